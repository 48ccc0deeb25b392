"""Distance to the opposite label on CUDA: two Triton kernels, no host synchronisation, CUDA-graph capturable.

Imported only when a CUDA tensor arrives (Triton is not installed everywhere).
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

_ROW_BLOCK_ELEMENTS = 2048
# Of one warp: a thread holds one column of the tile, and the farthest of its distances needs no barrier. With more
# rows than 8 their labels do not fit in the predicate registers.
_COLUMN_BLOCK = (8, 32)


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _minimum(a, b):
    return tl.minimum(a, b)


@triton.jit
def _squared_row_distance(is_site, column):
    """Squared distance within each row to the nearest site; infinite in rows without one."""
    before = tl.associative_scan(tl.where(is_site, column, float("-inf")), 1, _maximum)
    after = tl.associative_scan(tl.where(is_site, column, float("inf")), 1, _minimum, reverse=True)
    distance = tl.minimum(column - before, after - column)
    return distance * distance


@triton.jit
def _row_kernel(labels, to_zero, to_one, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Squared distances along the row to the nearest pixel of label 0 and of label 1."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    offset = row * width + column
    label = tl.load(labels + offset, inside, other=255)
    position = tl.broadcast_to(column.to(tl.float32), (BLOCK_ROWS, BLOCK_WIDTH))
    tl.store(to_zero + offset, _squared_row_distance(label == 0, position), inside)
    tl.store(to_one + offset, _squared_row_distance(label == 1, position), inside)


@triton.jit
def _nearer(squared, zero_column, one_column, is_one, inside, first, row, height, width, BLOCK_HEIGHT: tl.constexpr):
    """The smaller of ``squared`` and (i - k)^2 + the row distance at k: i from ``first`` on, k from ``row`` on."""
    steps = tl.arange(0, BLOCK_HEIGHT)[:, None]
    between = (first - row).to(tl.float32)
    for n in tl.static_range(BLOCK_HEIGHT):
        present = inside & (row + n < height)
        zero = tl.load(zero_column + (row + n) * width, present, other=float("inf"))
        one = tl.load(one_column + (row + n) * width, present, other=float("inf"))
        step = between + (steps - n).to(tl.float32)
        squared = tl.minimum(squared, tl.where(is_one, zero, one) + step * step)
    return squared


@triton.jit
def _column_kernel(labels, to_zero, to_one, out, height, width, BLOCK_HEIGHT: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Minimum over the rows k of (i - k)^2 + the row distance at k, for the label opposite to the pixel's own.

    From the tile's own rows outwards, BLOCK_HEIGHT rows to either side at a time, until the next ones are as many
    steps away as the farthest of the tile's distances: no row beyond can be nearer.
    """
    image = tl.program_id(0).to(tl.int64) * height * width
    first = tl.program_id(1) * BLOCK_HEIGHT
    row = first + tl.arange(0, BLOCK_HEIGHT)[:, None]
    column = tl.program_id(2) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = (row < height) & (column < width)
    offset = image + row * width + column
    label = tl.load(labels + offset, inside, other=255)
    is_one = label == 1
    zero = to_zero + image + column
    one = to_one + image + column
    squared = tl.where(label <= 1, float("inf"), 0.0)  # 0: without a label there is nothing to search for
    squared = _nearer(squared, zero, one, is_one, column < width, first, first, height, width, BLOCK_HEIGHT)
    above = first - BLOCK_HEIGHT
    below = first + BLOCK_HEIGHT
    steps = 1  # from the tile to the nearest row not visited
    while ((above >= 0) | (below < height)) & (steps * steps < tl.max(squared)):
        if above >= 0:
            squared = _nearer(squared, zero, one, is_one, column < width, first, above, height, width, BLOCK_HEIGHT)
        if below < height:
            squared = _nearer(squared, zero, one, is_one, column < width, first, below, height, width, BLOCK_HEIGHT)
        above -= BLOCK_HEIGHT
        below += BLOCK_HEIGHT
        steps += BLOCK_HEIGHT
    # sqrt_rn, not sqrt: the latter is approximate on NVIDIA GPUs.
    distance = tl.where(label <= 1, tl.sqrt_rn(squared), float("inf"))
    tl.store(out + offset, distance, inside)


def opposite_distance(labels: torch.Tensor) -> torch.Tensor:
    """Distance to the nearest pixel of the opposite label.

    The row pass is a scan. The column pass reads, for a tile of few rows, the rows as far from it as its farthest
    distance: at most N H^2 W minima, 0.15 G for a batch of 16 at 192 x 256, which images of one label reach. Squared
    distances are exact in float32 as long as H^2 + W^2 <= 2^24.

    Args:
        labels: (N, H, W) uint8, contiguous, on CUDA; 0 and 1 are labels, every other value belongs to neither.

    Returns:
        (N, H, W) float32, pixels; infinite where there is no opposite label, or no label.
    """
    count, height, width = labels.shape
    to_zero, to_one, out = torch.empty((3, *labels.shape), dtype=torch.float32, device=labels.device)
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, _ROW_BLOCK_ELEMENTS // block_width)
    rows = count * height
    column_grid = (count, triton.cdiv(height, _COLUMN_BLOCK[0]), triton.cdiv(width, _COLUMN_BLOCK[1]))
    with torch.cuda.device_of(labels):
        _row_kernel[(triton.cdiv(rows, block_rows),)](labels, to_zero, to_one, rows, width, block_rows, block_width)
        _column_kernel[column_grid](labels, to_zero, to_one, out, height, width, *_COLUMN_BLOCK, num_warps=1)
    return out
