"""The whole job on a laptop: images -> data set -> plan -> train -> masks -> Dice and a sheet of overlays.

Runs the same commands that a user types, in a folder of its own (``demo/``), on synthetic dermoscopy-like images or,
with ``--source``, on a sample of real ones in the official ISIC 2018 layout. See ``make demo``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from tqdm import tqdm

from nnunetv2_dermomamba.conversion.errors import ConversionError
from nnunetv2_dermomamba.conversion.isic2018 import find_isic2018
from nnunetv2_dermomamba.conversion.pairing import Case
from nnunetv2_dermomamba.evaluation.metrics import confusion, overlap_metrics
from nnunetv2_dermomamba.synthetic import write_isic2018_layout

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
DATASET, TRAINER = "Dataset118_ISIC2018", "nnUNetTrainerDermoMamba_demo"
TRAINING, HELD_OUT = 40, 8
FOLDS = 5  # of nnU-Net's cross-validation: as many training pairs at least
SEED = 118
MARKER = ".dermomamba_demo"  # only a folder with this file in it is emptied
REMADE = ("source", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "predictions")  # by each run
SIZE = "96x128"  # a quarter of the default's pixels: two CPU cores train on it in two minutes


def main() -> None:
    """Parse the command line and run every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder with ISIC 2018 in its official layout (default: synthetic)")
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="where to work (default: demo/)")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    pairs = None if arguments.source is None else real_pairs(arguments.source, folder)
    empty_folder(folder)

    start = time.monotonic()
    source = folder / "source"
    if pairs is None:
        write_isic2018_layout(source, TRAINING, HELD_OUT, seed=SEED)
    else:
        link_sample(pairs, source)
    environment = demo_environment(folder)
    images, truth = (folder / "nnUNet_raw" / DATASET / name for name in ("imagesTs", "labelsTs"))
    predictions = folder / "predictions"
    steps = {
        "Convert": [sys.executable, ROOT / "dataset_conversion" / "isic2018.py", "--source", source, "--size", SIZE],
        "Plan and preprocess": words("nnUNetv2_plan_and_preprocess -d 118 -c 2d --verify_dataset_integrity -np 2"),
        "Train": words(f"nnUNetv2_train 118 2d 0 -tr {TRAINER} -device cpu"),
        "Predict": words("nnUNetv2_predict -i", images, "-o", predictions, f"-d 118 -c 2d -tr {TRAINER} -f 0")
        + words("-device cpu -npp 1 -nps 1"),
        "Evaluate": words("dermomamba evaluate -p", predictions, "-g", truth, "--images", images)
        + words("--json", folder / "evaluation.json", "--report", folder / "report.html"),
    }
    # steps differ in length, so a rate or a time left would mislead
    layout = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}]"
    with tqdm(steps.items(), position=0, bar_format=layout) as progress:
        for name, command in progress:
            progress.set_description(name)
            run(name, [str(part) for part in command], environment, folder)

    scores = {case: dice(predictions / f"{case}.png", truth / f"{case}.png") for case in cases_of(predictions)}
    for case, score in scores.items():
        print(f"{case}  Dice {score:.3f}")
    draw_overlays(images, truth, predictions, scores, folder / "overlays.png")
    mean = np.mean(list(scores.values()))
    print(f"\nMean Dice on {len(scores)} held-out images: {mean:.3f}  ({time.monotonic() - start:.0f} s)")
    print(f"Overlays: {folder / 'overlays.png'}\nReport:   {folder / 'report.html'}\nLogs:     {folder / 'logs'}")
    (folder / "scores.json").write_text(json.dumps(scores, indent=2))


def words(*parts: str | Path) -> list[str | Path]:
    """A command line: texts are split at spaces, paths are not."""
    return [word for part in parts for word in (part.split() if isinstance(part, str) else [part])]


def demo_environment(folder: Path) -> dict[str, str]:
    """nnU-Net's folders inside the demo's, one augmentation worker, and this interpreter's commands first."""
    environment = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for path in environment.values():
        Path(path).mkdir(exist_ok=True)
    # Every worker imports PyTorch first, which takes longer than the work on a few small images.
    workers = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    # PyTorch's threads must not spin while they wait for each other: on busy cores a step takes ten times as long.
    workers["OMP_WAIT_POLICY"] = "PASSIVE"
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, **environment, **workers, "PATH": commands}


def real_pairs(archive: Path, folder: Path) -> list[Case]:
    """Real training pairs, enough of them and none where the demo's folder is emptied."""
    try:
        pairs = [case for case in find_isic2018(Path(os.path.abspath(archive))).cases if case.mask is not None]
    except ConversionError as error:
        sys.exit(str(error))
    if len(pairs) < HELD_OUT + FOLDS:
        sys.exit(f"{archive}: {len(pairs)} image-mask pairs are too few for the demo, which needs {HELD_OUT + FOLDS}")
    remade = [folder / part for part in REMADE]
    parents = {path.parent for case in pairs for path in (case.image, case.mask)}
    for parent in parents | {parent.resolve() for parent in parents}:  # links among the remade are removed, too
        if any(parent.is_relative_to(part) for part in remade):
            sys.exit(f"{parent} holds the source and would be emptied; give another --folder, or another --source")
    return pairs


def empty_folder(folder: Path) -> None:
    """Remove what an earlier demo left in its folder; a folder of anything else is refused."""
    marker = folder / MARKER
    if folder.exists() and not marker.exists() and (folder.is_file() or any(folder.iterdir())):
        sys.exit(f"{folder} holds something else than a demo; give a new or empty --folder (an old demo: remove it)")
    if marker.exists():
        print(f"What an earlier demo left in {folder} is replaced.")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for part in REMADE:
        if (folder / part).is_symlink():
            (folder / part).unlink()  # what it points at is the user's
        shutil.rmtree(folder / part, ignore_errors=True)


def link_sample(pairs: list[Case], source: Path) -> None:
    """Link a seeded sample of real training pairs into an official layout, some of them as the test set."""
    chosen = random.Random(SEED).sample(pairs, min(len(pairs), TRAINING + HELD_OUT))
    for subset, cases in (("Test", chosen[:HELD_OUT]), ("Training", chosen[HELD_OUT:])):
        for kind, paths in (("1-2_{}_Input", [c.image for c in cases]), ("1_{}_GroundTruth", [c.mask for c in cases])):
            target = source / f"ISIC2018_Task{kind.format(subset)}"
            target.mkdir(parents=True)
            for path in paths:
                (target / path.name).symlink_to(path.resolve())


def run(name: str, command: list[str], environment: dict[str, str], folder: Path) -> None:
    """Run one command with its output in ``logs/``; on failure show the end of it and stop."""
    (folder / "logs").mkdir(exist_ok=True)
    log = folder / "logs" / f"{name.lower().replace(' ', '_')}.txt"
    with log.open("w") as output:
        code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        print(f"\n{' '.join(command)}\nfailed with exit code {code}; the end of {log}:", file=sys.stderr)
        sys.exit("\n".join(log.read_text().splitlines()[-30:]))


def cases_of(predictions: Path) -> list[str]:
    """Names of the predicted cases."""
    return sorted(path.stem for path in predictions.glob("*.png"))


def dice(prediction: Path, truth: Path) -> float:
    """Dice of two label images."""
    masks = (np.asarray(Image.open(path)) > 0 for path in (prediction, truth))
    return overlap_metrics(confusion(*masks))["dice"]


def draw_overlays(images: Path, truth: Path, predictions: Path, scores: dict[str, float], file: Path) -> None:
    """One sheet: every held-out image with the true contour (magenta) and the predicted one (green)."""
    columns = 4
    rows = -(-len(scores) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.0 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (case, score) in zip(axes.flat, scores.items(), strict=False):
        axis.imshow(Image.open(images / f"{case}_0000.png"))
        for folder, colour in ((truth, "#ff3fd5"), (predictions, "#00ff88")):
            axis.contour(np.asarray(Image.open(folder / f"{case}.png")) > 0, [0.5], colors=colour, linewidths=1.5)
        axis.set_title(f"{case}  Dice {score:.3f}", fontsize=9)
    figure.suptitle("magenta: true contour, green: DermoMamba", fontsize=10)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
