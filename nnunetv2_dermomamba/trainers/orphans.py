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
    nothing of the kind; spawned processes read a pipe from their parent and notice.
    """
    if not sys.platform.startswith("linux"):
        return
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask_for_signal() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    os.register_at_fork(after_in_child=ask_for_signal)
