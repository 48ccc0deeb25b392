"""What a training has forked does not outlive it."""

import os
import signal
import subprocess
import sys

import pytest
from processes import left

SCRIPT = """
import multiprocessing, os, sys
what, method = sys.argv[1:]
worker = multiprocessing.get_context(method).Process(target=os.system, args=("echo it works; sleep 60",), daemon=True)
if what == "protected":
    from nnunetv2_dermomamba.trainers.orphans import EndsWithParent, end_forks_with_parent
    end_forks_with_parent()
    worker.sent_along = EndsWithParent()
worker.start()
print(worker.pid, flush=True)
worker.join()
"""


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone signals a parent's death")


@LINUX
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("what", ["protected", "stock"])
def test_worker_dies_with_its_parent(what: str, method: str) -> None:
    command = [sys.executable, "-c", SCRIPT, what, method]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert parent.stdout.readline() == "it works\n"
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert (worker in left(parent.pid, 20 if what == "protected" else 1)) == (what == "stock")
    finally:
        if left(parent.pid, 0):
            os.killpg(parent.pid, signal.SIGKILL)


@LINUX
def test_a_copy_ends_with_nobody() -> None:
    script = """
import copy, ctypes
from nnunetv2_dermomamba.trainers.orphans import EndsWithParent
copy.deepcopy(EndsWithParent())
set_to = ctypes.c_int(-1)
ctypes.CDLL(None).prctl(2, ctypes.byref(set_to))  # PR_GET_PDEATHSIG
print(set_to.value)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
