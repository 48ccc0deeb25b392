"""The Triton backend of the selective scan: one import for the dispatcher. Needs triton; CUDA, or its interpreter."""

from nnunetv2_dermomamba.ops.triton_scan_1d import scan_1d_backward, scan_1d_forward, states_shape_1d
from nnunetv2_dermomamba.ops.triton_scan_2d import scan_2d_backward, scan_2d_forward, states_shape_2d

__all__ = [
    "scan_1d_backward",
    "scan_1d_forward",
    "scan_2d_backward",
    "scan_2d_forward",
    "states_shape_1d",
    "states_shape_2d",
]
