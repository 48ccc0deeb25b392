import copy

import pytest
import torch
from torch.nn import functional as F

from nnunetv2_dermomamba.network import DermoMamba, cross_scale, dermomamba
from nnunetv2_dermomamba.network.attention import CBAM
from nnunetv2_dermomamba.network.convolution import ConvIn
from nnunetv2_dermomamba.network.stages import EncoderStage


def test_published_parameter_count() -> None:
    assert sum(p.numel() for p in DermoMamba(3, 1, (192, 256)).parameters()) == 4_953_425


@pytest.mark.parametrize(
    ("channels", "classes", "patch"), [(1, 2, (32, 64)), (4, 7, (64, 32)), (3, 3, (50, 71)), (3, 2, (33, 96))]
)
def test_channels_classes_and_patch_sizes(channels: int, classes: int, patch: tuple[int, int]) -> None:
    network = DermoMamba(channels, classes, patch)
    out = network(torch.randn(2, channels, *patch))
    assert out.shape == (2, classes, *patch)
    out.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_padding_is_zeros_at_the_bottom_and_on_the_right() -> None:
    torch.manual_seed(0)
    small, padded = DermoMamba(3, 2, (40, 60)).eval(), DermoMamba(3, 2, (64, 64)).eval()
    padded.load_state_dict(small.state_dict())
    x = torch.randn(1, 3, 40, 60)
    with torch.no_grad():
        expected = padded(torch.nn.functional.pad(x, (0, 4, 0, 24)))[..., :40, :60]
        torch.testing.assert_close(small(x), expected)


def test_a_validation_in_between_changes_no_training_step(monkeypatch) -> None:
    """Fused AdamW on a CPU goes through weights, gradients and moments as they lie in memory."""
    monkeypatch.setattr(dermomamba, "WIDTHS", (4, 8))
    monkeypatch.setattr(dermomamba, "STRIDE", 4)
    images = torch.randn(2, 3, 16, 16)
    trained = []
    for validates in (False, True):
        torch.manual_seed(0)
        network = DermoMamba(3, 2, (16, 16))
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2, fused=True)
        for _ in range(4):
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()
            if validates:
                network.eval()
                network.train()
        trained.append(network)
    for straight, interrupted in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert torch.equal(straight, interrupted)
        assert straight.stride() == interrupted.stride()


def test_3d_patch_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match="2d configuration"):
        DermoMamba(3, 2, (32, 64, 64))


def test_other_input_size_is_refused() -> None:
    with pytest.raises(ValueError, match="built for inputs of 32 x 64"):
        DermoMamba(3, 2, (32, 64))(torch.randn(1, 3, 64, 64))


def test_initial_values() -> None:
    torch.manual_seed(0)
    ss2d = DermoMamba(3, 1, (192, 256)).encoder[4].res_mamba.block.vss.ss2d
    torch.testing.assert_close(ss2d.A_logs, torch.arange(1.0, 17).log().expand_as(ss2d.A_logs))
    assert (ss2d.Ds == 1).all()
    dt = torch.nn.functional.softplus(ss2d.dt_projs_bias)
    assert dt.min() >= 0.99e-3
    assert dt.max() <= 0.101
    # Log-uniform: the median of log dt lies midway between the ends.
    assert abs(dt.log().median() - 0.5 * (torch.tensor(1e-3).log() + torch.tensor(1e-1).log())) < 0.4
    assert ss2d.dt_projs_weight.abs().max() <= ss2d.dt_projs_weight.shape[2] ** -0.5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_bias_before_a_normalisation_changes_the_running_mean_alone(device):
    torch.manual_seed(0)
    stage = EncoderStage(8).double().to(device)
    plain = copy.deepcopy(stage)
    x = torch.randn(2, 8, 6, 4, dtype=torch.float64, device=device)
    results = []
    for module in (stage, plain):
        results.append(stage(x)[1] if module is stage else F.relu(module.norm(module.conv(module.res_mamba(x)))))
        results[-1].square().sum().backward()
    torch.testing.assert_close(*results)
    for name, buffer in stage.norm.named_buffers():
        torch.testing.assert_close(buffer, plain.norm.get_buffer(name))
    assert plain.norm.running_mean.abs().max() > 1e-3
    for (name, one), other in zip(stage.named_parameters(), plain.parameters(), strict=True):
        if name in ("conv.bias", "res_mamba.conv.bias"):
            assert not one.grad.any()
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_formula_of_the_first_convolution(channels):
    torch.manual_seed(0)
    conv, x = ConvIn(channels, 16), torch.randn(2, channels, 3, 5)
    y = conv._formula(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, conv(x))
    cotangent = torch.randn_like(y)
    for one, other in zip(*(torch.autograd.grad(m, conv.parameters(), cotangent) for m in (y, conv(x))), strict=True):
        torch.testing.assert_close(one, other)


def test_the_channel_gate_of_few_maps_is_that_of_many() -> None:
    torch.manual_seed(0)
    cbam, pooled = CBAM(32).double(), torch.randn(2, 3, 32, dtype=torch.float64)
    torch.testing.assert_close(cbam._mlp_of_few(pooled), cbam.channel_mlp(pooled))


def test_maps_side_by_side_are_the_same_with_and_without_gradients() -> None:
    maps = [torch.randn(2, 3, 5, 4) for _ in range(4)]
    with torch.no_grad():
        without = cross_scale._side_by_side(maps)
    assert torch.equal(without, cross_scale._side_by_side(maps))
    assert without.stride() == (240, 80, 16, 1)
