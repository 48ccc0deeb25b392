"""One photograph at a time through a trained model, in three steps that may run in three threads."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image

from nnunetv2_dermomamba.images.photograph import Photograph
from nnunetv2_dermomamba.network.ss2d import SS2D
from nnunetv2_dermomamba.ops import describe_choice
from nnunetv2_dermomamba.predict.mirrors import MirrorsAtOncePredictor
from nnunetv2_dermomamba.predict.model import ModelError, build_network, load_model
from nnunetv2_dermomamba.predict.options import FINAL_CHECKPOINT
from nnunetv2_dermomamba.predict.reading import photo_in_memory, read_photo
from nnunetv2_dermomamba.predict.rendering import Classes, Prediction, render

__all__ = ["Predictor", "Prepared", "choose_device"]

SPACING = (999, 1, 1)  # nnU-Net's for images of one slice


@dataclass(frozen=True)
class Prepared:
    """A photograph ready for the network.

    Attributes:
        data: Float32 tensor of shape (channels, 1, height, width), normalised.
        properties: nnU-Net's, to undo its cropping.
        shape: (height, width) of the photograph in pixels.
    """

    data: torch.Tensor
    properties: dict
    shape: tuple[int, int]


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; if none is, the GPU if there is one, else the CPU.

    Raises:
        RuntimeError: PyTorch does not know it, or cannot use it on this machine.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    counts = {"cuda": torch.cuda.device_count, "mps": torch.mps.device_count}
    if chosen.type in counts and counts[chosen.type]() <= (chosen.index or 0):
        raise RuntimeError(
            f"PyTorch finds no device {str(chosen)!r} on this machine; use -device cpu (in Python, device='cpu')"
        )
    return chosen


class Predictor:
    """A trained model that takes photographs and gives masks.

    ``mask, probability = Predictor(MODEL)(image)``.

    Args:
        model: nnU-Net's results folder, or the zip file that ``nnUNetv2_export_model_to_zip`` writes.
        device: "cuda", "cpu" or "mps"; None for the GPU if there is one.
        folds: Names of the folds whose logits are averaged; None for all.
        checkpoint: File name of the checkpoints.
        mirroring: Average over the flipped images, too, as nnU-Net does.
        step_size: Of the sliding window, as a share of the patch.
        trust: Load checkpoints that could run any code.

    Attributes:
        model: What was read.
        classes: The foreground classes.
        scan: Which backend computes the selective scan; None for a network without one.

    Raises:
        ModelError: The model cannot be used.
        RuntimeError: The device cannot be used.
    """

    def __init__(
        self,
        model: str | Path,
        device: str | torch.device | None = None,
        *,
        folds: list[str] | None = None,
        checkpoint: str = FINAL_CHECKPOINT,
        mirroring: bool = True,
        step_size: float = 0.5,
        trust: bool = False,
    ) -> None:
        self.device = choose_device(device)
        self.model = load_model(model, folds, checkpoint, trust)
        try:
            self.plans = PlansManager(self.model.plans)
            self.configuration = self.plans.get_configuration(self.model.configuration)
            self.labels = self.plans.get_label_manager(self.model.dataset)
            self.preprocessor = self.configuration.preprocessor_class(verbose=False)
            self.channels = len(self.model.dataset["channel_names"])
            self.classes = Classes.of(self.labels, self.model.dataset["labels"])
            if self.channels in (1, 3):
                self.prepare(Photograph(Image.new("RGB", (8, 8), "gray"), (8, 8), 1))  # tries the plans
        except Exception as error:  # nnU-Net checks little, and raises what comes
            raise ModelError(f"{self.model.name}: damaged plans: {type(error).__name__}: {error}") from error
        if self.channels not in (1, 3):
            raise ModelError(f"{self.model.name} needs {self.channels} channels; a photograph has 3, or 1 if grey")
        network = build_network(self.model, self.plans, trust)
        has_scan = any(isinstance(module, SS2D) for module in network.modules())
        self.scan = describe_choice(self.device.type) if has_scan else None
        with redirect_stdout(io.StringIO()):  # nnU-Net tells that it keeps results on the CPU
            self._nnunet = MirrorsAtOncePredictor(
                tile_step_size=step_size,
                use_mirroring=mirroring,
                perform_everything_on_device=self.device.type == "cuda",
                device=self.device,
                allow_tqdm=False,
            )
        on_gpu = self.device.type == "cuda"  # nnU-Net loads each fold's weights for each photograph
        weights = [{k: v.to(self.device) for k, v in fold.items()} if on_gpu else fold for fold in self.model.weights]
        self._nnunet.manual_initialization(
            network.to(self.device),
            self.plans,
            self.configuration,
            weights,
            self.model.dataset,
            self.model.trainer,
            self.model.mirror_axes,
        )

    def __call__(self, image: np.ndarray | Image.Image | str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
        """Segment one photograph.

        Args:
            image: A file, a PIL image (read as a file is, its EXIF orientation undone), or a uint8 array of shape
                (height, width, 3) or (height, width).

        Returns:
            The mask, uint8 of shape (height, width), 1 on the lesion (the label's value if there are several classes);
            and the lesion's probability, float32 of shape (height, width), or (classes, height, width) if there are
            several.

        Raises:
            ImageReadError: The file cannot be read, or the image has no single right reading.
            ValueError: The array has another shape or type.
        """
        prepared = self.prepare(self._photograph(image))
        prediction = self.finish(self.network(prepared), prepared)
        rendered = render(prediction, probability=np.float32)
        assert rendered.probability is not None
        single = len(self.classes.values) == 1
        return rendered.labels, rendered.probability[0] if single else rendered.probability

    def read(self, path: str | Path) -> Prepared:
        """Read and prepare a file.

        Raises:
            ImageReadError: The file cannot be read.
        """
        return self.prepare(read_photo(path, self.model.shape))

    def prepare(self, photograph: Photograph) -> Prepared:
        """Normalise a photograph of the training size as nnU-Net does."""
        image = photograph.image if self.channels == 3 else photograph.image.convert("L")
        pixels = np.asarray(image, np.float32).reshape(image.height, image.width, self.channels)
        data = np.ascontiguousarray(pixels.transpose(2, 0, 1)[:, None])
        data, _, properties = self.preprocessor.run_case_npy(
            data, None, {"spacing": SPACING}, self.plans, self.configuration, self.model.dataset
        )
        return Prepared(torch.from_numpy(data), properties, photograph.original_shape)

    def network(self, prepared: Prepared) -> torch.Tensor:
        """Logits of nnU-Net's sliding window, averaged over folds and flips."""
        return self._nnunet.predict_logits_from_preprocessed_data(prepared.data)

    def finish(self, logits: torch.Tensor, prepared: Prepared) -> Prediction:
        """Probabilities at the training size from logits, with nnU-Net's cropping undone.

        Raises:
            FloatingPointError: They are not finite.
        """
        _, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            self.plans,
            self.configuration,
            self.labels,
            prepared.properties,
            return_probabilities=True,
            num_threads_torch=torch.get_num_threads(),
        )
        if not np.isfinite(probabilities).all():
            raise FloatingPointError("the network's output is not finite")
        return Prediction(probabilities[:, 0], prepared.shape, self.classes)

    def _photograph(self, image: np.ndarray | Image.Image | str | os.PathLike) -> Photograph:
        if isinstance(image, (str, os.PathLike)):
            return read_photo(Path(image), self.model.shape)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
                raise ValueError(
                    f"an array of {image.dtype} and shape {image.shape}; expected is uint8 of (height, width, 3) "
                    "or (height, width)"
                )
            image = Image.fromarray(np.ascontiguousarray(image))
        return photo_in_memory(image, self.model.shape)
