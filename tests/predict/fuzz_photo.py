"""Reads mutated photographs, each in a forked process, since a decoder may crash or hang.

python fuzz_photo.py SEED COUNT: prints JSON, how many were read, refused, ended by a signal, and any other exit status
by number; the slowest in seconds of processor time, and the peak memory in bytes. A DICOM file is decoded in a process
of its own in earnest, too: there, a signal is only an unreadable file.
"""

import io
import json
import os
import resource
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import SimpleITK
from fuzz_reader import mutate

from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.predict import dicom
from nnunetv2_dermomamba.predict.reading import read_photo


def decode_dicom(path: Path) -> int:
    sys.stdout = io.TextIOWrapper(io.BytesIO())
    sys.stderr = io.StringIO()
    status = dicom.main(str(path))
    if status == 0:
        pixels = np.load(io.BytesIO(sys.stdout.buffer.getvalue()), allow_pickle=False)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
    return status


def decode(path: Path) -> int:
    try:
        read_photo(path, (64, 64))
    except ImageReadError:
        return dicom.REFUSED
    return 0


def in_child(function, path: Path) -> tuple[int, resource.struct_rusage]:
    process = os.fork()
    if process == 0:
        status = 99
        try:
            status = function(path)
        except BaseException as error:
            os.write(2, f"{path}: {error!r}\n".encode())
        finally:
            os._exit(status)
    _, status, usage = os.wait4(process, 0)
    return os.waitstatus_to_exitcode(status), usage


def main(seed: Path, count: int) -> None:
    warnings.simplefilter("ignore")
    SimpleITK.ReadImage(str(seed)) if seed.suffix == ".dcm" else read_photo(seed)  # what children need is loaded
    function = decode_dicom if seed.suffix == ".dcm" else decode
    rng = np.random.default_rng(0)
    data = seed.read_bytes()
    mutated = seed.with_name(f"mutated{seed.suffix}")
    codes: Counter = Counter()
    slowest, peak = 0.0, 0
    for _ in range(count):
        mutated.write_bytes(mutate(rng, data))
        code, usage = in_child(function, mutated)
        codes["signal" if code < 0 else code] += 1
        slowest = max(slowest, usage.ru_utime + usage.ru_stime)
        peak = max(peak, usage.ru_maxrss * 1024)
    read, refused, signals = codes.pop(0, 0), codes.pop(dicom.REFUSED, 0), codes.pop("signal", 0)
    result = {"read": read, "refused": refused, "signals": signals, "other": dict(codes)}
    print(json.dumps(result | {"slowest": slowest, "peak": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
