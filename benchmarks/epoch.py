"""Time one nnU-Net epoch, part by part: ``python benchmarks/epoch.py [-d 118] [--contenders NAME[:cpu|:device] ...]``.

Needs ``nnUNet_preprocessed`` with a planned data set; results go to a temporary folder. First a gate: augmentation on
this device gives what it gives on the CPU from the same random numbers. Then for every contender, a trainer's name and
where it augments (nnU-Net's worker processes, or the device: any trainer can):

- loader: batches a second of the training loader alone, its queue emptied first;
- step: ms of ``train_step`` on one batch over and over, what the epoch could be if data were free;
- epoch: seconds of the trainer's own loop, after one short epoch to warm up and compile and a whole one: its training
  iterations, its validation iterations, and the rest (logs, plot, checkpoint);
- busy: share of the training iterations' time in which the GPU runs a kernel or copy, as the driver samples it
  (NVML's utilisation, no overhead), and from a trace of further iterations (the union of all kernels and copies over
  the span; tracing slows the host down a little, so it errs low).

The ratios are over the first contender.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.profiler import ProfilerActivity, profile

from nnunetv2_dermomamba.augmentation.trainer_mixin import AugmentedBatches, DeviceAugmentationMixin
from nnunetv2_dermomamba.augmentation.translate import BatchAugmenter
from nnunetv2_dermomamba.trainers.background_plot import BackgroundPlotMixin
from nnunetv2_dermomamba.trainers.interruptible import InterruptibleMixin
from nnunetv2_dermomamba.trainers.stop_signals import StopRequest

CONTENDERS = ["nnUNetTrainer:cpu", "nnUNetTrainerDermoMamba:cpu", "nnUNetTrainerDermoMamba:device"]
PLACES = {"cpu": False, "device": True, "": None}  # ``augment_on_device``
WARM_UP, TRACED, LOADED = 20, 40, 60  # iterations
SAMPLING_INTERVAL = 0.1  # seconds between readings of the GPU's utilisation; the driver averages over as much or more
GATE = 1e-4


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def check_augmentation(device: torch.device) -> None:
    """Compare both devices' results; the noise itself comes from another generator on each, so it is left out."""
    transforms = nnUNetTrainer.get_training_transforms((192, 256), (-np.pi, np.pi), None, (0, 1), False)
    transforms.transforms = [t for t in transforms.transforms if "GaussianNoise" not in repr(t)]
    image = torch.randn(64, 3, 301, 301, generator=torch.Generator().manual_seed(0))
    segmentation = (image[:, :1] > 0).to(torch.int16)
    results = []
    for where in (torch.device("cpu"), device):
        augment = BatchAugmenter(transforms, (-1, 0, 1), where, np.random.default_rng(0))
        results.append([t.cpu() for t in augment(image.to(where, copy=True), segmentation.to(where, copy=True))])
    (image, labels), (other_image, other_labels) = results
    error = float((other_image - image).norm() / image.norm())
    share = float((other_labels != labels).float().mean())
    print(f"gate: images differ by {error:.1e}, {share:.1e} of labels differ", flush=True)
    if not (error <= GATE and share <= GATE):
        raise SystemExit("wrong augmentation: nothing is timed")


@dataclass
class Utilisation:
    """Mean of the driver's utilisation readings inside a ``with`` block, in percent; NaN without CUDA or NVML."""

    device: torch.device
    readings: list[int] = field(default_factory=list)

    def __enter__(self) -> Utilisation:
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        return self

    def _read(self) -> None:
        while self.device.type == "cuda" and not self.done.wait(SAMPLING_INTERVAL):
            try:
                self.readings.append(torch.cuda.utilization(self.device))
            except (ModuleNotFoundError, RuntimeError):  # no NVML
                return

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take no further reading."""
        self.done.set()
        self.thread.join()

    @property
    def mean(self) -> float:  # noqa: D102
        return float(np.mean(self.readings)) if self.readings else float("nan")


def traced_busy(trainer: nnUNetTrainer) -> float:
    """Percent of the span of some iterations in which a kernel or copy runs."""
    if trainer.device.type != "cuda":
        return float("nan")
    synchronize(trainer.device)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(TRACED):
            trainer.train_step(next(trainer.dataloader_train))
        synchronize(trainer.device)
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    intervals = np.array(sorted((e.time_range.start, e.time_range.end) for e in events))
    ends = np.maximum.accumulate(intervals[:, 1])
    gaps = np.maximum(intervals[1:, 0] - ends[:-1], 0).sum()
    return float(100 * (1 - gaps / (ends[-1] - intervals[0, 0])))


def make_trainer(contender: str, arguments: argparse.Namespace) -> nnUNetTrainer:
    name, _, place = contender.partition(":")
    device = torch.device(arguments.device)
    trainer = get_trainer_from_args(arguments.dataset, "2d", arguments.fold, name, device=device)
    if not isinstance(trainer, DeviceAugmentationMixin):
        kind = type(trainer)
        trainer.__class__ = type(kind.__name__, (DeviceAugmentationMixin, kind), {})
    trainer.augment_on_device = PLACES[place]
    if isinstance(trainer, InterruptibleMixin):
        trainer.stop_request, trainer.stop_group = StopRequest(), None  # as its run_training
    trainer.on_train_start()
    return trainer


def loader_rate(trainer: nnUNetTrainer) -> float:
    """Batches a second. Worker processes have full queues at first, so as many batches are thrown away."""
    for part in ("discarded", "counted"):
        start = time.perf_counter()
        for _ in range(LOADED):
            next(trainer.dataloader_train)
        synchronize(trainer.device)
        if part == "counted":
            return LOADED / (time.perf_counter() - start)
    raise AssertionError


def step_ms(trainer: nnUNetTrainer) -> float:
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    synchronize(trainer.device)
    start = time.perf_counter()
    for _ in range(WARM_UP):
        trainer.train_step(batch)
    synchronize(trainer.device)
    return 1000 * (time.perf_counter() - start) / WARM_UP


def turn(trainer: nnUNetTrainer) -> None:
    """One turn of the loop in the trainer's ``run_training``: ours, or what nnU-Net's does."""
    if isinstance(trainer, InterruptibleMixin):
        trainer._run_epoch()
        return
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
    trainer.on_train_epoch_end(outputs)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        batches = trainer.num_val_iterations_per_epoch
        outputs = [trainer.validation_step(next(trainer.dataloader_val)) for _ in range(batches)]
        trainer.on_validation_epoch_end(outputs)
    trainer.on_epoch_end()


@contextmanager
def followed(trainer: nnUNetTrainer, methods: Iterable[str], action: Callable[[], None]) -> Iterator[None]:
    """Inside, ``action`` is called behind each of the trainer's methods."""

    def with_action(method: Callable[..., None]) -> Callable[..., None]:
        def both(*arguments: object) -> None:
            method(*arguments)
            action()

        return both

    for name in methods:
        setattr(trainer, name, with_action(getattr(trainer, name)))
    yield
    for name in methods:
        delattr(trainer, name)


def epoch(trainer: nnUNetTrainer) -> dict[str, float]:
    """One turn of the trainer's loop, timed."""
    marks = [time.perf_counter()]
    utilisation = Utilisation(trainer.device)

    def mark() -> None:
        synchronize(trainer.device)
        marks.append(time.perf_counter())
        utilisation.stop()  # it is of the training iterations

    with utilisation, followed(trainer, ["on_train_epoch_end", "on_validation_epoch_end"], mark):
        turn(trainer)
    mark()
    train, validation, rest = np.diff(marks)
    total = marks[-1] - marks[0]
    return {"train": train, "val": validation, "rest": rest, "epoch": total, "driver": utilisation.mean}


def close(trainer: nnUNetTrainer) -> None:
    if isinstance(trainer, BackgroundPlotMixin):
        trainer.finish_drawing()
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if isinstance(loader, AugmentedBatches):
            loader.close()
        elif isinstance(loader, NonDetMultiThreadedAugmenter):
            loader._finish()


def measure(contender: str, arguments: argparse.Namespace) -> dict[str, float]:
    torch.compiler.reset()
    start = time.perf_counter()
    trainer = make_trainer(contender, arguments)
    started = time.perf_counter()
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = WARM_UP, 2
    epoch(trainer)
    warm = time.perf_counter()
    result = {"batch": trainer.batch_size, "start": started - start, "warm-up": warm - started}
    result |= {"loader": loader_rate(trainer), "step": step_ms(trainer)}
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = (
        arguments.iterations,
        arguments.iterations // 5,
    )
    epoch(trainer)  # what it leaves to the next one, such as a plot to draw, counts there
    result |= epoch(trainer) | {"trace": traced_busy(trainer)}
    close(trainer)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", default="118", help="number or name, planned and preprocessed")
    parser.add_argument("-f", "--fold", type=int, default=0)
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, metavar="TRAINER[:cpu|:device]")
    parser.add_argument("--iterations", type=int, default=250, help="of the epoch; validation has a fifth of them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    for contender in arguments.contenders:
        if contender.partition(":")[2] not in PLACES:
            parser.error(f"{contender!r}: behind the colon comes cpu or device")
    device = torch.device(arguments.device)
    if device.type == "cuda":  # as nnUNetv2_train does
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {os.cpu_count()} cores, PyTorch {torch.__version__}", flush=True)
    check_augmentation(device)

    columns = [
        "batch",
        "start",
        "warm-up",
        "loader",
        "step",
        "train",
        "val",
        "rest",
        "epoch",
        "ratio",
        "driver",
        "trace",
    ]
    units = ["", "s", "s", "batch/s", "ms", "s", "s", "s", "s", "", "busy %", "busy %"]
    results: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["nnUNet_results"] = folder  # noqa: SIM112
        for contender in arguments.contenders:
            results.append(measure(contender, arguments))
            gc.collect()
            print(f"{contender}: {results[-1]}", flush=True)
    width = max(len(contender) for contender in arguments.contenders)
    for line in (columns, units):
        print(f"{'':{width}}" + "".join(f"{word:>9}" for word in line))
    for contender, result in zip(arguments.contenders, results, strict=True):
        result["ratio"] = result["epoch"] / results[0]["epoch"]
        print(f"{contender:{width}}" + "".join(f"{result[column]:9.4g}" for column in columns))


if __name__ == "__main__":
    main()
