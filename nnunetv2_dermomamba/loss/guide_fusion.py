"""Guide Fusion Loss: cross entropy plus Dice, guided by an attention map that peaks at the lesion's border.

Hoang, Nguyen, Tran, Pham, "DermoMamba: a cross-scale Mamba-based model with guide fusion loss for skin lesion
segmentation in dermoscopy images", Pattern Analysis and Applications 28:128, 2025; the arithmetic is that of the
authors' released implementation without its defects (a sigmoid before "with logits", distances across the batch).
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from torch import nn

from nnunetv2_dermomamba.loss.distance import distance_to_opposite

__all__ = ["GuideFusionLoss", "GuideFusionParts", "attention_map", "guide_fusion_loss"]

Attention = Literal["scalar", "pixel"]
ATTENTIONS = get_args(Attention)  # a constant: torch.compile of PyTorch 2.6 cannot trace get_args


class GuideFusionParts(NamedTuple):
    """The two summands of the loss, each a scalar tensor."""

    cross_entropy: torch.Tensor
    attention_dice: torch.Tensor


def attention_map(mask: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """A = 1 / (1 + D), D the distance in pixels to the nearest pixel of the opposite label in the same image.

    Args:
        mask: (..., H, W) bool.
        valid: broadcastable to ``mask``, bool, or None. An ignored pixel is neither foreground nor background: no
            distance ends at it, and its own A is 0.

    Returns:
        (..., H, W) float32 in [0, 0.5]; 0 throughout an image that lacks foreground or background.
    """
    return 1 / (1 + distance_to_opposite(mask, valid))


def _check_attention(attention: str) -> None:
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be 'scalar' or 'pixel', got {attention!r}")


def _check_shapes(logits: torch.Tensor, target: torch.Tensor, regions: bool, ignore_label: int | None) -> None:
    if logits.ndim != 4:
        raise ValueError(f"expected 2D logits (B, C, H, W), got shape {tuple(logits.shape)}")
    channels = logits.shape[1] + (ignore_label is not None) if regions else 1
    if target.shape != (logits.shape[0], channels, *logits.shape[2:]):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} need a target with {channels} channel(s), "
            f"got shape {tuple(target.shape)}"
        )
    if not regions and logits.shape[1] < 2:
        raise ValueError("a softmax over one channel is constant; use regions=True for a single sigmoid logit")


def _softmax_terms(
    logits: torch.Tensor, target: torch.Tensor, ignore_label: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of a label map and K = C - 1 foreground classes.

    Returns:
        Cross entropy (B, 1, H, W), probability (B, K, H, W), mask (B, K, H, W), valid pixels (B, 1, H, W) or None.
    """
    log_probability = logits.log_softmax(1)
    valid = None if ignore_label is None else target != ignore_label
    label = target if valid is None else target * valid  # any class will do where the cross entropy is then set to 0
    # The numbers of nll_loss, whose CUDA kernels without a reduction are slow: 0.1 ms each way at 64 x 192 x 256, H100.
    cross_entropy = -log_probability.gather(1, label.long())
    if valid is not None:
        cross_entropy = cross_entropy.masked_fill(~valid, 0)
    classes = torch.arange(1, logits.shape[1], device=target.device).view(-1, 1, 1)
    return cross_entropy, log_probability[:, 1:].exp(), target == classes, valid


def _sigmoid_terms(
    logits: torch.Tensor, target: torch.Tensor, ignore_label: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of K = C one-hot regions.

    Returns:
        Cross entropy (B, K, H, W), probability (B, K, H, W), mask (B, K, H, W), valid pixels (B, 1, H, W) or None.
    """
    target = target.bool()
    mask = target[:, : logits.shape[1]]
    cross_entropy = F.binary_cross_entropy_with_logits(logits, mask.to(logits.dtype), reduction="none")
    valid = None if ignore_label is None else ~target[:, -1:]
    return cross_entropy, logits.sigmoid(), mask, valid


def _pool_batch(sums: list[torch.Tensor], mean_guide: torch.Tensor, ddp: bool) -> tuple[torch.Tensor, ...]:
    """The (B, K) sums added over the images and ``mean_guide`` averaged, under DDP over those of all processes."""
    # Added up before they are gathered: nnU-Net's processes may hold different numbers of images.
    pooled = torch.stack([*sums, mean_guide, torch.ones_like(mean_guide)]).sum(1)
    if ddp:
        pooled = AllGatherGrad.apply(pooled).sum(0)
    *sums, guide_sum, images = pooled
    return *sums, guide_sum / images


def _counts(
    pixels: torch.Tensor | int, images: int, device: torch.device, ddp: bool
) -> tuple[torch.Tensor | int, torch.Tensor | int]:
    """What sums over pixels and over images are divided by to get means; under DDP the mean of all processes' counts.

    Processes may hold different numbers of images and of ignored pixels. A process's sum divided by the mean count
    becomes, averaged over the processes as DDP averages gradients, the mean over the joint batch.
    """
    if not ddp:
        return (pixels if isinstance(pixels, int) else pixels.clamp_min(1)), images
    counts = torch.stack([torch.as_tensor(count, device=device) for count in (pixels, images)])
    torch.distributed.all_reduce(counts)
    return (counts.clamp_min(1) / torch.distributed.get_world_size()).unbind()


def guide_fusion_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    attention: Attention = "pixel",
    regions: bool = False,
    ignore_label: int | None = None,
    batch_dice: bool = False,
    ddp: bool = False,
    smooth: float = 1e-5,
) -> GuideFusionParts:
    r"""Guide Fusion Loss in its two parts; the loss is their sum.

    With :math:`A_{ik}` the attention map (:func:`attention_map`) of image i and foreground class (or region) k, one
    against the rest, :math:`\bar A_{ik}` its mean over the pixels, :math:`p` the probability and :math:`g` the label:

    ``attention="scalar"``, the released arithmetic:

    .. math:: L = \mathrm{mean}_i \big( CE_i + \mathrm{mean}_k\, \bar A_{ik}\, Dice_{ik} \big), \qquad
        Dice = 1 - \frac{2 \sum p g + s}{\sum p + \sum g + s}

    ``attention="pixel"``: the same with every pixel weighted by :math:`w = A / \bar A` in cross entropy and Dice:

    .. math:: CE_i = \mathrm{mean}_{pixels}\big( ce \cdot \mathrm{mean}_k\, w_{ik} \big), \qquad
        Dice = 1 - \frac{2 \sum w p g + s}{\sum w p + \sum w g + s}

    The weights of an image average 1, so a uniform map gives w = 1 and both forms are equal. So too where A = 0
    throughout (no foreground, or nothing else): w = 1, and as the mean of A is 0 only the cross entropy is left. For
    regions the cross entropy of region k takes :math:`w_{ik}` itself.

    An ignored pixel enters no sum, no mean and no number of pixels, and no distance ends at it. The cross entropy is a
    mean over valid pixels and, for regions, over regions (nnU-Net's ``DC_and_BCE_loss`` sums over the regions once
    there is an ignore label). If all is ignored the loss is 0.

    With ``batch_dice`` the sums in Dice run over the batch, under DDP over all processes, and :math:`\bar A` is its
    mean over those images, as nnU-Net's own Dice pools them. Under DDP the mean of the processes' losses is the loss of
    the joint batch, and the gradients that DDP averages are its gradients.

    Half-precision logits are taken to float32; no operation here is one that autocast would run in half precision.

    Args:
        logits: (B, C, H, W), any floating dtype; C classes, the first the background, or C regions.
        target: label map (B, 1, H, W) of any dtype, or with ``regions`` one-hot (B, C, H, W), with a last further
            channel that marks the ignored pixels if ``ignore_label`` is not None. As nnU-Net's losses get them.
        attention: ``"pixel"``, which measured best (docs/accuracy.md), or ``"scalar"``, as released with the paper.
        regions: sigmoid per channel instead of a softmax over the channels.
        ignore_label: nnU-Net's ignore label, or None. With ``regions`` only its presence matters.
        batch_dice: one Dice per class over the batch instead of one per image and class.
        ddp: this is one of several processes' shares of a batch; needs an initialised process group.
        smooth: s, added to numerator and denominator of Dice (nnU-Net's value).

    Returns:
        Cross entropy and attention x Dice, scalars, float32 (float64 for float64 logits). All non-negative.

    Raises:
        ValueError: unknown ``attention``, or shapes that do not fit.
    """
    _check_attention(attention)
    _check_shapes(logits, target, regions, ignore_label)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    terms = _sigmoid_terms if regions else _softmax_terms
    cross_entropy, probability, mask, valid = terms(logits, target, ignore_label)
    one_hot = mask.to(logits.dtype)

    guide = attention_map(mask, valid).to(logits.dtype)
    pixels = guide[0, 0].numel() if valid is None else valid.sum((2, 3)).clamp_min(1)
    mean_guide = guide.sum((2, 3)) / pixels

    weight = None if valid is None else valid.to(logits.dtype)
    if attention == "pixel":
        level = mean_guide[:, :, None, None]
        weight = torch.where(level > 0, guide / level, 1.0 if weight is None else weight)
    if weight is not None:
        cross_entropy = cross_entropy * (weight if regions else weight.mean(1, keepdim=True))
        probability = probability * weight
    pixels = cross_entropy[:, 0].numel() if valid is None else valid.sum()
    pixel_count, image_count = _counts(pixels, len(logits), logits.device, ddp)
    cross_entropy = cross_entropy.sum() / (pixel_count * cross_entropy.shape[1])

    intersection = (probability * one_hot).sum((2, 3))
    predicted = probability.sum((2, 3))
    labelled = (one_hot if weight is None else one_hot * weight).sum((2, 3))
    if batch_dice:
        intersection, predicted, labelled, mean_guide = _pool_batch(
            [intersection, predicted, labelled], mean_guide, ddp
        )
    dice = (2 * intersection + smooth) / (predicted + labelled + smooth).clamp_min(1e-8)
    attention_dice = (1 - dice) * mean_guide
    if batch_dice:
        return GuideFusionParts(cross_entropy, attention_dice.mean())
    return GuideFusionParts(cross_entropy, attention_dice.mean(1).sum() / image_count)


class GuideFusionLoss(nn.Module):
    """:func:`guide_fusion_loss` as nnU-Net's trainers call a loss: ``loss(net_output, target)``.

    Attributes:
        parts: the two summands of the last call with gradients, detached and left on their device, for the log; None
            before it.

    Args:
        attention: ``"pixel"`` or ``"scalar"`` (the released arithmetic).
        regions: nnU-Net's ``label_manager.has_regions``.
        ignore_label: nnU-Net's ``label_manager.ignore_label``.
        batch_dice: nnU-Net's ``configuration_manager.batch_dice``.
        ddp: nnU-Net's ``trainer.is_ddp``.
        smooth: added to numerator and denominator of Dice.
    """

    def __init__(
        self,
        attention: Attention = "pixel",
        *,
        regions: bool = False,
        ignore_label: int | None = None,
        batch_dice: bool = False,
        ddp: bool = False,
        smooth: float = 1e-5,
    ) -> None:
        super().__init__()
        _check_attention(attention)
        self.attention = attention
        self.regions = regions
        self.ignore_label = ignore_label
        self.batch_dice = batch_dice
        self.ddp = ddp
        self.smooth = smooth
        self.parts: GuideFusionParts | None = None

    def forward(self, net_output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Scalar loss of logits (B, C, H, W) and nnU-Net's target."""
        parts = guide_fusion_loss(
            net_output,
            target,
            attention=self.attention,
            regions=self.regions,
            ignore_label=self.ignore_label,
            batch_dice=self.batch_dice,
            ddp=self.ddp,
            smooth=self.smooth,
        )
        if torch.is_grad_enabled():
            # not in validation: a training step that is a CUDA graph goes on writing to those of its capture
            self.parts = GuideFusionParts(*(part.detach() for part in parts))
        return parts.cross_entropy + parts.attention_dice
