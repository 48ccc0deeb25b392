"""How much `dermomamba predict` adds to the network's own time, and how much memory it takes.

python benchmarks/predict.py MODEL: draws photographs, times the network alone on them (on a GPU by nnU-Net's predictor,
too) and the whole prediction, and prints the ratio of the wall-clock times and of the processor times (which say more
on a busy machine); then the peak resident memory of the command itself, in a process of its own, on these photographs
and on four times as many.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from PIL import Image

from nnunetv2_dermomamba.cuda_graph import WARM_UP
from nnunetv2_dermomamba.predict import Predictor
from nnunetv2_dermomamba.predict.outputs import Outputs
from nnunetv2_dermomamba.predict.photos import find_photos
from nnunetv2_dermomamba.predict.stream import predict_photos
from nnunetv2_dermomamba.synthetic import draw_case

DISTINCT = 4  # drawing takes longer than predicting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=768)
    parser.add_argument("--device")
    parser.add_argument("--disable_tta", action="store_true")
    parser.add_argument("--everything", action="store_true", help="overlays, probabilities and the table, too")
    args = parser.parse_args()
    predictor = Predictor(args.model, args.device, mirroring=not args.disable_tta)
    with tempfile.TemporaryDirectory() as folder:
        _draw(Path(folder, "photos"), args.count, (args.height, args.width))
        alone, alone_cpu = _network_alone(predictor, Path(folder, "photos"))
        if predictor.device.type == "cuda":
            theirs, _ = _network_alone(_by_nnunets_predictor(predictor), Path(folder, "photos"))
            print(f"network alone by nnU-Net's predictor: {theirs / args.count:.4f} s for each")
        whole, whole_cpu = _least(lambda: _whole(predictor, Path(folder), args.everything))
        print(f"{args.width} x {args.height}, {args.count} photographs, {predictor.device}")
        print(f"network alone: {alone / args.count:.4f} s for each, {alone_cpu / args.count:.4f} s of processor time")
        print(f"predict: {whole / args.count:.4f} s for each, {whole_cpu / args.count:.4f} s of processor time")
        print(f"ratio: {whole / alone:.3f}, of processor times {whole_cpu / alone_cpu:.3f}")
        print(f"peak memory: {_peak(args, folder):.0f} MiB", end=", ", flush=True)
        _draw(Path(folder, "photos"), 4 * args.count, (args.height, args.width))
        print(f"{_peak(args, folder):.0f} MiB with four times as many photographs")


def _draw(folder: Path, count: int, shape: tuple[int, int]) -> None:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        file = folder / f"photo{number:05d}.jpg"
        if number < DISTINCT:
            Image.fromarray(draw_case(rng, shape)[0]).save(file, quality=92)
            files.append(file.read_bytes())
        file.write_bytes(files[number % DISTINCT])


def _least(function: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor seconds, each the least of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter(), time.process_time()
        function()
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return min(wall for wall, _ in times), min(cpu for _, cpu in times)


def _network_alone(predictor: Predictor, folder: Path) -> tuple[float, float]:
    """Wall-clock and processor seconds for all photographs; the first one warms up, until a CUDA graph is captured."""
    prepared = [predictor.read(file) for file in sorted(folder.iterdir())]
    for _ in range(WARM_UP + 1 if predictor.device.type == "cuda" else 1):
        predictor.network(prepared[0])
    return _least(lambda: [predictor.network(photograph) for photograph in prepared])


def _by_nnunets_predictor(predictor: Predictor) -> Predictor:
    """The same predictor, but for nnU-Net's own way through the mirror images."""
    theirs = copy.copy(predictor)
    theirs._nnunet = copy.copy(predictor._nnunet)
    theirs._nnunet.__class__ = nnUNetPredictor
    return theirs


def _whole(predictor: Predictor, folder: Path, everything: bool) -> None:
    outputs = Outputs(folder / "masks", overlay=everything, probabilities=everything)
    predict_photos(predictor, find_photos(folder / "photos", outputs.folder), outputs, table=everything)


def _peak(args: argparse.Namespace, folder: str) -> float:
    """Peak resident memory of ``dermomamba predict`` in MiB."""
    command = [sys.executable, "-m", "nnunetv2_dermomamba.cli", "predict", "-i", f"{folder}/photos"]
    command += ["-o", f"{folder}/masks", "-m", str(args.model)]
    command += ["-device", args.device] if args.device else []
    command += ["--disable_tta"] if args.disable_tta else []
    command += ["--overlay", "--probabilities", "--csv"] if args.everything else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
