"""Tell stock nnU-Net where the trainers are: run at interpreter start by ``nnunetv2_dermomamba.pth``.

nnU-Net >= 2.8 looks for ``-tr NAME`` in the directories of the environment variable ``nnUNet_extTrainer``. This module
appends ``nnunet_ext/``, a directory that holds nothing but a re-export of the trainers, so that a user's own setting
stays first. By hand it is
``export nnUNet_extTrainer=$(python -c "from nnunetv2_dermomamba._autoload import *; print(TRAINER_DIRECTORY)")``.

It must never stop Python from starting nor print anything, and it takes well under a millisecond: only ``os``, which
the interpreter has loaded already, is used.
"""

import os

TRAINER_DIRECTORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "nnunet_ext")


def register(environ: "os._Environ[str] | dict[str, str]") -> None:
    """Append ``TRAINER_DIRECTORY`` to ``environ['nnUNet_extTrainer']`` once, behind what is already there."""
    present = [entry for entry in environ.get("nnUNet_extTrainer", "").split(os.pathsep) if entry.strip()]
    if TRAINER_DIRECTORY not in present:
        environ["nnUNet_extTrainer"] = os.pathsep.join([*present, TRAINER_DIRECTORY])


try:  # noqa: SIM105  (contextlib would be one more import at every start)
    register(os.environ)
except Exception:  # an interpreter without the trainers beats one that does not start
    pass
