import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from triton_interpreter import interpreted

from nnunetv2_dermomamba.loss import distance, distance_to_opposite

SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (5, 3), (16, 16), (13, 37), (40, 33), (1, 200), (70, 2)]


def reference(mask: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Distance to the nearest valid pixel of the opposite label, one label of one image at a time."""
    out = np.full(mask.shape, np.inf)
    for here, opposite in ((mask & valid, ~mask & valid), (~mask & valid, mask & valid)):
        if opposite.any():
            out[here] = distance_transform_edt(~opposite)[here]
    return out


def random_masks(seed: int, count: int) -> list[np.ndarray]:
    """Noise of every density, blobs, single pixels, and masks with only one label."""
    random = np.random.default_rng(seed)
    masks = []
    for n in range(count):
        shape = SHAPES[n % len(SHAPES)]
        kind = n // len(SHAPES) % 4
        if kind == 0:
            mask = random.random(shape) < random.random()
        elif kind == 1:
            centre, radius = random.random(2) * shape, random.random() * max(shape) / 2
            mask = np.hypot(*(np.indices(shape) - centre[:, None, None])) < radius
        elif kind == 2:
            mask = np.zeros(shape, bool)
            mask[random.integers(shape[0]), random.integers(shape[1])] = True
            mask ^= random.random() < 0.5
        else:
            mask = np.full(shape, random.random() < 0.5)
        masks.append(mask)
    return masks


def squared(values: np.ndarray | torch.Tensor) -> np.ndarray:
    """Distances as the exact integers they are roots of; infinity stays."""
    return np.rint(np.asarray(values, dtype=np.float64) ** 2)


@pytest.fixture(params=["numba", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(distance, "_opposite_distance", distance._opposite_distance_torch)
    return request.param


def test_thousands_of_masks(path):
    infinite = 0
    for mask in random_masks(0, 4000):
        result = distance_to_opposite(torch.from_numpy(mask))
        expected = reference(mask, np.ones_like(mask))
        assert np.array_equal(squared(result), squared(expected)), mask
        infinite += not np.isfinite(expected).any()
    assert infinite >= 1000  # the masks with one label


def test_ignored_pixels(path):
    random = np.random.default_rng(1)
    for mask in random_masks(2, 1000):
        valid = random.random(mask.shape) < random.choice([0.1, 0.5, 0.9])
        result = distance_to_opposite(torch.from_numpy(mask), torch.from_numpy(valid))
        assert np.array_equal(squared(result), squared(reference(mask, valid)))
        assert np.isinf(result.numpy()[~valid]).all()


def test_numba_roots_are_correctly_rounded():
    mask = np.random.default_rng(3).random((192, 256)) < 1e-3
    result = distance_to_opposite(torch.from_numpy(mask))
    assert result.dtype == torch.float32
    assert np.array_equal(result.numpy(), reference(mask, np.ones_like(mask)).astype(np.float32))


@pytest.mark.parametrize("shape", [(1024, 1024), (1, 4000), (300, 1)])
def test_large_images(shape):
    mask = np.zeros(shape, bool)
    mask[0, 0] = True
    result = distance_to_opposite(torch.from_numpy(mask))
    assert np.array_equal(squared(result), squared(reference(mask, np.ones_like(mask))))


def test_images_of_a_batch_do_not_meet(path):
    masks = np.random.default_rng(4).random((2, 3, 12, 17)) < 0.1
    masks[0, 1] = False
    masks[1, 2] = True
    valid = np.random.default_rng(5).random((2, 1, 12, 17)) < 0.8
    result = distance_to_opposite(torch.from_numpy(masks), torch.from_numpy(valid))
    assert result.shape == masks.shape
    for index in np.ndindex(2, 3):
        expected = reference(masks[index], valid[index[0], 0])
        assert np.array_equal(squared(result[index]), squared(expected))


def test_strided_mask():
    mask = torch.rand(3, 20, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    transposed = distance_to_opposite(mask.mT)
    assert torch.equal(transposed, distance_to_opposite(mask.mT.contiguous()))
    assert torch.equal(transposed, distance_to_opposite(mask).mT)


def test_an_empty_batch(path):
    assert distance_to_opposite(torch.zeros(0, 5, 6, dtype=torch.bool)).shape == (0, 5, 6)


@pytest.mark.parametrize("mask", [torch.zeros(4, 4), torch.zeros(4, dtype=torch.bool)])
def test_bad_input(mask):
    with pytest.raises(ValueError, match="boolean mask"):
        distance_to_opposite(mask)


def test_custom_op():
    labels = torch.randint(0, 3, (2, 6, 7), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.dermomamba.opposite_distance.default, (labels,))


WITHOUT_COMPILERS = """
import sys, warnings
sys.modules["triton"] = sys.modules["numba"] = None
from nnunetv2_dermomamba.loss import distance
with warnings.catch_warnings(record=True) as caught:
    assert distance._cuda_distance() is distance._opposite_distance_torch
assert "Triton is not installed" in str(caught[0].message)
"""


def test_import_needs_neither_triton_nor_numba():
    subprocess.run([sys.executable, "-c", WITHOUT_COMPILERS], check=True)


INTERPRETED = """
import torch
from nnunetv2_dermomamba.loss.distance import _opposite_distance
from nnunetv2_dermomamba.loss.distance_triton import opposite_distance
generator = torch.Generator().manual_seed(0)
for shape in [(1, 1, 1), (1, 1, 33), (2, 17, 1), (2, 5, 9), (1, 18, 70)]:
    for density, ignored in ((0, 0), (0.05, 0), (0.5, 0.3), (1, 0), (1, 0.3)):
        labels = (torch.rand(shape, generator=generator) < density).to(torch.uint8)
        labels[torch.rand(shape, generator=generator) < ignored] = 2
        assert torch.equal(opposite_distance(labels), _opposite_distance(labels)), (shape, density, ignored)

# The column pass stops where no row can be nearer: late, at once, and not before the end of the image.
labels = torch.zeros((5, 43, 30), dtype=torch.uint8)
labels[0, 0, 0] = 1
labels[1, 24, 20] = labels[1, 33, 1] = 1
labels[2, 10:20, 3:28] = 1
labels[3] = 1
labels[3, -1, 5:7] = 0
labels[4, ::2] = 1
holes = labels.clone()
holes[:, 8:33] = 255
sites = torch.full_like(labels, 255)[:3]
sites[0, 0, 0], sites[0, -1, -1] = 0, 1
sites[1, 3, 29], sites[1, 40, 29] = 1, 0
sites[2, 5], sites[2, 35] = 1, 1
for case in (labels, holes, sites):
    assert torch.equal(opposite_distance(case), _opposite_distance(case))
"""


@interpreted
def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment)


@pytest.mark.gpu
class TestCuda:
    def test_against_scipy(self):
        pytest.importorskip("triton")
        random = np.random.default_rng(6)
        for mask in [*random_masks(7, 2000), random.random((192, 256)) < 1e-3, random.random((1024, 1000)) < 1e-5]:
            result = distance_to_opposite(torch.from_numpy(mask).cuda()).cpu().numpy()
            assert np.array_equal(result, reference(mask, np.ones_like(mask)).astype(np.float32))

    def test_ignored_pixels_and_batches(self):
        pytest.importorskip("triton")
        mask = torch.rand(5, 100, 300) < 0.01
        valid = torch.rand(5, 100, 300) < 0.7
        assert torch.equal(distance_to_opposite(mask.cuda(), valid.cuda()).cpu(), distance_to_opposite(mask, valid))

    def test_no_synchronisation_and_graph_capture(self):
        pytest.importorskip("triton")
        masks = torch.rand(2, 4, 1, 192, 256, device="cuda") < 0.01
        mask = masks[0].clone()
        distance_to_opposite(mask)
        torch.cuda.set_sync_debug_mode("error")
        try:
            distance_to_opposite(mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = distance_to_opposite(mask)
        mask.copy_(masks[1])
        graph.replay()
        assert torch.equal(captured.cpu(), distance_to_opposite(masks[1].cpu()))
