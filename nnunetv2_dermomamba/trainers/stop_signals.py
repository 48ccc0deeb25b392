"""SIGTERM and SIGINT: what a cluster sends before it kills, and Ctrl-C."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType

STOPPED = 75
"""Exit code of a run that was stopped and that ``--c`` continues: EX_TEMPFAIL of sysexits.h, "try again"."""
INTERRUPTED = 130
"""Exit code after a second SIGINT: 128 + SIGINT, as shells report it."""
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has the latter only, and it kills there
WORKER_GRACE = 60  # seconds in which a worker process outlives the SIGTERM that its group got


class StopRequest:
    """Remembers that SIGTERM or SIGINT came, between `install` and `restore`.

    A second SIGINT ends the process at once. Processes forked meanwhile, such as nnU-Net's workers, leave the decision
    to this one: a cluster and Ctrl-C signal the whole group, and a batch that never comes would keep this process from
    finishing its step.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.process = os.getpid()
        self.previous: dict[signal.Signals, object] = {}

    def install(self) -> None:
        """Take over from the current handlers; a signal that is ignored, as in a shell's background job, stays so."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python hears signals in its main thread only
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            if number == signal.SIGTERM:
                signal.alarm(WORKER_GRACE)  # whoever terminates a stuck worker still gets rid of it
            return
        if number == signal.SIGINT and self.received == signal.SIGINT:
            leave_at_once(INTERRUPTED, "Interrupted twice: stopped at once, without saving.")
        if self.received is None:
            self.received = signal.Signals(number)


def leave_at_once(code: int, message: str) -> None:
    """End this process and its children now, with one line instead of a stack trace from each.

    Nothing is waited for: a pool's own clean-up can block for ever when its workers were killed by the same signal.
    """
    children = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    with contextlib.suppress(RuntimeError):  # a handler may have interrupted the main thread's own writing
        sys.stdout.flush()
    os.write(2, f"{message}\n".encode())
    sys.setswitchinterval(60)  # no other thread runs from here on: a pool's would replace the workers that die
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, KILL)
    os._exit(code)


@contextlib.contextmanager
def stopping_at_once(message: str) -> Iterator[None]:
    """Inside, SIGTERM and SIGINT end the process with the code `STOPPED`, whatever it computes or waits for.

    A thread does that, since the main thread hears signals between two Python instructions only, and those may be
    minutes apart. Child processes get no SIGINT: they inherit the main thread's block.
    """
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, lambda *_: None) for number in heard}  # a handler, so that they are heard
    wakeup = signal.set_wakeup_fd(writing)

    def watch() -> None:
        if os.read(reading, 1):
            leave_at_once(STOPPED, message)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    resource_tracker.ensure_running()  # or the first pool would start it, and in doing so unblock SIGINT (Python's own)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)
        watcher.join()
        os.close(reading)
