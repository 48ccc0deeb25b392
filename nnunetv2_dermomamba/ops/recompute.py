"""Computing again in the backward pass, on a GPU, what costs more memory to keep than time to repeat."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .backends import choose_backend

# Compilation warns that such functions must do nothing in place. Those here do nothing in place.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn" not in record.getMessage())


def _keep_scans(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What a scan reads is kept, too, where one operator makes it: it is small beside the scan's states."""
    name = str(op)
    is_kept = name.startswith("dermomamba.") and ("_scan_" in name or "depthwise_silu" in name)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """``function(*arguments)``, of which a training on a GPU keeps the arguments and, of scans, inputs and results.

    PyTorch refuses a second backward pass through it, even with ``retain_graph``.

    Args:
        function: without BatchNorm, whose statistics a second call would update again, without random numbers, and
            without operations in place.
        arguments: the first one's device decides.
    """
    if not (torch.is_grad_enabled() and _is_worth_it(arguments[0])):
        return function(*arguments)
    contexts = partial(create_selective_checkpoint_contexts, _keep_scans)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _is_worth_it(x: Tensor) -> bool:
    """Other backends' scans are no single operator, and would be repeated."""
    return x.is_cuda and choose_backend("cuda", x.dtype) in ("cuda", "triton")
