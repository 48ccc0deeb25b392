"""Golden numbers of the authors' released implementation, computed in float32 on a CPU with a step-by-step scan.

``network/golden.npz`` holds, per block and mode, every ``stride``-th element of outputs and input gradient (stride odd
and such that about 2 000 elements are kept), the norms of the whole arrays, and the norms of all parameter gradients.
Parameters and inputs follow the deterministic rules below, a function of names and shapes alone.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "network"
SPECIFICATION = json.loads((FOLDER / "reference_keys.json").read_text())
KEPT = 2000


def numbers() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "golden.npz") as file:
        return dict(file)


def generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def fill(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Value of the state-dict entry that the authors' implementation calls ``key``."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    z = generator(key).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        z = 1 + 0.5 * np.abs(z)
    elif key.endswith("A_logs"):
        z = np.log(np.arange(1, shape[-1] + 1, dtype=np.float32)) + 0.1 * z
    elif key.endswith("dt_projs_bias"):
        z = -3 + 0.5 * z
    elif key.endswith(("Ds", "scale")) or (key.endswith("weight") and len(shape) == 1):
        z = 1 + 0.1 * z
    elif len(shape) <= 1:
        z = 0.1 * z
    else:
        fan_in = shape[-1] if key.endswith(("x_proj_weight", "dt_projs_weight")) else int(np.prod(shape[1:]))
        z = z / np.float32(np.sqrt(fan_in))
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def normal(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(generator(f"input:{name}").standard_normal(shape).astype(np.float32))


def network_input() -> torch.Tensor:
    return torch.from_numpy(generator("input:net").random((1, 3, 192, 256)).astype(np.float32))


def reference_state_dict(block: str) -> dict[str, torch.Tensor]:
    return {key: fill(f"{block}.{key}", tuple(shape)) for key, shape in SPECIFICATION[block]["params"].items()}


def kept(array: torch.Tensor) -> np.ndarray:
    flat = array.detach().numpy().ravel()
    return flat[:: max(1, -(-flat.size // KEPT)) | 1]
