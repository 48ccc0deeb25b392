"""Distance to the opposite label on the CPU: a separable exact transform, compiled by Numba.

Imported only when a CPU tensor arrives, since importing Numba takes about a second.
"""

import numba
import numpy as np

_NONE = np.int32(2**30)  # no pixel of that label in the column; above every squared distance that int32 needs here


@numba.njit(nogil=True, cache=True)
def _column_distances(labels: np.ndarray, to_label: np.ndarray) -> None:
    """Fill ``to_label`` (2, H, W): squared distance within the column to the nearest pixel of label 0, of label 1."""
    height, width = labels.shape
    steps = np.empty(width, np.int32)
    for label in range(2):
        squared = to_label[label]
        steps[:] = -1
        for i in range(height):
            for j in range(width):
                steps[j] = 0 if labels[i, j] == label else steps[j] + (steps[j] >= 0)
                squared[i, j] = steps[j] * steps[j] if steps[j] >= 0 else _NONE
        steps[:] = -1
        for i in range(height - 1, -1, -1):
            for j in range(width):
                steps[j] = 0 if labels[i, j] == label else steps[j] + (steps[j] >= 0)
                if steps[j] >= 0:
                    squared[i, j] = min(squared[i, j], steps[j] * steps[j])


@numba.njit(nogil=True, cache=True)
def _row_envelopes(
    labels: np.ndarray, to_label: np.ndarray, label: int, out: np.ndarray, site: np.ndarray, start: np.ndarray
) -> None:
    """Fill one row for the pixels of the label opposite to ``label``: min over q of to_label[q] + (j - q)^2, rooted.

    A pixel of ``label`` bounds the search: what lies beyond it is farther. So each run between two of them has its
    own lower envelope of parabolas (Felzenszwalb and Huttenlocher, Theory of Computing 8, 2012), ends included.
    """
    width = labels.shape[0]
    j = 0
    while j < width:
        if labels[j] == label:
            j += 1
            continue
        first = j
        while j < width and labels[j] != label:
            j += 1
        top = -1
        for q in range(max(first - 1, 0), min(j + 1, width)):
            if to_label[q] == _NONE:
                continue
            crossing = -np.inf
            while top >= 0:
                p = site[top]
                crossing = (to_label[q] - to_label[p] + q * q - p * p) / (2.0 * (q - p))
                if crossing > start[top]:
                    break
                top -= 1
            top += 1
            site[top] = q
            start[top] = crossing if top > 0 else -np.inf
        if top < 0:
            continue
        current = 0
        for q in range(first, j):
            while current < top and start[current + 1] < q:
                current += 1
            if labels[q] == 1 - label:
                out[q] = np.sqrt(np.float64(to_label[site[current]] + (q - site[current]) ** 2))


@numba.njit(nogil=True, cache=True)
def opposite_distance(labels: np.ndarray, out: np.ndarray) -> None:
    """Fill ``out`` with the distance to the nearest pixel of the opposite label.

    Args:
        labels: (N, H, W) uint8; 0 and 1 are labels, every other value belongs to neither.
        out: (N, H, W) float32, written: pixels; infinite where there is no opposite label, or no label.
    """
    count, height, width = labels.shape
    to_label = np.empty((2, height, width), np.int32)
    site = np.empty(width, np.int64)
    start = np.empty(width, np.float64)
    out[:] = np.inf
    for n in range(count):
        _column_distances(labels[n], to_label)
        for i in range(height):
            for label in range(2):
                _row_envelopes(labels[n, i], to_label[label, i], label, out[n, i], site, start)
