"""Random inputs of the selective scans, as hard as finite floats make them."""

from dataclasses import dataclass

import torch
from torch import Tensor

# One and two steps, primes, and one less and one more than the tile lengths of all backends (16 to 64).
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 61, 63, 64, 65, 97, 131)
MAPS = ((1, 1), (1, 2), (2, 1), (1, 65), (64, 1), (1, 17), (3, 5), (7, 11), (8, 8), (9, 8), (13, 5))


@dataclass
class Case:
    """Tensors in float64, and a name that says what is special."""

    name: str
    tensors: list[Tensor]
    softplus: bool = True


def pick(rng: torch.Generator, options: tuple) -> object:
    return options[int(torch.randint(len(options), (1,), generator=rng))]


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def steps_kind(rng: torch.Generator, like: Tensor, softplus: bool) -> tuple[str, Tensor]:
    """Step sizes before the softplus (or as they are): moderate, large, tiny, at +-50, zero, constant."""
    kind = pick(rng, ("moderate", "large", "tiny", "fifty", "zero", "constant"))
    noise = normal(rng, *like.shape)
    if not softplus:
        scale = {"moderate": 0.1, "large": 3.0, "tiny": 1e-6, "fifty": 50.0, "zero": 0.0, "constant": 0.0}[kind]
        return kind, noise.abs() * scale + (0.3 if kind == "constant" else 0.0)
    values = {
        "moderate": noise - 2,
        "large": noise * 3 + 4,
        "tiny": noise - 12,
        "fifty": torch.where(noise > 0, 50.0, -50.0).to(torch.float64),
        "zero": torch.zeros_like(noise),
        "constant": torch.full_like(noise, -3.0),
    }
    return kind, values[kind]


def decay(rng: torch.Generator, dim: int, state: int) -> tuple[str, Tensor]:
    kind = pick(rng, ("initial", "random", "strong", "weak"))
    values = {
        "initial": -torch.arange(1.0, state + 1, dtype=torch.float64).repeat(dim, 1),
        "random": -torch.rand(dim, state, generator=rng, dtype=torch.float64) * 10 - 1e-3,
        "strong": -(10 ** (3 * torch.rand(dim, state, generator=rng, dtype=torch.float64))),
        "weak": -(10 ** (-4 * torch.rand(dim, state, generator=rng, dtype=torch.float64))),
    }
    return kind, values[kind]


def content(rng: torch.Generator, *shape: int) -> tuple[str, Tensor]:
    kind = pick(rng, ("random", "random", "random", "zero", "constant", "non-contiguous"))
    if kind == "zero":
        return kind, torch.zeros(*shape, dtype=torch.float64)
    if kind == "constant":
        return kind, torch.full(shape, 0.7, dtype=torch.float64)
    if kind == "non-contiguous":
        return kind, normal(rng, *shape[::-1]).permute(*reversed(range(len(shape))))
    return kind, normal(rng, *shape)


def case_1d(seed: int) -> Case:
    rng = torch.Generator().manual_seed(seed)
    batch, length = pick(rng, (1, 2)), pick(rng, LENGTHS)
    groups, per_group, state = pick(rng, (1, 2, 4)), pick(rng, (1, 3, 8)), pick(rng, (16, 16, 4, 1))
    dim, softplus = groups * per_group, bool(torch.rand(1, generator=rng) < 0.7)
    content_kind, u = content(rng, batch, dim, length)
    steps, delta = steps_kind(rng, u, softplus)
    decay_kind, A = decay(rng, dim, state)
    B, C = normal(rng, batch, groups, state, length), normal(rng, batch, groups, state, length)
    D, bias = normal(rng, dim), (normal(rng, dim) if softplus else torch.zeros(dim, dtype=torch.float64))
    name = f"{seed}: {tuple(u.shape)} groups {groups} state {state} u {content_kind} steps {steps} A {decay_kind}"
    return Case(name, [u, delta, A, B, C, D, bias], softplus)


def case_2d(seed: int) -> Case:
    rng = torch.Generator().manual_seed(seed)
    batch, (height, width) = pick(rng, (1, 2)), pick(rng, MAPS)
    dim, rank, state = pick(rng, (1, 2, 5, 8, 16)), pick(rng, (1, 2, 5)), pick(rng, (16, 16, 4))
    content_kind, x = content(rng, batch, height, width, dim)
    x_proj = normal(rng, 4, rank + 2 * state, dim) / dim**0.5
    dt_proj = normal(rng, 4, dim, rank) / rank**0.5
    steps, bias = steps_kind(rng, torch.empty(4, dim), True)
    decay_kind, A = decay(rng, 4 * dim, state)
    name = f"{seed}: {tuple(x.shape)} rank {rank} state {state} x {content_kind} steps {steps} A {decay_kind}"
    return Case(name, [x, x_proj, dt_proj, bias, A, normal(rng, 4 * dim)])
