"""Two processes train as one: losses, gradients, BatchNorm's statistics, and weights after twenty steps."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from preprocessed_dataset import PATCH_SIZE
from tolerances import FORWARD, GRADIENT, relative_error

DTYPE = torch.float64  # so that gradients that are zero but for rounding stay negligible
SUMMED = torch.float32  # in which the scan sums its parameters' gradients over the images, and the log keeps losses
BATCH = 5  # three and two: as nnU-Net, which divides the planned batch
DEVICES = {"gloo": "cpu", "nccl": "cuda"}
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
BACKENDS = pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, TWO_GPUS])])
EVEN = 4  # nnU-Net's own cross entropy is a mean over one process's images, whatever their number


def batch_of(step: int, images: int) -> dict:
    rng = np.random.default_rng(step)
    data = torch.from_numpy(rng.normal(size=(images, 3, *PATCH_SIZE)))
    target = torch.from_numpy(rng.integers(0, 3, (images, 1, *PATCH_SIZE)).astype(np.int16))
    target[0] = 0  # and an image without foreground
    return {"data": data, "target": target, "keys": [f"case_{n}" for n in range(images)]}


def share(batch: dict, here: slice, trainer) -> dict:
    target = batch["target"][here]
    if scales := trainer._get_deep_supervision_scales():
        target = [target[:, :, :: round(1 / scale[0]), :: round(1 / scale[1])] for scale in scales]
    return {"data": batch["data"][here], "target": target, "keys": batch["keys"][here]}


def train(backend: str, name: str, rank: int, world_size: int, folder: Path, steps: int, batch_size: int) -> None:
    """One process's training, on its GPU for NCCL; leaves what shall be compared in FOLDER."""
    from ddp_on_cpu import use_cpu

    from nnunetv2_dermomamba import trainers

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    if world_size > 1:
        if backend == "gloo":
            use_cpu()
        init = f"file://{folder / 'rendezvous'}"
        dist.init_process_group(backend, init, timedelta(seconds=100), world_size, rank)
    plans, dataset_json = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["2d"]["batch_size"] = batch_size
    torch.manual_seed(rank)  # the first one's weights must reach the others
    trainer = getattr(trainers, name)(plans, "2d", 0, dataset_json, torch.device(DEVICES[backend]))
    trainer.num_epochs, trainer.num_iterations_per_epoch = 2, steps
    torch.set_default_dtype(DTYPE)
    trainer.initialize()
    torch.set_default_dtype(torch.float32)
    if world_size == 1 and trainer.enable_deep_supervision:
        # nnU-Net's weights of the scales under DDP, which wants a gradient for every parameter.
        trainer.loss.weight_factors = (1 / (1 + 1e-6), 1e-6 / (1 + 1e-6))
    first = batch_size - batch_size // 2 if world_size > 1 else batch_size
    here = slice(0, first) if rank == 0 else slice(first, None)
    assert trainer.batch_size == len(range(batch_size)[here])
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    result: dict = {}
    outputs = []
    for step in range(steps):
        outputs.append(trainer.train_step(share(batch_of(step, batch_size), here, trainer)))
        if step == 0:
            parameters = dict(trainer.network.named_parameters())
            result["gradients"] = {key: value.grad.clone() for key, value in parameters.items()}
    trainer.on_train_epoch_end(outputs)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        batch = share(batch_of(99, batch_size), here, trainer)
        trainer.on_validation_epoch_end([trainer.validation_step(batch)])
    trainer.on_epoch_end()
    result["state"] = trainer.network.state_dict()
    result["losses"] = {key: trainer.logger.get_value(key, step=-1) for key in ("train_losses", "val_losses")}
    result = {
        key: {name.removeprefix("module."): entry for name, entry in value.items()} for key, value in result.items()
    }
    if rank == 0:  # which alone writes a log
        with open(trainer.log_file) as log:
            result["log"] = [line.partition(": ")[2] for line in log if "parts" in line]
    torch.save(result, folder / f"result_{world_size}_{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def run(folder: Path, backend: str, name: str, world_size: int, steps: int, batch_size: int) -> list[dict]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "f",
    }
    arguments = [[backend, name, rank, world_size, folder, steps, batch_size] for rank in range(world_size)]
    processes = [
        subprocess.Popen([sys.executable, __file__, *map(str, one)], env=environment, stderr=subprocess.PIPE, text=True)
        for one in arguments
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size, "".join(errors)[-4000:]
    files = [folder / f"result_{world_size}_{rank}.pt" for rank in range(world_size)]
    return [torch.load(file, map_location="cpu", weights_only=False) for file in files]


@pytest.fixture
def compare(preprocessed, plans, dataset_json):
    def run_both(backend: str, name: str, steps: int, batch_size: int) -> None:
        (preprocessed / "plans.json").write_text(json.dumps([plans, dataset_json]))
        (expected,) = run(preprocessed, backend, name, 1, steps, batch_size)
        results = run(preprocessed, backend, name, 2, steps, batch_size)
        assert results[0]["log"] == expected["log"]
        for result in results:
            check(result, expected)

    return run_both


def check(result: dict, expected: dict) -> None:
    for kind in ("gradients", "state"):
        assert result[kind].keys() == expected[kind].keys()
        for key, reference in expected[kind].items():
            assert relative_error(result[kind][key], reference) <= GRADIENT[SUMMED], (kind, key)
    for key, reference in expected["losses"].items():
        assert abs(result["losses"][key] - reference) <= FORWARD[SUMMED] * abs(reference), key


@BACKENDS
def test_a_step_gives_the_same_gradients(compare, backend: str) -> None:
    compare(backend, "nnUNetTrainerDermoMamba", 1, BATCH)


@pytest.mark.faults
@BACKENDS
@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        ("nnUNetTrainerDermoMamba", BATCH),
        ("nnUNetTrainerDermoMambaDiceCE", EVEN),
        ("nnUNetTrainerGuideFusionLoss", BATCH),
    ],
)
def test_twenty_steps_give_the_same_weights(compare, backend: str, name: str, batch_size: int) -> None:
    compare(backend, name, 20, batch_size)


if __name__ == "__main__":
    backend, name, rank, world_size, folder, steps, batch_size = sys.argv[1:]
    train(backend, name, int(rank), int(world_size), Path(folder), int(steps), int(batch_size))
