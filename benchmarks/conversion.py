"""Speed of the conversion on one core, against a plain open-resize-save loop and against JPEG decoding alone.

    python benchmarks/conversion.py --source DIR    # with images/ and masks/, or ISIC 2018's official folders

Without ``--source``, synthetic images of the size of ISIC's large ones are drawn first. The results must agree before
anything is timed: images within a mean of 1 grey level of the plain loop's, masks within half a pixel of their area.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from nnunetv2_dermomamba.conversion.case import convert_case
from nnunetv2_dermomamba.conversion.cli import size
from nnunetv2_dermomamba.conversion.isic2018 import find_isic2018
from nnunetv2_dermomamba.conversion.pairing import Case
from nnunetv2_dermomamba.images.photograph import read_photograph
from nnunetv2_dermomamba.images.png import write_png
from nnunetv2_dermomamba.synthetic import draw_case


def draw_source(folder: Path, count: int = 5, shape: tuple[int, int] = (2000, 3000)) -> None:
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in range(count):
        image, mask = draw_case(rng, shape)
        Image.fromarray(image).save(folder / "images" / f"{number}.jpg", quality=95)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{number}_segmentation.png")


def plain(source: Path, target: Path, shape: tuple[int, int], resampling: Image.Resampling) -> None:
    with Image.open(source) as image:
        image.resize(shape[::-1], resampling).save(target)


def check(cases: list[Case], shape: tuple[int, int], folder: Path) -> None:
    for case in cases:
        plain(case.image, folder / "plain.png", shape, Image.Resampling.LANCZOS)
        convert_case(case, folder, shape)
        ours = np.asarray(Image.open(folder / "imagesTr" / f"{case.case_id}_0000.png")).astype(int)
        difference = np.abs(ours - np.asarray(Image.open(folder / "plain.png")))
        area = np.count_nonzero(np.asarray(Image.open(folder / "labelsTr" / f"{case.case_id}.png")))
        exact = (
            np.count_nonzero(np.asarray(Image.open(case.mask))) / np.prod(Image.open(case.mask).size) * np.prod(shape)
        )
        print(
            f"{case.case_id:>14} {Image.open(case.image).size!s:>12}  grey levels off: mean {difference.mean():.2f}, "
            f"largest {difference.max()}; lesion pixels off: {area - exact:+.2f}"
        )
        assert difference.mean() < 1
        assert abs(area - exact) <= 0.5 + 1e-6


def rates_of(works: dict[str, Callable[[Case], object]], cases: list[Case], rounds: int) -> dict[str, float]:
    """Cases per second of processor time: best of several rounds for each case, all works in turn in each round."""
    best = {(name, case.case_id): float("inf") for name in works for case in cases}
    for _ in range(rounds):
        for case in cases:
            for name, work in works.items():
                start = time.process_time()
                work(case)
                best[name, case.case_id] = min(best[name, case.case_id], time.process_time() - start)
    return {name: len(cases) / sum(best[name, case.case_id] for case in cases) for name in works}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--size", type=size, default="192x256", metavar="HEIGHTxWIDTH")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir()
        if options.source is None:
            draw_source(folder)
        cases = find_isic2018(options.source or folder).cases
        check(cases, options.size, folder)

        def plain_image(case: Case, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> None:
            plain(case.image, folder / "imagesTr" / "image.png", options.size, resampling)

        def plain_pair(case: Case) -> None:
            plain_image(case)
            plain(case.mask, folder / "labelsTr" / "mask.png", options.size, Image.Resampling.BOX)

        def our_image(case: Case) -> None:
            write_png(read_photograph(case.image, options.size).image, folder / "imagesTr" / "image.png")

        works = {
            "JPEG decoding alone, full scale": lambda case: Image.open(case.image).load(),
            "image, plain loop (Lanczos)": plain_image,
            "image, plain loop (Pillow's default, bicubic)": lambda c: plain_image(c, Image.Resampling.BICUBIC),
            "image, conversion": our_image,
            "image and mask, plain loop (Lanczos, box)": plain_pair,
            "image and mask, conversion": lambda case: convert_case(case, folder, options.size),
        }
        rates = rates_of(works, cases, options.rounds)
    for name, rate in rates.items():
        print(f"{name:<48} {rate:7.1f} per second and core")
    for kind, reference in (("image", "(Lanczos)"), ("image", "bicubic)"), ("image and mask", "box)")):
        baseline = next(name for name in rates if name.startswith(f"{kind}, plain") and name.endswith(reference))
        print(f"{kind}, conversion over {baseline}: {rates[f'{kind}, conversion'] / rates[baseline]:.2f} times as fast")


if __name__ == "__main__":
    main()
