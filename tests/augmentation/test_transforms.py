"""Every transform of a batch against batchgeneratorsv2's own, sample by sample, with the same parameters."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import (
    SpatialTransform,
    _convert_my_grid_to_grid_sample_grid,
    _create_centered_identity_grid2,
    create_affine_matrix_2d,
)
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from tolerances import FORWARD, relative_error

from nnunetv2_dermomamba.augmentation.blur import GaussianBlur, gaussian_kernels
from nnunetv2_dermomamba.augmentation.intensity import Brightness, Contrast, Gamma, GaussianNoise
from nnunetv2_dermomamba.augmentation.labels import DeepSupervisionTargets, MaskOutside, Regions, ReplaceLabel
from nnunetv2_dermomamba.augmentation.low_resolution import LowResolution, low_sizes
from nnunetv2_dermomamba.augmentation.parameters import scalar_sampler
from nnunetv2_dermomamba.augmentation.spatial import Mirror, RotateScaleCrop, affine_matrices, sample_labels

SHAPE = (4, 3, 37, 50)  # samples, channels, height, width
PLANES = np.array([0, 2, 4, 7, 11])
RESAMPLED = 1e-4
"""Of float32 coordinates of about 100 pixels, rounded differently, in white noise: 1e-5 pixels change it by 1e-5."""
TIES = 1e-3  # share of pixels in which rounding may settle a tie between two labels differently
UNUSED = scalar_sampler(1)


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def label_maps(shape: tuple[int, ...], highest: int = 2, seed: int = 1) -> torch.Tensor:
    """Blocks of labels -1 to ``highest``."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randint(-1, highest + 1, (*shape[:2], 5, 6), generator=random)
    return torch.nn.functional.interpolate(coarse.float(), shape[2:], mode="nearest").to(torch.int16)


def changed_planes(transform, **parameters) -> torch.Tensor:
    """Apply a transform of planes to ``PLANES`` of the images."""
    parameters = {name: torch.as_tensor(value) for name, value in parameters.items()}
    segmentation = label_maps((4, 1, 37, 50))
    result, unchanged = transform.apply(images(), segmentation, planes=torch.from_numpy(PLANES), **parameters)
    assert torch.equal(unchanged, label_maps((4, 1, 37, 50)))
    return result


def one_plane_each(transform, **parameters) -> torch.Tensor:
    """nnU-Net's transform on the same planes, one call each; parameters are lists over planes."""
    result = images()
    for n, plane in enumerate(PLANES):
        sample, channel = divmod(int(plane), SHAPE[1])
        own = {name: values[n] for name, values in parameters.items()}
        result[sample, channel] = transform._apply_to_image(result[sample, channel][None].clone(), **own)[0]
    return result


def test_noise():
    sigma = np.array([0.01, 0.05, 0.1, 0.2, 0.5], np.float32)
    noise = GaussianNoise(1, 1, UNUSED, True, torch.Generator().manual_seed(3))
    difference = (changed_planes(noise, sigma=sigma) - images()).view(-1, 37 * 50)
    torch.manual_seed(3)  # one stream of normal numbers, whichever way it is cut into planes
    theirs = GaussianNoiseTransform((0, 1), 1, False)
    parameters = {"num_apply": 5, "apply_idx": torch.arange(5), "sigmas": sigma}
    expected = theirs._apply_to_image(torch.zeros(5, 37, 50), **parameters).view(5, -1)
    assert relative_error(difference[PLANES], expected) <= FORWARD[torch.float32]
    assert torch.count_nonzero(difference.abs().sum(1)) == 5


def test_brightness():
    factor = np.array([0.75, 0.8, 1, 1.1, 1.25], np.float32)
    expected = one_plane_each(
        MultiplicativeBrightnessTransform((0, 1), False), apply_to_channel=[[0]] * 5, multipliers=factor[:, None]
    )
    result = changed_planes(Brightness(1, 1, UNUSED, False), factor=factor)
    assert relative_error(result, expected) <= FORWARD[torch.float32]


@pytest.mark.parametrize("preserve_range", [True, False])
def test_contrast(preserve_range):
    factor = np.array([0.75, 0.8, 1, 1.1, 1.25], np.float32)
    expected = one_plane_each(
        ContrastTransform((0, 1), preserve_range, False),
        apply_to_channel=[torch.tensor([0])] * 5,
        multipliers=torch.from_numpy(factor)[:, None],
    )
    result = changed_planes(Contrast(1, 1, UNUSED, False, preserve_range), factor=factor)
    assert relative_error(result, expected) <= FORWARD[torch.float32]


def test_gamma():
    gamma = np.array([0.7, 0.9, 1, 1.2, 1.5], np.float32)
    invert = np.array([True, False, True, False, True])
    retain = np.array([True, True, False, False, True])
    expected = one_plane_each(
        GammaTransform((0, 1), 1, False, 1, 1),
        apply_to_channel=[torch.tensor([0])] * 5,
        gamma=torch.from_numpy(gamma)[:, None],
        invert_image=torch.from_numpy(invert)[:, None],
        retain_stats=torch.from_numpy(retain)[:, None],
    )
    sign = np.where(invert, -1, 1).astype(np.float32)
    result = changed_planes(Gamma(1, 1, UNUSED, False, 1, 1), gamma=gamma, sign=sign, retain=retain.astype(np.float32))
    assert relative_error(result, expected) <= FORWARD[torch.float32]


def test_gamma_of_a_constant_plane_is_finite():
    image = torch.full(SHAPE, 2.0)
    one = torch.ones(12)
    result, _ = Gamma(1, 1, UNUSED, False, 1, 1).apply(
        image, torch.zeros(1), planes=torch.arange(12), gamma=0.7 * one, sign=one, retain=one
    )
    assert torch.equal(result, torch.full(SHAPE, 2.0))


def test_blur():
    sigma = np.array([[0.5, 1], [0.58, 0.59], [0.9, 0.91], [0.7, 0.6], [1, 1]], np.float32)
    expected = one_plane_each(
        GaussianBlurTransform(1, False, False, benchmark=False),
        apply_to_channel=[torch.tensor([True])] * 5,
        sigmas=[[[float(s) for s in pair]] for pair in sigma],
    )
    result = changed_planes(GaussianBlur(1, 1, UNUSED, False, False), kernels=gaussian_kernels(sigma))
    assert relative_error(result, expected) <= FORWARD[torch.float32]


def test_low_resolution():
    scale = np.array([[0.5, 0.5], [0.61, 0.61], [0.77, 0.93], [0.99, 0.99], [1, 1]], np.float32)
    expected = one_plane_each(
        SimulateLowResolutionTransform((0, 1), False, True, None),
        apply_to_channel=[[0]] * 5,
        scales=torch.from_numpy(scale)[:, None],
    )
    low_size = low_sizes(scale, torch.Size(SHAPE))
    result = changed_planes(LowResolution(1, 1, UNUSED, False, True), low_size=low_size)
    assert relative_error(result, expected) <= FORWARD[torch.float32]


def nnunet_spatial(patch_size, border_mode_seg="constant") -> SpatialTransform:
    return SpatialTransform(
        patch_size, 0, False, bg_style_seg_sampling=False, border_mode_seg=border_mode_seg, padding_value_seg=-1
    )


def nnunet_grid(angle, scale, patch_size, source) -> torch.Tensor:
    affine = create_affine_matrix_2d(angle, scale)
    grid = _create_centered_identity_grid2(patch_size).float() @ torch.from_numpy(affine.T).float()
    return _convert_my_grid_to_grid_sample_grid(grid, source)


@pytest.mark.parametrize(("source", "patch_size"), [((61, 61), (37, 50)), ((60, 77), (40, 51)), ((37, 50), (37, 50))])
def test_rotation_scaling_crop(source, patch_size):
    count = 6
    image = torch.randn(count, 3, *source, generator=torch.Generator().manual_seed(0))
    segmentation = label_maps((count, 1, *source))
    angle = np.array([0.3, -2.9, 0, 1.2])
    scale = np.array([[0.7, 0.7], [1.4, 1.4], [1.2, 0.8], [1, 1]])
    samples = [0, 2, 3, 5]

    theirs = nnunet_spatial(patch_size)
    expected_image, expected_segmentation = [], []
    for n in range(count):
        grid = None
        if n in samples:
            grid = nnunet_grid(angle[samples.index(n)], scale[samples.index(n)], patch_size, source)
        parameters = {"grid": grid, "center_location_in_pixels": [s / 2 for s in source]}
        expected_image.append(theirs._apply_to_image(image[n], **parameters))
        expected_segmentation.append(theirs._apply_to_segmentation(segmentation[n], **parameters))

    ours = RotateScaleCrop(patch_size, 0.2, UNUSED, 0.2, UNUSED, 1, [0, 1, 2], -1)
    affine = torch.from_numpy(affine_matrices(angle, scale).astype(np.float32))
    result, labels = ours.apply(image, segmentation, samples=torch.tensor(samples), affine=affine)
    assert relative_error(result, torch.stack(expected_image)) <= RESAMPLED
    assert labels.dtype == torch.int16
    assert (labels != torch.stack(expected_segmentation)).float().mean() <= TIES


@pytest.mark.parametrize("labels", [(0, 1), (0, 1, 2, 3, 7)])
@pytest.mark.parametrize("border", ["constant", "zeros"])
def test_labels_where_samples_fall_between_pixels(labels, border):
    """Shifts by half a pixel make ties everywhere along borders."""
    torch.manual_seed(0)
    segmentation = torch.tensor(labels, dtype=torch.int16)[torch.randint(len(labels), (1, 1, 20, 24))]
    rows, columns = torch.meshgrid(torch.arange(-2, 22) + 0.5, torch.arange(-2, 26) + 0.5, indexing="ij")
    grid = torch.stack([(columns + 0.5) / 12 - 1, (rows + 0.5) / 10 - 1], -1)
    theirs = nnunet_spatial((24, 28), border)
    expected = theirs._apply_to_segmentation(segmentation[0], grid=grid)
    padding = -1 if border == "constant" else 0
    result = sample_labels(segmentation, grid[None], sorted({*labels, padding}), padding)
    assert torch.equal(result[0], expected)


def test_mirror():
    image, segmentation = images(), label_maps((4, 1, 37, 50))
    axes = [[], [0], [1], [0, 1]]
    theirs = MirrorTransform((0, 1))
    expected_image = torch.stack([theirs._apply_to_image(i, axes=a) for i, a in zip(image, axes, strict=True)])
    expected = torch.stack([theirs._apply_to_segmentation(s, axes=a) for s, a in zip(segmentation, axes, strict=True)])
    result, labels = Mirror((0, 1)).apply(
        image.clone(), segmentation.clone(), axis0=torch.tensor([1, 3]), axis1=torch.tensor([2, 3])
    )
    assert torch.equal(result, expected_image)
    assert torch.equal(labels, expected)


def sample_by_sample(transform, image: torch.Tensor, segmentation: torch.Tensor) -> list[dict]:
    pairs = zip(image.clone(), segmentation.clone(), strict=True)
    return [transform(image=i, segmentation=s) for i, s in pairs]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (MaskOutside([0, 2], 0, 0.5), MaskImageTransform([0, 2], 0, 0.5)),
        (ReplaceLabel(-1, 0, None), RemoveLabelTansform(-1, 0)),
        (ReplaceLabel(2, 1, [1]), RemoveLabelTansform(2, 1, [1])),
        (Regions([[1, 2], [2], [0]], 0), ConvertSegmentationToRegionsTransform([(1, 2), 2, [0]])),
    ],
)
def test_labels(ours, theirs):
    image, segmentation = images(), label_maps((4, 2, 37, 50))
    expected = sample_by_sample(theirs, image, segmentation)
    result, labels = ours.apply(image.clone(), segmentation.clone())
    assert torch.equal(result, torch.stack([e["image"] for e in expected]))
    assert torch.equal(labels, torch.stack([e["segmentation"] for e in expected]))
    assert labels.dtype == expected[0]["segmentation"].dtype


@pytest.mark.parametrize("kind", [torch.int16, torch.bool])
def test_deep_supervision(kind):
    segmentation = label_maps((4, 2, 37, 50)).to(kind)
    theirs = DownsampleSegForDSTransform([[1, 1], [0.5, 0.5], [0.25, 0.5]])
    expected = [e["segmentation"] for e in sample_by_sample(theirs, images(), segmentation)]
    _, targets = DeepSupervisionTargets(theirs).apply(images(), segmentation)
    assert [t.shape for t in targets] == [(4, 2, 37, 50), (4, 2, 18, 25), (4, 2, 9, 25)]
    for n, target in enumerate(targets):
        assert torch.equal(target, torch.stack([e[n] for e in expected]))
        assert target.dtype == kind
