"""Which training segments best? ``python benchmarks/accuracy.py --settings unet,dermomamba --presentations 100000``.

Needs ``nnUNet_preprocessed`` with Dataset118 planned and preprocessed (``resenc`` also its plans: the error says how).
A fifth of its cases, the same for every setting and machine, is held out: what trains gets a data set folder of links
whose splits do not name them. Every setting of ``recipes.py`` sees the same number of images, and its schedule ends
there; the final weights, averaged over flips as nnU-Net does, predict the held-out fifth; ``dermomamba evaluate``
scores it. A line for each run is appended to ``docs/experiments.csv``, and a Markdown table is printed.

A run that is finished (``WORK/runs/.../run.json``) is not trained again, so that the same command with more settings
or seeds goes on, and that ``runs/`` of another machine gives its table here. Several such commands may work in one
folder at once, on different settings: a GPU that waits for the processor is better used so.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import math
import os
import shutil
import subprocess
import time
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from recipes import SETTINGS, Setting
from torch import nn

from nnunetv2_dermomamba.augmentation.trainer_mixin import DeviceAugmentationMixin
from nnunetv2_dermomamba.evaluation.aggregate import PER_IMAGE, Figure, summarise
from nnunetv2_dermomamba.evaluation.compare import Difference, compare
from nnunetv2_dermomamba.evaluation.evaluate import evaluate
from nnunetv2_dermomamba.evaluation.output import METRICS, read_csv, write_csv, write_text
from nnunetv2_dermomamba.trainers.seeding import seed_generators

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT_SEED = 2018
HELD_OUT, VALIDATION = 1 / 5, 1 / 10  # of all cases; of the others
PREDICTED_AT_ONCE = 16
SCORES = ["dice", "iou", "precision", "recall", "boundary_f1"]
COLUMNS = ["commit", "setting", "data", "batch", "seed", "presentations", *SCORES, "minutes", "device"]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: of the setting, with ``@DATASET`` where that is not the command's.
        setting: what is trained.
        dataset: folder name of the data set.
        plans: name of the plans.
        batch: images in a batch, None for the planned number.
        presentations: images asked for.
        seed: of the weights, and of whatever else is reproducible.
        work: the command's folder.
    """

    name: str
    setting: Setting
    dataset: str
    plans: str
    batch: int | None
    presentations: int
    seed: int
    work: Path

    @property
    def folder(self) -> Path:
        """Where its predictions and scores are."""
        parts = [self.name.partition("@")[0], f"{self.presentations}x", f"batch{self.batch or 'planned'}"]
        return self.work / "runs" / f"{self.dataset}__{self.plans}" / "_".join([*parts, f"seed{self.seed}"])

    @property
    def preprocessed(self) -> Path:
        """The data set that it trains on."""
        return self.work / "preprocessed" / self.dataset


def held_out_split(cases: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Split for training, and the cases held out of it, from nothing but the sorted names."""
    cases = sorted(cases)
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(cases))
    held_out = round(HELD_OUT * len(cases))
    validation = held_out + max(1, round(VALIDATION * (len(cases) - held_out)))
    parts = np.split(order, [held_out, validation])
    held, val, train = (sorted(cases[n] for n in part) for part in parts)
    return {"train": train, "val": val}, held


def link(target: Path, source: Path) -> None:
    """Make ``target`` a link to ``source`` unless it is there, such as by another process."""
    with suppress(FileExistsError):
        target.symlink_to(source.resolve())


def prepare(source: Path, run: Run) -> list[str]:
    """Build the data set folder of links with its own splits, and the folder of true masks; the held-out cases."""
    masks = sorted((source / "gt_segmentations").iterdir())
    split, held_out = held_out_split([path.name.removesuffix("".join(path.suffixes)) for path in masks])
    truth = run.work / "truth" / run.dataset
    for folder in (run.preprocessed, truth):
        folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name != "splits_final.json":
            link(run.preprocessed / path.name, path)
    write_text(run.preprocessed / "splits_final.json", json.dumps([split], indent=1))
    for path in masks:
        if path.name.removesuffix("".join(path.suffixes)) in set(held_out):
            link(truth / path.name, path)
    return held_out


def build_trainer(run: Run, arguments: argparse.Namespace) -> nnUNetTrainer:
    """The setting's trainer, to end after the presentations, without checkpoints and plots on the way."""
    setting = run.setting
    plans, dataset = (
        json.loads((run.preprocessed / name).read_text()) for name in (f"{run.plans}.json", "dataset.json")
    )
    plans["continue_training"] = False
    configuration = plans["configurations"]["2d"]
    configuration |= setting.plan_changes | ({"batch_size": run.batch} if run.batch else {})
    kind = recursive_find_trainer_class_by_name(setting.trainer)
    device = () if issubclass(kind, DeviceAugmentationMixin) else (DeviceAugmentationMixin,)
    kind = type(kind.__name__, (*setting.mixins, *device, kind), {})
    trainer = kind(plans, "2d", 0, dataset, torch.device(arguments.device))
    for name, value in setting.trainer_changes.items():
        if not hasattr(trainer, name):
            raise SystemExit(f"{setting.trainer} has no attribute {name!r}: see recipes.py")
        setattr(trainer, name, value)
    trainer.augment_on_device = arguments.augment_on_device
    trainer.disable_checkpointing = True
    trainer.logger.plot_progress_png = lambda folder: None  # takes a second

    batch = trainer.configuration_manager.batch_size
    training = len(json.loads((run.preprocessed / "splits_final.json").read_text())[0]["train"])
    steps = math.ceil(run.presentations / batch)
    trainer.num_epochs = min(steps, setting.epochs or max(1, round(run.presentations / training)))
    trainer.num_iterations_per_epoch = max(1, round(steps / trainer.num_epochs))
    trainer.num_val_iterations_per_epoch = math.ceil(setting.validation_images / batch)
    return trainer


def final_network(trainer: nnUNetTrainer) -> nn.Module:
    """What is predicted with: without wrappers and deep supervision, averaged where the trainer averages."""
    trainer.set_deep_supervision_enabled(False)
    if hasattr(trainer, "inference_network"):
        return trainer.inference_network()
    return getattr(trainer.network, "_orig_mod", trainer.network)


@torch.inference_mode()
def predict_logits(predictor: nnUNetPredictor, images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits (classes, 1, height, width) of images (channels, 1, height, width) as nnU-Net's sliding window gives them.

    Images of the patch's size are one window each, so they go through the predictor together.
    """
    patch = (1, *predictor.configuration_manager.patch_size)
    if any(tuple(image.shape[1:]) != patch for image in images):
        return [predictor.predict_sliding_window_return_logits(image).float().cpu() for image in images]
    batch = torch.stack([image[:, 0] for image in images]).to(predictor.device)
    predictor.network.to(predictor.device).eval()
    with torch.autocast("cuda") if predictor.device.type == "cuda" else nullcontext():
        logits = predictor._internal_maybe_mirror_and_predict(batch)
    return list(logits.float().cpu()[:, :, None])


def predict(trainer: nnUNetTrainer, cases: list[str], folder: Path) -> None:
    """Write the masks of preprocessed cases through nnU-Net's predictor and export."""
    folder.mkdir(parents=True, exist_ok=True)
    predictor = nnUNetPredictor(
        use_mirroring=True,
        perform_everything_on_device=trainer.device.type == "cuda",
        device=trainer.device,
        allow_tqdm=False,
    )
    plans, configuration, dataset = trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json
    predictor.manual_initialization(
        final_network(trainer), plans, configuration, None, dataset, type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    stored = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    for start in range(0, len(cases), PREDICTED_AT_ONCE):
        some = cases[start : start + PREDICTED_AT_ONCE]
        loaded = [stored.load_case(case) for case in some]
        images = [torch.from_numpy(np.ascontiguousarray(data[:], np.float32)) for data, *_ in loaded]
        for case, logits, (*_, properties) in zip(some, predict_logits(predictor, images), loaded, strict=True):
            export_prediction_from_logits(
                logits.numpy(), properties, configuration, plans, dataset, str(folder / case), num_threads_torch=1
            )


def perform(run: Run, cases: list[str], arguments: argparse.Namespace) -> None:
    """Train, predict and score one run; its ``run.json``, last of all, says that it is done."""
    start = time.perf_counter()
    torch.compiler.reset()
    seed_generators(run.seed)
    run.folder.mkdir(parents=True, exist_ok=True)
    results = run.work / "models" / run.folder.parent.name / run.folder.name
    os.environ["nnUNet_preprocessed"] = str(run.work / "preprocessed")  # noqa: SIM112
    os.environ["nnUNet_results"] = str(results)  # noqa: SIM112
    with open(run.folder / "log.txt", "w") as log, redirect_stdout(log):
        trainer = build_trainer(run, arguments)
        trainer.run_training()
        predict(trainer, cases, run.folder / "masks")
        trainer.disable_checkpointing = False
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    evaluation = evaluate(run.folder / "masks", run.work / "truth" / run.dataset)
    write_csv(evaluation, run.folder / "cases.csv")
    figures = evaluation.figures[1][PER_IMAGE]
    batch = trainer.configuration_manager.batch_size
    cuda = trainer.device.type == "cuda"
    record = {
        "commit": arguments.commit,
        "setting": run.name.partition("@")[0],
        "data": f"{run.dataset}/{run.plans}",
        "batch": batch,
        "seed": run.seed,
        "presentations": trainer.num_epochs * trainer.num_iterations_per_epoch * batch,
        **{metric: METRICS[metric].show(figures[metric].value) for metric in SCORES},
        "minutes": f"{(time.perf_counter() - start) / 60:.1f}",
        "device": torch.cuda.get_device_name() if cuda else "CPU",
    }
    write_text(run.folder / "run.json", json.dumps(record, indent=1) + "\n")
    del trainer
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def add_line(record: dict[str, object], table: Path) -> None:
    """Append a run to the table of experiments unless it is there."""
    if not table.exists():
        write_text(table, ",".join(COLUMNS) + "\n")
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([record[column] for column in COLUMNS])
    if line.getvalue() not in table.read_text().splitlines(keepends=True):
        with table.open("a") as file:
            file.write(line.getvalue())


def mean_over_seeds(runs: list[Run]) -> pd.DataFrame:
    """One row for each held-out image, its scores averaged over the runs."""
    frames = pd.concat([read_csv(run.folder / "cases.csv") for run in runs])
    return frames.groupby("case")[["tp", "fp", "fn", "tn", *SCORES]].mean().reset_index()


def with_interval(figure: Figure) -> str:
    return f"{100 * figure.value:.2f} ({100 * figure.low:.2f} to {100 * figure.high:.2f})"


def with_p(difference: Difference) -> str:
    p = "< 0.0001" if difference.p < 1e-4 else f"= {difference.p:.4f}"
    return f"{100 * (difference.mean - difference.other):+.2f} (p {p})"


def markdown(runs: list[Run], against: str) -> str:
    """The table: every setting's mean over images and seeds, and its paired differences from one of them."""
    names = list(dict.fromkeys(run.name for run in runs))
    frames = {name: mean_over_seeds([run for run in runs if run.name == name]) for name in names}
    head = ["setting", "batch", "presentations", "seeds", *(METRICS[metric].title for metric in SCORES)]
    head += ["spread of DSC over seeds", f"DSC - {against}", f"Boundary F1 - {against}"]
    lines = [head, ["---"] * len(head)]
    for name in names:
        records = [json.loads((run.folder / "run.json").read_text()) for run in runs if run.name == name]
        figures = summarise(frames[name], SCORES)[PER_IMAGE]
        scores = [float(record["dice"]) for record in records]
        row = [name, str(records[0]["batch"]), str(records[0]["presentations"]), str(len(records))]
        row += [with_interval(figures[metric]) for metric in SCORES]
        row.append(f"{max(scores) - min(scores):.2f}" if len(scores) > 1 else "")
        if against in frames and name != against:
            differences = compare(frames[name], frames[against], SCORES)
            row += [with_p(differences[metric]) for metric in ("dice", "boundary_f1")]
        else:
            row += ["", ""]
        lines.append(row)
    images = len(frames[names[0]])
    notes = f"{images} held-out images, mean per image in %, 95 % bootstrap interval over images, Wilcoxon's p."
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + f"\n\n{notes}\n"


def plan(arguments: argparse.Namespace, source: Path) -> list[Run]:
    """All runs asked for, seed by seed, so that one of each setting is there soonest.

    Raises:
        SystemExit: A setting or a data set is not there.
    """
    names = arguments.settings.split(",")
    runs = []
    for seed in arguments.seeds.split(","):
        for name in names:
            key, _, dataset = name.partition("@")
            if key not in SETTINGS:
                raise SystemExit(f"no setting {key!r}; there are {', '.join(SETTINGS)}")
            folder = dataset_folder(source, dataset or arguments.dataset)
            setting, plans = SETTINGS[key], SETTINGS[key].plans or arguments.plans
            runs.append(
                Run(name, setting, folder, plans, arguments.batch, arguments.presentations, int(seed), arguments.work)
            )
    for run in runs:
        if not (run.folder / "run.json").exists() and not (source / run.dataset / f"{run.plans}.json").exists():
            planner = " -pl nnUNetPlannerResEncM" if "ResEncUNetM" in run.plans else ""
            raise SystemExit(
                f"{source / run.dataset} has no {run.plans}.json; "
                f"nnUNetv2_plan_experiment -d {run.dataset[7:10]}{planner} writes it"
            )
    return runs


def dataset_folder(source: Path, dataset: str) -> str:
    """Folder name of a data set given by number or name."""
    if dataset.startswith("Dataset"):
        return dataset
    found = sorted(path.name for path in source.glob(f"Dataset{int(dataset):03d}_*"))
    if len(found) != 1:
        raise SystemExit(f"{source} has {len(found)} folders Dataset{int(dataset):03d}_*, not one")
    return found[0]


def current_commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def preprocessed_folder(parser: argparse.ArgumentParser) -> Path:
    """Where nnU-Net's planned and preprocessed data are; says what to set where that is unknown."""
    folder = os.environ.get("nnUNet_preprocessed")  # noqa: SIM112
    if not folder:
        parser.error("set nnUNet_preprocessed to the folder of the planned and preprocessed data, as for nnU-Net")
    return Path(folder).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table = ["unet", "resenc", "paper", "dermomamba", "dermomamba-dice-ce", "unet-guide-fusion"]
    parser.add_argument("--settings", default=",".join(table), help="of recipes.py, a,b,c; NAME@119: on Dataset119")
    parser.add_argument("--presentations", type=int, default=100_000, help="images that each training sees")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--batch", type=int, help="instead of the planned batch size (paper keeps its 4)")
    parser.add_argument("--against", help="setting that the others are compared with (default: the first)")
    parser.add_argument("-d", "--dataset", default="118", help="number or folder name")
    parser.add_argument("--plans", default="nnUNetPlans")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--augment-on-device", action="store_true", help="for all settings, instead of in workers")
    parser.add_argument("--minutes", type=float, help="start no run that would not end within these, by the last one")
    parser.add_argument("--work", type=Path, default=Path("accuracy"), help="folder for runs/, models/ and links")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "experiments.csv")
    parser.add_argument("--commit", default=current_commit(), help="for the table, where there is no git")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    if arguments.device.startswith("cuda"):  # as nnUNetv2_train does
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = True
    source = preprocessed_folder(parser)

    start, longest, finished = time.perf_counter(), 0.0, []
    for run in plan(arguments, source):
        began = time.perf_counter()
        if not (run.folder / "run.json").exists():
            if arguments.minutes and began - start + longest > 60 * arguments.minutes:
                print(f"{run.name}, seed {run.seed}: not started, too little time is left", flush=True)
                continue
            perform(run, prepare(source / run.dataset, run), arguments)
            longest = max(longest, time.perf_counter() - began)
        record = json.loads((run.folder / "run.json").read_text())
        add_line(record, arguments.table)
        print(", ".join(f"{key} {value}" for key, value in record.items()), flush=True)
        finished.append(run)
    if finished:
        print("\n" + markdown(finished, arguments.against or finished[0].name))


if __name__ == "__main__":
    main()
