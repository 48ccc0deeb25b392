import pytest
import torch

from nnunetv2_dermomamba.network import DermoMamba
from nnunetv2_dermomamba.trainers.optimization import WarmupPolyLRScheduler, build_adamw, parameter_groups


@pytest.fixture(scope="module")
def network() -> DermoMamba:
    return DermoMamba(3, 2, (32, 32))


def test_scan_parameters_and_vectors_take_no_weight_decay(network: DermoMamba) -> None:
    decayed, free = parameter_groups(network, 0.01)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    free_names = {names[id(p)] for p in free["params"]}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert free_names | decayed_names == set(names.values())
    assert not free_names & decayed_names
    assert {n for n in names.values() if n.endswith(("A_logs", "Ds", "dt_projs_bias", "bias", "scale"))} <= free_names
    matrices = ("x_proj_weight", "dt_projs_weight", "conv.weight")
    assert {n for n in names.values() if n.endswith(matrices)} <= decayed_names


def test_optimizer_is_one_kernel(network: DermoMamba) -> None:
    assert build_adamw(network, 1e-3, 1e-2, torch.device("cpu")).defaults["fused"] is True


def test_warm_up_then_polynomial_decay(network: DermoMamba) -> None:
    optimizer = build_adamw(network, 1e-3, 1e-2, torch.device("cpu"))
    scheduler = WarmupPolyLRScheduler(optimizer, 1e-3, 10, warmup=1.0)

    def rate(epoch: float) -> float:
        scheduler.step(epoch)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        return rates.pop()

    assert rate(0) == 0
    assert rate(0.5) == pytest.approx(0.5 * 1e-3 * 0.95**0.9)
    assert rate(1.0) == pytest.approx(1e-3 * 0.9**0.9)
    assert rate(9.9) == pytest.approx(1e-3 * 0.01**0.9)
    assert rate(5.0) == pytest.approx(1e-3 * 0.5**0.9)  # whatever came before: a resumed run goes on
