"""What stock nnU-Net imports to find ``-tr NAME``: nothing but the trainers, by name."""

from nnunetv2_dermomamba.trainers import *  # noqa: F403
