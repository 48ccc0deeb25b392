"""The thread pool that the CPU's kernels share; they release the GIL."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """One pool per process (threads do not survive a fork) and thread count."""
    return ThreadPoolExecutor(threads, thread_name_prefix="dermomamba")


def run_shared(task: Callable[..., None], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Run the tasks on as many threads as PyTorch uses, this one among them; an error is raised here."""
    waiting = deque(arguments)

    def work() -> None:
        while True:
            try:
                argument = waiting.popleft()
            except IndexError:  # another thread took the last
                return
            task(*argument)

    threads = torch.get_num_threads()
    others = [_pool(threads, os.getpid()).submit(work) for _ in range(min(threads, len(waiting)) - 1)]
    try:
        work()
    finally:
        for other in others:
            other.result()
