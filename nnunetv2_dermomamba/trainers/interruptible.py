"""nnU-Net's training loop, made to be stopped and resumed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from nnunetv2_dermomamba.finite_images import NotFiniteError, check_images

from .finite import RunningStatistics, skipped_at_end
from .orphans import EndsWithParent, end_forks_with_parent
from .safe_checkpoints import SafeCheckpointMixin
from .seeding import environment_seed, seed_generators
from .stop_signals import STOPPED, StopRequest, stopping_at_once

REPAIR_INTERVAL = 10  # steps; BatchNorm's running means forget 65 % within as many
MOST_SKIPPED = (
    100  # steps in a row; the gradient scaler halves its scale at each, so fewer than 50 can be of its making
)


class InterruptibleMixin(SafeCheckpointMixin):
    """A run that can be killed, stopped and continued at any step, and that stops where it cannot get anywhere.

    SIGTERM and SIGINT have it finish the step, save and exit with code 75. With ``DERMOMAMBA_SEED`` set, every step
    draws from generators set by the seed, the epoch and the iteration; on the CPU and with ``nnUNet_n_proc_DA=0`` a run
    then ends with the same weights whether or not it was interrupted.
    """

    def initialize(self) -> None:
        """As nnU-Net, from the seed if there is one."""
        self.seed = environment_seed()
        if self.seed is not None:
            seed_generators(self.seed)
        super().initialize()
        self.running_statistics = RunningStatistics(self.plain_network())

    def get_dataloaders(self) -> tuple[Any, Any]:
        """As nnU-Net; from a seed, each process and a run that goes on augment in their own way."""
        if self.seed is not None:
            seed_generators(self.seed, self.local_rank, self.current_epoch, self.iteration)
        return super().get_dataloaders()

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """As nnU-Net; the processes that they are sent to end with this one."""
        datasets = super().get_tr_and_val_datasets()
        for dataset in datasets:
            dataset.ends_with_parent = EndsWithParent()
        return datasets

    def load_checkpoint(self, filename: str) -> None:
        """As nnU-Net, except that a damaged file is passed over."""
        super().load_checkpoint(filename)
        self.running_statistics = RunningStatistics(self.plain_network())

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net, never with broken running statistics."""
        self.running_statistics.repair()
        super().save_checkpoint(filename)

    def save_progress(self) -> None:
        """Save within an epoch, never with broken running statistics."""
        self.running_statistics.repair()
        super().save_progress()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As nnU-Net, with the epoch's losses fetched from the device in one transfer."""
        losses = [torch.as_tensor(output["loss"], dtype=torch.float32, device=self.device) for output in train_outputs]
        super().on_train_epoch_end([{"loss": loss} for loss in torch.stack(losses).cpu().numpy()[:, None]])

    def run_training(self) -> None:
        """nnU-Net's loop over the epochs.

        Raises:
            SystemExit: with code 75, after SIGTERM or SIGINT.
            NotFiniteError: an image, or 100 steps in a row, are not finite.
        """
        end_forks_with_parent()
        self.stop_request = StopRequest()
        self.stop_request.install()
        try:
            self.on_train_start()
            self.stop_group = dist.new_group(backend="gloo") if self.is_ddp else None
            while self.current_epoch < self.num_epochs:
                self._run_epoch()
            self.on_train_end()
            if self._stop_requested():
                self._stop("The training is complete")
        except BaseException:
            self._close_loaders()
            raise
        finally:
            self.stop_request.restore()

    def _run_epoch(self) -> None:
        self.on_epoch_start()
        self.on_train_epoch_start()
        with self._progress_bar() as bar:
            while self.iteration < self.num_iterations_per_epoch:
                batch = self._next_batch(self.dataloader_train, self.iteration)
                self.train_outputs.append(self.train_step(batch))
                self.iteration += 1
                self._look_after_numbers()
                bar.update()
        skipped = self._skipped_in_a_row()
        self.on_train_epoch_end(self.train_outputs)
        self.running_statistics.repair()

        with torch.no_grad():
            self.on_validation_epoch_start()
            steps = range(self.iteration, self.iteration + self.num_val_iterations_per_epoch)
            self.on_validation_epoch_end(
                [self.validation_step(self._next_batch(self.dataloader_val, step)) for step in steps]
            )
        self.iteration, self.train_outputs, self.skipped_before = 0, [], skipped
        self.on_epoch_end()

    def _progress_bar(self) -> tqdm:
        """Of an epoch's steps, on a terminal: nnU-Net says nothing before an epoch's end, which may be minutes away."""
        return tqdm(
            total=self.num_iterations_per_epoch,
            initial=self.iteration,
            desc=f"Epoch {self.current_epoch}",
            unit="step",
            leave=False,
            disable=None if self.local_rank == 0 else True,  # None: unless it is a terminal
        )

    def _next_batch(self, loader: Any, step: int) -> dict:
        """The batch of a step of this epoch, unless it is time to save or to stop."""
        if self._stop_requested():
            self.save_progress()
            saved = "Left" if self.disable_checkpointing else "Saved"
            self._stop(f"{saved} after iteration {self.iteration} of epoch {self.current_epoch}")
        self.save_progress_if_due()
        if self.seed is not None:
            seed_generators(self.seed, self.local_rank, self.current_epoch, step)
        batch = next(loader)
        check_images(batch)
        return batch

    def _look_after_numbers(self) -> None:
        if self.iteration % REPAIR_INTERVAL == 0:
            self.running_statistics.repair()
        if self.iteration % MOST_SKIPPED == 0:
            self._skipped_in_a_row()

    def _skipped_in_a_row(self) -> int:
        """How many of the last steps were skipped, across epochs; waits for the device.

        Raises:
            NotFiniteError: they are 100 or more.
        """
        skipped = skipped_at_end(self.train_outputs)
        if skipped == len(self.train_outputs):
            skipped += self.skipped_before
        if skipped >= MOST_SKIPPED:
            raise NotFiniteError(
                f"The loss or its gradient was not finite in the last {MOST_SKIPPED} steps, up to iteration "
                f"{self.iteration} of epoch {self.current_epoch}; they were skipped. Lower the learning rate "
                f"(initial_lr, now {self.initial_lr}) and train again; {self.output_folder} keeps the checkpoints "
                "from before."
            )
        return skipped

    def _stop_requested(self) -> bool:
        """Whether any process of this run was told to stop; all of them must leave after the same step."""
        requested = self.stop_request.received is not None
        if self.stop_group is None:
            return requested
        flag = torch.tensor(int(requested))  # on the CPU, so that no GPU is waited for
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.stop_group)
        return bool(flag)

    def _stop(self, where: str) -> None:
        received = self.stop_request.received
        name = received.name if received is not None else "a signal to another process"
        how = "the same command with --c goes on"
        if self.disable_checkpointing:
            how = "nothing is saved: checkpointing is disabled"
        self.print_to_log_file(f"Stopped by {name}. {where}; {how}. Exit code {STOPPED}.")
        raise SystemExit(STOPPED)

    def _close_loaders(self) -> None:
        """End the worker processes, so that none outlives or holds up this one."""
        for loader in (self.dataloader_train, self.dataloader_val):
            source: Any = getattr(loader, "source", loader)
            if hasattr(source, "_finish"):
                source._finish()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As nnU-Net; SIGTERM and SIGINT end it at once with code 75, and ``--c`` or ``--val`` run it again."""
        with stopping_at_once(f"Validation stopped; --c runs it again. Exit code {STOPPED}."):
            super().perform_actual_validation(save_probabilities)
