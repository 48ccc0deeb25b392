"""``nnUNetv2_train -num_gpus 2`` as nnU-Net launches it, on the CPU: to the end, and with a process that fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import left
from workspace import DATASET, Workspace, preprocessed_workspace

pytestmark = [pytest.mark.faults, pytest.mark.xdist_group("pipeline")]
TRAINER = "nnUNetTrainerDermoMambaFails"
FAILS = """
import os, signal, time
from nnunetv2_dermomamba.trainers import nnUNetTrainerDermoMamba

class nnUNetTrainerDermoMambaFails(nnUNetTrainerDermoMamba):
    def __init__(self, plans, configuration, fold, dataset_json, device=None):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 4, 1

    def train_step(self, batch):
        open(f"images_of_{self.local_rank}", "w").write(str(len(batch["data"])))
        if self.local_rank == 1 and self.iteration == 1:
            how = os.environ.get("FAIL")
            open(f"{how}_at", "w").write(str(time.time()))
            if how == "raise":
                raise MemoryError("a GPU's memory is full")
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
        return super().train_step(batch)
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = preprocessed_workspace(tmp_path_factory.mktemp("distributed"), FAILS)
    file = workspace.folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["2d"]["batch_size"] = 3
    file.write_text(json.dumps(plans))
    return workspace


def train(workspace: Workspace, how: str, *options: str) -> tuple[int, str]:
    """Exit code and output of a training on two processes; none may be left."""
    command = [sys.executable, str(Path(__file__).with_name("ddp_on_cpu.py")), "118", "2d", "0", "-tr", TRAINER]
    environment = workspace.environment | {"FAIL": how, "OMP_NUM_THREADS": "1"}
    output = workspace.folder / f"{how}.log"
    with output.open("w") as log:
        process = subprocess.Popen(
            [*command, "-num_gpus", "2", *options],
            env=environment, cwd=workspace.folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=400)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            pytest.fail(f"hangs: {output.read_text()[-3000:]}")
    assert left(process.pid) == []
    return code, output.read_text()


def test_trains_to_the_end_and_validates(workspace: Workspace) -> None:
    code, output = train(workspace, "never")
    assert code == 0, output[-3000:]
    results = workspace.folder / "nnUNet_results" / DATASET / f"{TRAINER}__nnUNetPlans__2d" / "fold_0"
    assert (results / "checkpoint_final.pth").exists()
    assert len(json.loads((results / "validation" / "summary.json").read_text())["metric_per_case"]) == 2
    # not by the output, where both processes' lines may be mixed
    assert [(workspace.folder / f"images_of_{rank}").read_text() for rank in range(2)] == ["2", "1"]


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_all_end_within_a_minute_when_one_fails(workspace: Workspace, how: str) -> None:
    code, output = train(workspace, how)
    ended = time.time()
    assert code != 0
    assert ended - float((workspace.folder / f"{how}_at").read_text()) < 60
    assert ("a GPU's memory is full" if how == "raise" else "SIGKILL") in output


def test_one_process_that_is_told_to_stop_stops_both_and_c_goes_on(workspace: Workspace) -> None:
    code, output = train(workspace, "terminate")
    assert code != 0
    assert "Saved after iteration 2 of epoch 0" in output
    code, output = train(workspace, "never", "--c")
    assert code == 0, output[-3000:]
