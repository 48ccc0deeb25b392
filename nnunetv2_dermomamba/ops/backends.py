"""Which backend serves the selective scan: the one place that asks what is installed.

Automatic choice takes the first of ``BACKENDS`` that can serve the device and type. A backend that is asked for, by
argument or by the environment variable ``DERMOMAMBA_BACKEND``, is taken or refused with the reason, never replaced.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from .composed import selective_scan_2d_composed
from .library import register_directions_2d, register_scan_1d, register_scan_2d

ENVIRONMENT_VARIABLE = "DERMOMAMBA_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A backend as listed: nothing is imported until it is asked for.

    Attributes:
        name: what users call it.
        module: module of this package that holds its functions.
        devices: device types it serves; empty means all.
        float64: whether it computes in float64.
        fused: whether it has a fused 2D scan.
    """

    name: str
    module: str
    devices: tuple[str, ...]
    float64: bool
    fused: bool


@dataclass(frozen=True)
class LoadedBackend:
    """A backend's differentiable functions."""

    name: str
    scan_1d: Callable[..., Tensor]
    scan_2d: Callable[..., Tensor]
    directions_2d: Callable[..., Tensor] | None = None
    """For inference, results of the four directions apart."""


# Fastest first, by benchmarks/selective_scan.py.
BACKENDS = (
    Backend("cuda", "cuda_scan", ("cuda",), float64=False, fused=True),
    Backend("triton", "triton_scan", ("cuda",), float64=False, fused=True),
    Backend("mamba-ssm", "mamba_ssm_scan", ("cuda",), float64=False, fused=False),
    Backend("numba", "cpu_scan", ("cpu",), float64=True, fused=True),
    Backend("torch", "torch_scan", (), float64=True, fused=False),
)


@cache
def _import_module(module: str) -> ModuleType | str:
    """The backend's module, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(f".{module}", __package__)
    except Exception as error:  # a broken installation of one backend must not take the others with it
        return f"{type(error).__name__}: {error}"


def why_not(backend: Backend, device: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot serve tensors of this device type and dtype; None if it can."""
    if backend.devices and device not in backend.devices:
        return f"serves {', '.join(backend.devices)} tensors, not {device}"
    if dtype == torch.float64 and not backend.float64:
        return "computes in float32 only"
    module = _import_module(backend.module)
    return f"cannot be imported ({module})" if isinstance(module, str) else None


# Filled by ``choose_backend``; a plain dictionary, since torch.compile traces through the look-up.
LOADED: dict[str, LoadedBackend] = {}
# Device types whose backend has been named to the user: once a process, by a trainer's log or on first use.
_ANNOUNCED: set[str] = set()


def _load(backend: Backend) -> LoadedBackend:
    module = _import_module(backend.module)
    assert isinstance(module, ModuleType)
    identifier = backend.name.replace("-", "_")
    if backend.fused:
        apart = register_directions_2d(identifier, module) if hasattr(module, "scan_2d_directions") else None
        scans = register_scan_1d(identifier, module), register_scan_2d(identifier, module)
        return LoadedBackend(backend.name, *scans, apart)
    # Plain PyTorch brings its own autograd.
    scan_1d = module.scan_1d if hasattr(module, "scan_1d") else register_scan_1d(identifier, module)
    return LoadedBackend(backend.name, scan_1d, partial(selective_scan_2d_composed, scan=scan_1d))


@cache
def _choose(device: str, dtype: torch.dtype, requested: str) -> str:
    if requested:
        named = [b for b in BACKENDS if b.name == requested]
        if not named:
            known = ", ".join(b.name for b in BACKENDS)
            raise ValueError(f"unknown selective-scan backend {requested!r}; choose one of {known}")
        reason = why_not(named[0], device, dtype)
        if reason is not None:
            raise RuntimeError(
                f"the requested selective-scan backend {requested!r} cannot serve: it {reason}. Unset "
                f"{ENVIRONMENT_VARIABLE} for automatic choice"
            )
        return requested
    return next(b.name for b in BACKENDS if why_not(b, device, dtype) is None)


@torch.compiler.assume_constant_result
def choose_backend(device: str, dtype: torch.dtype, requested: str | None = None) -> str:
    """Name of the backend for tensors of a device type and dtype; its functions are in ``LOADED`` from then on.

    Args:
        device: device type ('cpu', 'cuda', 'mps').
        dtype: type of the input map or sequence.
        requested: a backend's name; None asks ``DERMOMAMBA_BACKEND`` and then chooses automatically.

    Raises:
        ValueError: the requested name is unknown.
        RuntimeError: the requested backend cannot serve; the message says why.
    """
    name = _choose(device, dtype, requested or os.environ.get(ENVIRONMENT_VARIABLE, ""))
    if name not in LOADED:
        LOADED[name] = _load(next(b for b in BACKENDS if b.name == name))
    if device not in _ANNOUNCED and requested is None:
        print(describe_choice(device, dtype), file=sys.stderr)  # standard output may be a program's JSON
    return name


@torch.compiler.assume_constant_result
def own_gpu_kernels(dtype: torch.dtype) -> bool:
    """Whether the other operators' Triton kernels serve CUDA tensors: where the scan is this package's own, too."""
    triton = next(b for b in BACKENDS if b.name == "triton")
    return choose_backend("cuda", dtype) in ("cuda", "triton") and why_not(triton, "cuda", dtype) is None


@torch.compiler.assume_constant_result
def own_cuda_kernels(dtype: torch.dtype) -> bool:
    """Whether CUDA kernels of convolutions and normalisations serve maps of this type: where the scan is CUDA's."""
    if choose_backend("cuda", dtype) != "cuda":
        return False
    from .cuda_depthwise import fits  # needs CUDA

    return fits(dtype)


def describe_choice(device: str, dtype: torch.dtype = torch.float32) -> str:
    """One line for logs: the backend that serves this device, and why the ones before it do not.

    The device then counts as announced: the caller prints or logs the line. Without such a call the first scan on a
    device prints it to standard error.
    """
    _ANNOUNCED.add(device)
    name = choose_backend(device, dtype)
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return f"Selective scan backend: {name} (requested by {ENVIRONMENT_VARIABLE})"
    passed_over = [b for b in BACKENDS[: [b.name for b in BACKENDS].index(name)] if device in b.devices]
    reasons = "".join(f"; {b.name} {why_not(b, device, dtype)}" for b in passed_over)
    return f"Selective scan backend: {name} for {device}{reasons}"
