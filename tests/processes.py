"""Processes of a group, such as what a command has started that ran with ``start_new_session=True``."""

import subprocess
import time


def living(group: int) -> list[int]:
    """Those that have not ended; an orphan's new parent may be slow to collect it, or never do."""
    command = ["ps", "-A", "-o", "pgid=,pid=,stat="]
    listed = [line.split() for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines()]
    return [int(process) for of, process, state in listed if int(of) == group and state[0] != "Z"]


def left(group: int, seconds: float = 20) -> list[int]:
    """Those that have not ended after a while: on a busy machine even killed processes take their time."""
    end = time.monotonic() + seconds
    while (processes := living(group)) and time.monotonic() < end:
        time.sleep(0.1)
    return processes
