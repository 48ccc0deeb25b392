"""Masks from photographs with a trained nnU-Net model.

``mask, probability = Predictor(MODEL, device)(image)``. Importing this package imports no torch; using
`Predictor` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunetv2_dermomamba.predict.predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    if name == "Predictor":
        from nnunetv2_dermomamba.predict.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
