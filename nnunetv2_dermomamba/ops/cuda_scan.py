"""The CUDA backend of the selective scan: its own kernels where they are made for a call, Triton's elsewhere.

Its own serve up to 16 states, in 2D up to 128 channels and a dt rank of 8, on GPUs of compute capability 8.0 and newer
whose shared memory holds a block.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import cuda_scan_1d, cuda_scan_2d, nvrtc
from .cuda_block import aligned

nvrtc.library()  # fails here, with the reason, where PyTorch is not built for CUDA
if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
    raise ImportError("needs a GPU of compute capability 8.0 or newer")


def _triton() -> ModuleType:
    try:
        from . import triton_scan  # only where it is needed: it may not be installed
    except ImportError as error:
        raise RuntimeError(
            "the CUDA kernels of the selective scan are not made for so many states or channels, or for this GPU, and "
            f"Triton's cannot be imported ({error}); set DERMOMAMBA_BACKEND=torch"
        ) from error
    return triton_scan


def _module_1d(u: Tensor, groups: int, states: int) -> ModuleType:
    return cuda_scan_1d if cuda_scan_1d.serves_1d(u, groups, states) else _triton()


def _module_2d(x: Tensor, rank: int, states: int) -> ModuleType:
    return cuda_scan_2d if cuda_scan_2d.serves_2d(x, rank, states) else _triton()


def _plain(*parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters and gradients as the kernels read them, in float32."""
    return [None if p is None else aligned(p.float()) for p in parameters]


def _alike(*inputs: Tensor) -> list[Tensor]:
    """Inputs in one type, which the kernels are compiled for."""
    if len({m.dtype for m in inputs}) > 1:
        inputs = tuple(m.float() for m in inputs)
    return [aligned(m) for m in inputs]


def states_shape_1d(u: Tensor, state: int, groups: int) -> list[int]:
    """Shape of the saved states of ``scan_1d_forward``."""
    return _module_1d(u, groups, state).states_shape_1d(u, state, groups)


def scan_1d_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """See ``triton_scan_1d.scan_1d_forward``."""
    module = _module_1d(u, B.shape[1], A.shape[1])
    u, delta, B, C = _alike(u, delta, B, C)
    A, D, delta_bias = _plain(A, D, delta_bias)
    return module.scan_1d_forward(u, delta, A, B, C, D, delta_bias, delta_softplus)


def scan_1d_backward(
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
    """See ``triton_scan_1d.scan_1d_backward``."""
    module = _module_1d(u, B.shape[1], A.shape[1])
    u, delta, B, C = _alike(u, delta, B, C)
    dy, A, D, delta_bias = _plain(dy, A, D, delta_bias)
    return module.scan_1d_backward(dy, u, delta, A, B, C, D, delta_bias, delta_softplus, states)


def states_shape_2d(x: Tensor, rank: int, state: int) -> list[int]:
    """Shape of the states that ``scan_2d_backward`` starts from."""
    return _module_2d(x, rank, state).states_shape_2d(x, rank, state)


def scan_2d_forward(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """See ``triton_scan_2d.scan_2d_forward``."""
    module = _module_2d(x, dt_projs_weight.shape[2], A.shape[1])
    parameters = _plain(x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
    return module.scan_2d_forward(aligned(x), *parameters, keep)


def scan_2d_directions(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A: Tensor, Ds: Tensor
) -> Tensor:
    """Results of the four directions, (4, B, H, W, d), whose sum is ``scan_2d_forward``'s; Triton's is one of them."""
    module = _module_2d(x, dt_projs_weight.shape[2], A.shape[1])
    arguments = (aligned(x), *_plain(x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds))
    if module is cuda_scan_2d:
        return cuda_scan_2d.scan_2d_directions(*arguments)
    y = module.scan_2d_forward(*arguments, False)[0]
    return torch.cat([y[None], y.new_zeros(3, *y.shape)])


def scan_2d_backward(
    dy: Tensor,
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``triton_scan_2d.scan_2d_backward``."""
    module = _module_2d(x, dt_projs_weight.shape[2], A.shape[1])
    dy, *parameters = _plain(dy, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
    return module.scan_2d_backward(dy, aligned(x), *parameters, states)
