"""The start-up hook: nnU-Net finds the trainers, and Python always starts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nnunetv2_dermomamba
from nnunetv2_dermomamba import trainers
from nnunetv2_dermomamba._autoload import TRAINER_DIRECTORY, register
from nnunetv2_dermomamba.nnunet_ext import dermomamba_trainers

ROOT = Path(__file__).resolve().parents[1]
NAMES = list(trainers.__all__)


def python(code: str, *flags: str, **environment: str) -> str:
    variables = {key: value for key, value in os.environ.items() if key != "nnUNet_extTrainer"} | environment
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    assert done.stderr == ""
    return done.stdout.strip()


def test_directory_holds_the_trainers_and_nothing_else() -> None:
    assert [path.name for path in Path(TRAINER_DIRECTORY).glob("*.py")] == ["dermomamba_trainers.py"]


def test_every_interpreter_finds_the_directory_and_loads_no_torch() -> None:
    code = "import os, sys; print(os.environ['nnUNet_extTrainer'], 'torch' in sys.modules)"
    assert python(code) == f"{TRAINER_DIRECTORY} False"
    assert python(code, "-I") == f"{TRAINER_DIRECTORY} False"


def test_users_own_setting_stays_first() -> None:
    printed = python("import os; print(os.environ['nnUNet_extTrainer'])", nnUNet_extTrainer="/mine")
    assert printed == f"/mine{os.pathsep}{TRAINER_DIRECTORY}"


def test_registering_twice_changes_nothing() -> None:
    environment = {"nnUNet_extTrainer": "/mine"}
    register(environment)
    once = dict(environment)
    register(environment)
    assert environment == once


def test_stock_nnunet_finds_every_trainer() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        f"print([find(name).__name__ for name in {NAMES}] == {NAMES})\n"
        "print(find('nnUNetTrainer').__module__)\n"
    )
    lines = python(code).splitlines()
    assert lines[-2:] == ["True", "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"]


def test_package_import_is_light() -> None:
    code = "import nnunetv2_dermomamba, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert python(code) == "False False"
    assert nnunetv2_dermomamba.__version__


def test_reexport_names_every_trainer() -> None:
    assert list(dermomamba_trainers.TRAINERS) == NAMES


# What an interrupted installation, a full disk or another package may leave of ours.
REMAINS = {
    "nothing": {},
    "an empty folder": {"nnunetv2_dermomamba/__init__.py": ""},
    "half a file": {"nnunetv2_dermomamba/__init__.py": "", "nnunetv2_dermomamba/_autoload.py": "def register(environ"},
    "a file of zeros": {"nnunetv2_dermomamba/__init__.py": "\0" * 100},
    "an error": {"nnunetv2_dermomamba/__init__.py": "raise RuntimeError"},
    "a file in its place": {"nnunetv2_dermomamba": "text"},
}


@pytest.mark.parametrize("remains", REMAINS.values(), ids=REMAINS.keys())
def test_python_starts_silently_with_what_is_left_of_the_package(tmp_path: Path, remains: dict[str, str]) -> None:
    for name, content in remains.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    shutil.copy(ROOT / "nnunetv2_dermomamba.pth", tmp_path)
    # A site folder of its own, without those of this environment.
    printed = python(f"import site; site.addsitedir({str(tmp_path)!r}); print('started')", "-I", "-S")
    assert printed == "started"


NNUNETS = {
    "absent": None,
    "broken": "raise RuntimeError('broken')",
    "half": "from nnunetv2.paths import nothing",
    "old": "__version__ = '2.0'",
}


@pytest.mark.parametrize("content", NNUNETS.values(), ids=NNUNETS.keys())
def test_python_starts_silently_whatever_nnunet_is_there(tmp_path: Path, content: str | None) -> None:
    """The hook is run as at start-up, in a site folder without other packages."""
    shutil.copy(ROOT / "nnunetv2_dermomamba.pth", tmp_path)
    shutil.copytree(Path(nnunetv2_dermomamba.__file__).parent, tmp_path / "nnunetv2_dermomamba")
    if content is not None:
        (tmp_path / "nnunetv2").mkdir()
        (tmp_path / "nnunetv2" / "__init__.py").write_text(content)
    code = f"import os, site; site.addsitedir({str(tmp_path)!r}); print(os.environ['nnUNet_extTrainer'])"
    assert python(code, "-I", "-S") == str(tmp_path / "nnunetv2_dermomamba" / "nnunet_ext")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_python_starts_silently_without_write_access(tmp_path: Path) -> None:
    package = tmp_path / "nnunetv2_dermomamba"
    shutil.copytree(Path(nnunetv2_dermomamba.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "nnunetv2_dermomamba.pth", tmp_path)
    for folder in (package / "nnunet_ext", package, tmp_path):
        folder.chmod(0o555)
    code = f"import os, site; site.addsitedir({str(tmp_path)!r}); print('nnUNet_extTrainer' in os.environ)"
    nobody = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    if nobody:  # root writes everywhere; pytest's folders are closed to others
        for folder in tmp_path.parents[:-1]:
            if folder.stat().st_mode & 0o001 == 0:
                folder.chmod(folder.stat().st_mode | 0o011)
    base = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    done = subprocess.run([base, "-I", "-S", "-c", code], capture_output=True, text=True, check=True, **nobody)
    assert (done.stdout.strip(), done.stderr) == ("True", "")
    assert not (package / "__pycache__").exists()


def test_the_environment_is_left_alone_where_it_cannot_be_changed() -> None:
    code = (
        "import os, sys\n"
        "class Closed(dict):\n"
        "    def __setitem__(self, name, value): raise OSError\n"
        "os.environ = Closed()\n"
        "sys.modules.pop('nnunetv2_dermomamba._autoload', None)\n"
        "import nnunetv2_dermomamba._autoload\n"
        "print('started')"
    )
    assert python(code) == "started"


def test_subprocesses_have_it_once() -> None:
    inner = "import os; print(os.environ['nnUNet_extTrainer'])"
    code = f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {inner!r}], text=True))"
    assert python(code) == TRAINER_DIRECTORY
    assert python(code, nnUNet_extTrainer="/mine") == f"/mine{os.pathsep}{TRAINER_DIRECTORY}"


def test_other_trainers_are_found_though_ours_are_broken(tmp_path: Path) -> None:
    """A user's own folder, even behind ours; nnU-Net's trainers; and the error for a name that nobody has."""
    (tmp_path / "mine.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerMine(nnUNetTrainer): pass\n"
    )
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "sys.modules['nnunetv2_dermomamba.trainers'] = None\n"
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "print([find(name).__name__ for name in ('nnUNetTrainerMine', 'nnUNetTrainerNoMirroring')])\n"
        "for name in ('nnUNetTrainerUnheardOf', 'nnUNetTrainerDermoMamba'):\n"
        "    try:\n"
        "        find(name)\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__)\n"
    )
    for entries in ((TRAINER_DIRECTORY, str(tmp_path)), (str(tmp_path),)):
        printed = python(code, nnUNet_extTrainer=os.pathsep.join(entries))
        lines = [line for line in printed.splitlines() if line.startswith("[") or line.endswith("Error")]
        assert lines[0] == "['nnUNetTrainerMine', 'nnUNetTrainerNoMirroring']"
        assert lines[1:] == ["RuntimeError", "ModuleNotFoundError"]
