"""The one table of tolerances: relative errors ||result - reference|| / ||reference||, never relaxed elsewhere."""

import torch

FORWARD = {torch.float32: 1e-5, torch.float64: 1e-12}
GRADIENT = {torch.float32: 1e-4, torch.float64: 1e-10}
NEGLIGIBLE = 1e-12
"""Of tensors of order 1, a result of this norm is zero: what is left of a sum that cancels, or of exp(-50)."""
GOLDEN_BLOCK = 1e-4
GOLDEN_NETWORK = 1e-3


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """||result - reference|| / ||reference||; NaN anywhere gives NaN, which passes no comparison.

    Where the reference is negligible, so must the result be: the norm counts as ``NEGLIGIBLE``.
    """
    reference = reference.to(torch.float64)
    difference = (result.detach().to(torch.float64) - reference).norm()
    return float(difference / reference.norm().clamp(min=NEGLIGIBLE))
