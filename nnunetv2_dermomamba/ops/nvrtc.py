"""Compile and launch CUDA kernels with what PyTorch's wheels for CUDA bring: no toolkit, no compiler, no header.

NVRTC and the driver are reached through ``libcaffe2_nvrtc.so``, which PyTorch links against both. Compiled kernels are
kept in ``$XDG_CACHE_HOME/nnunetv2_dermomamba`` (``~/.cache`` where that is unset).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from nnunetv2_dermomamba.files import write_file

SOURCES = Path(__file__).parent / "cuda"
# Attributes of functions and devices in the driver's cuda.h.
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97

Argument: TypeAlias = Tensor | ctypes.Structure | ctypes.c_longlong | int | None
Definitions: TypeAlias = tuple[tuple[str, int], ...]


@cache
def library() -> ctypes.CDLL:
    """NVRTC and the driver.

    Raises:
        ImportError: PyTorch is not built for CUDA.
        OSError: there is no driver, or PyTorch's wheel is another system's than Linux.
    """
    if torch.version.cuda is None:
        raise ImportError("PyTorch is not built for CUDA")
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"))


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what} failed with error {code} of NVRTC or the CUDA driver")


def compile_source(nvrtc: ctypes.CDLL, source: str, options: Iterable[str]) -> bytes:
    """Machine code of CUDA C++ ``source``.

    Raises:
        RuntimeError: the source does not compile; the message is the compiler's.
    """
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 0, None, None), "nvrtcCreateProgram")
    try:
        encoded = [option.encode() for option in options]
        if nvrtc.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"a CUDA kernel did not compile: {log.value.decode()}")
        _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        code = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def read_sources(files: Iterable[str]) -> str:
    """Files of ``ops/cuda`` as one source."""
    return "\n".join((SOURCES / file).read_text(encoding="utf-8") for file in files)


def _cache_file(*key: object) -> Path:
    """Where compiled code is kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "nnunetv2_dermomamba"
    return folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.cubin"


def _compiled(source: str, options: tuple[str, ...], again: bool = False) -> bytes:
    """From the cache, or (or ``again``) compiled and put there."""
    version = (ctypes.c_int * 2)()
    library().nvrtcVersion(ctypes.byref(version, 0), ctypes.byref(version, ctypes.sizeof(ctypes.c_int)))
    file = _cache_file(source, options, tuple(version))
    with suppress(OSError):
        if not again:
            return file.read_bytes()
    code = compile_source(library(), source, options)
    with suppress(OSError):  # a home that cannot be written costs seconds a process
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, code)
    return code


@cache
def _module(files: tuple[str, ...], definitions: Definitions, device: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    defined = (f"-D{name}={value}" for name, value in definitions)
    source, options = read_sources(files), (f"--gpu-architecture=sm_{major}{minor}", "-std=c++17", *defined)
    module = ctypes.c_void_p()
    if library().cuModuleLoadData(ctypes.byref(module), _compiled(source, options)):  # a file that is no code any more
        code = library().cuModuleLoadData(ctypes.byref(module), _compiled(source, options, again=True))
        _check(code, "cuModuleLoadData")
    return module


@cache
def max_shared(device: int) -> int:
    """Bytes of shared memory that a block may ask for."""
    value = ctypes.c_int()
    code = library().cuDeviceGetAttribute(ctypes.byref(value), MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device)
    _check(code, "cuDeviceGetAttribute")
    return value.value


@cache
def _function(files: tuple[str, ...], definitions: Definitions, device: int, name: str) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    module = _module(files, definitions, device)
    _check(library().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding kernel {name}")
    code = library().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, max_shared(device))
    _check(code, f"asking for shared memory for {name}")
    return function


@cache
def _context(device: int) -> ctypes.c_void_p:
    """The context that PyTorch uses on a device."""
    context = ctypes.c_void_p()
    _check(library().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    return context


def _enter_context(device: int) -> None:
    """Make the device's context the thread's, as PyTorch's own first call in a thread (autograd's, say) would."""
    current = ctypes.c_void_p()
    _check(library().cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent")
    if current.value != _context(device).value:
        _check(library().cuCtxSetCurrent(_context(device)), "cuCtxSetCurrent")


def _as_c(value: Argument) -> ctypes._SimpleCData | ctypes.Structure:  # type: ignore[type-arg]
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_int(value) if isinstance(value, int) else value


def launch(
    files: tuple[str, ...],
    definitions: dict[str, int],
    name: str,
    blocks: int,
    threads: int,
    shared: int,
    *arguments: Argument,
) -> None:
    """Launch kernel ``name`` of ``files`` (in ``ops/cuda``, one after the other) on the current stream and device.

    Args:
        files: what to compile.
        definitions: macros, by name.
        name: the kernel, ``extern "C"``.
        blocks: of the grid.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
        arguments: tensors are passed as pointers, None as a null pointer, ints as int, ctypes values as they are.

    Raises:
        RuntimeError: it does not compile, or the driver refuses it.
        ValueError: a tensor is on another device.
    """
    device = torch.cuda.current_device()
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.get_device() != device:
            raise ValueError(f"{name}: a tensor is on {argument.device}, the others are on cuda:{device}")
    _enter_context(device)
    function = _function(files, tuple(definitions.items()), device, name)
    values = [_as_c(a) for a in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    code = library().cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, pointers, None)
    _check(code, f"launching {name}")
