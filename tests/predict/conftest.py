import json

import pytest
import torch

SIZE = (64, 64)
PLANS = {
    "dataset_name": "Dataset501_Test",
    "plans_name": "nnUNetPlans",
    "original_median_spacing_after_transp": [999.0, 1.0, 1.0],
    "original_median_shape_after_transp": [1, *SIZE],
    "image_reader_writer": "NaturalImage2DIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "experiment_planner_used": "ExperimentPlanner",
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": {}, "1": {}, "2": {}},
    "configurations": {
        "2d": {
            "data_identifier": "nnUNetPlans_2d",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": list(SIZE),
            "median_image_size_in_voxels": list(SIZE),
            "spacing": [1.0, 1.0],
            "normalization_schemes": ["ZScoreNormalization"] * 3,
            "use_mask_for_norm": [False] * 3,
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
            "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": {
                    "n_stages": 2,
                    "features_per_stage": [4, 8],
                    "conv_op": "torch.nn.modules.conv.Conv2d",
                    "kernel_sizes": [[3, 3], [3, 3]],
                    "strides": [[1, 1], [2, 2]],
                    "n_conv_per_stage": [1, 1],
                    "n_conv_per_stage_decoder": [1],
                    "conv_bias": True,
                    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
                    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                    "dropout_op": None,
                    "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
            "batch_dice": True,
        }
    },
}
DATASET = {
    "channel_names": {"0": "R", "1": "G", "2": "B"},
    "labels": {"background": 0, "lesion": 1},
    "numTraining": 2,
    "file_ending": ".png",
    "dermomamba_conversion": {"size": list(SIZE), "normalization": "zscore"},
}


def save_model(results, trainer_name, folds=(0,), dataset=DATASET, plans=PLANS):
    """An untrained model whose files nnU-Net's trainer wrote; in a folder as below nnUNet_results."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    folder = results / plans["dataset_name"] / f"{trainer_name}__nnUNetPlans__2d"
    folder.mkdir(parents=True)
    cases = results.parent / "preprocessed" / plans["dataset_name"] / "nnUNetPlans_2d"
    cases.mkdir(parents=True, exist_ok=True)
    (cases / "case.b2nd").touch()  # its name tells the trainer how cases are stored
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    (folder / "dataset_fingerprint.json").write_text("{}")
    for fold in folds:
        torch.manual_seed(hash(fold))
        own = json.loads(json.dumps({**plans, "continue_training": False}))
        trainer = recursive_find_trainer_class_by_name(trainer_name)(own, "2d", fold, dataset, torch.device("cpu"))
        trainer.log_file = str(folder / "training_log.txt")
        trainer.initialize()
        trainer.logger.log("ema_fg_dice", 0.5, 0)
        (folder / f"fold_{fold}" / "validation").mkdir(parents=True)
        for name in ("progress.png", "validation/summary.json"):
            (folder / f"fold_{fold}" / name).touch()
        trainer.save_checkpoint(str(folder / f"fold_{fold}" / "checkpoint_final.pth"))
    return folder


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """nnUNet_results, and the other folders that nnU-Net wants to know of."""
    folder = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (folder / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(folder / name))
        yield folder / "results"


@pytest.fixture(scope="session")
def model(results):
    return save_model(results, "nnUNetTrainerDermoMamba_demo", folds=(0, 1))


@pytest.fixture(scope="session")
def unet(results):
    return save_model(results, "nnUNetTrainer")


@pytest.fixture(scope="session")
def grey(results):
    """A U-Net of one channel."""
    configuration = PLANS["configurations"]["2d"]
    one = {"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False]}
    plans = {**PLANS, "dataset_name": "Dataset502_Grey", "configurations": {"2d": {**configuration, **one}}}
    return save_model(results, "nnUNetTrainer", dataset={**DATASET, "channel_names": {"0": "L"}}, plans=plans)


@pytest.fixture(scope="session")
def regions(results):
    """A U-Net of regions that overlap, trained with pixels to ignore."""
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    dataset = {**DATASET, "labels": labels, "regions_class_order": [1, 2]}
    return save_model(results, "nnUNetTrainer", dataset=dataset, plans={**PLANS, "dataset_name": "Dataset503_Regions"})


@pytest.fixture(scope="session")
def predictor(unet):
    from nnunetv2_dermomamba.predict import Predictor

    return Predictor(unet, "cpu", mirroring=False)
