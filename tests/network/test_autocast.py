"""The compiled network under autocast, as it trains on a GPU: as near to float32 as PyTorch's own operators come."""

from __future__ import annotations

import pytest
import torch
from tolerances import relative_error
from torch import Tensor, nn

from nnunetv2_dermomamba.loss import GuideFusionLoss
from nnunetv2_dermomamba.network import DermoMamba
from nnunetv2_dermomamba.ops import ENVIRONMENT_VARIABLE

PATCH = (192, 256)
LOSS_SCALE = 2.0**14  # a GradScaler's, or small gradients would be 0 in float16


def batch_of_ellipses(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in PATCH), indexing="ij")
    inside = torch.stack([(rows / (0.3 + 0.1 * n)) ** 2 + (columns / 0.5) ** 2 < 1 for n in range(count)])[:, None]
    image = torch.randn(count, 3, *PATCH, generator=generator) + inside
    return image.cuda(), inside.cuda().to(torch.int16)


def loss_and_gradients(network: nn.Module, call: nn.Module, kind: torch.dtype) -> tuple[float, Tensor]:
    data, target = batch_of_ellipses(2)
    network.zero_grad()
    with torch.autocast("cuda", kind, enabled=kind != torch.float32):
        loss = GuideFusionLoss(batch_dice=True)(call(data), target)
    (loss * LOSS_SCALE).backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() / LOSS_SCALE for p in network.parameters()])


@pytest.mark.gpu
def test_a_training_step_is_as_precise_as_with_pytorchs_operators(monkeypatch):
    torch.manual_seed(0)
    network = DermoMamba(3, 2, PATCH).cuda()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    loss, gradients = loss_and_gradients(network, network, torch.float32)
    their_loss, theirs = loss_and_gradients(network, network, torch.float16)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    our_loss, ours = loss_and_gradients(network, torch.compile(network), torch.float16)
    eps = torch.finfo(torch.float16).eps
    assert abs(our_loss - loss) < 2 * abs(their_loss - loss) + eps
    assert relative_error(ours, gradients) < 1.5 * relative_error(theirs, gradients) + eps
