"""Turn a backend's forward and backward functions into ``torch.library`` custom ops with autograd.

Every backend module has the same functions (``cpu_scan`` documents them): ``scan_1d_forward``, ``scan_1d_backward``,
``states_shape_1d`` and, where it is fused, the same three for ``2d``. The ops are named
``dermomamba::<backend>_scan_1d`` and so on; they are opaque to ``torch.compile``, which therefore sees one node and no
graph break. ``register_convolution`` does the same for CUDA kernels of a map and weights.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_DOUBLE_BACKWARD = (
    "the selective scan and convolution kernels have no second derivative: do not call backward with create_graph=True "
    "through them, or use nnunetv2_dermomamba.ops.naive, which plain autograd can differentiate twice"
)


def no_double_backward(op: Any) -> None:
    """Have a backward op refuse to be differentiated."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_DOUBLE_BACKWARD)

    op.register_autograd(backward)


def as_autocast(x: Tensor) -> Tensor:
    """``x`` in autocast's type for CUDA where that is on: operators of this package are none that autocast knows."""
    return x.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else x


def accumulation_type(x: Tensor) -> torch.dtype:
    """What is summed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _like(inputs: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Gradients in the types of their inputs."""
    return [None if m is None or g is None else g.to(m.dtype) for m, g in zip(inputs, grads, strict=True)]


def register_scan_1d(name: str, module: ModuleType) -> Callable[..., Tensor]:
    """Register ``dermomamba::<name>_scan_1d`` and its backward; returns the differentiable function."""

    @torch.library.custom_op(f"dermomamba::{name}_scan_1d", mutates_args=())
    def forward(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        return module.scan_1d_forward(u, delta, A, B, C, D, delta_bias, delta_softplus)

    @forward.register_fake
    def _(u, delta, A, B, C, D, delta_bias, delta_softplus):  # type: ignore[no-untyped-def]
        kind = accumulation_type(u)
        states = u.new_empty(module.states_shape_1d(u, A.shape[1], B.shape[1]), dtype=kind)
        return torch.empty_like(u, dtype=kind, memory_format=torch.contiguous_format), states

    @torch.library.custom_op(f"dermomamba::{name}_scan_1d_backward", mutates_args=())
    def backward_op(
        dy: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        states: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return module.scan_1d_backward(dy, u, delta, A, B, C, D, delta_bias, delta_softplus, states)

    @backward_op.register_fake
    def _(dy, u, delta, A, B, C, D, delta_bias, delta_softplus, states):  # type: ignore[no-untyped-def]
        vector = A[:, 0]
        tensors = (u, delta, A, B, C, vector, vector)
        kind = accumulation_type(u)
        return tuple(torch.empty_like(m, dtype=kind, memory_format=torch.contiguous_format) for m in tensors)

    no_double_backward(backward_op)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.delta_softplus = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dy: Tensor | None, dstates: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, states = ctx.saved_tensors
        if dy is None:
            return (None,) * 8
        grads = backward_op(dy.contiguous(), *inputs, ctx.delta_softplus, states)
        return (*_like(tuple(inputs), grads), None)

    forward.register_autograd(backward, setup_context=setup_context)

    def scan(*arguments: Any) -> Tensor:
        return forward(*arguments)[0]

    return scan


def register_scan_2d(name: str, module: ModuleType) -> Callable[..., Tensor]:
    """Register ``dermomamba::<name>_scan_2d`` and its backward; returns the differentiable function."""

    @torch.library.custom_op(f"dermomamba::{name}_scan_2d", mutates_args=())
    def forward(
        x: Tensor,
        x_proj_weight: Tensor,
        dt_projs_weight: Tensor,
        dt_projs_bias: Tensor,
        A: Tensor,
        Ds: Tensor,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        return module.scan_2d_forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds, keep)

    @forward.register_fake
    def _(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds, keep):  # type: ignore[no-untyped-def]
        kind = accumulation_type(x)
        shape = module.states_shape_2d(x, dt_projs_weight.shape[2], A.shape[1]) if keep else [0]
        states = x.new_empty(shape, dtype=kind)
        return torch.empty_like(x, dtype=kind, memory_format=torch.contiguous_format), states

    @torch.library.custom_op(f"dermomamba::{name}_scan_2d_backward", mutates_args=())
    def backward_op(
        dy: Tensor,
        x: Tensor,
        x_proj_weight: Tensor,
        dt_projs_weight: Tensor,
        dt_projs_bias: Tensor,
        A: Tensor,
        Ds: Tensor,
        states: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        dx, *rest = module.scan_2d_backward(dy, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds, states)
        return dx.to(x.dtype), *rest

    @backward_op.register_fake
    def _(dy, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds, states):  # type: ignore[no-untyped-def]
        parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
        kind = accumulation_type(x)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        return dx, *(torch.empty_like(m, dtype=kind, memory_format=torch.contiguous_format) for m in parameters)

    no_double_backward(backward_op)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:-1], output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dy: Tensor | None, dstates: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, states = ctx.saved_tensors
        if dy is None:
            return (None,) * 7
        return (*_like(tuple(inputs), backward_op(dy.contiguous(), *inputs, states)), None)

    forward.register_autograd(backward, setup_context=setup_context)

    def scan(*arguments: Tensor) -> Tensor:
        keep = torch.is_grad_enabled() and any(argument.requires_grad for argument in arguments)
        return forward(*arguments, keep)[0]

    return scan


def register_directions_2d(name: str, module: ModuleType) -> Callable[..., Tensor]:
    """Register ``dermomamba::<name>_scan_2d_directions``: for inference, ``scan_2d`` of each direction by itself."""

    @torch.library.custom_op(f"dermomamba::{name}_scan_2d_directions", mutates_args=())
    def directions(
        x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A: Tensor, Ds: Tensor
    ) -> Tensor:
        return module.scan_2d_directions(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)  # type: ignore[no-any-return]

    @directions.register_fake
    def _(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds):  # type: ignore[no-untyped-def]
        return x.new_empty(4, *x.shape, dtype=accumulation_type(x))

    return directions


def register_convolution(
    name: str,
    module: str,
    kernel: str,
    shape: Callable[[Tensor, Tensor], tuple[int, ...]],
    order: torch.memory_format = torch.contiguous_format,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Register ``dermomamba::<name>`` and its backward, a CUDA module's ``<kernel>_forward`` and ``<kernel>_backward``.

    Args:
        name: the operator's.
        module: of this package; imported on the first call, since it needs CUDA.
        kernel: forward, of x and weights, to a map of x's type; backward, of dy, x and weights, to the gradients of x
            and weights.
        shape: of the result.
        order: in memory, of the result, dy and the gradient of x.

    Returns:
        The differentiable function.
    """

    def call(direction: str, *arguments: Tensor) -> Any:
        return getattr(import_module(f".{module}", __package__), f"{kernel}_{direction}")(*arguments)

    @torch.library.custom_op(f"dermomamba::{name}", mutates_args=())
    def forward(x: Tensor, weights: Tensor) -> Tensor:
        return call("forward", x, weights)  # type: ignore[no-any-return]

    @forward.register_fake
    def _(x: Tensor, weights: Tensor) -> Tensor:
        return torch.empty(shape(x, weights), dtype=x.dtype, device=x.device, memory_format=order)

    @torch.library.custom_op(f"dermomamba::{name}_backward", mutates_args=())
    def backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return call("backward", dy, x, weights)  # type: ignore[no-any-return]

    @backward.register_fake
    def _(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x, memory_format=order), weights.new_empty(weights.shape)

    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return backward(dy.contiguous(memory_format=order), *ctx.saved_tensors)

    no_double_backward(backward)
    forward.register_autograd(gradients, setup_context=setup_context)
    return forward
