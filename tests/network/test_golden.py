"""Every block against the authors' implementation: outputs, input gradient, parameter gradients."""

import golden
import numpy as np
import pytest
import torch
from tolerances import GOLDEN_BLOCK, GOLDEN_NETWORK

from nnunetv2_dermomamba.network import DermoMamba, convert_reference_state_dict
from nnunetv2_dermomamba.network.attention import CBAM, PCA
from nnunetv2_dermomamba.network.cross_scale import AxialDepthwise, CrossScaleMambaBlock
from nnunetv2_dermomamba.network.reference import rename_reference_key
from nnunetv2_dermomamba.network.ss2d import SS2D, VSSBlock
from nnunetv2_dermomamba.network.stages import DecoderStage, EncoderStage, ResMambaBlock
from nnunetv2_dermomamba.network.sweep_mamba import SweepMamba

# Block -> where it lives in the authors' network, where in ours, and how to build it.
BLOCKS = {
    "ss2d": ("e1.resmamba.block.vss.self_attention.", "encoder.0.res_mamba.block.vss.ss2d.", lambda: SS2D(4)),
    "ss2d_wide": ("e1.resmamba.block.vss.self_attention.", "encoder.0.res_mamba.block.vss.ss2d.", lambda: SS2D(32)),
    "vss": ("e1.resmamba.block.vss.", "encoder.0.res_mamba.block.vss.", lambda: VSSBlock(4)),
    "axial_dw": ("e1.resmamba.block.dw2.", "encoder.0.res_mamba.block.branches.1.", lambda: AxialDepthwise(4, 2)),
    "cross_scale_mamba": ("e1.resmamba.block.", "encoder.0.res_mamba.block.", lambda: CrossScaleMambaBlock(16)),
    "res_mamba": ("e1.resmamba.", "encoder.0.res_mamba.", lambda: ResMambaBlock(16)),
    "encoder": ("e1.", "encoder.0.", lambda: EncoderStage(16)),
    "cbam": ("s1.", "skip_attention.0.", lambda: CBAM(32)),
    "pca": ("b2.", "pca.", lambda: PCA(64)),
    "sweep_mamba": ("b1.", "sweep_mamba.", lambda: SweepMamba(64, 6, 8)),
    "decoder": ("d1.", "decoder.0.", lambda: DecoderStage(32)),
}
NUMBERS = golden.numbers()


def build(block: str) -> torch.nn.Module:
    theirs, ours, factory = BLOCKS[block]
    module = factory()
    state = golden.reference_state_dict(block)
    module.load_state_dict({rename_reference_key(theirs + key).removeprefix(ours): v for key, v in state.items()})
    return module


def assert_equals_golden(result: torch.Tensor, name: str, tolerance: float = GOLDEN_BLOCK) -> None:
    expected, norm = NUMBERS[name], NUMBERS[f"{name}/norm"]
    assert np.linalg.norm(golden.kept(result) - expected) <= tolerance * np.linalg.norm(expected)
    assert abs(float(result.detach().double().norm()) - norm) <= tolerance * norm


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("block", BLOCKS)
def test_block_equals_the_authors(block: str, mode: str) -> None:
    module = build(block).train(mode == "train")
    shape = tuple(golden.SPECIFICATION[block]["input"])
    x = golden.normal(block, shape).requires_grad_()
    arguments = [x]
    if block == "decoder":
        arguments.append(golden.normal("decoder.skip", (*shape[:2], 2 * shape[2], 2 * shape[3])))
    outputs = module(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for i, output in enumerate(outputs):
        assert_equals_golden(output, f"{block}/{mode}/out{i}")

    cotangents = [golden.normal(f"{block}.cot{i}", tuple(output.shape)) for i, output in enumerate(outputs)]
    torch.autograd.backward(outputs, cotangents)
    assert x.grad is not None
    assert_equals_golden(x.grad, f"{block}/{mode}/grad_input")
    theirs, ours, _ = BLOCKS[block]
    gradients = {name: p.grad for name, p in module.named_parameters()}
    order = golden.SPECIFICATION[block]["param_order"]
    names = [rename_reference_key(theirs + key).removeprefix(ours) for key in order]
    norms = np.array([float(gradients[name].norm()) for name in names])
    expected = NUMBERS[f"{block}/{mode}/grad_param_norms"]
    # A convolution's bias before a normalisation has no gradient but rounding: measure all against the largest too.
    np.testing.assert_allclose(norms, expected, rtol=GOLDEN_BLOCK, atol=GOLDEN_BLOCK * expected.max())


def test_network_equals_the_authors() -> None:
    network = DermoMamba(3, 1, (192, 256)).eval()
    network.load_state_dict(convert_reference_state_dict(golden.reference_state_dict("net")))
    with torch.no_grad():
        assert_equals_golden(network(golden.network_input()), "net/eval/out0", GOLDEN_NETWORK)
