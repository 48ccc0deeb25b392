"""How long the chunks of the CUDA scans are."""

from __future__ import annotations

import pytest

from nnunetv2_dermomamba.ops.cuda_block import Block, chunk_subs


@pytest.mark.parametrize(
    ("length", "channels", "sequences", "subs"),
    [
        (192 * 256, 8, 4 * 48, 16),
        (192 * 256, 8, 4 * 3, 9),  # few sequences
        (48 * 64, 32, 4 * 48, 16),
        (48 * 64, 32, 4 * 192, 192),  # whole sequences, since they fill a GPU
        (24 * 32, 64, 4 * 48, 48),
        (6 * 8, 128, 4, 3),  # whole, since they are short
        (1, 8, 1, 1),
    ],
)
def test_chunks_are_long_where_there_are_many(length, channels, sequences, subs):
    assert chunk_subs(length, sequences, Block.of(channels), 16) == subs


def test_chunks_fill_a_gpu_once():
    block = Block.of(8)
    subs = chunk_subs(192 * 256, 4 * 3, block, 16)
    blocks = 4 * 3 * -(-192 * 256 // (subs * 16 * block.segments))
    assert 0.9 * 132 * 4 <= blocks <= 132 * 4  # of 128 threads, four a processor
