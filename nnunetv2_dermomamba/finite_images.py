"""Refusing images that hold NaN or infinite values."""

from __future__ import annotations

import torch


class NotFiniteError(RuntimeError):
    """Images or steps hold NaN or infinite values; the message says where and what to do."""


def check_images(batch: dict) -> None:
    """Refuse a batch on the CPU that holds NaN or infinite values; other devices would have to be waited for.

    Args:
        batch: nnU-Net's, with ``data`` (samples, channels, *size) and ``keys``, the case of each sample.

    Raises:
        NotFiniteError: naming the cases.
    """
    data = batch["data"]
    if data.device.type != "cpu" or torch.isfinite(data.sum()):  # a sum is many times quicker than isfinite
        return
    cases = [str(key) for key, image in zip(batch["keys"], data, strict=True) if not torch.isfinite(image).all()]
    if cases:
        raise NotFiniteError(
            f"NaN or infinite values in the image of {', '.join(sorted(set(cases)))}, as preprocessed and augmented. "
            "Correct or remove these cases, run nnUNetv2_plan_and_preprocess again, and go on with --c."
        )
