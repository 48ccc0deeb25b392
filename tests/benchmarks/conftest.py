import sys
from pathlib import Path

from preprocessed_dataset import dataset_json, plans, preprocessed, small  # noqa: F401  (fixtures)

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # the scripts import each other so
