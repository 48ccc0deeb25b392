"""Stock nnUNetv2_train, killed, told to stop while it trains and while it validates, and continued with --c."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from test_pipeline import DATASET, Workspace
from test_pipeline import workspace as workspace

pytestmark = [pytest.mark.faults, pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]
TRAINER = """
from nnunetv2_dermomamba.trainers import nnUNetTrainerDermoMamba, safe_checkpoints

safe_checkpoints.SAVE_INTERVAL, safe_checkpoints.SAVE_SHARE = 0, 1e9  # at every step

class nnUNetTrainerDermoMambaShort(nnUNetTrainerDermoMamba):
    def __init__(self, plans, configuration, fold, dataset_json, device=None):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 3, 8, 2
"""
COMMAND = ["nnUNetv2_train", "118", "2d", "0", "-tr", "nnUNetTrainerDermoMambaShort", "-device", "cpu"]


class Training:
    """The command in a process group of its own, as a terminal and a cluster make it, until a text in its output."""

    def __init__(self, workspace: Workspace, name: str, *options: str) -> None:
        self.results = workspace.folder / name
        self.output = workspace.folder / "output.txt"
        environment = {"nnUNet_results": str(self.results), "nnUNet_n_proc_DA": "0", "DERMOMAMBA_SEED": "3"}
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [*COMMAND, *options],
                env={**workspace.environment, **environment, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def fold(self) -> Path:
        return self.results / DATASET / "nnUNetTrainerDermoMambaShort__nnUNetPlans__2d" / "fold_0"

    def signal_at(self, text: str, number: int, then: float = 0.0) -> tuple[int, str]:
        """Exit code and output of the run, signalled some seconds after it printed a text."""
        end = time.monotonic() + 200
        while text not in self.output.read_text():
            assert self.process.poll() is None, self.output.read_text()[-3000:]
            assert time.monotonic() < end, self.output.read_text()[-3000:]
            time.sleep(0.05)
        time.sleep(then)
        os.killpg(self.process.pid, number)
        return self.process.wait(60), self.output.read_text()

    def finish(self) -> dict[str, torch.Tensor]:
        """The weights at the end of the run."""
        assert self.process.wait(300) == 0, self.output.read_text()[-3000:]
        return torch.load(self.fold() / "checkpoint_final.pth", weights_only=False)["network_weights"]


def test_killed_and_stopped_it_ends_as_if_it_had_not_been(workspace: Workspace) -> None:
    (workspace.folder / "trainers" / "short.py").write_text(TRAINER)
    code, _ = Training(workspace, "interrupted").signal_at("Epoch 1", signal.SIGKILL, then=1)
    assert code == -signal.SIGKILL

    code, output = Training(workspace, "interrupted", "--c").signal_at("Epoch 2", signal.SIGTERM, then=1)
    assert code == 75, output[-3000:]
    assert "Epoch 0" not in output
    assert "Stopped by SIGTERM. Saved after iteration" in output
    assert "Traceback" not in output

    code, output = Training(workspace, "interrupted", "--c").signal_at("predicting ", signal.SIGINT)
    assert code == 75, output[-3000:]
    assert "Validation stopped; --c runs it again" in output
    assert "Traceback" not in output

    last = Training(workspace, "interrupted", "--c")
    weights = last.finish()
    assert "Epoch" not in last.output.read_text().split("Training done")[0].split("Using device")[1]
    summary = json.loads((last.fold() / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2

    straight = Training(workspace, "straight").finish()
    assert weights.keys() == straight.keys()
    assert all(torch.equal(weights[name], straight[name]) for name in weights)
