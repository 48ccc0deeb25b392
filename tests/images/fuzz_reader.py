"""Reads mutated images; run by test_fuzz.py in a process of its own, because a decoder may crash it.

python fuzz_reader.py FOLDER KIND COUNT: reads COUNT mutations of FOLDER/seed.* as photographs and as masks. Prints
JSON: what was read, what was refused, anything raised but `ImageReadError`, the slowest call in seconds of processor
time, and the peak memory in bytes.
"""

import json
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.images.masks import read_mask
from nnunetv2_dermomamba.images.photograph import read_photograph

HUGE = (b"\xff\xff", b"\x7f\xff", b"\xff\xff\xff\xff", b"\x00\x00\xff\xff", b"\x00\x00\x00\x00", b"\x23\x28\x23\x28")


def mutate(rng: np.random.Generator, seed: bytes) -> bytes:
    data = bytearray(seed)
    kind = rng.integers(5)
    if kind == 0:  # bit flips anywhere
        for position in rng.integers(len(data), size=rng.integers(1, 20)):
            data[position] ^= 1 << int(rng.integers(8))
    elif kind == 1:  # in the header
        for position in rng.integers(min(200, len(data)), size=rng.integers(1, 4)):
            data[position] = int(rng.integers(256))
    elif kind == 2:  # truncation
        del data[int(rng.integers(len(data))) :]
    elif kind == 3:  # huge claims
        value = HUGE[rng.integers(len(HUGE))]
        position = int(rng.integers(min(300, len(data) - 4)))
        data[position : position + len(value)] = value
    else:  # a piece repeated or lost
        start, stop = sorted(int(p) for p in rng.integers(len(data), size=2))
        data[start:stop] = data[start:stop] * int(rng.choice([0, 2, 3]))
    return bytes(data)


def main(folder: Path, name: str, count: int) -> None:
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    seed = next(folder.glob(f"{name}.*"))
    mutated = folder / f"mutated{seed.suffix}"

    def pixels(shape: tuple[int, int] | None) -> np.ndarray:
        return np.asarray(read_photograph(mutated, shape).image)

    result: dict = {"read": 0, "refused": 0, "raised": [], "slowest": 0.0}
    for number in range(count):
        data = mutate(rng, seed.read_bytes())
        mutated.write_bytes(data)
        for read in (lambda: pixels(None), lambda: pixels((24, 32)), lambda: read_mask(mutated)):
            start = time.process_time()
            try:
                read()
                result["read"] += 1
            except ImageReadError:
                result["refused"] += 1
            except BaseException as error:
                result["raised"].append(f"{number}: {error!r}")
            result["slowest"] = max(result["slowest"], time.process_time() - start)
    result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
