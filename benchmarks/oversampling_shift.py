"""How far nnU-Net's oversampling of foreground moves whole images: ``python benchmarks/oversampling_shift.py``.

A third of nnU-Net's samples have a random lesion pixel brought towards the patch's centre. Where the patch is the whole
image, that moves the image up and to the left, never back, and fills the rest with zeros. Needs ``nnUNet_preprocessed``
with images of the planned patch's size; prints how many samples move, how far, and how much of the lesion is cut off.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from accuracy import dataset_folder, preprocessed_folder
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", default="118", help="number or folder name")
    parser.add_argument("--plans", default="nnUNetPlans")
    arguments = parser.parse_args()
    source = preprocessed_folder(parser)
    folder = source / dataset_folder(source, arguments.dataset)
    plans = PlansManager(json.loads((folder / f"{arguments.plans}.json").read_text()))
    labels = plans.get_label_manager(json.loads((folder / "dataset.json").read_text()))
    configuration = plans.get_configuration("2d")
    stored = str(folder / configuration.data_identifier)
    dataset = infer_dataset_class(stored)(stored)
    patch = tuple(configuration.patch_size)
    loader = nnUNetDataLoader(dataset, 2, patch, patch, labels, 0.33)
    np.random.seed(0)
    moves, lost = [], []
    for case in dataset.identifiers:
        image, segmentation, _, properties = dataset.load_case(case)
        if image.shape[2:] != patch or not (lesion := np.asarray(segmentation[:])[0, 0] > 0).any():
            continue
        (_, down, right), _ = loader.get_bbox(image.shape[1:], True, properties["class_locations"])
        moves.append((down, right))
        kept = lesion[max(down, 0) :, max(right, 0) :].sum()
        lost.append(1 - kept / lesion.sum())
    if not moves:
        raise SystemExit(f"no case has the planned patch's size {patch}")
    away, cut = np.array(moves), np.array(lost)
    print(f"{len(away)} images of {patch[0]} x {patch[1]}, one oversampled patch of each")
    print(f"moved: {100 * away.any(1).mean():.0f} %, by {away.mean(0).round(1)} rows and columns on average")
    print(f"range: {away.min(0)} to {away.max(0)}")
    print(
        f"lesion cut off: {100 * cut.mean():.1f} % of it on average, over a tenth in {100 * (cut > 0.1).mean():.0f} %"
    )


if __name__ == "__main__":
    main()
