"""Sums over the rows of channels that normalisations need, as a CUDA kernel (``cuda/channel_sums.cu``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cuda_block import INPUTS, aligned
from .nvrtc import launch

FILES = ("four.cuh", "input.cuh", "channel_sums.cu")
THREADS = 256


class Sizes(ctypes.Structure):
    """As in ``channel_sums.cu``."""

    _fields_ = [(n, ctypes.c_int) for n in ("rows", "parts", "part_rows")]


def _memory(x: Tensor) -> Tensor:
    return aligned(x.permute(0, 2, 3, 1))


def channel_sums(a: Tensor | None, b: Tensor, shift: Tensor, rows: int, parts: int, part_rows: int) -> Tensor:
    """See ``normalise.channel_sums``; a group's ``rows`` fall into ``parts`` of ``part_rows``."""
    groups, channels = shift.shape
    sums = shift.new_empty(groups, parts, 2, channels)
    with torch.cuda.device_of(b):
        arguments = None if a is None else _memory(a), _memory(b), shift.contiguous(), sums
        definitions = {"CHANNELS": channels, "INPUT": INPUTS[b.dtype]}
        sizes = Sizes(rows, parts, part_rows)
        shared = THREADS * 16 * 4  # every thread's sums of eight channels
        launch(FILES, definitions, "channel_sums", groups * parts, THREADS, shared, *arguments, sizes)
    return sums
