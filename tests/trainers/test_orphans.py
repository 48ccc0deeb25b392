"""What a training has forked does not outlive it."""

import os
import signal
import subprocess
import sys
import time

import pytest

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


def alive(process: int) -> bool:
    """Whether a process exists and has not ended; an orphan's new parent may be slow to collect it."""
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone signals a parent's death")
@pytest.mark.parametrize("what", ["protected", "stock"])
def test_forked_worker_dies_with_its_parent(what: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT, what], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        end = time.monotonic() + (30 if what == "protected" else 1)
        while alive(worker) and time.monotonic() < end:
            time.sleep(0.05)
        assert alive(worker) == (what == "stock")
    finally:
        if alive(worker):
            os.kill(worker, signal.SIGKILL)
