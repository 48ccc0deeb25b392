"""Sizes of the CUDA scans' blocks."""

from __future__ import annotations

import pytest

from nnunetv2_dermomamba.ops.cuda_block import LONG, chunk_subs, long_chunk_subs


@pytest.mark.parametrize(
    ("length", "segments", "sequences", "subs", "long"),
    [
        (192 * 256, 8, 384, LONG, 2 * LONG),
        (192 * 256, 8, 6, LONG // 2, LONG // 2),  # few blocks
        (24 * 32, 1, 384, LONG, LONG),
        (12 * 16, 1, 384, 12, 12),  # one chunk
        (128, 1, 2048, LONG, LONG),  # one chunk
        (1, 8, 1, 1, 1),
    ],
)
def test_chunks_are_long_where_there_are_many(length, segments, sequences, subs, long):
    assert chunk_subs(length, segments, sequences) == subs
    assert long_chunk_subs(length, segments, sequences) == long
