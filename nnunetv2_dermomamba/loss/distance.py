"""Exact Euclidean distance from each pixel to the nearest pixel of the opposite label, where the tensor is."""

import functools
import warnings
from collections.abc import Callable

import torch

_UNLABELLED = 2  # neither foreground nor background
_BROADCAST_ELEMENTS = 2**25  # memory bound of the plain PyTorch path: 128 MiB of float32


def _min_plus(values: torch.Tensor) -> torch.Tensor:
    """Minimum over q of values[..., q] + (j - q)^2, by broadcasting in pieces."""
    length = values.shape[-1]
    position = torch.arange(length, device=values.device, dtype=values.dtype)
    step = (position[:, None] - position[None, :]).square()
    lines = values.reshape(-1, 1, length)
    pieces = lines.split(max(1, _BROADCAST_ELEMENTS // length**2))
    return torch.cat([(piece + step).amin(-1) for piece in pieces]).reshape(values.shape)


def _opposite_distance_torch(labels: torch.Tensor) -> torch.Tensor:
    """The definition in plain PyTorch, row pass then column pass; also the twin of the fast kernels."""

    def distance_to(label: int) -> torch.Tensor:
        at_label = torch.where(labels == label, 0.0, torch.inf)
        return _min_plus(_min_plus(at_label).mT).mT.sqrt()

    distance = torch.where(labels == 1, distance_to(0), distance_to(1))
    return torch.where(labels <= 1, distance, torch.inf)


@functools.cache
def _cuda_distance() -> Callable[[torch.Tensor], torch.Tensor]:
    """The Triton path, or plain PyTorch where Triton is not installed (CUDA on Windows)."""
    try:
        from nnunetv2_dermomamba.loss.distance_triton import opposite_distance
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        warnings.warn("Triton is not installed: the Guide Fusion Loss takes a slower distance transform", stacklevel=2)
        return _opposite_distance_torch
    return opposite_distance


@torch.library.custom_op("dermomamba::opposite_distance", mutates_args=())
def _opposite_distance(labels: torch.Tensor) -> torch.Tensor:
    return _opposite_distance_torch(labels)


@_opposite_distance.register_kernel("cuda")
def _(labels: torch.Tensor) -> torch.Tensor:
    return _cuda_distance()(labels.contiguous())


@_opposite_distance.register_kernel("cpu")
def _(labels: torch.Tensor) -> torch.Tensor:
    from nnunetv2_dermomamba.loss.distance_numba import opposite_distance

    labels = labels.contiguous()
    out = torch.empty(labels.shape, dtype=torch.float32)
    opposite_distance(labels.numpy(), out.numpy())
    return out


@_opposite_distance.register_fake
def _(labels: torch.Tensor) -> torch.Tensor:
    return torch.empty(labels.shape, dtype=torch.float32, device=labels.device)


def distance_to_opposite(mask: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Euclidean distance in pixels from each pixel to the nearest pixel of the opposite label in the same image.

    Exact: the float32 root of an exact integer, while H^2 + W^2 <= 2^24 (2 896 x 2 896). Runs on the device of
    ``mask``: Triton on CUDA, Numba on the CPU, plain PyTorch elsewhere. A mask has no gradient, nor has the result.

    Args:
        mask: (..., H, W) bool, foreground.
        valid: broadcastable to ``mask``, bool; where it is False a pixel is neither foreground nor background: no
            distance ends there. None: all pixels are valid.

    Returns:
        (..., H, W) float32. Infinite in an image without foreground or without background, and at invalid pixels.

    Raises:
        ValueError: ``mask`` is not boolean or has fewer than two dimensions.
    """
    if mask.dtype != torch.bool or mask.ndim < 2:
        raise ValueError(f"expected a boolean mask (..., H, W), got {mask.dtype} of shape {tuple(mask.shape)}")
    labels = mask.to(torch.uint8)
    if valid is not None:
        labels = torch.where(valid, labels, _UNLABELLED)
    return _opposite_distance(labels.reshape(-1, *mask.shape[-2:])).reshape(mask.shape)
