"""Colour, each sample with its own parameters and its own order of operations.

Images are (3, n, P): a plane for each channel, holding the P pixels of each of n samples, so that a channel, and a run
of samples within it, is contiguous.

Semantics: torchvision's on float images in [0, 1]. Nothing is rounded to uint8 between operations (PIL does, and
differs by a few 1/255 for that reason); results are clamped to [0, 1] where torchvision clamps them.
"""

from collections.abc import Mapping
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from ssl_bench.augment.resample import Params, uniform

LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbers of ColorJitter's operations
_ORDERS = torch.tensor(list(permutations(range(4))))  # (24, 4)
IDENTITY = (1.0, 0.0, 0.0)  # coefficients of `blend`
_TINY = 1e-20


def draw_jitter(n: int, jitter: tuple[float, float, float, float], p: float, generator: torch.Generator) -> Params:
    """Draws the parameters of torchvision's ``RandomApply([ColorJitter(*jitter)], p)``.

    Args:
        n: the number of samples.
        jitter: half-widths of brightness, contrast and saturation factors around 1 (not below 0), and of the hue's
            shift around 0, in turns.
        p: the probability that a sample is jittered at all.
        generator: the CPU generator to draw from.
    """
    factors = [uniform((n,), max(0.0, 1 - width), 1 + width, generator) for width in jitter[:3]]
    return {
        "jitter": torch.rand(n, generator=generator) < p,
        "factors": torch.stack(factors, 1),  # (n, 3)
        "hue": uniform((n,), -jitter[3], jitter[3], generator),
        "order": _ORDERS[torch.randint(len(_ORDERS), (n,), generator=generator)],  # (n, 4)
    }


def hue_position(params: Mapping[str, Tensor]) -> Tensor:
    """(n,) how many operations come before the hue's; 4 for a sample that is not jittered."""
    position = (params["order"].numpy() == HUE).argmax(1)
    return torch.from_numpy(np.where(params["jitter"].numpy(), position, 4))


def blend_coefficients(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The coefficients of `blend` for brightness, contrast and saturation in each sample's order.

    Returns:
        two (n, 3, 3), (n, step, coefficient): for the steps before the hue and for those after it. In step 1, say, a
        sample's second blend has its coefficients in one of the two, and the other has `IDENTITY`.
    """
    # NumPy: the same float32 arithmetic at half the cost of a call, of which a GPU's host pays many at every step.
    order, jitter = params["order"].numpy(), params["jitter"].numpy()
    position = hue_position(params).numpy()[:, None]
    order = order[order != HUE].reshape(-1, 3)
    factor = params["factors"].numpy()[np.arange(len(order))[:, None], order]
    rest = 1 - factor
    blends = np.stack([factor, rest * (order == SATURATION), rest * (order == CONTRAST)], 2)
    before, identity = np.arange(3) < position, np.array(IDENTITY, np.float32)
    chosen = np.stack([before & jitter[:, None], ~before])[..., None]
    first, last = torch.from_numpy(np.where(chosen, blends, identity))
    return first, last


def luma(planes: Tensor) -> Tensor:
    """(3, n, P) -> (n, P) torchvision's grey value."""
    red, green, blue = planes
    return red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blend(planes: Tensor, coefficients: Tensor) -> Tensor:
    """One of brightness, contrast and saturation for each sample, in place.

    All three are ``clamp(factor * x + (1 - factor) * other)`` where `other` is black, the image's mean grey value or
    the pixel's grey value, so samples with different operations share the passes over memory.

    Args:
        planes: (3, n, P) float in [0, 1].
        coefficients: (n, 3) of the image, of the pixel's grey value, and of the mean grey value.
    """
    ratio, on_grey, on_mean = coefficients[:, :, None].unbind(1)  # (n, 1) each
    grey = luma(planes)
    mean = grey.mean(1, keepdim=True).mul_(on_mean)
    offset = grey.mul_(on_grey).add_(mean)
    return torch.addcmul(offset, planes, ratio, out=planes).clamp_(0, 1)


def rotate_hue(planes: Tensor, shift: Tensor) -> Tensor:
    """torchvision's ``adjust_hue``, in place, without its branches.

    With chroma c = max - min and R' = (r - min) / c and so on, one of R', G', B' is 0 and one is 1. In sixths of a
    turn, the hue's distance from red is then 1 - R' + G' + B', on the side given by the sign of g - b. Back from hue t
    in [0, 6), a channel is min + c * clamp(2 - distance(t, its own hue), 0, 1); r, g and b have hues 0, 2 and 4.

    Args:
        planes: (3, n, P) float in [0, 1].
        shift: (n, 1) in turns, within [-0.5, 0.5].
    """
    red, green, blue = planes
    high = torch.maximum(red, green)
    torch.maximum(high, blue, out=high)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    chroma = high.sub_(low)
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=_TINY)).add_(1)
    hue.copysign_(green - blue).add_(shift * 6)
    hue.sub_(torch.floor(hue * (1 / 6)), alpha=6)  # in [0, 6]
    for channel, centre in ((green, 2), (blue, 4)):
        share = (hue - centre).abs_().neg_().add_(2).clamp_(0, 1)
        torch.addcmul(low, chroma, share, out=channel)
    share = hue.sub_(3).abs_().sub_(1).clamp_(0, 1)  # red's own hue is both 0 and 6
    torch.addcmul(low, chroma, share, out=red)
    return planes


def to_grey(planes: Tensor, chosen: Tensor) -> Tensor:
    """torchvision's ``rgb_to_grayscale`` of the samples with 1 in ``chosen``, (n, 1) of 0 and 1; in place."""
    return planes.lerp_(luma(planes), chosen)  # exact for 0 and 1


def solarize(planes: Tensor, chosen: Tensor, threshold: float) -> Tensor:
    """torchvision's ``solarize``, in place: inverts what is at or above the threshold.

    Args:
        planes: (3, n, P) float in [0, 1].
        chosen: (n, 1) float, 1 for the samples to solarize and 0 for the others.
        threshold: in [0, 1].
    """
    # A threshold of 1 / 0 leaves the others out. Arithmetic for the rest, since a CPU is slow to select by a mask.
    above = (planes >= threshold / chosen).to(planes.dtype)
    return planes.addcmul_(above, 1 - 2 * planes)
