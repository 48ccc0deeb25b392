"""Show the network's size and cost, the selective-scan backend, versions and devices.

Parameters and operations are those of the network for one image of the patch size: the published 192 x 256 with three
colour channels and one logit, or a trained model's own (--model).

Operations are counted on the network as it runs, in multiply-adds:
  convolutions and linear layers  by PyTorch's own counter
  scan projections                the selective scan's x to (dt, B, C) and dt to channels
  scan state updates              h = exp(delta A) h + delta B u: directions x channels x length x states
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_dermomamba import __version__

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Cost", "Model", "add_arguments", "count_cost", "load_model", "run"]

PUBLISHED_PATCH = (192, 256)
PACKAGES = ("torch", "nnunetv2", "numba", "triton", "mamba-ssm", "numpy", "scipy", "SimpleITK", "pillow")


@dataclass(frozen=True)
class Cost:
    """A network's size and its work for one image.

    Attributes:
        parameters: Trainable parameters.
        convolutions: Multiply-adds of convolutions.
        linear: Multiply-adds of linear layers.
        scan_projections: Multiply-adds of the selective scans' projections.
        scan_updates: State updates of the selective scans.
    """

    parameters: int
    convolutions: int
    linear: int
    scan_projections: int
    scan_updates: int

    @property
    def operations(self) -> int:
        """All multiply-adds and state updates."""
        return self.convolutions + self.linear + self.scan_projections + self.scan_updates


@dataclass(frozen=True)
class Model:
    """A trained model, or the published network.

    Attributes:
        name: Trainer, plans and configuration, or the network's name.
        network: On the CPU.
        channels: Input channels.
        patch_size: (height, width) in pixels.
        details: What else its files say, for people.
    """

    name: str
    network: nn.Module
    channels: int
    patch_size: tuple[int, ...]
    details: dict[str, str]


def count_cost(network: nn.Module, channels: int, patch_size: tuple[int, ...]) -> Cost:
    """Count a network's parameters and its operations for one image of the patch size; nothing is computed.

    Args:
        network: On the CPU; without selective scans too.
        channels: Input channels.
        patch_size: Size of the input.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from nnunetv2_dermomamba.network.ss2d import SS2D

    projections = updates = 0

    def count_scan(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        nonlocal projections, updates
        pixels = inputs[0].shape[:3].numel()
        projections += pixels * (module.x_proj_weight.numel() + module.dt_projs_weight.numel())
        updates += pixels * module.A_logs.numel()

    hooks = [m.register_forward_hook(count_scan) for m in network.modules() if isinstance(m, SS2D)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    was_training = network.training
    try:
        network.eval()
        with _automatic_backend(), torch.no_grad(), mode, FlopCounterMode(display=False) as counter:
            network(torch.empty(1, channels, *patch_size))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    # PyTorch counts two operations for a multiply-add.
    counts = {str(op): count // 2 for op, count in counter.get_flop_counts()["Global"].items()}
    convolutions = counts.pop("aten.convolution", 0)
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Cost(parameters, convolutions, sum(counts.values()), projections, updates)


@contextmanager
def _automatic_backend() -> Iterator[None]:
    """Leave the backend to automatic choice: on the CPU that is a fused scan, which counts as no other operation."""
    from nnunetv2_dermomamba.ops import ENVIRONMENT_VARIABLE

    requested = os.environ.pop(ENVIRONMENT_VARIABLE, None)
    try:
        yield
    finally:
        if requested is not None:
            os.environ[ENVIRONMENT_VARIABLE] = requested


def published_model() -> Model:
    """The network as published: 3 x 192 x 256, one logit."""
    from nnunetv2_dermomamba.network import DermoMamba

    return Model("DermoMamba as published", DermoMamba(3, 1, PUBLISHED_PATCH), 3, PUBLISHED_PATCH, {})


def load_model(path: Path) -> Model:
    """Read a trained model.

    Args:
        path: nnU-Net's results folder of one trainer and configuration (it holds ``plans.json`` and ``fold_*``), or the
            zip file that ``nnUNetv2_export_model_to_zip`` writes.

    Raises:
        ValueError: It is neither.
    """
    if path.is_dir():
        return _read_model(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a folder nor a zip file that nnUNetv2_export_model_to_zip wrote")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
        return _read_model(_only_model(Path(folder), path))


def _only_model(folder: Path, path: Path) -> Path:
    found = sorted(plans.parent for plans in folder.rglob("plans.json"))
    if len(found) != 1:
        names = ", ".join(str(model.relative_to(folder)) for model in found) or "none"
        raise ValueError(f"{path} must hold one model, but it holds {names}; unpack it and name the one meant")
    return found[0]


def _read_model(folder: Path) -> Model:
    folds = sorted(fold.name.removeprefix("fold_") for fold in folder.glob("fold_*") if any(fold.glob("*.pth")))
    if not (folder / "plans.json").is_file() or not folds:
        raise ValueError(
            f"{folder} is no trained model: it needs plans.json, dataset.json and fold_*/checkpoint_final.pth, like "
            "nnUNet_results/Dataset501_ISIC2018/nnUNetTrainerDermoMamba__nnUNetPlans__2d"
        )
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    first = folder / f"fold_{folds[0]}"
    checkpoint = "checkpoint_final.pth" if (first / "checkpoint_final.pth").is_file() else "checkpoint_best.pth"
    use_fold = int(folds[0]) if folds[0].isdigit() else folds[0]
    with redirect_stdout(sys.stderr):  # nnU-Net prints
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), [use_fold], checkpoint)
    dataset = predictor.dataset_json
    details = {
        "data set": predictor.plans_manager.dataset_name,
        "trainer": predictor.trainer_name,
        "labels": ", ".join(dataset["labels"]),
        "folds": ", ".join(folds),
        "checkpoint": checkpoint,
    }
    patch_size = tuple(predictor.configuration_manager.patch_size)
    return Model(folder.name, predictor.network, len(dataset["channel_names"]), patch_size, details)


def backends() -> dict[str, dict[str, str]]:
    """By device type that is present, each selective-scan backend and why it is or is not the one used."""
    import torch

    from nnunetv2_dermomamba.ops import BACKENDS, ENVIRONMENT_VARIABLE, choose_backend, why_not

    requested = os.environ.get(ENVIRONMENT_VARIABLE)
    result = {}
    for device in ["cuda"] * torch.cuda.is_available() + ["cpu"]:
        try:
            chosen = choose_backend(device, torch.float32)
        except (RuntimeError, ValueError) as error:
            result[device] = {"none": str(error)}
            continue
        used = f"used, requested by {ENVIRONMENT_VARIABLE}" if requested else "used"
        passed_over = "not asked for" if requested else f"could serve, but {chosen} is faster"
        result[device] = {
            backend.name: used if backend.name == chosen else why_not(backend, device, torch.float32) or passed_over
            for backend in BACKENDS
        }
    return result


def devices() -> dict[str, str]:
    """The devices that PyTorch sees, by its names for them."""
    import torch

    found = {}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    found["cpu"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return found


def versions() -> dict[str, str]:
    """Versions of this package, Python and what the computation depends on; ``not installed`` where it is not."""
    found = {"nnunetv2-dermomamba": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dermomamba info``."""
    parser.add_argument(
        "-m", "--model", type=Path, metavar="MODEL", help="trained model: nnU-Net's results folder or an exported zip"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run ``dermomamba info``; returns the exit status."""
    try:
        model = load_model(args.model) if args.model else published_model()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"dermomamba info: error: {error}", file=sys.stderr)
        return 2
    cost = count_cost(model.network, model.channels, model.patch_size)
    print(json.dumps(_as_dict(model, cost), indent=1) if args.json else _as_text(model, cost))
    return 0


def _as_dict(model: Model, cost: Cost) -> dict[str, Any]:
    return {
        "model": {"name": model.name, "channels": model.channels, "patch_size": model.patch_size, **model.details},
        "cost": {**asdict(cost), "operations": cost.operations},
        "backends": backends(),
        "devices": devices(),
        "versions": versions(),
    }


def _as_text(model: Model, cost: Cost) -> str:
    size = " x ".join(str(side) for side in (model.channels, *model.patch_size))
    sections = {
        model.name: {"input": size, "parameters": f"{cost.parameters:,}", **model.details},
        "Operations for one image": {
            "convolutions": _giga(cost.convolutions),
            "linear layers": _giga(cost.linear),
            "scan projections": _giga(cost.scan_projections),
            "scan state updates": _giga(cost.scan_updates),
            "in all": _giga(cost.operations),
        },
        **{f"Selective scan on {device}": reasons for device, reasons in backends().items()},
        "Devices": devices(),
        "Versions": versions(),
    }
    width = max(len(key) for section in sections.values() for key in section)
    lines = []
    for title, section in sections.items():
        lines += [title, *(f"  {key:{width}}  {value}".rstrip() for key, value in section.items()), ""]
    return "\n".join(lines).rstrip()


def _giga(count: int) -> str:
    return f"{count / 1e9:7.3f} G"
