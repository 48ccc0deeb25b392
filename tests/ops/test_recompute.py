from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunetv2_dermomamba.network.ss2d import SS2D
from nnunetv2_dermomamba.network.stages import DecoderStage
from nnunetv2_dermomamba.ops import cpu_scan, recompute


def gradients(layer, function, *inputs):
    """Result, gradients of inputs and parameters, and the bytes that were kept between the two passes."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    inputs = [x.clone().requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(*inputs)
    leaves = [*inputs, *layer.parameters()]
    return y.detach(), torch.autograd.grad(y.square().sum(), leaves), sum(kept.values())


def both_ways(monkeypatch, layer, function, *inputs):
    plain = gradients(layer, function, *inputs)
    monkeypatch.setattr(recompute, "_is_worth_it", lambda x: True)
    again = gradients(layer, function, *inputs)
    torch.testing.assert_close(again[:2], plain[:2], rtol=0, atol=0)
    return plain[2], again[2]


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
def test_ss2d_keeps_its_scan_and_computes_the_rest_again(monkeypatch):
    torch.manual_seed(0)
    layer, norm = SS2D(4), nn.LayerNorm(4)
    results = []  # of every scan; what is kept of them passes the counting hooks by
    scan = cpu_scan.scan_2d_forward
    monkeypatch.setattr(cpu_scan, "scan_2d_forward", lambda *args: results.append(scan(*args)) or results[-1])
    plain, again = both_ways(monkeypatch, layer, lambda x: layer(x, norm), torch.randn(2, 24, 32, 4))
    assert len(results) == 2  # one for each way: none in the backward pass
    again += sum(result.numel() * result.element_size() for result in results[1])
    assert again < 0.7 * plain


def test_the_decoder_keeps_no_product_of_its_skip(monkeypatch):
    torch.manual_seed(0)
    stage = DecoderStage(8)
    x, skip = torch.randn(2, 8, 12, 16), torch.randn(2, 8, 24, 32)
    gates = torch.rand(2, 8, 1, 1), torch.rand(2, 1, 24, 32)
    plain, again = both_ways(monkeypatch, stage, stage, x, skip, *gates)
    assert plain - again >= 2 * skip.numel() * 4


@pytest.mark.gpu
def test_on_a_gpu_less_is_kept():
    def allocated(function):
        before = torch.cuda.memory_allocated()
        y = function(x)
        return torch.cuda.memory_allocated() - before - y.numel() * y.element_size()

    layer, x = SS2D(4).cuda(), torch.randn(2, 96, 128, 4, device="cuda")
    allocated(layer)
    projected = x.numel() // 4 * layer.in_proj.out_features * 4  # bytes
    assert allocated(layer) + projected <= allocated(lambda x: layer._forward(x, None))
