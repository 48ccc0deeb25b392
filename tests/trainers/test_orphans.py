"""What a training has forked does not outlive it."""

import os
import signal
import subprocess
import sys

import pytest
from processes import left

SCRIPT = """
import multiprocessing, sys, time
if sys.argv[1] == "protected":
    from nnunetv2_dermomamba.trainers.orphans import end_forks_with_parent
    end_forks_with_parent()
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
worker.start()
print(worker.pid, flush=True)
worker.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone signals a parent's death")
@pytest.mark.parametrize("what", ["protected", "stock"])
def test_forked_worker_dies_with_its_parent(what: str) -> None:
    command = [sys.executable, "-c", SCRIPT, what]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert left(parent.pid, 20 if what == "protected" else 1) == ([worker] if what == "stock" else [])
    finally:
        if left(parent.pid, 0):
            os.killpg(parent.pid, signal.SIGKILL)
