"""Inputs of the GPU's scans, and the comparison of their results with the step-by-step scan in float64."""

from __future__ import annotations

import torch
from tolerances import FORWARD, GRADIENT, relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sequences(batch, dim, length, groups, state, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    return {
        "u": draw(batch, dim, length),
        "delta": draw(batch, dim, length),
        "A": -torch.exp(draw(dim, state)),
        "B": draw(batch, groups, state, length),
        "C": draw(batch, groups, state, length),
        "D": draw(dim),
        "delta_bias": draw(dim),
    }


def maps(batch, height, width, d, rank, state, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    return {
        "x": draw(batch, height, width, d),
        "x_proj_weight": draw(4, rank + 2 * state, d) * d**-0.5,
        "dt_projs_weight": draw(4, d, rank) * rank**-0.5,
        "dt_projs_bias": draw(4, d),
        "A": -torch.exp(draw(4 * d, state)),
        "Ds": draw(4 * d),
    }


def in_float64(inputs):
    return {k: None if v is None else v.double().requires_grad_() for k, v in inputs.items()}


def check(y, gradients, reference, dy, leaves):
    assert relative_error(y, reference.detach()) <= FORWARD[torch.float32]
    reference.backward(dy.double())
    assert len({m.untyped_storage().data_ptr() for m in gradients}) == len(gradients)  # PyTorch refuses aliases
    for gradient, (name, leaf) in zip(gradients, leaves.items(), strict=True):
        assert gradient.dtype == torch.float32
        if leaf is None:
            assert not gradient.any()
        else:
            assert gradient.shape == leaf.shape
            assert relative_error(gradient, leaf.grad) <= GRADIENT[torch.float32], name


def cotangent(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
