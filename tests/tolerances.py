"""The one table of tolerances: relative errors ||result - reference|| / ||reference||, never relaxed elsewhere."""

import torch

FORWARD = {torch.float32: 1e-5, torch.float64: 1e-12}
GRADIENT = {torch.float32: 1e-4, torch.float64: 1e-10}
GOLDEN_BLOCK = 1e-4
GOLDEN_NETWORK = 1e-3


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """||result - reference|| / ||reference||; NaN anywhere gives NaN, which passes no comparison."""
    reference = reference.to(torch.float64)
    difference = (result.detach().to(torch.float64) - reference).norm()
    norm = reference.norm()
    return float(difference / norm) if norm > 0 else float(difference)
