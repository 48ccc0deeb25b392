"""What stock nnU-Net imports to find ``-tr NAME``: the trainers, by name, and imported only when they are asked for.

nnU-Net imports this module whatever trainer it looks for, so that a fault of ours must not show before it is ours.
"""

TRAINERS = (
    "nnUNetTrainerDermoMamba",
    "nnUNetTrainerDermoMambaDiceCE",
    "nnUNetTrainerDermoMambaPaper",
    "nnUNetTrainerDermoMamba_5epochs",
    "nnUNetTrainerDermoMamba_demo",
    "nnUNetTrainerGuideFusionLoss",
)


def __getattr__(name: str) -> type:
    if name not in TRAINERS:
        raise AttributeError(name)
    from nnunetv2_dermomamba import trainers

    return getattr(trainers, name)
