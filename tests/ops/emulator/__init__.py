"""``nvrtc.launch`` on the CPU: the CUDA kernels' own sources, compiled by g++ with ``emulator.h``."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from functools import cache
from pathlib import Path

import torch

from nnunetv2_dermomamba.ops.nvrtc import read_sources

HEADER = Path(__file__).parent / "emulator.h"
SHARED_BYTES = 56 * 1024 * 4


@cache
def _library(source: str, options: tuple[str, ...], folder: Path) -> ctypes.CDLL:
    key = hashlib.sha256(repr((source, options, HEADER.read_text())).encode()).hexdigest()[:16]
    library = folder / f"{key}.so"
    if not library.exists():
        file = folder / f"{key}.cpp"
        file.write_text(source)
        command = ["g++", "-O1", "-w", "-std=c++17", "-fno-strict-aliasing", "-shared", "-fPIC", *options]
        subprocess.run([*command, str(file), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def launch(folder: Path, files, definitions, name, blocks, threads, shared, *arguments) -> None:
    """As ``nvrtc.launch``; compiled libraries are kept in ``folder``."""
    assert shared <= SHARED_BYTES
    source = read_sources(files).replace("extern __shared__ float shared[];", "")
    kernel = re.search(rf"{name}\(([^)]*)\)\s*{{", source)
    assert kernel is not None
    parameters = kernel.group(1)
    names = [re.split(r"[ *&]+", " ".join(p.split()))[-1] for p in parameters.split(",")]
    assert len(names) == len(arguments)
    source += (
        f'\nextern "C" bool emulate(int blocks, int threads, int shared_floats, {parameters}) {{\n'
        f"    return run_grid(blocks, threads, shared_floats, [=]() mutable {{ {name}({', '.join(names)}); }});\n}}\n"
    )
    options = tuple(f"-D{key}={value}" for key, value in definitions.items())
    library = _library(f'#include "{HEADER}"\n{source}', options, folder)
    library.emulate.restype = ctypes.c_bool
    inside = library.emulate(blocks, threads, shared // 4, *map(_as_c, arguments))
    assert inside, f"{name} wrote behind the {shared} bytes of shared memory that it had asked for"


def _as_c(argument):
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous() or argument.stride(-1) == 1
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_void_p(None) if argument is None else argument
