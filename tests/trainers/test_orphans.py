"""What a training has forked does not outlive it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import living

import nnunetv2_dermomamba

FOLDER = Path(nnunetv2_dermomamba.__file__).parent / "trainers"  # the module alone: the others take long to import
SCRIPT = """
import multiprocessing, os, sys
what, method, folder = sys.argv[1:]
worker = multiprocessing.get_context(method).Process(target=os.system, args=("echo it works; sleep 60",), daemon=True)
if what == "protected":
    sys.path.insert(0, folder)
    import orphans
    orphans.end_forks_with_parent()
    worker.sent_along = orphans.EndsWithParent()
worker.start()
os.write(1, b"%d" % worker.pid + os.linesep.encode())  # at once: print may write the end of the line apart
worker.join()
"""


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone signals a parent's death")


@LINUX
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("what", ["protected", "stock"])
def test_worker_dies_with_its_parent(what: str, method: str) -> None:
    seconds = 20 if what == "protected" else 1
    command = [sys.executable, "-c", SCRIPT, what, method, str(FOLDER)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout is not None
    number, said = sorted(parent.stdout.readline() for _ in range(2))  # either may be first
    assert said == "it works\n"
    worker = int(number)
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        end = time.monotonic() + seconds
        while (stays := worker in living(parent.pid)) and time.monotonic() < end:  # its own child stays anyway
            time.sleep(0.1)
        assert stays == (what == "stock")
    finally:
        if living(parent.pid):
            os.killpg(parent.pid, signal.SIGKILL)


@LINUX
def test_a_copy_ends_with_nobody() -> None:
    script = """
import copy, ctypes, sys
sys.path.insert(0, sys.argv[1])
import orphans
copy.deepcopy(orphans.EndsWithParent())
set_to = ctypes.c_int(-1)
ctypes.CDLL(None).prctl(2, ctypes.byref(set_to))  # PR_GET_PDEATHSIG
print(set_to.value)
"""
    done = subprocess.run([sys.executable, "-c", script, str(FOLDER)], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
