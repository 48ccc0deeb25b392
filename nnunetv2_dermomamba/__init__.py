"""DermoMamba and its Guide Fusion Loss as a plug-in trainer for stock nnU-Net v2.

This module runs at every interpreter start (through ``nnunetv2_dermomamba.pth``), so it imports nothing.
"""

__version__ = "0.1.0"
