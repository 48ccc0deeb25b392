"""Show the network's size and cost, the scan's backend, versions and devices.

Parameters and operations are those of the network for one image of the patch
size: the published 192 x 256 with three colour channels and one logit, or a
trained model's own (--model).

Operations are counted on the network as it runs, in multiply-adds:
  convolutions and linear layers  by PyTorch's own counter
  scan projections                the selective scan's x to (dt, B, C), and dt
                                  to channels
  scan state updates              h = exp(delta A) h + delta B u: directions x
                                  channels x length x states
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from typing import Any

from nnunetv2_dermomamba import __version__
from nnunetv2_dermomamba.cost import Cost, count_cost
from nnunetv2_dermomamba.predict.options import add_model_arguments
from nnunetv2_dermomamba.predict.sized_network import SizedNetwork, trained_model

__all__ = ["EXAMPLES", "add_arguments", "published_model", "run"]

EXAMPLES = """examples:
  dermomamba info
  dermomamba info -m model.zip
  dermomamba info --json > info.json
"""

PUBLISHED_PATCH = (192, 256)
PACKAGES = ("torch", "nnunetv2", "numba", "triton", "mamba-ssm", "numpy", "scipy", "SimpleITK", "pillow")


def published_model() -> SizedNetwork:
    """The network as published: 3 x 192 x 256, one logit."""
    from nnunetv2_dermomamba.network import DermoMamba

    return SizedNetwork("DermoMamba as published", DermoMamba(3, 1, PUBLISHED_PATCH), 3, PUBLISHED_PATCH, {})


def backends() -> dict[str, dict[str, str]]:
    """By device type that is present, each selective-scan backend and why it is or is not the one used."""
    import torch

    from nnunetv2_dermomamba.ops import BACKENDS, ENVIRONMENT_VARIABLE, choose_backend, why_not

    requested = os.environ.get(ENVIRONMENT_VARIABLE)
    result = {}
    for device in dict.fromkeys(name.partition(":")[0] for name in devices()):
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
    add_model_arguments(parser, use=" (default: the published network)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Run ``dermomamba info``; returns the exit status."""
    try:
        model = trained_model(args.model, args.f, args.chk, args.trust) if args.model else published_model()
        cost = count_cost(model.network, model.channels, model.patch_size)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"dermomamba info: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(_as_dict(model, cost), indent=1) if args.json else _as_text(model, cost))
    return 0


def _as_dict(model: SizedNetwork, cost: Cost) -> dict[str, Any]:
    return {
        "model": {"name": model.name, "channels": model.channels, "patch_size": model.patch_size, **model.details},
        "cost": {**asdict(cost), "operations": cost.operations},
        "backends": backends(),
        "devices": devices(),
        "versions": versions(),
    }


def _as_text(model: SizedNetwork, cost: Cost) -> str:
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
