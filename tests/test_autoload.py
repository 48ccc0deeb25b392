"""The start-up hook: nnU-Net finds the trainers, and Python always starts."""

import os
import subprocess
import sys
from pathlib import Path

import nnunetv2_dermomamba
from nnunetv2_dermomamba._autoload import TRAINER_DIRECTORY, register

NAMES = [
    "nnUNetTrainerDermoMamba",
    "nnUNetTrainerDermoMambaDiceCE",
    "nnUNetTrainerDermoMamba_5epochs",
    "nnUNetTrainerDermoMamba_50epochs",
    "nnUNetTrainerDermoMamba_demo",
    "nnUNetTrainerGuideFusionLoss",
]


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
