import pytest
import torch

from nnunetv2_dermomamba.cost import count_cost
from nnunetv2_dermomamba.network import DermoMamba
from nnunetv2_dermomamba.ops import ENVIRONMENT_VARIABLE

STATES, DIRECTIONS = 16, 4


class HandCount:
    """Multiply-adds of the network's layers, written down from the paper's description, layer by layer."""

    def __init__(self, height, width):
        self.convolutions = self.linear = self.projections = self.updates = 0
        pixels = height * width
        self.conv(3, 16, 1, pixels)
        for dim in (16, 32, 64, 128, 256):
            self.encoder_stage(dim, pixels)
            self.skip_attention(2 * dim, pixels)
            self.decoder_stage(2 * dim, pixels)
            pixels //= 4
        self.convolutions += 512 * 9 * 9 * pixels  # PCA's depthwise convolution
        self.linear += 2 * 512 * 64 * pixels  # Sweep-Mamba's projections in and out
        self.ss2d(64, pixels)
        self.ss2d(height // 32, width // 32 * 64)
        self.ss2d(width // 32, height // 32 * 64)
        self.conv(16, 1, 1, height * width)

    def conv(self, inputs, outputs, kernel, pixels):
        self.convolutions += inputs * outputs * kernel**2 * pixels

    def encoder_stage(self, dim, pixels):
        for _ in range(3):
            self.convolutions += dim // 4 * (7 + 7 + 3 * 3) * pixels  # depthwise 1x7, 7x1, 3x3
            self.ss2d(dim // 4, pixels)
        self.conv(dim, dim, 3, pixels)
        self.conv(dim, 2 * dim, 3, pixels)

    def skip_attention(self, dim, pixels):
        self.linear += 2 * 2 * dim * (dim // 16)  # average and maximum, through two layers
        self.conv(2, 1, 7, pixels)

    def decoder_stage(self, dim, pixels):
        self.conv(dim, dim, 1, pixels // 4)  # the upsampled half of the 1x1 runs before the upsampling
        self.conv(dim, dim, 1, pixels)
        self.conv(dim, dim // 2, 3, pixels)

    def ss2d(self, dim, pixels):
        inner, rank = 2 * dim, -(-dim // 16)
        self.linear += (dim * 2 * inner + inner * dim) * pixels
        self.convolutions += inner * 3 * 3 * pixels
        self.projections += DIRECTIONS * ((rank + 2 * STATES) * inner + inner * rank) * pixels
        self.updates += DIRECTIONS * inner * STATES * pixels


@pytest.mark.parametrize("patch_size", [(192, 256), (64, 96)])
def test_the_count_is_the_hand_count(patch_size):
    cost = count_cost(DermoMamba(3, 1, patch_size), 3, patch_size)
    hand = HandCount(*patch_size)
    assert cost.convolutions == hand.convolutions
    assert cost.linear == hand.linear
    assert cost.scan_projections == hand.projections
    assert cost.scan_updates == hand.updates
    assert cost.operations == hand.convolutions + hand.linear + hand.projections + hand.updates


def test_published_figures():
    cost = count_cost(DermoMamba(3, 1, (192, 256)), 3, (192, 256))
    assert cost.parameters == 4_953_425
    bottleneck = DIRECTIONS * STATES * (128 * 48 + 12 * 512 + 16 * 384)
    # Stages: half of 16, 32, ... channels, three chunks, 192 x 256 pixels and a quarter of them at each stage.
    stages = sum(3 * DIRECTIONS * STATES * (8 << i) * (192 * 256 >> 2 * i) for i in range(5))
    assert stages == pytest.approx(146.3e6, rel=1e-3)
    assert cost.scan_updates == stages + bottleneck


def test_a_network_without_scans_and_the_network_is_left_alone():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cost = count_cost(network, 3, (10, 20))
    assert (cost.convolutions, cost.linear, cost.scan_updates) == (3 * 4 * 9 * 200, 0, 0)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_requested_backend_does_not_change_the_count(monkeypatch):
    network = DermoMamba(3, 1, (64, 64))
    automatic = count_cost(network, 3, (64, 64))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    assert count_cost(network, 3, (64, 64)) == automatic
