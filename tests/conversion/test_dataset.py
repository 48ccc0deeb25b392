import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

from nnunetv2_dermomamba.conversion import case, dataset
from nnunetv2_dermomamba.conversion.errors import ConversionError
from nnunetv2_dermomamba.conversion.isic2018 import DESCRIPTION, find_isic2018, main
from nnunetv2_dermomamba.folder_lock import locked

NAME = "Dataset118_ISIC2018"
LOCK = f".{NAME}.lock"


@pytest.fixture
def raw(nnunet):
    return nnunet / "nnUNet_raw"


def convert(isic, *options, workers=1):
    return main(["--source", str(isic.root), "--size", "24x32", "--workers", str(workers), *options])


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def make_bad(isic):
    """Eight kinds of bad cases; returns what the message must say of each."""
    isic.add(*(f"bad{number}" for number in range(1, 8)))
    image, mask = zip(*(isic.files(f"bad{number}") for number in range(1, 8)), strict=True)
    image[0].write_bytes(image[0].read_bytes()[:700])
    mask[1].unlink()
    image[2].unlink()
    Image.open(mask[3]).resize((50, 50)).save(mask[3])
    Image.new("L", (96, 72)).save(mask[4])
    Image.linear_gradient("L").resize((96, 72)).save(mask[5])
    Image.open(image[6]).save(image[6].with_suffix(".png"))
    return {
        "bad1": "truncated",
        "bad2": "without mask",
        "bad3": "without image",
        "bad4": "sizes differ",
        "bad5": "no lesion",
        "bad6": "grey values",
        "bad7": "more than once",
    }


def test_all_bad_cases_are_listed_together(isic, raw, capsys):
    isic.add("good")
    expected = make_bad(isic)
    assert convert(isic) == 1
    message = capsys.readouterr().err
    assert "7 bad cases" in message
    for bad, reason in expected.items():
        line = next(line for line in message.splitlines() if line.startswith(f"  '{bad}'"))
        assert reason in line
        assert str(isic.root) in line
    assert "good" not in message
    assert not (raw / NAME).exists()


def test_skip_bad_lists_them_in_a_file(isic, raw, capsys):
    isic.add("good")
    expected = make_bad(isic)
    assert convert(isic, "--skip-bad") == 0
    lines = (raw / NAME / "skipped_cases.txt").read_text().splitlines()
    assert [(line.split("'")[1], reason in line) for line, reason in zip(lines, expected.values(), strict=True)] == [
        (bad, True) for bad in expected
    ]
    assert os.listdir(raw / NAME / "imagesTr") == ["good_0000.png"]
    assert json.loads((raw / NAME / "dataset.json").read_text())["numTraining"] == 1
    printed = capsys.readouterr().out
    assert "Left out as bad: 7" in printed
    assert "2d all" in printed  # one case has no folds


def test_nothing_good_left(isic, raw, capsys):
    make_bad(isic)
    assert convert(isic, "--skip-bad") == 1
    assert "no training case" in capsys.readouterr().err
    assert not (raw / NAME).exists()


def test_mending_the_source_reconverts_only_what_changed(isic, raw, monkeypatch):
    isic.add("a", "b", "c", "d")
    image = isic.files("b")[0]
    whole = image.read_bytes()
    image.write_bytes(b"")
    assert convert(isic) == 1
    image.write_bytes(whole)
    os.utime(isic.files("d")[1], (1, 1))  # written again meanwhile
    isic.files("c")[0].unlink()
    isic.files("c")[1].unlink()
    converted = []
    real = dataset.convert_case
    monkeypatch.setattr(dataset, "convert_case", lambda one, *rest: converted.append(one.case_id) or real(one, *rest))
    assert convert(isic) == 0
    assert converted == ["b", "d"]
    assert sorted(os.listdir(raw / NAME / "labelsTr")) == ["a.png", "b.png", "d.png"]
    assert sorted(os.listdir(raw)) == [LOCK, NAME]


def test_another_size_starts_again(isic, raw):
    isic.add("a", "b")
    isic.files("b")[0].write_bytes(b"")
    assert convert(isic) == 1
    assert convert(isic, "--size", "12x16", "--skip-bad") == 0
    assert Image.open(raw / NAME / "imagesTr" / "a_0000.png").size == (16, 12)


def test_existing_data_set_is_kept_unless_overwrite_succeeds(isic, raw, capsys):
    isic.add("a")
    assert convert(isic) == 0
    before = contents(raw / NAME)
    assert convert(isic, "--size", "12x16") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert contents(raw / NAME) == before
    assert sorted(os.listdir(raw)) == [LOCK, NAME]
    isic.add("b")
    mask = isic.files("b")[1]
    mask.rename(mask.with_name("z_segmentation.png"))
    assert convert(isic, "--overwrite") == 1
    assert contents(raw / NAME) == before
    mask.with_name("z_segmentation.png").rename(mask)
    assert convert(isic, "--overwrite") == 0
    assert sorted(os.listdir(raw / NAME / "labelsTr")) == ["a.png", "b.png"]
    assert sorted(os.listdir(raw)) == [LOCK, NAME]


def test_a_linked_data_set_folder_is_replaced_not_followed(isic, raw, tmp_path):
    isic.add("a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    raw.mkdir()
    (raw / NAME).symlink_to(tmp_path / "elsewhere")
    assert convert(isic) == 1
    assert convert(isic, "--overwrite") == 0
    assert not (raw / NAME).is_symlink()
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_a_source_in_the_data_sets_own_folder_is_not_removed(isic, raw, capsys):
    isic.root = raw / NAME
    isic.add("a")
    before = contents(raw / NAME)
    for options in ((), ("--overwrite",)):
        assert convert(isic, *options) == 1
        assert "move the source elsewhere" in capsys.readouterr().err
        assert contents(raw / NAME) == before


def test_half_of_a_replaced_data_set_is_not_put_back(isic, raw, monkeypatch):
    isic.add("a")
    assert convert(isic) == 0

    def kill(folder):
        (folder / "dataset.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset.shutil, "rmtree", lambda folder: kill(folder) if ".re" in folder.name else None)
        with pytest.raises(KeyboardInterrupt):
            dataset._drop((raw / NAME).rename(raw / f".{NAME}.replaced"))
    assert convert(isic) == 0
    assert (raw / NAME / "dataset.json").exists()
    assert sorted(os.listdir(raw)) == [LOCK, NAME]


def test_a_kill_between_the_two_renames_is_mended(isic, raw):
    isic.add("a")
    assert convert(isic) == 0
    before = contents(raw / NAME)
    (raw / NAME).rename(raw / f".{NAME}.replaced")
    assert convert(isic) == 1
    assert contents(raw / NAME) == before


def test_a_taken_number_is_refused(isic, raw, capsys):
    isic.add("a")
    (raw / "Dataset118_Other").mkdir(parents=True)
    assert convert(isic) == 1
    assert "Dataset118_Other" in capsys.readouterr().err
    assert convert(isic, "--dataset-id", "7") == 0
    assert (raw / "Dataset007_ISIC2018").is_dir()


def test_nnunet_raw_unset(isic, nnunet, monkeypatch, capsys):
    isic.add("a")
    monkeypatch.delenv("nnUNet_raw")
    assert convert(isic) == 1
    assert "export nnUNet_raw" in capsys.readouterr().err


def test_no_write_permission(isic, nnunet, monkeypatch, capsys):
    isic.add("a")
    for folder in ("/proc/nnUNet_raw", isic.files("a")[0]):
        monkeypatch.setenv("nnUNet_raw", str(folder))
        assert convert(isic) == 1
        assert str(folder) in capsys.readouterr().err


def test_two_conversions_at_once(isic, raw, capsys):
    isic.add("a")
    assert convert(isic) == 0
    (raw / NAME).rename(raw / f".{NAME}.replaced")  # as it is for a moment while the other one publishes
    with locked(raw / LOCK, AssertionError()):
        assert convert(isic, "--overwrite") == 1
    assert "another conversion" in capsys.readouterr().err
    assert sorted(os.listdir(raw)) == [LOCK, f".{NAME}.replaced"]
    assert convert(isic, "--overwrite") == 0


def test_a_data_set_that_another_conversion_publishes_meanwhile_is_kept(isic, raw, monkeypatch, capsys):
    isic.add("a")

    def locked_behind_another(*arguments):
        patch.undo()
        assert convert(isic) == 0
        published.append(contents(raw / NAME))
        return locked(*arguments)

    published = []
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "locked", locked_behind_another)
        assert convert(isic, "--size", "12x16") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert published == [contents(raw / NAME)]


def test_a_full_disk_leaves_no_half_file(isic, raw, capsys):
    isic.add("a", "b")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # a write beyond it is cut short, then fails
    try:
        assert convert(isic, "--size", "96x128") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "run again to go on" in capsys.readouterr().err
    assert not (raw / NAME).exists()
    for file in raw.rglob("*.png"):
        Image.open(file).load()
    assert not list(raw.rglob("*writing*"))
    assert convert(isic) == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("step", ["_write_json", "write_png", "sync"])
def test_a_write_that_fails_at_any_step(isic, raw, capsys, monkeypatch, number, step):
    isic.add("a", "b", "c")
    assert convert(isic, "--size", "12x16") == 0
    before = contents(raw / NAME)
    calls = []

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2 or step == "sync":
            raise OSError(number, os.strerror(number), "some file")
        real(*arguments)

    with monkeypatch.context() as patch:
        module = {"_write_json": dataset, "write_png": case, "sync": os}[step]
        real = getattr(module, step)
        patch.setattr(module, step, fail_at_the_second)
        assert convert(isic, "--overwrite") == 1
    assert os.strerror(number) in capsys.readouterr().err
    assert contents(raw / NAME) == before
    assert convert(isic, "--overwrite") == 0
    assert Image.open(raw / NAME / "imagesTr" / "c_0000.png").size == (32, 24)
    assert sorted(os.listdir(raw)) == [LOCK, NAME]


def test_says_once_how_many_images_were_stretched(isic, raw, capsys):
    isic.add("same", "also")
    isic.add("nearly", shape=(72, 100))  # 4 % wider
    assert convert(isic, workers=2) == 0
    assert "aspect ratio" not in capsys.readouterr().out
    isic.add("square", shape=(80, 80))
    isic.add("upright", shape=(96, 72), subset="test")
    assert convert(isic, "--overwrite", workers=2) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "aspect ratio" in line]
    assert len(lines) == 1
    assert lines[0].startswith("2 of 5 images")
    assert convert(isic, "--overwrite", "--size", "native") == 0
    assert "aspect ratio" not in capsys.readouterr().out


def test_what_must_precede_publication_can_stop_it(isic, raw):
    isic.add("a")

    def refuse(training_cases):
        assert training_cases == ["a"]
        raise ConversionError("no")

    with pytest.raises(ConversionError, match="no"):
        dataset.convert_dataset(
            find_isic2018(isic.root), DESCRIPTION, raw / NAME, dataset.Options((24, 32), workers=1), refuse
        )
    assert not (raw / NAME).exists()
    assert convert(isic) == 0


def test_the_data_set_appears_whole(isic, raw):
    """By a rename: a copy would be there in part for a while."""
    isic.add("a")
    built = []

    def note(training_cases):
        built.append((raw / f".{NAME}.partial" / "dataset").stat().st_ino)

    options = dataset.Options((24, 32), workers=1)
    dataset.convert_dataset(find_isic2018(isic.root), DESCRIPTION, raw / NAME, options, note)
    assert [(raw / NAME).stat().st_ino] == built


@pytest.mark.parametrize("name", ["with  space", "two\nlines", "黒子-ﻥ-é", "x" * 230, "a'b\"$(c)*?", "-v", "a.b..c"])
def test_weird_names(isic, raw, name):
    isic.add(name)
    assert convert(isic) == 0
    assert os.listdir(raw / NAME / "imagesTr") == [f"{name}_0000.png"]
    assert os.listdir(raw / NAME / "labelsTr") == [f"{name}.png"]


def test_a_name_that_is_no_text(isic, raw, capsys):
    isic.add("a")
    for file, copy in zip(isic.files("a"), isic.files("\udcff"), strict=True):
        copy.write_bytes(file.read_bytes())
    assert convert(isic) == 1
    assert "not valid Unicode" in capsys.readouterr().err
    assert convert(isic, "--skip-bad") == 0
    assert "Unicode" in (raw / NAME / "skipped_cases.txt").read_text()


def test_links_are_followed_and_broken_ones_named(isic, raw, tmp_path, capsys):
    isic.add("a", "b")
    image = isic.files("a")[0]
    image.rename(tmp_path / "real.jpg")
    image.symlink_to(tmp_path / "real.jpg")
    broken = isic.files("b")[0]
    broken.unlink()
    broken.symlink_to("nowhere")
    assert convert(isic) == 1
    message = capsys.readouterr().err
    assert str(broken) in message
    assert "No such file" in message
    assert convert(isic, "--skip-bad") == 0


@pytest.mark.parametrize(
    "options", [["--size", "192"], ["--size", "0x5"], ["--workers", "0"], ["--dataset-id", "1000"]]
)
def test_wrong_command_line(options, capsys):
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_help_suffices(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("source", "dataset-id", "size", "workers", "overwrite", "skip-bad", "download", "paper-split"):
        assert f"--{option}" in text


def run_in_process(isic, *options, **popen):
    command = [sys.executable, "-m", "nnunetv2_dermomamba.conversion.isic2018", "--source", str(isic.root)]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


def descendants(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [int(child) for child in found]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def enlarge(isic, count, shape=(600, 800)):
    rng = np.random.default_rng(1)
    for number in range(count):
        image, mask = (file for file in isic.files(f"ISIC_{number:07d}"))
        for file in (image, mask):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(image)
        lesion = np.zeros(shape, np.uint8)
        lesion[100:300, 100 : 200 + number] = 255
        Image.fromarray(lesion).save(mask)


def test_workers_give_what_one_process_gives(isic, raw):
    isic.add(*"abcdef")
    assert convert(isic) == 0
    expected = contents(raw / NAME)
    assert convert(isic, "--overwrite", workers=2) == 0
    assert contents(raw / NAME) == expected


def test_the_conversion_imports_no_torch():
    code = "import sys, nnunetv2_dermomamba.conversion.isic2018; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_killed_and_run_again(isic, raw):
    enlarge(isic, 60)
    assert main(["--source", str(isic.root), "--workers", "1"]) == 0
    expected = contents(raw / NAME)
    (raw / NAME).rename(raw / "expected")
    process = run_in_process(isic, "--workers", "2", "--size", "192x256")
    partial = raw / f".{NAME}.partial"
    wait_for(lambda: len(list(partial.rglob("labelsTr/*.png"))) >= 10)
    workers = descendants(process.pid)
    assert workers
    process.kill()
    process.wait()
    assert not (raw / NAME).exists()
    wait_for(lambda: not any(alive(worker) for worker in workers))
    assert run_in_process(isic, "--workers", "2").wait() == 0
    assert contents(raw / NAME) == expected
    assert sorted(os.listdir(raw)) == [LOCK, NAME, "expected"]


def test_interrupted(isic, raw):
    enlarge(isic, 200)
    # A shell starts background jobs, such as a CI run, with interrupts ignored, and children inherit that.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = run_in_process(isic, "--workers", "2", start_new_session=True, **heeding)
    partial = raw / f".{NAME}.partial"
    wait_for(lambda: len(list(partial.rglob("labelsTr/*.png"))) >= 40)  # by then both workers have started
    os.killpg(process.pid, signal.SIGINT)
    _, message = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "run again to go on" in message
    assert "Traceback" not in message
    assert not (raw / NAME).exists()
    assert run_in_process(isic).wait() == 0


def test_workers_leave_interrupts_to_the_parent():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=dataset._initialise_worker) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_moment_of_overwriting(isic, raw, seed):
    enlarge(isic, 25)
    assert main(["--source", str(isic.root), "--workers", "1", "--size", "24x32"]) == 0
    old = contents(raw / NAME)
    process = run_in_process(isic, "--workers", "1", "--overwrite")
    time.sleep(np.random.default_rng(seed).uniform(0.2, 1.5))
    process.kill()
    process.wait()
    code = run_in_process(isic, "--workers", "1").wait()  # without --overwrite: must put right, and change nothing
    assert code == 1
    now = contents(raw / NAME)
    assert now == old or json.loads(now["dataset.json"])["dermomamba_conversion"]["size"] == [192, 256]
    assert len(now) == len(old)
    assert run_in_process(isic, "--workers", "1", "--overwrite").wait() == 0
    assert sorted(os.listdir(raw)) == [LOCK, NAME]
