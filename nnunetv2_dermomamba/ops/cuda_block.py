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
FULL = 132 * 512
"""Threads that fill a large GPU: 132 processors that hold 512. Fewer leave it idle, a few more run after all others."""
WHOLE_SEQUENCES = 24_000
"""Threads from which on whole sequences are walked, though they fill a third of such a GPU: measured, summaries cost
more than that."""
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
        """Chunks walked side by side: of few channels, as many as make 128 threads; else one, maybe a sequence."""
        return 64 // self.D if self.D < 32 else 1

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


def chunk_subs(length: int, sequences: int, block: Block, longest: int) -> int:
    """Blocks of SUB positions of a chunk: the longer, the fewer summaries, but few sequences want many chunks.

    A sequence is one chunk, and needs no summary, where there are enough of them or it is very short. Otherwise it is
    ``longest`` at most.
    """
    if block.segments == 1 and (sequences * block.threads >= WHOLE_SEQUENCES or length <= 4 * SUB):
        return ceil_div(length, SUB)
    positions = ceil_div(length * sequences * block.threads, block.segments * FULL)  # of a chunk, for a full GPU
    return min(longest, ceil_div(positions, SUB))


def aligned(m: Tensor) -> Tensor:
    """Contiguous, and where loads of 16 bytes may start; a view may start elsewhere."""
    m = m.contiguous()
    return m if m.data_ptr() % 16 == 0 else m.clone()


def max_shared(like: Tensor) -> int:
    """Bytes of shared memory that a block may have on the tensor's device."""
    index = like.device.index
    return nvrtc.max_shared(torch.cuda.current_device() if index is None else index)
