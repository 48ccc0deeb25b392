"""The random choices of both paths have one distribution: nnU-Net's own pipeline, drawn from many times each way."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy import stats
from tolerances import FORWARD, relative_error

from nnunetv2_dermomamba.augmentation.base import PlaneTransform
from nnunetv2_dermomamba.augmentation.blur import gaussian_kernels
from nnunetv2_dermomamba.augmentation.low_resolution import low_sizes
from nnunetv2_dermomamba.augmentation.parameters import UntranslatableTransformError, scalar_sampler
from nnunetv2_dermomamba.augmentation.translate import BatchAugmenter

DRAWS = 4000
SHAPE = (3, 64, 64)  # channels, height, width
P_VALUE = 1e-3  # seeds are fixed, so a test fails always or never
ROTATION = (-np.pi, np.pi)


@pytest.fixture(autouse=True)
def _seed():
    np.random.seed(0)
    torch.manual_seed(0)


def pipeline(**options):
    settings = {"deep_supervision_scales": None, "mirror_axes": (0, 1), "do_dummy_2d_data_aug": False} | options
    return nnUNetTrainer.get_training_transforms((4, 4), ROTATION, **settings)


def augmenter(transforms, labels=(-1, 0, 1), seed: int = 0) -> BatchAugmenter:
    return BatchAugmenter(transforms, labels, torch.device("cpu"), np.random.default_rng(seed))


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return stats.ks_2samp(ours, theirs).pvalue > P_VALUE


def same_frequencies(ours: np.ndarray, theirs: np.ndarray, categories: int) -> bool:
    """Of non-negative integers below ``categories``; categories that never occur must do so in both."""
    table = np.array([np.bincount(ours, minlength=categories), np.bincount(theirs, minlength=categories)])
    table = table[:, table.any(0)]
    return table.shape[1] == 1 or stats.chi2_contingency(table).pvalue > P_VALUE


def their_noise(parameters: dict) -> dict:
    return {"changed": parameters["apply_idx"], "sigma": np.full(parameters["num_apply"], parameters["sigmas"])}


def their_blur(parameters: dict) -> dict:
    sigma = np.array(parameters["sigmas"]).reshape(-1, 2)
    kernels = gaussian_kernels(np.concatenate([sigma, [[1, 1]]]))[:-1]  # as wide as the widest
    return {"changed": np.flatnonzero(parameters["apply_to_channel"]), "kernels": kernels}


def their_factor(parameters: dict) -> dict:
    return {"changed": parameters["apply_to_channel"], "factor": parameters["multipliers"]}


def their_scale(parameters: dict) -> dict:
    low_size = low_sizes(parameters["scales"].numpy().reshape(-1, 2), torch.Size(SHAPE))
    return {"changed": parameters["apply_to_channel"], "low_size": low_size}


def their_gamma(parameters: dict) -> dict:
    sign = np.where(parameters["invert_image"], -1, 1)
    return {
        "changed": parameters["apply_to_channel"],
        "gamma": parameters["gamma"],
        "sign": sign,
        "retain": parameters["retain_stats"].float(),
    }


READERS: dict[str, Callable[[dict], dict]] = {
    "GaussianNoiseTransform": their_noise,
    "GaussianBlurTransform": their_blur,
    "MultiplicativeBrightnessTransform": their_factor,
    "ContrastTransform": their_factor,
    "SimulateLowResolutionTransform": their_scale,
    "GammaTransform": their_gamma,
}


def their_draws(transform: RandomTransform) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Channels changed in each of ``DRAWS`` samples, and the parameters of all changed channels."""
    read = READERS[type(transform.transform).__name__]
    image = torch.zeros(SHAPE)
    counts, values = np.zeros(DRAWS, int), []
    for n in range(DRAWS):
        if transform.get_parameters()["apply_transform"]:
            drawn = read(transform.transform.get_parameters(image=image))
            counts[n] = len(drawn.pop("changed"))
            if counts[n]:
                values.append({name: np.asarray(value) for name, value in drawn.items()})
    return counts, {name: np.concatenate([v[name] for v in values]) for name in values[0]}


@pytest.mark.parametrize("n", range(7))
def test_planes(n):
    theirs = [t for t in pipeline().transforms if isinstance(t, RandomTransform)]
    ours = [t for t in augmenter(pipeline()).transforms if isinstance(t, PlaneTransform)]
    assert len(theirs) == len(ours) == 7
    their_counts, their_values = their_draws(theirs[n])
    values = ours[n].draw(np.random.default_rng(1), torch.Size((DRAWS, *SHAPE)))
    counts = np.bincount(values.pop("planes") // SHAPE[0], minlength=DRAWS)
    assert same_frequencies(counts, their_counts, SHAPE[0] + 1)
    assert values.keys() == their_values.keys()
    for name, value in values.items():
        columns = zip(
            value.reshape(len(value), -1).T, their_values[name].reshape(len(their_values[name]), -1).T, strict=True
        )
        assert all(same_distribution(*column) for column in columns), name


def test_channels_share_what_is_synchronized():
    noise = augmenter(pipeline()).transforms[1]
    drawn = noise.draw(np.random.default_rng(0), torch.Size((200, *SHAPE)))
    assert drawn["sigma"].size > 0
    assert (drawn["sigma"].reshape(-1, 3) == drawn["sigma"].reshape(-1, 3)[:, :1]).all()
    brightness = augmenter(pipeline()).transforms[3].draw(np.random.default_rng(0), torch.Size((200, *SHAPE)))
    assert len(np.unique(brightness["factor"])) == brightness["factor"].size


def test_spatial():
    theirs = pipeline().transforms[0]
    draws = [theirs.get_parameters(image=torch.zeros(3, 4, 4))["affine"] for _ in range(DRAWS)]
    their_matrices = np.array([a for a in draws if a is not None])
    ours = augmenter(pipeline()).transforms[0].draw(np.random.default_rng(1), torch.Size((DRAWS, 3, 4, 4)))
    changed = np.zeros(DRAWS, int)
    changed[ours["samples"]] = 1
    assert same_frequencies(changed, np.array([a is not None for a in draws], int), 2)

    def angle_and_scale(matrices):
        return np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]), np.linalg.norm(matrices, axis=1)

    angle, scale = angle_and_scale(ours["affine"])
    their_angle, their_scale = angle_and_scale(their_matrices)
    assert same_distribution(angle[angle != 0], their_angle[their_angle != 0])
    assert same_frequencies(np.int64(angle != 0), np.int64(their_angle != 0), 2)
    scaled, their_scaled = abs(scale[:, 0] - 1) > 1e-6, abs(their_scale[:, 0] - 1) > 1e-6
    assert same_frequencies(np.int64(scaled), np.int64(their_scaled), 2)
    assert same_distribution(scale[scaled, 0], their_scale[their_scaled, 0])
    np.testing.assert_allclose(scale[:, 0], scale[:, 1], rtol=1e-6)  # synchronized


def test_mirror():
    transforms = pipeline(mirror_axes=(0, 1)).transforms
    theirs = np.array([sum(1 << a for a in transforms[8].get_parameters()["axes"]) for _ in range(DRAWS)])
    drawn = augmenter(pipeline()).transforms[8].draw(np.random.default_rng(1), torch.Size((DRAWS, 3, 4, 4)))
    ours = np.zeros(DRAWS, int)
    ours[drawn["axis0"]] += 1
    ours[drawn["axis1"]] += 2
    assert same_frequencies(ours, theirs, 4)


@pytest.mark.parametrize("source", [0.3, (0.5, 1.0), BGContrast((0.75, 1.25)), BGContrast((1.1, 1.5))])
def test_scalars(source):
    from batchgeneratorsv2.helpers.scalar_type import sample_scalar

    theirs = np.array([sample_scalar(source) for _ in range(DRAWS)])
    ours = scalar_sampler(source)(np.random.default_rng(0), (DRAWS,))
    assert ours.dtype == np.float32
    assert np.allclose(ours, theirs) if isinstance(source, float) else same_distribution(ours, theirs)


def test_seed_decides_everything():
    image, segmentation = torch.rand(8, 3, 6, 6), torch.randint(0, 2, (8, 1, 6, 6), dtype=torch.int16)
    results = [augmenter(pipeline(), seed=s)(image.clone(), segmentation.clone()) for s in (5, 5, 6)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_what_cannot_be_translated_is_named():
    transforms = pipeline()
    transforms.transforms[0].p_elastic_deform = 0.5
    with pytest.raises(UntranslatableTransformError, match=r"SpatialTransform with p_elastic_deform=0\.5"):
        augmenter(transforms)
    transforms = pipeline()
    transforms.transforms[1].transform.noise_variance = lambda *args: 0.1
    with pytest.raises(UntranslatableTransformError, match="draw many values"):
        augmenter(transforms)

    class MyTransform(RandomTransform):
        pass

    transforms.transforms = [MyTransform(transforms.transforms[2])]
    with pytest.raises(UntranslatableTransformError, match="MyTransform"):
        augmenter(transforms)
    with pytest.raises(UntranslatableTransformError, match="synchronize_channels=True"):
        augmenter(RandomTransform(BrightnessAdditiveTransform(0, 1, synchronize_channels=True), 0.5))


def batch_of_lesions(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dark ellipses on noise, framed as nnU-Net's loader pads patches to the size that rotation needs."""
    random = np.random.default_rng(0)
    image = np.zeros((count, 3, 64, 64), np.float32)
    segmentation = np.full((count, 1, 64, 64), -1, np.int16)
    rows, columns = np.mgrid[:40, :48]
    for n in range(count):
        mask = np.hypot((rows - 20) / random.uniform(4, 12), (columns - 24) / random.uniform(4, 14)) < 1
        image[n, :, 12:52, 8:56] = random.normal(0.5, 0.3, (3, 40, 48)) - 1.5 * mask
        segmentation[n, 0, 12:52, 8:56] = mask
    return torch.from_numpy(image), torch.from_numpy(segmentation)


def statistics(image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, np.ndarray]:
    """One number a sample each."""
    lesion = (segmentation == 1).expand_as(image)
    differences = (image[..., 1:] - image[..., :-1]).abs()
    return {
        "mean": image.mean((1, 2, 3)).numpy(),
        "standard deviation": image.std((1, 2, 3)).numpy(),
        "minimum": image.amin((1, 2, 3)).numpy(),
        "roughness": differences.mean((1, 2, 3)).numpy(),
        "lesion": lesion.float().mean((1, 2, 3)).numpy(),
        "contrast": ((image * lesion).sum((1, 2, 3)) / lesion.sum((1, 2, 3)).clamp(min=1)).numpy(),
    }


def test_whole_pipeline():
    count = 1200
    transforms = nnUNetTrainer.get_training_transforms((40, 48), ROTATION, None, (0, 1), False)
    image, segmentation = batch_of_lesions(count)
    pairs = zip(image.clone(), segmentation.clone(), strict=True)
    samples = [transforms(image=i, segmentation=s) for i, s in pairs]
    theirs = statistics(*(torch.stack([s[name] for s in samples]) for name in ("image", "segmentation")))
    ours = statistics(*augmenter(transforms, seed=1)(image, segmentation))
    for name in theirs:
        assert same_distribution(ours[name], theirs[name]), name


def test_low_resolution_is_a_share_of_the_cropped_patch():
    spatial = pipeline().transforms[0]
    spatial.patch_size, spatial.p_rotation, spatial.p_scaling = (40, 48), 0, 0
    transforms = ComposeTransforms([spatial, SimulateLowResolutionTransform(0.5, False, True, None)])
    image, segmentation = batch_of_lesions(4)
    expected = torch.stack([transforms(image=i.clone(), segmentation=segmentation[0])["image"] for i in image])
    result, _ = augmenter(transforms)(image, segmentation)
    assert relative_error(result, expected) <= FORWARD[torch.float32]


@pytest.mark.gpu
def test_device_never_waits():
    device = torch.device("cuda")
    options = {"deep_supervision_scales": [[1, 1], [0.5, 0.5]], "regions": ((1, 2), 2), "use_mask_for_norm": [True] * 3}
    transforms = nnUNetTrainer.get_training_transforms(
        (40, 48), ROTATION, mirror_axes=(0, 1), do_dummy_2d_data_aug=False, **options
    )
    augment = BatchAugmenter(transforms, (-1, 0, 1, 2), device, np.random.default_rng(0))
    image, segmentation = (t.to(device) for t in batch_of_lesions(16))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            augment(image.clone(), segmentation.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_device_computes_what_the_host_does():
    transforms = nnUNetTrainer.get_training_transforms((40, 48), ROTATION, None, (0, 1), False)
    transforms.transforms = [t for t in transforms.transforms if "Noise" not in repr(t)]  # another generator there
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        augment = BatchAugmenter(transforms, (-1, 0, 1), device, np.random.default_rng(2))
        image, segmentation = (t.to(device) for t in batch_of_lesions(64))
        results.append([t.cpu() for t in augment(image, segmentation)])
    (image, labels), (device_image, device_labels) = results
    assert (device_image - image).norm() <= 1e-4 * image.norm()  # coordinates of sampling points, rounded differently
    assert (device_labels != labels).float().mean() <= 1e-3  # ties
