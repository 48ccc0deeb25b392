"""Convert PH2 for nnU-Net; see --help."""

import sys
from pathlib import Path

from nnunetv2_dermomamba.conversion.ph2 import main

if __name__ == "__main__":
    sys.exit(main(default_source=Path(__file__).resolve().parents[1] / "data" / "PH2"))
