"""Sizes of the CUDA scans' blocks of threads: what ``cuda/walk.cuh`` computes from the number of channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import nvrtc

STATES = 16
"""N, states of a channel; fewer are padded."""
SUB, ROW, STEPS = 16, 20, 4
"""Positions in shared memory at once, floats from row to row, positions done at once."""
INPUTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_CHANNELS = 128
ONE_CHUNK = 256
"""Positions up to which a sequence may be one chunk."""
LONG = 8
"""Blocks of SUB positions of a chunk in a long sequence."""
FULL = 528
"""Blocks that fill a large GPU: 132 processors that hold four each. Fewer leave it idle, a few more run after all others."""
MAX_POSITIONS = 2**30
"""Of a sequence: positions are 32-bit, and so are those a work item behind the last."""
MAX_SEQUENCES = 2**27
"""Channels of all samples and directions: their states are counted in 32 bits."""


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below ``a / b``."""
    return -(-a // b)


@dataclass(frozen=True)
class Block:
    """A block of threads for ``D`` channels: the power of two from 8 to 128 that holds them, or 128."""

    D: int

    @classmethod
    def of(cls, channels: int) -> Block:
        """The block for so many channels."""
        return cls(min(MAX_CHANNELS, max(8, 1 << (channels - 1).bit_length())))

    @property
    def segments(self) -> int:
        """Chunks walked side by side."""
        return max(1, 64 // self.D)

    @property
    def threads(self) -> int:
        """Of a block: each holds two channels of four states."""
        return 2 * self.D * self.segments

    @property
    def summed_rows(self) -> int:
        """Shared rows for dB and dC: none where they replace B and C, else a sum of both for each warp of a segment."""
        return 0 if self.D <= 16 else self.D // 16 * 2 * STATES

    def rows_bytes(self, rows: int) -> int:
        """Bytes of ``rows`` shared rows of every segment."""
        floats = rows * ROW
        return self.segments * (floats + (0 if floats % 32 else 16)) * 4

    @property
    def states_bytes(self) -> int:
        """Bytes of all threads' states."""
        return self.threads * 8 * 4


def chunk_subs(length: int, segments: int, sequences: int) -> int:
    """Blocks of SUB positions of a chunk: the longer, the fewer summaries, but few sequences want many chunks.

    A short sequence is one chunk, and needs no summary, where there are enough of them or it is very short.
    """
    if segments == 1 and length <= (ONE_CHUNK if sequences >= FULL // 4 else ONE_CHUNK // 4):
        return ceil_div(length, SUB)
    return min(LONG, ceil_div(length * sequences, segments * SUB * FULL))


def long_chunk_subs(length: int, segments: int, sequences: int) -> int:
    """As ``chunk_subs``, of a kernel that loses nothing by chunks twice as long, where there are many blocks."""
    subs = chunk_subs(length, segments, sequences)
    blocks = sequences * ceil_div(length, 2 * segments * subs * SUB)
    is_one_chunk = length <= segments * subs * SUB
    return 2 * subs if subs == LONG and blocks >= 4 * FULL and not is_one_chunk else subs


def max_shared(like: Tensor) -> int:
    """Bytes of shared memory that a block may have on the tensor's device."""
    index = like.device.index
    return nvrtc.max_shared(torch.cuda.current_device() if index is None else index)
