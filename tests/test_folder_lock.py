import errno
import os
import signal
import subprocess
import sys

import pytest

from nnunetv2_dermomamba import folder_lock
from nnunetv2_dermomamba.folder_lock import locked


def test_a_folder_is_one_process_at_a_time(tmp_path):
    with (
        locked(tmp_path, AssertionError()),
        pytest.raises(ValueError, match="taken"),
        locked(tmp_path, ValueError("taken")),
    ):
        pass
    with locked(tmp_path, AssertionError()):
        assert not os.listdir(tmp_path)


def test_a_killed_process_leaves_no_lock(tmp_path):
    program = "import sys, time, pathlib; from nnunetv2_dermomamba.folder_lock import locked\n"
    program += "with locked(pathlib.Path(sys.argv[1]), ValueError()): print(flush=True), time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="taken"), locked(tmp_path, ValueError("taken")):
            pass
        process.send_signal(signal.SIGKILL)
    with locked(tmp_path, AssertionError()):
        pass


def test_a_file_system_without_locks_is_worked_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    with locked(tmp_path, AssertionError()):
        pass
