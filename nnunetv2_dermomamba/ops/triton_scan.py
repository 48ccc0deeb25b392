"""The Triton backend of the selective scan: one import for the dispatcher. Needs Triton 3.3, CUDA or interpreted."""

import triton

from nnunetv2_dermomamba.ops.triton_scan_1d import scan_1d_backward, scan_1d_forward, states_shape_1d
from nnunetv2_dermomamba.ops.triton_scan_2d import scan_2d_backward, scan_2d_forward, states_shape_2d

# Before, products of fewer than 16 rows do not compile, and the interpreter's ``tl.gather`` fails.
if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3):
    raise ImportError(f"needs Triton 3.3, which PyTorch 2.7 brings; this is {triton.__version__}")

__all__ = [
    "scan_1d_backward",
    "scan_1d_forward",
    "scan_2d_backward",
    "scan_2d_forward",
    "states_shape_1d",
    "states_shape_2d",
]
