"""Independent SS2D layers at once: emulated without a GPU, on one on streams of their own."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from tolerances import FORWARD, relative_error

from nnunetv2_dermomamba.network import ss2d
from nnunetv2_dermomamba.network.ss2d import SS2D
from nnunetv2_dermomamba.network.sweep_mamba import SweepMamba
from nnunetv2_dermomamba.ops import cuda_depthwise, cuda_norm_linear, norm_linear, side_by_side
from nnunetv2_dermomamba.ops.backends import LoadedBackend
from nnunetv2_dermomamba.ops.composed import selective_scan_2d_composed


def stacked(*arguments: torch.Tensor) -> torch.Tensor:
    """As a scan whose directions are apart."""
    y = selective_scan_2d_composed(*arguments)
    return torch.stack([0.25 * y, 0.5 * y, -y, 1.25 * y])


@pytest.mark.skipif(torch.cuda.is_available() or shutil.which("g++") is None, reason="needs g++, and no GPU")
def test_each_gives_what_it_gives_alone(monkeypatch, emulate):
    emulate(cuda_depthwise, cuda_norm_linear)
    monkeypatch.setattr(ss2d, "serves", lambda x, channels: True)
    monkeypatch.setattr(side_by_side, "choose_backend", lambda *_: "stub")
    monkeypatch.setitem(side_by_side.LOADED, "stub", LoadedBackend("stub", stacked, stacked, stacked))
    monkeypatch.setattr(norm_linear, "_gpu_kernels", lambda *_: cuda_norm_linear)
    torch.manual_seed(0)
    layers, maps = [SS2D(4), SS2D(4)], [torch.randn(2, 5, 6, 4), torch.randn(1, 7, 3, 4)]
    with torch.inference_mode():
        for layer, x, y in zip(layers, maps, ss2d.side_by_side(layers, maps), strict=True):
            assert relative_error(y, layer(x)) < FORWARD[torch.float32]


def test_serves_inference_on_a_gpu_of_what_the_kernels_take(monkeypatch):
    x = SimpleNamespace(is_cuda=True, dtype=torch.float16, numel=lambda: 16)
    for name in ("own_cuda_kernels", "own_gpu_kernels"):
        monkeypatch.setattr(side_by_side, name, lambda _: True)
    with torch.inference_mode():
        assert side_by_side.serves(x, [8, 12])
        assert not side_by_side.serves(x, [8, 14])
        assert not side_by_side.serves(x, [8, 132])
        assert not side_by_side.serves(torch.zeros(1, 2, 2, 4), [8, 12])
    assert not side_by_side.serves(x, [8, 12])
    with torch.inference_mode():
        for name in ("own_cuda_kernels", "own_gpu_kernels"):  # a layer needs both
            with monkeypatch.context() as patch:
                patch.setattr(side_by_side, name, lambda _: False)
                assert not side_by_side.serves(x, [8, 12])


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [1, 64])
def test_on_streams_call_after_call(batch, kind, compiled):
    torch.manual_seed(0)
    module = SweepMamba(512, 6, 8).cuda().eval()
    call = torch.compile(module, mode="reduce-overhead") if compiled else module
    maps = [torch.randn(batch, 512, 6, 8, device="cuda") for _ in range(8)]

    def results(module):
        with torch.autocast("cuda", torch.float16, enabled=kind == torch.float16):
            return [module(x).clone() for _ in range(4) for x in maps]

    one_after_the_other = results(module)  # with gradients
    with torch.inference_mode():
        at_once = results(call)
    tolerance = FORWARD[torch.float32] if kind == torch.float32 else 4 * torch.finfo(kind).eps
    for ours, theirs in zip(at_once, one_after_the_other, strict=True):
        assert relative_error(ours, theirs.detach()) < tolerance
