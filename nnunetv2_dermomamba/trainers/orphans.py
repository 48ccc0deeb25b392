"""Worker processes that end with the training, also when it is killed with a signal that it cannot hear."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@functools.cache
def end_forks_with_parent() -> None:
    """From now on, Linux kills what this process forks, nnU-Net's data loading workers for instance, when it dies.

    They would otherwise wait for ever for somebody to take their batches, and keep their memory. Other systems have
    nothing of the kind.
    """
    if sys.platform.startswith("linux"):
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        os.register_at_fork(after_in_child=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL))


class EndsWithParent:
    """Does the same for the spawned processes that get it: under several GPUs, nnU-Net's workers are spawned.

    Attach it to an object that is pickled for a worker, such as its data set: it acts when it is unpickled there.
    """

    def __reduce__(self) -> tuple:
        return _arrive, (os.getpid(),)


def _arrive(sender: int) -> EndsWithParent:
    if os.getppid() == sender and sys.platform.startswith("linux"):  # neither a copy nor from a file
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return EndsWithParent()
