"""Multi-crop (Caron et al. 2020, arXiv 2006.09882): two large crops of an image, and small ones of parts of it.

The large crops give the targets, and every crop predicts those of the other ones.
"""

import torch
from torch import Tensor, nn

from ssl_bench.methods.base import check, check_scales
from ssl_bench.methods.views import Crop

LOCAL_SHARE = 96 / 224  # of the images' side; the small crops of SwAV and DINO on ImageNet


def multi_crop(
    method: str,
    backbone: nn.Module,
    *,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    local_crops: int,
    local_size: int,
    blur_p: float | None = None,
    solarize_p: float | None = None,
) -> tuple[Crop, ...]:
    """Declares two large crops, then the small ones, which are blurred half the time and never solarised.

    Args:
        method: the name that errors begin with.
        backbone: what the crops go through; where it cuts images into patches, the small crops are whole patches.
        global_scale, local_scale: ranges of the large and of the small crops' share of the image's area, in (0, 1].
        local_crops: how many small crops, >= 0.
        local_size: pixels of their sides, > 0; 0 = 96/224 of the images' side, to the nearest number of whole patches.
        blur_p, solarize_p: of the large crops; None = the recipe's.

    Raises:
        ValueError: a value out of its range, or small crops that the backbone cannot take.
    """
    check_scales(method, global_scale=global_scale, local_scale=local_scale)
    check(method, ">= 0", local_crops=local_crops, local_size=local_size)
    large = Crop(scale=global_scale, blur_p=blur_p, solarize_p=solarize_p)
    if not local_crops:
        return (large, large)
    size = _local_size(method, backbone, local_size)
    return (large, large, *[Crop(size=size, scale=local_scale, blur_p=0.5, solarize_p=0.0)] * local_crops)


def _local_size(method: str, backbone: nn.Module, asked: int) -> int | float:
    """The small crops' size; timm's vision transformers know their images' and patches' sizes."""
    patches = getattr(backbone, "patch_embed", None)
    if getattr(patches, "strict_img_size", False):
        raise ValueError(
            f"{method}: local_crops must be 0 for a backbone that takes images of one size only "
            "(model.dynamic_img_size=true makes a ViT take others)"
        )
    patch, image = (getattr(patches, name, None) for name in ("patch_size", "img_size"))
    if patch is not None and asked % patch[0]:
        raise ValueError(
            f"{method}: local_size must be a multiple of the backbone's patch size {patch[0]}, got {asked}"
        )
    if asked or patch is None or image is None:
        return asked or LOCAL_SHARE
    return patch[0] * max(1, round(LOCAL_SHARE * image[0] / patch[0]))


def prediction_loss(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of every crop's softmax to the large crops' targets: the mean over pairs of different crops.

    sum_k t_k log softmax_k = t . s - log sum exp s, which needs no array of logarithms.

    Args:
        scores: (N, crops, K), the two large crops first.
        targets: (N, 2, K) of the large crops, each with sum 1.
        temperature: divides the scores, > 0.
    """
    n, crops, _ = scores.shape
    scores = scores / temperature
    pairs = torch.bmm(scores, targets.mT) - scores.logsumexp(dim=2, keepdim=True)  # (N, crops, 2)
    total = pairs.sum(dim=0)
    return (total.diagonal().sum() - total.sum()) / (2 * (crops - 1) * n)
