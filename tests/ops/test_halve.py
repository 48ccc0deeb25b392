"""Max pooling as it runs on a GPU against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from nnunetv2_dermomamba.ops.halve import _Halve, _pairs


@pytest.mark.parametrize("compiled", [False, True])
def test_equals_pytorchs_own(compiled):
    pool = torch.compile(_Halve.apply, backend="aot_eager", fullgraph=True) if compiled else _Halve.apply
    torch.compiler.reset()
    x = torch.randint(-3, 3, (2, 4, 6, 8), generator=torch.Generator().manual_seed(0)).float()  # many are equal
    ours, theirs = x.permute(0, 2, 3, 1).requires_grad_(), x.clone().requires_grad_()
    y, expected = pool(ours), torch.nn.functional.max_pool2d(theirs, 2)
    assert torch.equal(y.permute(0, 3, 1, 2), expected)
    assert torch.equal(_pairs(ours)[0], y)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(dy)
    (dx,) = torch.autograd.grad(y, ours, dy.permute(0, 2, 3, 1))
    assert torch.equal(dx.permute(0, 3, 1, 2), theirs.grad)


def test_compiled_which_pixel_was_first_is_written_for_the_gradient():
    sources = []

    def compiler(module, _):
        sources.append(module.code)
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
    torch.compiler.reset()
    x = torch.randn(1, 4, 6, 8, requires_grad=True)
    torch.compile(_Halve.apply, backend=backend)(x).sum().backward()
    assert "dermomamba.written" in "".join(sources)


def test_writing_is_a_proper_operator():
    torch.library.opcheck(torch.ops.dermomamba.written.default, (torch.ones(2, 3, dtype=torch.uint8),))
