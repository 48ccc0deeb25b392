import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from scipy.ndimage import distance_transform_edt
from tolerances import FORWARD, GRADIENT, relative_error

from nnunetv2_dermomamba.loss import GuideFusionLoss, attention_map, guide_fusion, guide_fusion_loss

IGNORE = 9
SMOOTH = 1e-5
HEIGHT, WIDTH = 10, 13

CASES = [
    {"attention": attention, "regions": regions, "ignore_label": ignore, "batch_dice": batch_dice}
    for attention, regions, ignore, batch_dice in itertools.product(
        ("scalar", "pixel"), (False, True), (None, IGNORE), (False, True)
    )
]


def case_id(case: dict) -> str:
    names = [case["attention"], "regions" if case["regions"] else "softmax"]
    return "-".join(names + [key for key in ("ignore_label", "batch_dice") if case[key]])


all_cases = pytest.mark.parametrize("case", CASES, ids=case_id)
ignoring_cases = pytest.mark.parametrize("case", [case for case in CASES if case["ignore_label"]], ids=case_id)


def make_target(channels: int, regions: bool, ignore_label: int | None, batch: int = 4, seed: int = 0) -> torch.Tensor:
    """nnU-Net's target: the first image all background, the second all foreground, the last ignored if it can be."""
    random = np.random.default_rng(seed)
    ignored = random.random((batch, 1, HEIGHT, WIDTH)) < 0.2
    ignored[-1] = batch > 1
    if regions:
        smooth_noise = distance_transform_edt(random.random((batch * channels, HEIGHT, WIDTH)) < 0.9)
        target = smooth_noise.reshape(batch, channels, HEIGHT, WIDTH) > 1.5
        target[0] = False
        target[1:2] = True
        if ignore_label is not None:
            target = np.concatenate([target, ignored], 1)
        return torch.from_numpy(target)
    target = random.integers(0, channels, (batch, 1, HEIGHT, WIDTH))
    target[0] = 0
    target[1:2] = 1
    if ignore_label is not None:
        target[ignored] = ignore_label
    return torch.from_numpy(target).to(torch.int16)


def make_logits(channels: int, batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, channels, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_()


def attention_of_image(mask: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """1 / (1 + D) of one image and class; zero at ignored pixels and where one of the labels is missing."""
    foreground, background = mask & valid, ~mask & valid
    attention = np.zeros(mask.shape, np.float32)
    if foreground.any() and background.any():
        distance = np.where(mask, distance_transform_edt(~background), distance_transform_edt(~foreground))
        attention[valid] = (1 / (1 + distance.astype(np.float32)))[valid]
    return attention


def twin(logits, target, *, attention, regions, ignore_label, batch_dice):
    """The formula of the docstring, one image and one class at a time, in float64."""
    batch, channels = logits.shape[:2]
    if regions:
        ignored = target[:, -1].bool() if ignore_label is not None else torch.zeros_like(target[:, 0]).bool()
        masks = target[:, :channels].bool()
        probability = 1 / (1 + (-logits).exp())
    else:
        ignored = target[:, 0] == ignore_label if ignore_label is not None else torch.zeros_like(target[:, 0]).bool()
        masks = torch.stack([target[:, 0] == label for label in range(1, channels)], 1)
        softmax = logits.exp() / logits.exp().sum(1, keepdim=True)
        probability = softmax[:, 1:]
    classes = masks.shape[1]

    cross_entropy_sum, number = 0.0, 0
    sums = torch.zeros(batch, classes, 3, dtype=torch.float64)
    means = torch.zeros(batch, classes, dtype=torch.float64)
    for i in range(batch):
        valid = ~ignored[i]
        if not valid.any():
            continue
        weights = []
        for k in range(classes):
            guide = attention_of_image(masks[i, k].numpy(), valid.numpy()).astype(np.float64)
            mean = guide[valid.numpy()].mean()
            means[i, k] = mean
            uniform = attention == "scalar" or mean == 0
            weights.append(np.ones(guide.shape) if uniform else guide / mean)
        for k in range(classes):
            w = torch.from_numpy(weights[k])[valid]
            p, g = probability[i, k][valid], masks[i, k][valid].double()
            sums[i, k] = torch.stack([(w * p * g).sum(), (w * p).sum(), (w * g).sum()])
            if regions:
                cross_entropy_sum = cross_entropy_sum - (w * (g * p.log() + (1 - g) * (1 - p).log())).sum()
                number += len(p)
        if not regions:
            w = torch.from_numpy(np.mean(weights, 0))[valid]
            label = target[i, 0].long().clamp_max(channels - 1)
            p = softmax[i].gather(0, label[None])[0][valid]
            cross_entropy_sum = cross_entropy_sum - (w * p.log()).sum()
            number += len(p)

    if batch_dice:
        sums, means = sums.sum(0), means.mean(0)
    intersection, predicted, labelled = sums.unbind(-1)
    dice = 1 - (2 * intersection + SMOOTH) / (predicted + labelled + SMOOTH)
    return cross_entropy_sum / number, (means * dice).mean()


@pytest.fixture
def uniform_map(monkeypatch):
    """A = 1 / 4 at every valid pixel."""

    def distance(mask, valid=None):
        everywhere = torch.full(mask.shape, 3.0)
        return everywhere if valid is None else torch.where(valid, everywhere, torch.inf)

    monkeypatch.setattr(guide_fusion, "distance_to_opposite", distance)
    return 0.25


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@all_cases
def test_equals_the_twin(case, channels, dtype):
    target = make_target(channels, case["regions"], case["ignore_label"])
    logits = make_logits(channels)
    expected = twin(logits, target, **case)
    result_logits = logits.detach().to(dtype).requires_grad_()
    result = guide_fusion_loss(result_logits, target, **case)
    for part, expected_part in zip(result, expected, strict=True):
        assert part.dtype == dtype
        assert expected_part > 0
        assert relative_error(part, expected_part.detach()) <= FORWARD[dtype]
        gradient = torch.autograd.grad(part, result_logits, retain_graph=True)[0]
        expected_gradient = torch.autograd.grad(expected_part, logits, retain_graph=True)[0]
        assert relative_error(gradient, expected_gradient) <= GRADIENT[dtype]


def test_one_sigmoid_logit_is_the_released_arithmetic():
    """mean_i(BCE + Dice * A_i) on a batch of images that all hold a lesion."""
    target = make_target(1, True, None)[2:]
    logits = make_logits(1)[2:]
    expected = []
    for x, g in zip(logits[:, 0], target[:, 0], strict=True):
        p = x.sigmoid()
        dice = 1 - (2 * (p * g).sum() + SMOOTH) / (p.sum() + g.sum() + SMOOTH)
        guide = float(attention_of_image(g.numpy(), np.ones(g.shape, bool)).astype(np.float64).mean())
        expected.append(torch.nn.functional.binary_cross_entropy(p, g.double()) + dice * guide)
    result = sum(guide_fusion_loss(logits, target, attention="scalar", regions=True))
    assert relative_error(result, torch.stack(expected).mean().detach()) <= FORWARD[torch.float64]


@all_cases
def test_gradcheck(case):
    target = make_target(3, case["regions"], case["ignore_label"])[..., :4, :5]
    logits = make_logits(3).detach()[..., :4, :5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(guide_fusion_loss(x, target, **case)), (logits,))


@all_cases
def test_uniform_map_gives_nnunet_losses(case, uniform_map):
    """Both forms are then nnU-Net's cross entropy plus A (1 + nnU-Net's negative Dice)."""
    channels = 3
    target = make_target(channels, case["regions"], case["ignore_label"])
    logits = make_logits(channels, dtype=torch.float32)
    if case["ignore_label"] is not None:
        target[-1] = target[-2]  # in an image with nothing but ignored pixels the mean of A is 0
    dice_options = {"batch_dice": case["batch_dice"], "do_bg": case["regions"], "smooth": SMOOTH, "ddp": False}
    options = {"weight_ce": 1, "weight_dice": uniform_map, "dice_class": MemoryEfficientSoftDiceLoss}
    if case["regions"]:
        theirs = DC_and_BCE_loss({}, dice_options, use_ignore_label=case["ignore_label"] is not None, **options)
        if case["ignore_label"] is not None:
            theirs.weight_ce = 1 / channels  # they sum over the regions here and average elsewhere
    else:
        theirs = DC_and_CE_loss(dice_options, {}, ignore_label=case["ignore_label"], **options)
    expected = theirs(logits, target) + uniform_map
    result = sum(guide_fusion_loss(logits, target, **case))
    assert relative_error(result, expected.detach()) <= FORWARD[torch.float32]


def test_attention_map():
    mask = torch.zeros(2, 1, 3, 5, dtype=torch.bool)
    mask[0, 0, 1, 2] = True
    expected = torch.tensor(
        [
            [1 / (1 + 5**0.5), 1 / (1 + 2**0.5), 1 / 2, 1 / (1 + 2**0.5), 1 / (1 + 5**0.5)],
            [1 / 3, 1 / 2, 1 / 2, 1 / 2, 1 / 3],
            [1 / (1 + 5**0.5), 1 / (1 + 2**0.5), 1 / 2, 1 / (1 + 2**0.5), 1 / (1 + 5**0.5)],
        ]
    )
    result = attention_map(mask)
    assert relative_error(result[0, 0], expected) <= FORWARD[torch.float32]
    assert not result[1].any()
    assert not attention_map(~mask[1:]).any()


@pytest.mark.parametrize("attention", ["scalar", "pixel"])
@pytest.mark.parametrize("label", [0, 1])
def test_one_label_leaves_the_cross_entropy(attention, label):
    target = torch.full((2, 1, HEIGHT, WIDTH), label)
    logits = make_logits(2, batch=2)
    parts = guide_fusion_loss(logits, target, attention=attention)
    assert parts.attention_dice == 0
    expected = torch.nn.functional.cross_entropy(logits.detach(), target[:, 0])
    assert relative_error(parts.cross_entropy, expected) <= FORWARD[torch.float64]


@pytest.mark.parametrize("batch_dice", [False, True])
def test_images_of_a_batch_do_not_meet(batch_dice):
    """Without batch_dice the loss of a batch is the mean of its images'; with it the map still is the images'."""
    target, logits = make_target(2, False, None), make_logits(2)
    for attention in ("scalar", "pixel"):
        whole = guide_fusion_loss(logits, target, attention=attention, batch_dice=batch_dice)
        single = [
            guide_fusion_loss(logits[i : i + 1], target[i : i + 1], attention=attention, batch_dice=batch_dice)
            for i in range(4)
        ]
        cross_entropy = torch.stack([parts.cross_entropy for parts in single]).mean()
        attention_dice = torch.stack([parts.attention_dice for parts in single]).mean()
        assert relative_error(whole.cross_entropy, cross_entropy.detach()) <= FORWARD[torch.float64]
        assert (relative_error(whole.attention_dice, attention_dice.detach()) <= FORWARD[torch.float64]) != batch_dice


@ignoring_cases
def test_ignored_pixels_contribute_nothing(case):
    target, logits = make_target(3, case["regions"], IGNORE), make_logits(3)
    ignored = target[:, -1:].bool() if case["regions"] else target == IGNORE
    sum(guide_fusion_loss(logits, target, **case)).backward()
    assert not logits.grad[ignored.expand_as(logits)].any()
    assert logits.grad[~ignored.expand_as(logits)].all()
    other = torch.where(ignored, -3 * logits.detach(), logits.detach())
    if case["regions"]:
        target = torch.cat([target[:, :-1] ^ ignored, target[:, -1:]], 1)
    for part, other_part in zip(
        guide_fusion_loss(logits, make_target(3, case["regions"], IGNORE), **case),
        guide_fusion_loss(other, target, **case),
        strict=True,
    ):
        assert torch.equal(part, other_part)


@ignoring_cases
def test_everything_ignored(case):
    logits = make_logits(2)
    target = make_target(2, case["regions"], IGNORE)
    if case["regions"]:
        target[:, -1] = True
    else:
        target[:] = IGNORE
    loss = sum(guide_fusion_loss(logits, target, **case))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("attention", ["scalar", "pixel"])
def test_half_precision_logits(dtype, regions, attention):
    target, logits = make_target(2, regions, None), make_logits(2, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        parts = guide_fusion_loss(logits, target, attention=attention, regions=regions)
    exact = guide_fusion_loss(logits.double(), target, attention=attention, regions=regions)
    for part, exact_part in zip(parts, exact, strict=True):
        assert part.dtype == torch.float32
        assert relative_error(part, exact_part.detach()) <= FORWARD[torch.float32]
    sum(parts).backward()
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@all_cases
def test_extreme_logits_stay_finite(case, dtype):
    target = make_target(2, case["regions"], case["ignore_label"])
    logits = (make_logits(2, dtype=dtype).detach().sign() * 1e4).requires_grad_()
    loss = sum(guide_fusion_loss(logits, target, **case))
    loss.backward()
    assert 1e3 < loss < 1e5
    assert logits.grad.isfinite().all()
    assert logits.grad.any()


@all_cases
def test_compiles_without_a_break(case):
    torch._dynamo.reset()
    target, logits = make_target(3, case["regions"], case["ignore_label"]), make_logits(3, dtype=torch.float32)
    loss = GuideFusionLoss(**case)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = loss(logits, target)
    gradient = torch.autograd.grad(expected, logits)[0]
    parts = loss.parts
    result = compiled(logits, target)
    assert relative_error(result, expected.detach()) <= FORWARD[torch.float32]
    assert relative_error(torch.autograd.grad(result, logits)[0], gradient) <= GRADIENT[torch.float32]
    for part, compiled_part in zip(parts, loss.parts, strict=True):
        assert relative_error(compiled_part, part) <= FORWARD[torch.float32]


def test_module_keeps_its_parts():
    loss = GuideFusionLoss("pixel", batch_dice=True)
    assert loss.parts is None
    target, logits = make_target(2, False, None), make_logits(2)
    value = loss(logits, target)
    assert torch.equal(sum(loss.parts), value)
    assert not any(part.requires_grad for part in loss.parts)
    assert not loss.state_dict()


def test_validation_leaves_the_parts_of_training():
    loss = GuideFusionLoss("pixel", batch_dice=True)
    target, logits = make_target(2, False, None), make_logits(2)
    loss(logits, target)
    parts = loss.parts
    with torch.no_grad():
        loss(2 * logits, target)
    assert loss.parts is parts


@pytest.mark.parametrize("ignore_label", [None, -1, 1, 255])
def test_softmax_cross_entropy_is_nll_loss(ignore_label):
    """To the bit, with its gradient, whatever the ignored pixels' label and where a logit is infinite."""
    target, logits = make_target(3, False, None), make_logits(3).detach()
    if ignore_label is not None:
        target[:, :, ::2] = ignore_label
        logits[:, :2, ::4] = -torch.inf
    logits.requires_grad_()
    result = guide_fusion._softmax_terms(logits, target, ignore_label)[0]
    expected = torch.nn.functional.nll_loss(
        logits.log_softmax(1),
        target[:, 0].long(),
        ignore_index=-100 if ignore_label is None else ignore_label,
        reduction="none",
    )[:, None]
    assert torch.equal(result, expected)
    weight = torch.rand_like(expected)
    gradients = [torch.autograd.grad(term, logits, weight)[0] for term in (result, expected)]
    assert torch.equal(*gradients)
    if ignore_label is not None:
        assert not result[:, :, ::2].any()
        assert not gradients[0][:, :, ::2].any()


def test_target_may_be_float():
    target, logits = make_target(3, False, IGNORE), make_logits(3)
    for case in (CASES[2], CASES[10]):
        assert guide_fusion_loss(logits, target.float(), **case) == guide_fusion_loss(logits, target, **case)


@pytest.mark.parametrize(
    ("logits", "target", "options", "message"),
    [
        ((2, 2, 4, 4, 4), (2, 1, 4, 4, 4), {}, "2D logits"),
        ((2, 2, 4, 4), (2, 2, 4, 4), {}, "1 channel"),
        ((2, 2, 4, 4), (2, 1, 4, 5), {}, "target"),
        ((2, 1, 4, 4), (2, 1, 4, 4), {}, "softmax over one channel"),
        ((2, 2, 4, 4), (2, 2, 4, 4), {"regions": True, "ignore_label": 3}, "3 channel"),
        ((2, 2, 4, 4), (2, 1, 4, 4), {"attention": "none"}, "'scalar' or 'pixel'"),
    ],
)
def test_bad_input(logits, target, options, message):
    with pytest.raises(ValueError, match=message):
        guide_fusion_loss(torch.zeros(logits), torch.zeros(target), **options)


def _process(rank: int, rendezvous: str) -> None:
    """Three images on one process, two on the other, against all five: the mean of the losses, and the gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    here = slice(0, 3) if rank == 0 else slice(3, 5)
    for case in CASES:
        logits = make_logits(3, batch=5)
        target = make_target(3, case["regions"], case["ignore_label"], batch=5)
        expected = torch.stack(guide_fusion_loss(logits, target, **case))
        gradient = torch.autograd.grad(expected.sum(), logits)[0][here]
        local = logits.detach()[here].requires_grad_()
        result = torch.stack(guide_fusion_loss(local, target[here], ddp=True, **case))
        local_gradient = torch.autograd.grad(result.sum(), local)[0] / 2  # DDP averages over the processes
        mean = result.detach()
        torch.distributed.all_reduce(mean)
        for part in (0, 1):
            assert expected[part] > 0
            assert relative_error(mean[part] / 2, expected[part].detach()) <= FORWARD[torch.float64]
        assert relative_error(local_gradient, gradient) <= GRADIENT[torch.float64]
    torch.distributed.destroy_process_group()


def test_two_processes_equal_the_joint_batch(tmp_path):
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    commands = [[sys.executable, __file__, str(rank), str(tmp_path / "rendezvous")] for rank in (0, 1)]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


@pytest.mark.gpu
@all_cases
class TestCuda:
    def test_equals_the_cpu_without_synchronisation(self, case):
        target, logits = make_target(3, case["regions"], case["ignore_label"]), make_logits(3, dtype=torch.float32)
        loss = GuideFusionLoss(**case)
        expected = loss(logits, target)
        gradient = torch.autograd.grad(expected, logits)[0]
        device_logits, device_target = logits.detach().cuda().requires_grad_(), target.cuda()
        loss(device_logits, device_target).backward()
        device_logits.grad = None
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast("cuda"):
                result = loss(device_logits, device_target)
            result.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert relative_error(result.cpu(), expected.detach()) <= FORWARD[torch.float32]
        assert relative_error(device_logits.grad.cpu(), gradient) <= GRADIENT[torch.float32]

    def test_compiles_without_a_break(self, case):
        torch._dynamo.reset()
        target, logits = make_target(3, case["regions"], case["ignore_label"]), make_logits(3, dtype=torch.float32)
        expected = GuideFusionLoss(**case)(logits, target)
        compiled = torch.compile(GuideFusionLoss(**case), fullgraph=True)
        result = compiled(logits.detach().cuda().requires_grad_(), target.cuda())
        result.backward()
        assert relative_error(result.cpu(), expected.detach()) <= FORWARD[torch.float32]


if __name__ == "__main__":  # one of the two processes of test_two_processes_equal_the_joint_batch
    _process(int(sys.argv[1]), sys.argv[2])
    # All is asserted. Threads of PyTorch's can abort an interpreter that ends ("terminate called without an active
    # exception", once in many runs), so it does not.
    os._exit(0)
