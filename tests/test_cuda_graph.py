"""On a GPU: a captured or compiled step trains as a plain one does, and an overflow in float16 costs no weights."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_dermomamba.cuda_graph import WARM_UP, CapturedPass
from nnunetv2_dermomamba.loss import GuideFusionLoss
from nnunetv2_dermomamba.network import DermoMamba
from nnunetv2_dermomamba.trainers.optimization import build_adamw

pytestmark = pytest.mark.gpu


class Training:
    """A small DermoMamba's steps under fp16 autocast, captured or not."""

    def __init__(self, captures: bool) -> None:
        torch.manual_seed(0)
        self.network = DermoMamba(3, 2, (64, 64)).cuda()
        self.optimizer = build_adamw(self.network, 1e-3, 1e-2, torch.device("cuda"))
        self.scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        self.loss = GuideFusionLoss(batch_dice=True)
        self.captured_pass = CapturedPass(self.forward_backward) if captures else None

    def forward_backward(self, data: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda"):
            value = self.loss(self.network(data), target)
        self.scaler.scale(value).backward()
        return value

    def step(self, data: Tensor, target: Tensor) -> float:
        value = (self.captured_pass or self.forward_backward)(data, target)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(value.detach())


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Noise, brighter on the lesion: a square of a side of its own."""
    rng = torch.Generator().manual_seed(seed)
    target = torch.zeros(4, 1, 64, 64, dtype=torch.int16)
    target[..., 8 : 24 + seed, 8 : 24 + seed] = 1
    return (torch.randn(4, 3, 64, 64, generator=rng) + target).cuda(), target.cuda()


def test_captured_steps_train_as_plain_ones() -> None:
    plain, captured = Training(False), Training(True)
    losses = [[training.step(*batch(seed)) for seed in range(WARM_UP + 12)] for training in (plain, captured)]
    assert captured.captured_pass is not None
    assert captured.captured_pass.captured
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.02)  # float16 sums in another order
    assert losses[1][-1] < losses[1][0]


def test_the_losss_parts_are_the_steps_own_after_a_validation() -> None:
    training = Training(True)
    for seed in range(WARM_UP + 2):
        training.step(*batch(seed))
    for seed in range(4):
        with torch.no_grad(), torch.autocast("cuda"):  # as nnU-Net validates
            training.loss(training.network(batch(9)[0]), batch(9)[1])
        value = training.step(*batch(seed))
        torch.testing.assert_close(float(sum(training.loss.parts)), value, rtol=1e-6, atol=0)


def test_a_validation_in_the_steps_own_memory() -> None:
    """Neither sees what the other one left there."""
    plain, captured = Training(False), Training(True)
    validation = CapturedPass(captured.network, shares=captured.captured_pass)
    for seed in range(WARM_UP + 8):
        data, target = batch(seed)
        losses = [training.step(data, target) for training in (plain, captured)]
        torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.02)
        captured.network.eval()
        with torch.no_grad(), torch.autocast("cuda"):
            torch.testing.assert_close(validation(data), captured.network(data), rtol=1e-3, atol=1e-3)
        captured.network.train()
    assert captured.captured_pass is not None
    assert captured.captured_pass.graph is not None
    assert validation.graph is not None
    assert validation.graph.pool() == captured.captured_pass.graph.pool()


@pytest.mark.parametrize("captures", [False, True])
def test_an_overflow_costs_one_step_and_no_weights(captures: bool) -> None:
    training = Training(captures)
    for seed in range(WARM_UP + 2):
        training.step(*batch(seed))
    weights = [parameter.detach().clone() for parameter in training.network.parameters()]
    data, target = batch(0)
    data[0, 0, 0, 0] = torch.inf
    training.step(data, target)
    assert training.scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(weights, training.network.parameters(), strict=True))
    training.step(*batch(1))
    assert all(torch.isfinite(parameter).all() for parameter in training.network.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(weights, training.network.parameters(), strict=True))


def waits(value: Tensor) -> None:
    float(value)


def waits_unseen(_: Tensor) -> None:
    """Not among what PyTorch's own check knows, so that it breaks the capture itself."""
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()


def needs_too_much_memory(_: Tensor) -> None:
    """As where the graph's own memory does not fit beside what is there."""
    if torch.cuda.is_current_stream_capturing():
        torch.empty(2**50, device="cuda")


@pytest.mark.parametrize("breaks", [waits, waits_unseen, needs_too_much_memory])
def test_a_capture_that_fails_is_reported_and_leaves_nothing_behind(breaks: Callable[[Tensor], None]) -> None:
    lines: list[str] = []
    parameter = torch.ones(1, device="cuda", requires_grad=True)

    def compute(data: Tensor, target: Tensor) -> Tensor:
        parameter.grad = None
        value = (parameter * data - target).square().mean() + 0 * torch.rand((), device="cuda")
        value.backward()
        breaks(value)
        return value

    captured_pass = CapturedPass(compute, lines.append)
    stream = torch.cuda.current_stream()
    seed = torch.cuda.initial_seed()
    for number in range(WARM_UP + 3):
        data = torch.full((4,), 1.0 + number, device="cuda")  # a mean of four is exact
        assert float(captured_pass(data, 3 * data)) == 4 * (1 + number) ** 2
        assert parameter.grad.item() == -4 * (1 + number) ** 2
    assert not captured_pass.captured
    assert len(lines) == 1
    assert "without one: " in lines[0]
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.initial_seed() == seed
    drawn = torch.rand(1000, device="cuda").unique()  # refused by a generator that believes in the capture
    assert len(drawn) > 900
    torch.cuda.empty_cache()  # as nnU-Net when the training is over
    again = CapturedPass(lambda data, target: (data * target).sum())
    assert [float(again(data, data)) for _ in range(WARM_UP + 2)] == [float((data * data).sum())] * (WARM_UP + 2)
    assert again.captured


def test_other_threads_may_pin_memory_during_the_capture() -> None:
    """nnU-Net's does so for every batch; in CUDA's default mode either it or the capture would fail."""
    sizes = iter(range(10_000_000, 20_000_000, 1_000_000))  # never one that PyTorch has pinned before
    pinned = []

    def compute(data: Tensor, target: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: pinned.append(torch.empty(next(sizes)).pin_memory().is_pinned()))
        thread.start()
        thread.join()
        return (data * target).sum()

    captured_pass = CapturedPass(compute)
    data = torch.ones(3, device="cuda")
    assert [float(captured_pass(data, data)) for _ in range(WARM_UP + 2)] == [3.0] * (WARM_UP + 2)
    assert captured_pass.captured
    assert pinned == [True] * (WARM_UP + 1)


def test_compiled_gradients_under_autocast_are_as_near_to_float32_as_eager_ones() -> None:
    """Float16 moves this network's gradients by a fifth, as a change of its input by 1e-3 does in float32."""
    torch.manual_seed(0)
    network, (data, target) = DermoMamba(3, 2, (64, 64)).cuda(), batch(3)

    def gradient(call: Callable[[Tensor], Tensor], autocast: bool) -> Tensor:
        network.zero_grad()
        with torch.autocast("cuda", enabled=autocast):
            loss = GuideFusionLoss(batch_dice=True)(call(data), target)
        (1024 * loss).backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    exact = gradient(network, autocast=False)
    eager = gradient(network, autocast=True)
    compiled = gradient(torch.compile(network), autocast=True)
    assert torch.isfinite(compiled).all()
    assert (eager - exact).norm() < 0.4 * exact.norm()
    assert (compiled - exact).norm() < 1.5 * (eager - exact).norm()
