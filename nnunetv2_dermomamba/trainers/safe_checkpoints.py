"""Checkpoints that survive a kill at any moment, and that a run goes on from within an epoch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_dermomamba.predict.options import FINAL_CHECKPOINT

from .checkpoint_files import CheckpointError, read_checkpoint, write_checkpoint

LATEST = "checkpoint_latest.pth"
PREVIOUS = "checkpoint_previous.pth"
NAMES = (FINAL_CHECKPOINT, LATEST, PREVIOUS, "checkpoint_best.pth")
SAVE_INTERVAL = 120.0  # seconds between two of checkpoint_latest: what a kill costs
SAVE_SHARE = 0.01  # of the time may go into writing it


class SafeCheckpointMixin(nnUNetTrainer):
    """Writes nnU-Net's checkpoints whole or not at all, and ``checkpoint_latest`` every two minutes.

    Beside nnU-Net's own content a checkpoint holds how many steps of its epoch are done, what they returned, and how
    many were skipped just before. nnU-Net and ``dermomamba predict`` read it as any other. The ``checkpoint_latest``
    before the last stays as ``checkpoint_previous`` (a hard link, so it is not written again).
    """

    iteration = 0
    """Training steps of the present epoch that are done."""

    skipped_before = 0
    """Steps in a row that were skipped for not being finite, up to the end of the epoch before."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.train_outputs: list[dict] = []
        self.last_save = time.monotonic()
        self.save_duration = 0.0

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net, which calls it when an epoch is over."""
        self._save(Path(filename), within_epoch=False)

    def save_progress(self) -> None:
        """Save ``checkpoint_latest`` within an epoch."""
        self._save(Path(self.output_folder) / LATEST, within_epoch=True)

    def save_progress_if_due(self) -> None:
        """Save ``checkpoint_latest`` if the last one is long ago; a failure is told in the log, and tried again later.

        It takes at most 1 % of the time: on a disk that needs longer than 1.2 s the interval becomes 100 times as long.
        """
        interval = max(SAVE_INTERVAL, self.save_duration / SAVE_SHARE)
        if self.local_rank != 0 or self.disable_checkpointing or time.monotonic() - self.last_save < interval:
            return
        try:
            self.save_progress()
        except OSError as error:
            self.last_save = time.monotonic()
            self.print_to_log_file(f"WARNING: no checkpoint written: {error}. The one before stays; training goes on.")

    def on_train_end(self) -> None:
        """As nnU-Net, which removes ``checkpoint_latest`` now; ``checkpoint_previous`` goes with it."""
        super().on_train_end()
        if self.local_rank == 0:
            (Path(self.output_folder) / PREVIOUS).unlink(missing_ok=True)

    def _save(self, path: Path, within_epoch: bool) -> None:
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        start = time.monotonic()
        latest = path.name == LATEST
        write_checkpoint(self._checkpoint(within_epoch), path, path.with_name(PREVIOUS) if latest else None)
        if latest:
            self.last_save = time.monotonic()
            self.save_duration = self.last_save - start

    def _checkpoint(self, within_epoch: bool) -> dict[str, Any]:
        """nnU-Net's content (it builds and writes in one method), and how far the epoch is."""
        checkpoint = {
            "network_weights": self.plain_network().state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": self.__class__.__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "iteration": 0,
            "train_outputs": {},
            "skipped_before": self.skipped_before,
        }
        if within_epoch:
            finished = {name: values[: self.current_epoch] for name, values in checkpoint["logging"].items()}
            checkpoint |= {"logging": finished, "current_epoch": self.current_epoch, "iteration": self.iteration}
            checkpoint["train_outputs"] = _columns(self.train_outputs)
        return checkpoint

    def plain_network(self) -> nn.Module:
        """The network without the wrappers of several GPUs and of torch.compile."""
        network = self.network.module if self.is_ddp else self.network
        return getattr(network, "_orig_mod", network)

    def load_checkpoint(self, filename: str) -> None:
        """As nnU-Net; with ``--c``, a damaged or foreign file is passed over for the last good one.

        Raises:
            CheckpointError: the file, or with ``--c`` every checkpoint, cannot be used.
        """
        continuing = self.logger.resume and not self.was_initialized
        if not self.was_initialized:
            self.initialize()
        path, checkpoint = self._last_good(Path(filename), continuing)
        super().load_checkpoint(str(path))
        _lay_out_as_weights(self.optimizer)
        self.iteration = checkpoint.get("iteration", 0)
        self.skipped_before = checkpoint.get("skipped_before", 0)
        if continuing:
            self.print_to_log_file(f"Going on from {path.name}: {_where(checkpoint)}.")
        self.train_outputs = _rows(checkpoint.get("train_outputs", {}), self.device)

    def _last_good(self, wanted: Path, continuing: bool) -> tuple[Path, dict]:
        """The wanted checkpoint or, when continuing, whichever good one is furthest."""
        network = self.plain_network()
        try:
            return wanted, read_checkpoint(wanted, network)
        except CheckpointError as error:
            self.print_to_log_file(f"WARNING: {wanted} cannot be used: {error}.")
            reasons = [f"{wanted}: {error}"]
        good = []
        for path in (wanted.with_name(name) for name in NAMES if continuing and name != wanted.name):
            try:
                good.append((path, read_checkpoint(path, network)))
            except CheckpointError as error:
                if path.exists():
                    reasons.append(f"{path}: {error}")
        if not good:
            remedy = "Train again without --c, or put an intact copy there"
            raise CheckpointError("No checkpoint can be used. " + "; ".join(reasons) + f". {remedy}.")
        path, checkpoint = max(good, key=lambda pair: (pair[1]["current_epoch"], pair[1].get("iteration", 0)))
        self.print_to_log_file(f"Going on from the last good checkpoint instead: {path} ({_where(checkpoint)}).")
        return path, checkpoint


@torch.no_grad()
def _lay_out_as_weights(optimizer: torch.optim.Optimizer) -> None:
    """Lay out the moments that a checkpoint brought in memory as the weights are.

    PyTorch keeps the layout of the network that they were saved for; its fused optimizers take it to be the weights',
    on a CPU without looking.
    """
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            if isinstance(moment, torch.Tensor) and moment.shape == weight.shape:
                moments[name] = torch.empty_like(weight).copy_(moment)


def _where(checkpoint: dict) -> str:
    return f"epoch {checkpoint['current_epoch']}, iteration {checkpoint.get('iteration', 0)}"


def _columns(outputs: list[dict]) -> dict[str, torch.Tensor]:
    """Outputs of many steps as few tensors: one transfer each, and quick to write."""
    names = outputs[0] if outputs else {}
    return {name: torch.stack([torch.as_tensor(output[name]) for output in outputs]).cpu() for name in names}


def _rows(columns: dict[str, torch.Tensor], device: torch.device) -> list[dict]:
    steps = zip(*(column.to(device) for column in columns.values()), strict=True)
    return [dict(zip(columns, step, strict=True)) for step in steps]
