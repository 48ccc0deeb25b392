"""The DermoMamba network."""

from .dermomamba import DermoMamba
from .reference import convert_reference_state_dict

__all__ = ["DermoMamba", "convert_reference_state_dict"]
