"""The Slurm script on a real cluster of one node: five folds, one of them stopped and requeued, then the choice."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import slurm
from workspace import DATASET, ROOT, preprocessed_workspace

pytestmark = [
    pytest.mark.faults,
    pytest.mark.xdist_group("pipeline"),
    pytest.mark.skipif(slurm.missing() is not None, reason=f"Slurm: {slurm.missing()}"),
]
SCRIPT = ROOT / "examples" / "slurm_five_folds.sh"
TRAINER = "nnUNetTrainerDermoMambaWaits"
# Fold 0 waits in its second step of all until it is told to stop.
WAITS = """
import time
from pathlib import Path
from nnunetv2_dermomamba.trainers import nnUNetTrainerDermoMamba

class nnUNetTrainerDermoMambaWaits(nnUNetTrainerDermoMamba):
    def __init__(self, plans, configuration, fold, dataset_json, device=None):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

    def train_step(self, batch):
        if self.fold == 0 and self.iteration == 1 and not Path("waiting").exists():
            Path("waiting").touch()
            while self.stop_request.received is None:
                time.sleep(0.1)
            # It is saved after this step.
            self.num_iterations_per_epoch = 3
        return super().train_step(batch)
"""


def wait_for(condition, seconds: float, describe) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(1)


def batch_shell(task: int) -> int:
    """Process of a task's batch script."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:  # it ended, or is not ours
            continue
        if (
            any(word.endswith(b"slurm_script") for word in command)
            and f"SLURM_ARRAY_TASK_ID={task}".encode() in variables
        ):
            return int(folder.name)
    raise AssertionError(f"no batch script of task {task} is running")


def test_five_folds_one_requeued_then_the_best_configuration(tmp_path: Path) -> None:
    workspace = preprocessed_workspace(tmp_path, WAITS)
    with slurm.cluster() as environment:
        environment = environment | workspace.environment

        def run(*command: str) -> str:
            done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}: {done.stderr}\n{logs() if command[0] != 'squeue' else ''}"
            return done.stdout

        def logs() -> str:
            texts = [f"{file.name}:\n{file.read_text()[-3000:]}" for file in sorted(tmp_path.glob("dermomamba_*.log"))]
            return "\n".join([run("squeue"), *texts])

        options = ["--gres=none", "--cpus-per-task=1", "--time=20"]
        job = run("sbatch", "--parsable", *options, str(SCRIPT), "118", TRAINER, "-device", "cpu").strip()
        wait_for((tmp_path / "waiting").exists, 120, logs)
        os.kill(batch_shell(task=0), signal.SIGTERM)  # as Slurm does before the time limit (--signal=B:TERM)
        wait_for(lambda: "(BeginTime)" in run("squeue"), 120, logs)
        run("scontrol", "update", f"JobId={job}_0", "StartTime=now")  # Slurm has a requeued job wait two minutes
        wait_for(lambda: run("squeue", "--noheader") == "", 500, logs)

        first = (tmp_path / f"dermomamba_{job}_0.log").read_text()
        assert "Stopped by SIGTERM" in first
        assert first.count("Training done.") == 1
        assert "no checkpoint available to continue from" not in first.partition("Stopped by SIGTERM")[2]
        results = tmp_path / "nnUNet_results" / DATASET / f"{TRAINER}__nnUNetPlans__2d"
        for fold in range(5):
            assert (results / f"fold_{fold}" / "checkpoint_final.pth").exists(), logs()
        best = json.loads((results.parent / "inference_information.json").read_text())
        assert best["best_model_or_ensemble"]["selected_model_or_models"][0]["trainer"] == TRAINER
        assert len(list((results / "crossval_results_folds_0_1_2_3_4").glob("*.png"))) == 10
