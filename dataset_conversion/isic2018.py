"""Convert ISIC 2018 Task 1 for nnU-Net; see --help."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

try:
    from nnunetv2_dermomamba.conversion.isic2018 import main
except ModuleNotFoundError as error:
    sys.exit(f"Error: {error} in {sys.executable}. Install the package there first: pip install {REPOSITORY}")

if __name__ == "__main__":
    sys.exit(main(default_source=REPOSITORY / "data" / "ISIC2018"))
