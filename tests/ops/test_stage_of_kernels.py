"""A stage's convolutions and normalisations in 16 bits, as on a GPU, by emulated CUDA kernels, against float64."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from tolerances import relative_error
from torch import nn

from nnunetv2_dermomamba.network import convolution as network_convolution
from nnunetv2_dermomamba.network.stages import EncoderStage
from nnunetv2_dermomamba.ops import convolution as ops_convolution
from nnunetv2_dermomamba.ops import cuda_channel_sums, cuda_convolution, normalise


@pytest.mark.skipif(torch.cuda.is_available() or shutil.which("g++") is None, reason="needs g++, and no GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_as_in_float64(monkeypatch, emulate, compiled):
    emulate(cuda_convolution, cuda_channel_sums)
    torch.manual_seed(0)
    stage = EncoderStage(16)
    stage.res_mamba.block = nn.Identity()
    theirs = copy.deepcopy(stage).double()
    x, dy = torch.randn(3, 14, 34, 16).half().permute(0, 3, 1, 2), torch.randn(3, 32, 14, 34)
    wide = x.double().requires_grad_()
    expected = theirs(wide)[1]
    expected.backward(dy.double())
    monkeypatch.setattr(network_convolution.kernels, "serves", lambda x, weight: True)
    monkeypatch.setattr(ops_convolution, "as_autocast", lambda x: x.half())
    monkeypatch.setattr(normalise, "serves", lambda x: True)
    leaf = x.clone().requires_grad_()
    skip = (torch.compile(stage, backend="aot_eager", fullgraph=True) if compiled else stage)(leaf)[1]
    skip.backward(dy.to(skip.dtype))
    assert skip.dtype == torch.float16
    assert relative_error(skip, expected.detach()) < 2 * torch.finfo(torch.float16).eps
    # rounding puts some values on the other side of a ReLU's kink
    of_ours, of_theirs = (
        [m.grad for m in (one, *module.parameters())] for one, module in ((leaf, stage), (wide, theirs))
    )
    for (name, _), one, other in zip([("x", x), *stage.named_parameters()], of_ours, of_theirs, strict=True):
        assert relative_error(one, other) < 0.03, name
    assert relative_error(stage.norm.running_mean, theirs.norm.running_mean) < torch.finfo(torch.float16).eps
    assert relative_error(stage.norm.running_var, theirs.norm.running_var) < torch.finfo(torch.float16).eps
