"""DermoMamba (Hoang et al., Pattern Analysis and Applications 28:128, 2025), the whole network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import CBAM, PCA
from .convolution import ConvIn
from .replay import Replays, can_replay
from .stages import DecoderStage, EncoderStage
from .sweep_mamba import SweepMamba

WIDTHS = (16, 32, 64, 128, 256)
"""Channels entering the five encoder stages; each doubles them."""
STRIDE = 2 ** len(WIDTHS)


class DermoMamba(nn.Module):
    """Cross-scale Mamba encoder, Sweep-Mamba bottleneck, CBAM-filtered skips, convolutional decoder.

    Built for one patch size, since Sweep-Mamba scans along the map's height and width. A patch whose sides are no
    multiples of 32 is padded with zeros at the bottom and on the right, and the logits are cropped. In inference
    mode on a GPU the fourth call with a shape captures a CUDA graph, which later ones replay (``replay.Replays``),
    unless ``cuda_graph`` is set to False.

    Args:
        input_channels: colour channels.
        num_classes: output channels (logits): classes, regions, or 1.
        patch_size: (height, width) of every input.

    Shape:
        (B, input_channels, *patch_size) to logits (B, num_classes, *patch_size).

    Raises:
        ValueError: the patch size is not two positive numbers, or an input is of another size.
    """

    cuda_graph = True  # in inference

    def __init__(self, input_channels: int, num_classes: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        if len(patch_size) != 2 or min(patch_size) < 1:
            raise ValueError(
                f"DermoMamba is a 2D network and needs a patch size of (height, width), not {tuple(patch_size)}. "
                "Use nnU-Net's 2d configuration."
            )
        self.patch_size = tuple(int(side) for side in patch_size)
        height, width = (-(-side // STRIDE) for side in self.patch_size)
        deepest = 2 * WIDTHS[-1]
        self.conv_in = ConvIn(input_channels, WIDTHS[0])
        self.encoder = nn.ModuleList(EncoderStage(dim) for dim in WIDTHS)
        self.skip_attention = nn.ModuleList(CBAM(2 * dim) for dim in WIDTHS)
        self.pca = PCA(deepest)
        self.sweep_mamba = SweepMamba(deepest, height, width)
        self.decoder = nn.ModuleList(DecoderStage(2 * dim) for dim in WIDTHS)  # shallowest first, like the encoder
        self.conv_out = nn.Conv2d(WIDTHS[0], num_classes, 1)
        self._replays = Replays()

    def train(self, mode: bool = True) -> DermoMamba:
        """As ``nn.Module.train``; for inference on a CPU the weights are laid out as its convolutions read them.

        For training they are laid out as they were built, as the optimizer's moments are: PyTorch's fused AdamW takes
        both to lie in memory alike, without looking.
        """
        if self.conv_in.weight.device.type == "cpu":
            layout = torch.contiguous_format if mode else torch.channels_last
            for weight in (parameter for parameter in self.parameters() if parameter.ndim == 4):
                wanted = torch.empty(weight.shape, dtype=weight.dtype, memory_format=layout)
                if weight.stride() != wanted.stride():
                    weight.data = wanted.copy_(weight.data)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        height, width = self.patch_size
        if x.shape[2:] != self.patch_size:
            raise ValueError(
                f"this DermoMamba was built for inputs of {height} x {width}, not {tuple(x.shape[2:])}: "
                "build it with that patch_size"
            )
        replays = self.cuda_graph and can_replay(x)
        return self._replays(self, self._forward, x) if replays else self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        height, width = self.patch_size
        x = x.contiguous(memory_format=torch.channels_last)  # convolutions and scans read it so
        x = self.conv_in(F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE)))
        skips = []
        for stage in self.encoder:
            x, skip = stage(x)
            skips.append(skip)
        x = self.sweep_mamba(self.pca(x) + x)
        for stage, attention, skip in reversed(list(zip(self.decoder, self.skip_attention, skips, strict=True))):
            x = stage(x, *attention.factors(skip))
        return self.conv_out(x)[..., :height, :width]
