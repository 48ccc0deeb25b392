"""The trainer option: augmentation on the training device instead of in worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunetv2_dermomamba.finite_images import check_images

from .beside import Beside
from .parameters import UntranslatableTransformError
from .resident import ResidentDataLoader, estimated_bytes
from .translate import BatchAugmenter

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as Trainer
else:
    Trainer = object

OPTION = "DERMOMAMBA_AUGMENT_ON_DEVICE"
CHOICES = {"1": True, "true": True, "t": True, "0": False, "false": False, "f": False}
FASTER_ON = ("cuda",)  # device types
RESIDENT_SHARE = 0.25  # of the free device memory; building the tensors takes twice their size for a moment
Workers: TypeAlias = NonDetMultiThreadedAugmenter | SingleThreadedAugmenter


class AugmentedBatches:
    """Batches as a trainer wants them, on its device; on CUDA they are made beside the steps before.

    Args:
        source: yields raw patches.
        augmenter: changes them on the device.
    """

    def __init__(self, source: ResidentDataLoader | Workers, augmenter: BatchAugmenter) -> None:
        self.source = source
        self.augmenter = augmenter
        self._beside = Beside(augmenter.device) if augmenter.device.type == "cuda" else None

    def __iter__(self) -> AugmentedBatches:
        return self

    def __next__(self) -> dict:
        return self._make() if self._beside is None else self._beside(self._make)

    def _make(self) -> dict:
        batch = next(self.source)
        check_images(batch)
        image, segmentation = (batch[name].to(self.augmenter.device, non_blocking=True) for name in ("data", "target"))
        image, segmentation = self.augmenter(image, segmentation)
        return {"data": image, "target": segmentation, "keys": batch["keys"]}

    def close(self) -> None:
        """End the worker processes, if there are any."""
        if isinstance(self.source, NonDetMultiThreadedAugmenter):
            self.source._finish()


class DeviceAugmentationMixin(Trainer):
    """Lets an ``nnUNetTrainer`` augment on its device; list it before the trainer.

    A data set that fits into a quarter of the device's free memory is kept there; otherwise nnU-Net's worker processes
    still read and crop. ``augment_on_device`` chooses:

    - None, the default: on CUDA, where the configuration is 2D and all of the trainer's transforms have counterparts;
      nnU-Net's own way everywhere else.
    - True: always; an error where it cannot be done.
    - False: nnU-Net's own way.

    The environment variable ``DERMOMAMBA_AUGMENT_ON_DEVICE`` (1 or 0) overrides it.
    """

    augment_on_device: bool | None = None

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Training and validation batches.

        Raises:
            UntranslatableTransformError: It shall be on the device, but a transform or setting has no counterpart.
        """
        wanted = _environment_choice(self.augment_on_device)
        if not (self.device.type in FASTER_ON if wanted is None else wanted):
            return super().get_dataloaders()
        try:
            return self._device_dataloaders()
        except UntranslatableTransformError as error:
            if wanted:
                raise UntranslatableTransformError(
                    f"{error}. {type(self).__name__} cannot augment on the device; set {OPTION}=0."
                ) from error
            self.print_to_log_file(f"Augmentation in worker processes: {error}.")
            return super().get_dataloaders()

    def _device_dataloaders(self) -> tuple[AugmentedBatches, AugmentedBatches]:
        if len(self.configuration_manager.patch_size) != 2 or self.is_cascaded:
            raise UntranslatableTransformError("only 2D configurations without cascade have counterparts for batches")
        with _no_worker_processes():
            loaders = [_nnunet_loader(augmenter) for augmenter in super().get_dataloaders()]
        labels = {*self.label_manager.all_labels, self.label_manager.ignore_label, -1} - {None}
        # From the generator that nnU-Net's transforms draw from, so that whoever seeds that seeds both.
        rng = np.random.default_rng(np.random.randint(2**32, dtype=np.uint64))
        augmenters = [BatchAugmenter(loader.transforms, labels, self.device, rng) for loader in loaders]
        needed = sum(estimated_bytes(loader._data) for loader in loaders)
        resident = needed <= RESIDENT_SHARE * _free_bytes(self.device)
        place = "kept on the device" if resident else "read and cropped by worker processes"
        self.print_to_log_file(f"Augmentation on {self.device}; data set ({needed / 2**20:.0f} MiB) {place}.")
        source = partial(ResidentDataLoader, compiles=self._do_i_compile()) if resident else _workers
        sources = [source(loader, self.device) for loader in loaders]
        train, validation = (AugmentedBatches(*pair) for pair in zip(sources, augmenters, strict=True))
        return train, validation

    def on_train_end(self) -> None:
        """As nnU-Net; ends our worker processes, too."""
        super().on_train_end()
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, AugmentedBatches):
                loader.close()


def _environment_choice(default: bool | None) -> bool | None:
    value = os.environ.get(OPTION)
    if value is None:
        return default
    if value.lower() not in CHOICES:
        raise ValueError(f"{OPTION} is {value!r}; set it to 1 (augment on the device) or 0 (in worker processes)")
    return CHOICES[value.lower()]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows, macOS: unknown
        return 0


@contextmanager
def _no_worker_processes() -> Iterator[None]:
    """Have nnU-Net build its loaders without starting worker processes."""
    name = "nnUNet_n_proc_DA"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _nnunet_loader(augmenter: object) -> nnUNetDataLoader:
    loader = getattr(augmenter, "data_loader", None)
    if getattr(type(loader), "generate_train_batch", None) is not nnUNetDataLoader.generate_train_batch:
        raise UntranslatableTransformError(f"no counterpart for batches of what {type(loader).__name__} loads")
    return loader


def _workers(loader: nnUNetDataLoader, device: torch.device) -> Workers:
    """nnU-Net's worker processes for a loader that only reads and crops."""
    loader.transforms = None
    count = get_allowed_n_proc_DA()
    if count == 0:
        return SingleThreadedAugmenter(loader, None)
    pinned = device.type == "cuda"
    return NonDetMultiThreadedAugmenter(
        loader, None, num_processes=count, num_cached=max(6, count // 2), pin_memory=pinned, wait_time=0.002
    )
