import os
import resource
import subprocess
import sys

import pytest

from nnunetv2_dermomamba.files import remove_unfinished, whole_file, write_file


def test_a_file_is_whole_under_its_name(tmp_path):
    path = tmp_path / ("x" * 255)
    with whole_file(path) as temporary:
        temporary.write_bytes(b"part")
        assert temporary.parent == tmp_path
        assert not path.exists()
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("error", [OSError, RuntimeError, StopIteration, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("unfinished", [None, ".name.partial"])
def test_the_earlier_file_outlives_whatever_is_raised(tmp_path, error, unfinished):
    def write_a_part():
        with whole_file(path, unfinished) as temporary:
            temporary.write_bytes(b"part")
            raise error

    path = tmp_path / "name"
    write_file(path, b"earlier")
    with pytest.raises(error):
        write_a_part()
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["name"]


def test_the_earlier_file_outlives_a_full_disk(tmp_path):
    path = tmp_path / "name"
    write_file(path, b"earlier")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # Python ignores the signal, so writing fails
    try:
        with pytest.raises(OSError, match=r"[Tt]oo large: '.*/name'"):
            write_file(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["name"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_name_that_cannot_be_given_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(source, target):
        raise error("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(error, match="no"):
        write_file(tmp_path / "name", b"whole")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_file(tmp_path / "name", b"whole")
    finally:
        os.umask(before)
    assert (tmp_path / "name").stat().st_mode & 0o777 == mode


def test_writers_of_one_file_do_not_meet(tmp_path):
    with whole_file(tmp_path / "name") as one, whole_file(tmp_path / "name") as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert (tmp_path / "name").read_bytes() == b"one"


def test_what_a_kill_leaves_can_be_removed_or_is_overwritten(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from nnunetv2_dermomamba.files import whole_file
with whole_file(Path(sys.argv[1], "name"), *sys.argv[2:]) as temporary:
    temporary.write_bytes(b"part")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for unfinished in ([], [".name.partial"]):
        killed = subprocess.run([sys.executable, "-c", code, tmp_path, *unfinished], check=False)
        assert killed.returncode < 0
    assert len(os.listdir(tmp_path)) == 2
    remove_unfinished([tmp_path / "other", tmp_path / "folder" / "name"])
    assert len(os.listdir(tmp_path)) == 2
    remove_unfinished([tmp_path / "name"])
    assert os.listdir(tmp_path) == [".name.partial"]
    with whole_file(tmp_path / "name", ".name.partial") as temporary:
        temporary.write_bytes(b"whole")
    assert os.listdir(tmp_path) == ["name"]
