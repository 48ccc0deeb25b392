"""How much `dermomamba predict` adds to the network's own time, and how much memory it takes.

python benchmarks/predict.py MODEL: draws photographs, times the network alone on them and the whole prediction, and
prints the ratio and the peak resident memory after a run and after one four times as long.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

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
        alone = _network_alone(predictor, Path(folder, "photos"))
        whole = [_whole(predictor, Path(folder), args.everything) for _ in range(3)]
        print(f"{args.width} x {args.height}, {args.count} photographs, {predictor.device}")
        print(f"network alone: {alone:.4f} s for each, {alone * args.count:.2f} s for all")
        print(f"predict: {min(whole) / args.count:.4f} s for each; ratio {min(whole) / args.count / alone:.3f}")
        first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _draw(Path(folder, "photos"), 4 * args.count, (args.height, args.width))
        _whole(predictor, Path(folder), args.everything)
        longer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"peak memory: {first / 1024:.0f} MiB, {longer / 1024:.0f} MiB with four times as many photographs")


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


def _network_alone(predictor: Predictor, folder: Path) -> float:
    """Seconds for one photograph, the least of three passes over all; the first photograph warms up."""
    prepared = [predictor.read(file) for file in sorted(folder.iterdir())]
    predictor.network(prepared[0])
    passes = []
    for _ in range(3):
        start = time.perf_counter()
        for photograph in prepared:
            predictor.network(photograph)
        passes.append((time.perf_counter() - start) / len(prepared))
    return min(passes)


def _whole(predictor: Predictor, folder: Path, everything: bool) -> float:
    """Seconds for all photographs."""
    outputs = Outputs(folder / "masks", overlay=everything, probabilities=everything)
    start = time.perf_counter()
    predict_photos(predictor, find_photos(folder / "photos", outputs.folder), outputs, table=everything)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
