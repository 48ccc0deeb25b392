"""The Slurm script's own decisions, with stand-ins for Slurm and nnU-Net; ``test_slurm.py`` runs it on a cluster."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import ROOT

pytestmark = pytest.mark.skipif(shutil.which("bash") is None or sys.platform == "win32", reason="needs bash")


def submit(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code of the first task, and the commands that it gave."""
    log = folder / "commands.txt"
    for name in ("sbatch", "nnUNetv2_train"):
        stand_in = folder / name
        stand_in.write_text(f'#!/bin/bash\necho {name} "$@" >> "{log}"\n')
        stand_in.chmod(0o755)
    task = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_JOB_ID": "7"}
    environment = {**os.environ, **task, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    script = ROOT / "examples" / "slurm_five_folds.sh"
    code = subprocess.run(["bash", str(script), *arguments], env=environment, check=False).returncode
    return code, log.read_text() if log.exists() else ""


def test_the_last_job_gets_the_plans_of_the_trainings(tmp_path):
    code, commands = submit(tmp_path, "118", "nnUNetTrainerDermoMamba", "-p", "nnUNetPlans_small", "-device", "cpu")
    assert code == 0
    best, train = sorted(commands.splitlines(), reverse=True)
    assert best.endswith("nnUNetv2_find_best_configuration 118 -c 2d -tr nnUNetTrainerDermoMamba -p nnUNetPlans_small")
    assert train.endswith("-tr nnUNetTrainerDermoMamba --npz --c -p nnUNetPlans_small -device cpu")


def test_defaults(tmp_path):
    code, commands = submit(tmp_path, "118")
    assert code == 0
    assert "-tr nnUNetTrainerDermoMamba -p nnUNetPlans" in commands


def test_several_gpus_a_fold_are_refused(tmp_path):
    assert submit(tmp_path, "118", "nnUNetTrainerDermoMamba", "-num_gpus", "2") == (2, "")
