"""Read weights of the authors' implementation (github: hnkhai25/DermoMamba, commit 6587eae)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .dermomamba import DermoMamba

# Their name -> ours, applied in this order.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^pw_in\.", "conv_in."),
        (r"^e(\d)\.", lambda m: f"encoder.{int(m[1]) - 1}."),
        (r"^s(\d)\.", lambda m: f"skip_attention.{int(m[1]) - 1}."),
        (r"^d(\d)\.", lambda m: f"decoder.{int(m[1]) - 1}."),
        (r"^b1\.", "sweep_mamba."),
        (r"^b2\.dw\.", "pca.conv."),
        (r"^(encoder\.\d)\.pw\.", r"\1.conv."),
        (r"^(encoder\.\d)\.bn\.", r"\1.norm."),
        (r"\.resmamba\.ins_norm\.", ".res_mamba.norm."),
        (r"\.resmamba\.", ".res_mamba."),
        (r"\.block\.dw(\d)\.", lambda m: f".block.branches.{int(m[1]) - 1}."),
        (r"\.mixer_([hw])\.", r".conv_\1."),
        (r"\.block\.bn\.", ".block.norm."),
        (r"\.vss\.ln_1\.", ".vss.norm."),
        (r"\.self_attention\.", ".ss2d."),
        (r"\.conv2d\.", ".conv."),
        (r"\.ChannelGate\.mlp\.(\d)\.", lambda m: f".channel_mlp.{int(m[1]) - 1}."),
        (r"\.SpatialGate\.spatial\.(conv|bn)\.", lambda m: f".spatial_{'conv' if m[1] == 'conv' else 'norm'}."),
        (r"^(decoder\.\d)\.pw\.", r"\1.fuse."),
        (r"^(decoder\.\d)\.pw2\.", r"\1.conv."),
        (r"^(decoder\.\d)\.bn\.", r"\1.norm."),
        (r"^sweep_mamba\.ln\.", "sweep_mamba.norm_in."),
        (r"^sweep_mamba\.bn\.", "sweep_mamba.norm_out."),
        (r"^sweep_mamba\.mamba1\.", "sweep_mamba.scan_hw."),
        (r"^sweep_mamba\.mamba2\.", "sweep_mamba.scan_wc."),
        (r"^sweep_mamba\.mamba3\.", "sweep_mamba.scan_ch."),
    )
)


def rename_reference_key(key: str) -> str:
    """Our name of one state-dict entry of the authors' network."""
    for pattern, replacement in _RENAMES:
        key = pattern.sub(replacement, key)
    return key


def convert_reference_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a state dict of the authors' implementation into one that ``DermoMamba.load_state_dict`` takes.

    Args:
        state_dict: theirs, with or without the ``model.`` prefix of a Lightning checkpoint (pass its ``"state_dict"``).
            Input channels, classes and patch size are read off the shapes.

    Returns:
        The same tensors under our names.

    Raises:
        ValueError: names every missing, unexpected or misshapen key.
    """
    prefixed = any(key.startswith("model.") for key in state_dict)
    source = {key.removeprefix("model.") if prefixed else key: value for key, value in state_dict.items()}
    if not isinstance(source.get("pw_in.weight"), Tensor):
        raise ValueError("not a state dict of the authors' DermoMamba: it has no pw_in.weight")
    expected = {key: tuple(value.shape) for key, value in _network_like(source).state_dict().items()}
    names = {key: rename_reference_key(key) for key in source}
    present = set(names.values())
    problems = [f"missing: {name}" for name in expected if name not in present]
    problems += [f"unexpected: {key}" for key, name in names.items() if name not in expected]
    problems += [
        f"misshapen: {key} is {tuple(source[key].shape)}, expected {expected[name]}"
        for key, name in names.items()
        if name in expected and tuple(source[key].shape) != expected[name]
    ]
    if problems:
        raise ValueError("this state dict does not fit DermoMamba:\n  " + "\n  ".join(problems))
    return {name: source[key] for key, name in names.items()}


def _network_like(source: Mapping[str, Tensor]) -> DermoMamba:
    """A network with the sizes that a reference state dict's tensors tell; the published ones where they are absent."""

    def size(key: str, axis: int, default: int) -> int:
        return source[key].shape[axis] if key in source else default

    height = size("b1.mamba2.out_proj.weight", 0, 6)
    width = size("b1.mamba3.out_proj.weight", 0, 8)
    return DermoMamba(size("pw_in.weight", 1, 3), size("conv_out.weight", 0, 1), (32 * height, 32 * width))
