"""Checkpoint files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunetv2_dermomamba.files import whole_file

REQUIRED = ("network_weights", "optimizer_state", "logging", "current_epoch", "init_args", "_best_ema")
"""What nnU-Net's ``load_checkpoint`` takes from a checkpoint."""


class CheckpointError(RuntimeError):
    """No checkpoint can be used; the message names the files, the reasons and the remedy."""


def write_checkpoint(checkpoint: dict[str, Any], path: Path, keep: Path | None = None) -> None:
    """Write a checkpoint beside its place, have it reach the disk, and only then put it there.

    Whoever is killed at any moment leaves the earlier file or the new one, never a part of one.

    Args:
        checkpoint: what ``torch.save`` shall write.
        path: where; an earlier file is replaced.
        keep: a second name under which the earlier file stays, on file systems that have hard links.

    Raises:
        OSError: it cannot be written; the earlier file is still there.
    """
    try:
        with whole_file(path, f".{path.name}.partial") as partial:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                _keep(path, keep)
    except RuntimeError as error:  # how PyTorch's zip writer reports a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    _sync_folder(path.parent)


def _keep(path: Path, keep: Path) -> None:
    """Give a file a second name; a copy would be written twice, and a rename would leave a moment without it."""
    # where there are no hard links, checkpoint_best is what remains to fall back to
    with contextlib.suppress(OSError), whole_file(keep, f".{keep.name}.partial") as link:
        link.unlink(missing_ok=True)
        os.link(path, link)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: Path, network: nn.Module) -> dict[str, Any]:
    """Read a checkpoint on the CPU and make sure that a training of a network can go on from it.

    It is unpickled without restriction, as nnU-Net does with the files of its own results folder.

    Args:
        path: the file.
        network: whose weights it must hold, without wrappers.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: it is damaged or foreign; the message is the reason.
    """
    try:
        damaged = zipfile.ZipFile(path).testzip()  # PyTorch does not look at the checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except FileNotFoundError as error:
        raise CheckpointError("it does not exist") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"it is damaged ({type(error).__name__}: {str(error)[:200]})") from error
    missing = [key for key in REQUIRED if key not in checkpoint] if isinstance(checkpoint, Mapping) else REQUIRED
    if missing:
        raise CheckpointError(f"it is no checkpoint of nnU-Net (without {', '.join(missing)})")
    _check_weights(checkpoint["network_weights"], network)
    return checkpoint


def _check_weights(weights: Mapping[str, torch.Tensor], network: nn.Module) -> None:
    expected = {name: value.shape for name, value in network.state_dict().items()}
    found = {name.removeprefix("module."): value for name, value in weights.items()}
    differing = sorted(
        name for name in expected.keys() | found.keys() if name not in found or found[name].shape != expected.get(name)
    )
    if differing:
        raise CheckpointError(f"it is of another network ({len(differing)} weights differ, such as {differing[0]!r})")
    broken = sorted(name for name, value in found.items() if not torch.isfinite(value).all())
    if broken:
        raise CheckpointError(f"its weights are not finite, such as {broken[0]!r}")
