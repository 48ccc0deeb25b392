import golden
import pytest
import torch

from nnunetv2_dermomamba.network import DermoMamba, convert_reference_state_dict


def test_lightning_prefix_is_taken_off() -> None:
    state = {f"model.{key}": value for key, value in golden.reference_state_dict("net").items()}
    DermoMamba(3, 1, (192, 256)).load_state_dict(convert_reference_state_dict(state))


def test_every_misfit_is_named() -> None:
    state = golden.reference_state_dict("net")
    del state["e3.bn.weight"], state["d2.pw2.bias"]
    state["e1.resmamba.scale"] = torch.ones(2)
    state["surplus.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match="does not fit") as error:
        convert_reference_state_dict(state)
    message = str(error.value)
    assert "missing: encoder.2.norm.weight" in message
    assert "missing: decoder.1.conv.bias" in message
    assert "misshapen: e1.resmamba.scale is (2,), expected (1,)" in message
    assert "unexpected: surplus.weight" in message


def test_foreign_state_dict_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no pw_in\.weight"):
        convert_reference_state_dict({"conv1.weight": torch.ones(3)})
