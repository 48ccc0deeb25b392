"""A trained nnU-Net model, read without trusting who made it.

Nothing of a zip file is unpacked to disk: the few files that are needed are read into memory, after their claimed sizes
are checked. Checkpoints are unpickled by PyTorch's restricted unpickler with a list of what nnU-Net's hold. Plans may
name only network classes of the library that nnU-Net takes them from, since nnU-Net imports and calls what they name.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import pickle
import re
import stat
import warnings
import zipfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import numpy as np
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunetv2_dermomamba.conversion.dataset import CONVERSION_KEY
from nnunetv2_dermomamba.images.resample import MAX_SIDE
from nnunetv2_dermomamba.network import DermoMamba
from nnunetv2_dermomamba.predict.options import FINAL_CHECKPOINT

__all__ = ["Model", "ModelError", "build_network", "load_checkpoint", "load_model"]

MAX_CHECKPOINT_BYTES = 2 << 30  # nnU-Net's largest preset, with the optimizer's state, has about 1.2 GB
MAX_JSON_BYTES = 64 << 20
DEPTH = 3  # nnUNet_results / Dataset118_ISIC2018 / trainer__plans__configuration
FOLD = re.compile(r"fold_(\d{1,3}|all)", re.ASCII)

# These build DermoMamba. Importing them for that would also import what nnU-Net trains and plots with: 80 MB.
DERMOMAMBA_TRAINERS = frozenset(
    f"nnUNetTrainerDermoMamba{variant}" for variant in ("", "DiceCE", "Paper", "_5epochs", "_demo")
)

NETWORK_CLASSES = re.compile(r"dynamic_network_architectures\.architectures\.\w+(\.\w+)*", re.ASCII)
LAYER_CLASSES = re.compile(r"torch\.nn\.(modules\.\w+\.)?[A-Z]\w*", re.ASCII)

# What nnU-Net's checkpoints hold besides tensors and plain Python: NumPy scalars, in the log and the best mean Dice.
# Their constructor goes by two names, of NumPy 1 and 2.
_SCALAR = np.float64(0).__reduce__()[0]
SAFE_GLOBALS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")),
]


class ModelError(ValueError):
    """A model cannot be used; the message names the file, the reason and the remedy."""


@dataclass(frozen=True)
class Model:
    """What prediction needs of a trained model.

    Attributes:
        name: nnU-Net's folder name, trainer__plans__configuration.
        plans: ``plans.json``.
        dataset: ``dataset.json``.
        trainer: Class name.
        configuration: "2d".
        mirror_axes: Axes that mirroring may flip, or None.
        weights: A state dict for each fold.
        folds: Names of the folds, "0" or "all".
        left_out: Folds that are there without the checkpoint, unless folds were asked for.
        checkpoint: File name of the checkpoints.
        fingerprint: Hexadecimal digest of the plans and the checkpoints.
    """

    name: str
    plans: dict
    dataset: dict
    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...] | None
    weights: list[dict[str, Tensor]]
    folds: list[str]
    left_out: list[str]
    checkpoint: str
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) in pixels that the training images were brought to, or None if they kept their size."""
        size = self.dataset.get(CONVERSION_KEY, {}).get("size", "native")
        return None if size == "native" else (size[0], size[1])


class _Files(Protocol):
    names: list[str]

    def read(self, name: str, limit: int) -> bytes: ...


class _Folder:
    """The files of a model in a folder or up to two levels below."""

    def __init__(self, root: Path):
        self.root = root
        wanted = ("plans.json", "dataset.json", "fold_*/*.pth")
        found = [file for level in range(DEPTH) for name in wanted for file in root.glob("*/" * level + name)]
        self.names = [file.relative_to(root).as_posix() for file in found if file.is_file()]

    def read(self, name: str, limit: int) -> bytes:
        file = self.root / name
        if file.stat().st_size > limit:
            raise ModelError(f"{str(file)!r} is larger than {limit >> 20} MiB; this is no file of a model")
        return file.read_bytes()


class _Zip:
    """The files of a model in a zip file as ``nnUNetv2_export_model_to_zip`` writes it."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive = path, archive
        for entry in archive.infolist():
            if reason := _suspicion(entry):
                raise ModelError(f"{str(path)!r} holds {entry.filename!r}, {reason}; nnU-Net writes no such archives")
        self.names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        if len(set(self.names)) < len(self.names):
            raise ModelError(f"{str(path)!r} holds two files of one name; nnU-Net writes no such archives")

    def read(self, name: str, limit: int) -> bytes:
        size = self.archive.getinfo(name).file_size
        if size > limit:
            raise ModelError(f"{str(self.path)!r}: {name!r} claims {size:,} bytes, more than {limit >> 20} MiB")
        with self.archive.open(name) as file:
            return file.read(size)  # read() without a size would unpack up to 2 GiB before it cuts off what is too much


def _suspicion(entry: zipfile.ZipInfo) -> str | None:
    name = entry.filename
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        return "an absolute path"
    if ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts:
        return "a path that leaves the archive"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or a device"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile unpacks others without a limit
        return "compressed with something else than deflate"
    return None


def load_model(
    path: str | Path, folds: list[str] | None = None, checkpoint: str = FINAL_CHECKPOINT, trust: bool = False
) -> Model:
    """Read a trained model.

    Args:
        path: nnU-Net's results folder of one trainer and configuration, one above it that holds no other, or the zip
            file that ``nnUNetv2_export_model_to_zip`` writes.
        folds: "0", "1", ... or "all"; None for every numbered fold that has the checkpoint, or else "all".
        checkpoint: File name of the checkpoints.
        trust: Unpickle without restriction, and import whatever class the plans name.

    Raises:
        ModelError: There is no such model, or it is damaged or holds what a model has no need of.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_model(path, _Folder(path), folds, checkpoint, trust)
        with zipfile.ZipFile(path) as archive:
            return _read_model(path, _Zip(path, archive), folds, checkpoint, trust)
    except FileNotFoundError:
        raise ModelError(f"{str(path)!r} does not exist; give a results folder of nnU-Net or an exported zip") from None
    except OSError as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error}") from error
    except ModelError:
        raise
    except Exception as error:  # zipfile and its decompressors raise almost anything on damaged files
        raise ModelError(
            f"{str(path)!r} is neither a folder nor a whole zip file that nnUNetv2_export_model_to_zip wrote ({error})"
        ) from error


def _read_model(path: Path, files: _Files, folds: list[str] | None, checkpoint: str, trust: bool) -> Model:
    root = _only_model(path, files.names)
    plans_data = files.read(root + "plans.json", MAX_JSON_BYTES)
    if root + "dataset.json" not in files.names:
        raise ModelError(f"{str(path)!r} holds no dataset.json beside plans.json")
    dataset_data = files.read(root + "dataset.json", MAX_JSON_BYTES)
    plans, dataset = _parse(path, "plans.json", plans_data), _parse(path, "dataset.json", dataset_data)
    _check_shape(path, dataset)
    chosen, left_out = _choose_folds(path, root, files.names, folds, checkpoint)
    digest = hashlib.sha256(plans_data + dataset_data)
    weights, kinds = [], []
    for fold in chosen:
        name = f"{root}fold_{fold}/{checkpoint}"
        data = files.read(name, MAX_CHECKPOINT_BYTES)
        digest.update(hashlib.sha256(data).digest())
        content = load_checkpoint(data, f"{str(path)!r}: {name}", trust)
        weights.append(content["network_weights"])
        mirror_axes = content.get("inference_allowed_mirroring_axes")
        kinds.append((content["trainer_name"], content["init_args"]["configuration"], mirror_axes))
    if any(kind != kinds[0] for kind in kinds):
        raise ModelError(f"{str(path)!r}: the folds are of different trainers or configurations")
    trainer, configuration, mirror_axes = kinds[0]
    name = PurePosixPath(root).name or path.resolve().name
    return Model(
        name, plans, dataset, trainer, configuration, mirror_axes, weights, chosen, left_out, checkpoint,
        digest.hexdigest(),
    )  # fmt: skip


def _only_model(path: Path, names: list[str]) -> str:
    """The folder of ``plans.json``, "" or ending in "/"."""
    roots = [name.removesuffix("plans.json") for name in names if PurePosixPath(name).name == "plans.json"]
    depth = min((root.count("/") for root in roots), default=0)
    roots = sorted(root for root in roots if root.count("/") == depth)
    if not roots:
        if path.is_file() and not names:
            raise ModelError(
                f"{str(path)!r} is an empty zip, as an export that failed leaves it: delete it, export again"
            )
        broken = any(name.endswith(".pth") for name in names)  # nnU-Net exports checkpoints first
        raise ModelError(
            f"{str(path)!r} holds no trained model: it needs plans.json, dataset.json and fold_0/{FINAL_CHECKPOINT}, "
            "like nnUNet_results/Dataset118_ISIC2018/nnUNetTrainerDermoMamba__nnUNetPlans__2d"
            + (". There are checkpoints, so an export may have broken off: export again after validation" * broken)
        )
    if len(roots) > 1:
        raise ModelError(f"{str(path)!r} holds several models, name one or export one: {', '.join(roots)}")
    return roots[0]


def _choose_folds(
    path: Path, root: str, names: list[str], folds: list[str] | None, checkpoint: str
) -> tuple[list[str], list[str]]:
    """The folds to use, and those that lack the checkpoint if none were asked for."""
    present: dict[str, list[str]] = {}
    for name in names:
        parts = PurePosixPath(name.removeprefix(root)).parts
        if name.startswith(root) and len(parts) == 2 and (match := FOLD.fullmatch(parts[0])):
            present.setdefault(match[1], []).append(parts[1])
    having = sorted((fold for fold in present if checkpoint in present[fold]), key=lambda fold: (len(fold), fold))
    chosen = folds if folds is not None else [fold for fold in having if fold != "all"] or having
    missing = [fold for fold in chosen if fold not in having]
    if missing or not chosen:
        there = "; ".join(f"fold_{fold}: {', '.join(sorted(present[fold]))}" for fold in sorted(present)) or "no folds"
        which = f"of fold {', '.join(missing)} " if missing else ""
        raise ModelError(
            f"{str(path)!r} holds no {checkpoint} {which}(training unfinished?); choose with -f and -chk from: {there}"
        )
    return chosen, [] if folds is not None else sorted(set(present) - set(having))


def _parse(path: Path, name: str, data: bytes) -> dict:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{str(path)!r}: {name} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{str(path)!r}: {name} is damaged: it holds no object")
    return content


def _check_shape(path: Path, dataset: dict) -> None:
    rule = dataset.get(CONVERSION_KEY, {})
    size = rule.get("size", "native") if isinstance(rule, dict) else None
    sides = size if isinstance(size, list) and len(size) == 2 else [None]
    if size != "native" and not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
        raise ModelError(f"{str(path)!r}: dataset.json gives {size!r} as image size; [height, width] is expected")


def load_checkpoint(data: bytes, name: str, trust: bool = False) -> dict[str, Any]:
    """Unpickle a checkpoint of nnU-Net.

    Args:
        data: The file's content.
        name: What to call it in errors.
        trust: Unpickle anything, which may run any code.

    Returns:
        The checkpoint; with ``network_weights`` (finite tensors by name), ``trainer_name`` and
        ``init_args.configuration``.

    Raises:
        ModelError: It is damaged, no checkpoint of nnU-Net, or, without `trust`, holds other objects than those do.
    """
    try:
        if trust:
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
        else:
            _check_archive(data, name)
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(f"{name} {_refusal(error)}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise ModelError(f"{name} is damaged: {type(error).__name__}: {error}") from error
    _check_content(checkpoint, name)
    return checkpoint


def _check_archive(data: bytes, name: str) -> None:
    """PyTorch allocates what the entries of its zip format claim, so a small file must not claim much."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ModelError(
            f"{name} is truncated, or in PyTorch's format before 1.6; if so, and you know who made it, give --trust"
        )
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ModelError(f"{name} is compressed inside, as no checkpoint is")
    if sum(entry.file_size for entry in entries) > len(data):
        raise ModelError(f"{name} claims to hold more than its own size")


def _refusal(error: pickle.UnpicklingError) -> str:
    match = re.search(r"GLOBAL (\S+)", str(error))
    what = f"{match[1]!r}" if match else "objects other than tensors and plain values"
    return (
        f"is refused: it asks for {what}, which nnU-Net's checkpoints have no need of and which could run any code. "
        "If you know who made it and trust them, give --trust"
    )


def _check_content(checkpoint: Any, name: str) -> None:
    expected = {"network_weights": dict, "trainer_name": str, "init_args": dict}
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(key), kind) for key, kind in expected.items()
    ):
        raise ModelError(f"{name} is no checkpoint of nnU-Net: it needs {', '.join(expected)}")
    if not isinstance(checkpoint["init_args"].get("configuration"), str):
        raise ModelError(f"{name} is no checkpoint of nnU-Net: it names no configuration")
    axes = checkpoint.get("inference_allowed_mirroring_axes")
    if not (axes is None or (isinstance(axes, (tuple, list)) and axes and set(axes) <= {0, 1})):
        raise ModelError(f"{name} mirrors along axes {axes!r}; a 2D model has 0 and 1")
    for key, value in checkpoint["network_weights"].items():
        if not isinstance(value, Tensor):
            raise ModelError(f"{name} holds no tensor under {key!r}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(f"{name} holds NaN or infinity in {key!r}; train again or take another checkpoint")


def build_network(model: Model, plans_manager: PlansManager, trust: bool = False) -> nn.Module:
    """Build the network as the model's trainer does, and check that each fold's weights fit.

    Args:
        model: The model.
        plans_manager: Of the model's plans.
        trust: Import whatever class the plans name.

    Raises:
        ModelError: The trainer is not installed, the plans are damaged or refused, or weights do not fit.
    """
    try:
        configuration = plans_manager.get_configuration(model.configuration)
        if not trust:
            _check_architecture(model, configuration.configuration)
        if len(configuration.patch_size) != 2 or not all(
            type(side) is int and 1 <= side <= MAX_SIDE for side in configuration.patch_size
        ):
            raise ModelError(f"{model.name}: patch size {configuration.patch_size}; photographs need a 2D model")
        channels = determine_num_input_channels(plans_manager, configuration, model.dataset)
        heads = plans_manager.get_label_manager(model.dataset).num_segmentation_heads
        if model.trainer in DERMOMAMBA_TRAINERS:
            network: nn.Module = DermoMamba(channels, heads, configuration.patch_size)
        else:
            network = _build_by_trainer(model.trainer, plans_manager, configuration, channels, heads)
        for weights in reversed(model.weights):
            network.load_state_dict(weights)
    except ModelError:
        raise
    except Exception as error:  # nnU-Net checks little, and raises what comes
        raise ModelError(f"{model.name} ({model.trainer}): {type(error).__name__}: {error}") from error
    return network


def _build_by_trainer(
    name: str, plans_manager: PlansManager, configuration: ConfigurationManager, channels: int, heads: int
) -> nn.Module:
    from nnunetv2_dermomamba import trainers

    if name in trainers.__all__:
        trainer = getattr(trainers, name)
    else:
        with redirect_stdout(io.StringIO()):  # nnU-Net tells where it searches
            trainer = recursive_find_trainer_class_by_name(name)
    build = trainer.build_network_architecture
    # the signature before nnU-Net 2.8, which it still supports
    old = "plans_manager" not in inspect.signature(build).parameters
    managers = (
        (
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
        )
        if old
        else (plans_manager, configuration)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return build(*managers, channels, heads, enable_deep_supervision=False)


def _check_architecture(model: Model, configuration: dict) -> None:
    if not model.trainer.isidentifier():
        raise ModelError(f"{model.name}: {model.trainer!r} is no trainer")
    architecture = configuration.get("architecture") or {}
    kwargs = architecture.get("arch_kwargs") or {}
    named = [kwargs.get(key) for key in architecture.get("_kw_requires_import") or ()]
    refused = [name for name in named if name is not None and not LAYER_CLASSES.fullmatch(str(name))]
    network = architecture.get("network_class_name")
    if network is not None and not NETWORK_CLASSES.fullmatch(str(network)):
        refused.append(network)
    if refused:
        raise ModelError(
            f"{model.name} is refused: its plans.json asks to import {refused[0]!r}, which is neither a network of "
            "dynamic_network_architectures nor a layer of torch.nn. If you trust who made it, give --trust"
        )
