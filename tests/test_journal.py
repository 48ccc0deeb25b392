import os

from nnunetv2_dermomamba.journal import Journal, fingerprint, read_journal

SETTINGS = {"shape": [192, 256]}
ONE, TWO, THREE = ({"name": name, "rows": []} for name in ("one", "two", "three"))


def test_what_was_added_is_read_by_the_next_run(tmp_path):
    path = tmp_path / "journal.jsonl"
    assert read_journal(path) is None
    journal = Journal(path, SETTINGS, {"one": ONE})
    journal.add(TWO)
    assert read_journal(path) == (SETTINGS, {"one": ONE, "two": TWO})  # before it is closed, too
    journal.add({**TWO, "rows": [1]})
    journal.close()
    assert read_journal(path) == (SETTINGS, {"one": ONE, "two": {**TWO, "rows": [1]}})
    assert os.listdir(tmp_path) == ["journal.jsonl"]


def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, SETTINGS, {})
    journal.add(ONE)
    journal.add(TWO)
    journal.close()
    path.write_bytes(path.read_bytes()[:-5])
    assert read_journal(path) == (SETTINGS, {"one": ONE})
    journal = Journal(path, SETTINGS, read_journal(path)[1])
    journal.add(THREE)
    journal.close()
    assert read_journal(path) == (SETTINGS, {"one": ONE, "three": THREE})


def test_lines_that_are_no_entries_are_passed_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, SETTINGS, {"one": ONE})
    journal.close()
    path.write_bytes(path.read_bytes() + b'[1]\nnull\n"name"\n\xff\xfe\n')
    assert read_journal(path) == (SETTINGS, {"one": ONE})


def test_an_empty_journal_is_none(tmp_path):
    (tmp_path / "journal.jsonl").touch()
    assert read_journal(tmp_path / "journal.jsonl") is None


def test_a_fingerprint_tells_files_and_changes_apart(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("a")
    other.write_text("a")
    os.utime(path, ns=(1, 1))
    os.utime(other, ns=(1, 1))
    before = fingerprint(path)
    assert before == fingerprint(tmp_path / "." / "a")
    assert before != fingerprint(other)
    os.utime(path, ns=(1, 2))
    assert before != fingerprint(path)
