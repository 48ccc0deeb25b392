"""nnU-Net's predictor for a GPU: a patch and its mirror images are one batch."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor


class MirrorsAtOncePredictor(nnUNetPredictor):
    """As nnU-Net's, with its results but for rounding; on other devices than CUDA it is nnU-Net's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fits = True

    @torch.inference_mode()
    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda" and self._fits:
            try:
                return self._at_once(x)
            except torch.OutOfMemoryError:
                self._fits = False
                torch.cuda.empty_cache()
        return super()._internal_maybe_mirror_and_predict(x)  # type: ignore[no-any-return]

    def _at_once(self, x: Tensor) -> Tensor:
        axes = [axis + 2 for axis in self.allowed_mirroring_axes or ()] if self.use_mirroring else []
        flips = [chosen for count in range(len(axes) + 1) for chosen in combinations(axes, count)]
        mirrored = self.network(torch.cat([x.flip(chosen) for chosen in flips])).split(len(x))
        total = sum(logits.flip(chosen) for logits, chosen in zip(mirrored, flips, strict=True))
        return total / len(flips)  # type: ignore[return-value]
