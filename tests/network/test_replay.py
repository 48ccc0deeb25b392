"""Inference by replays of a CUDA graph gives what the network gives call by call, whatever happens to its weights."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from tolerances import relative_error

from nnunetv2_dermomamba.cuda_graph import WARM_UP
from nnunetv2_dermomamba.network import DermoMamba, replay
from nnunetv2_dermomamba.network.replay import MOST, Replays, _tensors_of, can_replay

PATCH = (64, 96)
TOLERANCE = 1e-3  # float16; the same kernels, but cuDNN may choose


def build(seed: int, device: str = "cpu") -> DermoMamba:
    torch.manual_seed(seed)
    return DermoMamba(3, 2, PATCH).to(device).eval()


def plain(network: DermoMamba, x: torch.Tensor) -> torch.Tensor:
    """Without a graph: not in inference mode."""
    with torch.no_grad(), torch.autocast("cuda", enabled=x.is_cuda):
        return network(x)


def replayed(network: DermoMamba, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), torch.autocast("cuda", enabled=x.is_cuda):
        return network(x)


def captured(network: DermoMamba) -> list[bool]:
    return [one.captured for one in network._replays._passes.values()]


def test_nothing_is_captured_without_a_gpu() -> None:
    network, x = build(0), torch.randn(1, 3, *PATCH)
    with torch.inference_mode():
        assert not can_replay(x)
        for _ in range(WARM_UP + 2):
            network(x)
    assert captured(network) == []


def test_copies_start_without_graphs() -> None:
    network = build(0)
    network._replays._passes["some"] = lambda x: x  # type: ignore[index,assignment]
    for other in (copy.deepcopy(network), copy.copy(network._replays)):
        replays = other if isinstance(other, Replays) else other._replays
        assert replays._passes == {}
    file = io.BytesIO()
    torch.save(network, file)
    assert "_replays" not in "".join(network.state_dict())


def test_a_module_in_training_or_with_hooks_has_no_graph_and_moved_weights_are_seen() -> None:
    network = build(0)
    tensors = _tensors_of(network)
    assert tensors == _tensors_of(network)
    network.load_state_dict(build(1).state_dict())
    assert _tensors_of(network) == tensors
    weight = network.conv_out.weight
    weight.data = weight.detach().clone()
    assert _tensors_of(network) != tensors
    network.encoder[0].norm.train()
    assert _tensors_of(network) is None
    network.eval()
    handle = network.decoder[0].register_forward_hook(lambda *_: None)
    assert _tensors_of(network) is None
    handle.remove()
    assert _tensors_of(network) is not None


def test_a_network_is_freed_with_its_last_user(monkeypatch) -> None:
    class Holding:
        def __init__(self, compute, *_, **__) -> None:
            self.compute = compute

        def __call__(self, x):
            return self.compute(x)

    monkeypatch.setattr(replay, "CapturedPass", Holding)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    network, x = build(0), torch.randn(1, 3, *PATCH)
    with torch.no_grad():
        assert torch.equal(network._replays(network, network._forward, x), network(x))
    gone = weakref.ref(network)
    gc.disable()
    try:
        del network
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_replays_are_what_the_network_computes() -> None:
    network = build(0, "cuda")
    for number in range(WARM_UP + 4):
        x = torch.randn(4, 3, *PATCH, device="cuda")
        y = replayed(network, x)
        assert relative_error(y, plain(network, x)) < TOLERANCE
        assert captured(network) == [number >= WARM_UP]
    kept, before = y, y.clone()
    replayed(network, x + 1)
    assert torch.equal(kept, before)  # results are not written over


@pytest.mark.gpu
def test_weights_loaded_in_place_are_read_and_moved_ones_captured_again() -> None:
    network, x = build(0, "cuda"), torch.randn(1, 3, *PATCH, device="cuda")
    for _ in range(WARM_UP + 2):
        replayed(network, x)
    for seed in (1, 2):  # as nnU-Net takes fold after fold
        network.load_state_dict(build(seed).state_dict())
        assert relative_error(replayed(network, x), plain(network, x)) < TOLERANCE
    assert captured(network) == [True]
    network.cpu().cuda()
    assert relative_error(replayed(network, x), plain(network, x)) < TOLERANCE
    network.load_state_dict(build(3, "cuda").state_dict(), assign=True)
    assert relative_error(replayed(network, x), plain(network, x)) < TOLERANCE


@pytest.mark.gpu
def test_other_threads_may_wait_for_the_gpu_meanwhile() -> None:
    """As nnU-Net's predictor does to bring patches there."""
    network, x = build(0, "cuda"), torch.randn(1, 3, *PATCH, device="cuda")
    done, values = threading.Event(), []

    def wait() -> None:
        while not done.is_set():
            values.append(torch.ones(1).cuda().item())

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    for _ in range(WARM_UP + 2):
        replayed(network, x)
    done.set()
    thread.join()
    assert captured(network) == [True]
    count = len(values)
    assert count > WARM_UP  # it went on to the end
    assert values == [1.0] * count


@pytest.mark.gpu
def test_few_graphs_are_kept_and_training_has_none() -> None:
    network = build(0, "cuda")
    for batch in range(1, MOST + 3):
        for _ in range(WARM_UP + 1):
            replayed(network, torch.randn(batch, 3, *PATCH, device="cuda"))
    assert captured(network) == [True] * MOST
    network.train()
    replayed(network, torch.randn(MOST + 3, 3, *PATCH, device="cuda"))
    network.eval().cuda_graph = False
    replayed(network, torch.randn(MOST + 4, 3, *PATCH, device="cuda"))
    assert captured(network) == [True] * MOST
