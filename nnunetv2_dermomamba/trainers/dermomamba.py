"""nnU-Net trainers of the DermoMamba network."""

from __future__ import annotations

from typing import cast

import torch
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, autocast, nn

from nnunetv2_dermomamba.augmentation.trainer_mixin import DeviceAugmentationMixin
from nnunetv2_dermomamba.cuda_graph import CapturedPass
from nnunetv2_dermomamba.network import DermoMamba
from nnunetv2_dermomamba.ops import describe_choice

from .background_plot import BackgroundPlotMixin
from .guide_fusion_loss import GuideFusionLossMixin
from .interruptible import InterruptibleMixin
from .optimization import WarmupPolyLRScheduler, build_adamw


class nnUNetTrainerDermoMambaDiceCE(DeviceAugmentationMixin, BackgroundPlotMixin, InterruptibleMixin):
    """DermoMamba with nnU-Net's own loss: AdamW, warm-up, no deep supervision; everything else nnU-Net's.

    Where the planned patch covers the images, they are not moved to have a lesion in the patch's middle, which a third
    of nnU-Net's samples are: it costs half a point of Dice (docs/accuracy.md).

    On CUDA nnU-Net's augmentation runs in batches on the device: its worker processes cannot feed the network there
    (docs/speed.md). ``DERMOMAMBA_AUGMENT_ON_DEVICE=0`` leaves it to them.
    A recipe is changed by a subclass that sets the attributes below, and ``attention`` of the Guide Fusion Loss.
    """

    learning_rate = 1e-3  # its peak, behind the warm-up
    adamw_weight_decay = 1e-2
    epochs = 50  # 12 500 steps: Dice was flat from 4 000 to 8 000 of them (docs/accuracy.md)
    warmup_epochs = 1.0
    gradient_clip = 1.0
    cuda_graph = True  # on CUDA without DDP; the kernels are many and short
    network: nn.Module

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.initial_lr = self.learning_rate
        self.weight_decay = self.adamw_weight_decay
        self.num_epochs = self.epochs
        if self._patch_covers_images():
            self.oversample_foreground_percent = 0.0
        self._captured_pass = CapturedPass(self._forward_backward, self.print_to_log_file)
        self._captured_inference = CapturedPass(
            self._infer, self.print_to_log_file, "validation", shares=self._captured_pass
        )

    def _patch_covers_images(self) -> bool:
        plan = self.configuration_manager
        sides = zip(plan.patch_size, plan.median_image_size_in_voxels, strict=True)
        return all(patch >= median for patch, median in sides)

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """DermoMamba for the planned patch size; there is no deep supervision to enable."""
        return DermoMamba(num_input_channels, num_output_channels, configuration_manager.patch_size)

    def initialize(self) -> None:
        """As nnU-Net; says in the log which backend computes the selective scan, and that the first steps take long."""
        super().initialize()
        self._initial_network = self.network
        self.print_to_log_file(describe_choice(self.device.type))
        if self.warmup_epochs:
            self.print_to_log_file(f"The learning rate rises from 0 to {self.initial_lr:g} during the warm-up.")
        if self.device.type == "cuda":
            self.print_to_log_file("The first steps compile for the GPU, at the very first start for minutes.")

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing to switch."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, WarmupPolyLRScheduler]:
        """AdamW without weight decay on the scan's own parameters; warm-up and polynomial decay per iteration."""
        optimizer = build_adamw(self.network, self.initial_lr, self.weight_decay, self.device)
        warmup = min(self.warmup_epochs, 0.1 * self.num_epochs)
        return optimizer, WarmupPolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, warmup)

    def _set_learning_rate(self) -> None:
        # the first iteration of the warm-up must not have a rate of zero
        fraction = (self.iteration + 1) / (self.num_iterations_per_epoch + 1)
        self.lr_scheduler.step(self.current_epoch + fraction)

    def _captures(self) -> bool:
        return self.cuda_graph and self.device.type == "cuda" and not self.is_ddp

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step without waiting for the device: losses stay there as tensors until the epoch ends."""
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        self._set_learning_rate()
        loss = (self._captured_pass if self._captures() else self._forward_backward)(data, target)
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.gradient_clip)
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        elif torch.isfinite(norm):  # as the gradient scaler does on CUDA; nothing to wait for on the CPU
            self.optimizer.step()
        return {"loss": loss.detach(), "gradient_norm": norm}

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's step, in which the network is a CUDA graph where the training step is."""
        network = self.network
        if not self._captures() or network is not self._initial_network:  # a subclass validates another one
            return super().validation_step(batch)  # type: ignore[no-any-return]
        self.network = cast(nn.Module, self._captured_inference)
        try:
            return super().validation_step(batch)  # type: ignore[no-any-return]
        finally:
            self.network = network

    def _infer(self, data: Tensor) -> Tensor:
        # nnU-Net's autocast would keep its copies of the weights from a capture that broke, which wrote none
        with autocast("cuda", cache_enabled=False):
            return self._initial_network(data)  # type: ignore[no-any-return]

    def _forward_backward(self, data: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast("cuda") if self.device.type == "cuda" else dummy_context():
            loss = self.loss(self.network(data), target)
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        return loss


class nnUNetTrainerDermoMamba(GuideFusionLossMixin, nnUNetTrainerDermoMambaDiceCE):
    """DermoMamba with the Guide Fusion Loss."""


class nnUNetTrainerDermoMamba_5epochs(nnUNetTrainerDermoMamba):
    """Five epochs, to see that everything runs."""

    epochs = 5


class nnUNetTrainerDermoMamba_demo(nnUNetTrainerDermoMamba):
    """Four epochs of fifty iterations: two minutes on two CPU cores for small images and batches."""

    epochs = 4

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch = 50
        self.num_val_iterations_per_epoch = 4
