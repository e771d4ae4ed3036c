"""Augmentation in one batched pass: parameters drawn for the global batch, applied to any slice of it on any device.

    augmentation = SSLView(32, blur_p=0.5, solarize_p=0.0, mean=mean, std=std)
    params = augmentation.draw(batch_size, generator)           # on the CPU, a pure function of the generator's seed
    x = augmentation(images[rows], take(params, rows))          # on the images' device

A sample's result depends on its own image and parameters alone, so that it is the same however a batch is split over
processes and chunks. Parameters stay on the CPU, where finding the samples that need an operation never waits for a
GPU; they travel in one packed copy per call.

The pipelines are those of torchvision with the same names, and its semantics on float images: see `color`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl_bench.augment import color
from ssl_bench.augment.base import Augmentation, Labels, Noise, View, take, to_device, to_planes
from ssl_bench.augment.resample import (
    Params,
    crop_boxes,
    crop_resize,
    draw_crops,
    gaussian_blur,
    shifted_rotation,
    tap_matrices,
    uniform,
)

__all__ = [
    "Augmentation",
    "Labels",
    "Noise",
    "Normalize",
    "PadCropFlipRotate",
    "Params",
    "RandomResizedCropFlip",
    "SSLView",
    "View",
    "take",
]

NO_BLUR = 1e-3  # a standard deviation, in pixels, that leaves an image as it is


class RandomResizedCropFlip(Augmentation):
    """Random resized crop (bilinear, antialiased: torchvision's default) and flip, for a linear probe's training.

    Args:
        size: pixels of the output's sides.
        crop_scale: the crop's share of the image's area, within (0, 1].
        crop_ratio: its width / height.
        flip: the probability of a horizontal flip.
        mean, std, dtype, compile, graph: see `Augmentation`.
    """

    kind = "bilinear"

    def __init__(
        self,
        size: int,
        *,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        graph: bool = False,
    ) -> None:
        super().__init__(mean, std, dtype, compile=compile, graph=graph)
        self._check(size > 0, "size", size, "a number of pixels > 0")
        self._check_range("crop_scale", crop_scale, 1)
        self._check_range("crop_ratio", crop_ratio)
        self._check_probability("flip", flip)
        self.size, self.flip, self.crop_scale, self.crop_ratio = size, flip, crop_scale, crop_ratio

    def draw(self, n: int, generator: torch.Generator) -> Params:
        return draw_crops(n, self.crop_scale, self.crop_ratio, self.flip, generator)

    def table(self, params: Mapping[str, Tensor], height: int, width: int) -> Tensor:
        """(n, 5) float32: the crop's box (4), flip."""
        return torch.cat([crop_boxes(params, height, width, self.crop_ratio), params["flip"][:, None]], 1)

    def crop(self, images: Tensor, table: Tensor) -> Tensor:
        """(3, n, size, size) float32 in [0, 1]."""
        return crop_resize(images, table[:, :4], table[:, 4], self.size, self.kind)

    def program(self, images: Tensor, table: Tensor) -> Tensor:
        return self._images(self._normalize(self.crop(images, table).flatten(2)), self.size, self.size)


class _Rows(NamedTuple):
    """Which samples of a block each operation of `SSLView` is applied to; by default all, for a fixed program.

    Args:
        before, after: those of the three blends before the hue, and of those after it; None for all.
        hue: those that are jittered at all; None for all.
        gray, blur, solarize: (n,) int64 indices on the device; None for all.
    """

    before: Sequence[slice | None] = (None,) * 3
    hue: slice | None = None
    after: Sequence[slice | None] = (None,) * 3
    gray: Tensor | None = None
    blur: Tensor | None = None
    solarize: Tensor | None = None


def _apply_to(rows: Tensor | None, operation: Callable[..., Tensor], x: Tensor, parameter: Tensor, *rest: Any) -> None:
    """An in-place operation on some samples of (3, n, ...), each with its row of the parameter."""
    if rows is None or len(rows) == len(parameter):
        operation(x, parameter, *rest)
    elif len(rows):
        x.index_copy_(1, rows, operation(x.index_select(1, rows), parameter.index_select(0, rows), *rest))


def _blend_each(planes: Tensor, coefficients: Tensor, parts: Sequence[slice | None]) -> None:
    """Three blends in place, each of the samples that need it; ``coefficients`` (n, 3, 3)."""
    for step, part in enumerate(parts):
        if part is None:
            color.blend(planes, coefficients[:, step])
        else:
            color.blend(planes[:, part], coefficients[part, step])


class SSLView(RandomResizedCropFlip):
    """One view of self-supervised learning, as in Barlow Twins, SimCLR and VICReg.

    In this order: random resized crop (bicubic, antialiased) and flip; colour jitter, its four operations in an order
    of each sample's own; greyscale; Gaussian blur; solarization; normalisation.

    Args:
        size, crop_scale, crop_ratio, flip: see `RandomResizedCropFlip`.
        jitter: half-widths of the brightness, contrast and saturation factors around 1, >= 0, and of the hue's shift
            in turns, in [0, 0.5].
        jitter_p: the probability of any jitter; 0 = off.
        gray_p: the probability of greyscale; 0 = off.
        blur_p: the probability of blur; 0 = off. Barlow Twins: 1 in view 1 and 0.1 in view 2.
        blur_sigma: the blur's standard deviation in output pixels, drawn uniformly.
        blur_kernel: its taps, odd, < 2 size; None takes 3 sigma to each side (PIL's blur, as in Barlow Twins, is not
            cut off), as far as ``size`` allows.
        solarize_p: the probability of solarization; 0 = off. Barlow Twins: 0 in view 1 and 0.2 in view 2.
        solarize_threshold: values at or above it are inverted, in [0, 1]. PIL inverts the values 128 ... 255, which
            are those that round up from 127.5 / 255 = 0.5.
        mean, std, dtype: see `Augmentation`.
        compile, graph: see `Augmentation`. Every sample then passes through every operation, so that shapes depend on
            the batch's size alone; results differ in the last bits of float32.
    """

    kind = "bicubic"

    def __init__(
        self,
        size: int,
        *,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        jitter_p: float = 0.8,
        gray_p: float = 0.2,
        blur_p: float = 0.0,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        blur_kernel: int | None = None,
        solarize_p: float = 0.0,
        solarize_threshold: float = 0.5,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        graph: bool = False,
    ) -> None:
        crop: Any = {"crop_scale": crop_scale, "crop_ratio": crop_ratio, "flip": flip}
        super().__init__(size, **crop, mean=mean, std=std, dtype=dtype, compile=compile, graph=graph)
        self._check_range("blur_sigma", blur_sigma)
        good = len(jitter) == 4 and min(jitter) >= 0 and jitter[3] <= 0.5
        self._check(good, "jitter", jitter, "four numbers >= 0, the last <= 0.5")
        named = {"jitter_p": jitter_p, "gray_p": gray_p, "blur_p": blur_p, "solarize_p": solarize_p}
        for name, p in named.items():
            self._check_probability(name, p)
        self._check(0 <= solarize_threshold <= 1, "solarize_threshold", solarize_threshold, "in [0, 1]")
        if blur_kernel is None:
            blur_kernel = 2 * min(int(3 * blur_sigma[1] + 0.999), size - 1) + 1
        good = blur_kernel % 2 == 1 and 0 < blur_kernel < 2 * size
        self._check(good, "blur_kernel", blur_kernel, f"odd, > 0 and < 2 size = {2 * size}")
        self.jitter, self.jitter_p, self.gray_p = jitter, jitter_p, gray_p
        self.blur_p, self.blur_sigma, self.blur_kernel = blur_p, blur_sigma, blur_kernel
        self.solarize_p, self.solarize_threshold = solarize_p, solarize_threshold
        self._taps = tap_matrices(size, blur_kernel)

    def draw(self, n: int, generator: torch.Generator) -> Params:
        params = super().draw(n, generator) | color.draw_jitter(n, self.jitter, self.jitter_p, generator)
        for name, p in (("gray", self.gray_p), ("blur", self.blur_p), ("solarize", self.solarize_p)):
            params[name] = torch.rand(n, generator=generator) < p
        params["sigma"] = uniform((n,), *self.blur_sigma, generator)
        return params

    def table(self, params: Mapping[str, Tensor], height: int, width: int) -> Tensor:
        """(n, 27) float32: what a sample needs of its parameters; an operation that it skips is the identity.

        The crop's box (4), flip, blends before the hue (9), hue, blends after it (9), grey, sigma, solarize.
        """
        table = torch.empty((len(params["hue"]), 27))
        columns = table.numpy()
        columns[:, :5] = super().table(params, height, width).numpy()
        before, after = color.blend_coefficients(params)
        columns[:, 5:14], columns[:, 15:24] = before.flatten(1).numpy(), after.flatten(1).numpy()
        columns[:, 14] = params["hue"].numpy() * params["jitter"].numpy()
        columns[:, 24] = params["gray"].numpy()
        columns[:, 25] = np.where(params["blur"].numpy(), params["sigma"].numpy(), np.float32(NO_BLUR))
        columns[:, 26] = params["solarize"].numpy()
        return table

    def _pixels(self, images: Tensor, table: Tensor, rows: _Rows) -> Tensor:
        """The view itself, for every device and every way to run it: (n, size * size, 3), normalised.

        Args:
            images: (n, 3, H, W) uint8.
            table: (n, 27) from `table`.
            rows: the samples that need each operation; any others pass through it unchanged.
        """
        crop, before, hue, after, gray, sigma, solarize = table.split([5, 9, 1, 9, 1, 1, 1], 1)
        square = self.crop(images, crop)
        planes = square.flatten(2)  # shares its memory
        _blend_each(planes, before.unflatten(1, (3, 3)), rows.before)
        color.rotate_hue(*((planes, hue) if rows.hue is None else (planes[:, rows.hue], hue[rows.hue])))
        _blend_each(planes, after.unflatten(1, (3, 3)), rows.after)
        if self.gray_p:
            _apply_to(rows.gray, color.to_grey, planes, gray)
        if self.blur_p:
            _apply_to(rows.blur, gaussian_blur, square, sigma, self._taps)
        if self.solarize_p:
            _apply_to(rows.solarize, color.solarize, planes, solarize, self.solarize_threshold)
        return self._normalize(planes)

    def program(self, images: Tensor, table: Tensor) -> Tensor:
        self._move_taps(images.device)
        return self._images(self._pixels(images, table, _Rows()), self.size, self.size)

    def kernel(self, images: Tensor, table: Tensor) -> Tensor | None:
        from ssl_bench.augment import kernels  # here: Triton is there where torch is built for a GPU

        if not kernels.fits(self.size, *images.shape[2:]):
            return None
        blur = {"blurs": self.blur_p > 0, "radius": self.blur_kernel // 2, "least": NO_BLUR}
        view = self._stats() | blur | {"threshold": self.solarize_threshold}
        return kernels.ssl_view(images, table, size=self.size, view=view, dtype=self.dtype)

    def _move_taps(self, device: torch.device) -> None:
        if self._taps.device != device:
            self._taps = self._taps.to(device)

    def apply(self, images: Tensor, table: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Each sample through its own operations only.

        Samples are sorted by how many colour operations come before the hue's, the only one that is not a blend: then
        each step is one operation on a run of neighbours, which needs no copy. (A GPU's own kernel skips what a sample
        does not need by itself.)
        """
        if images.is_cuda:
            return self.fused(images, to_device(table, images.device))
        self._move_taps(images.device)
        position = color.hue_position(params)
        order = position.argsort(stable=True)
        position, table = position[order], table.index_select(0, order)
        chosen = torch.stack([params["gray"], params["blur"], params["solarize"]])[:, order]
        pixels = torch.empty((len(images), self.size**2, 3), dtype=self.dtype, device=images.device)
        for block in self._blocks(images):
            lists = [order[block], *(mask.nonzero().squeeze(1) for mask in chosen[:, block])]
            samples, *lists = to_device(torch.cat(lists), images.device).split([len(part) for part in lists])
            # How many samples have their hue at position 0, at most 1, ..., at most 3; the others are not jittered.
            *ends, jittered = torch.searchsorted(position[block], torch.arange(1, 5)).tolist()
            before, after = [slice(end, jittered) for end in ends], [slice(end) for end in ends]
            rows = _Rows(before, slice(jittered), after, *lists)
            block_table = to_device(table[block], images.device)
            pixels[block] = self._pixels(images.index_select(0, samples), block_table, rows)
        pixels = pixels.index_select(0, to_device(order.argsort(), images.device))
        return self._images(pixels, self.size, self.size)


class PadCropFlipRotate(Augmentation):
    """The supervised track's: a zero-padded random crop of the image's size, flip, rotation (nearest, zero outside).

    Args:
        pad: pixels of padding on each side, >= 0; 0 = off.
        flip: the probability of a horizontal flip.
        degrees: rotations are drawn from U(-degrees, degrees), in [0, 180]; 0 = off.
        mean, std, dtype, compile, graph: see `Augmentation`.
    """

    def __init__(
        self,
        *,
        pad: int = 4,
        flip: float = 0.5,
        degrees: float = 15.0,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        graph: bool = False,
    ) -> None:
        super().__init__(mean, std, dtype, compile=compile, graph=graph)
        self._check(pad >= 0, "pad", pad, "a number of pixels >= 0")
        self._check_probability("flip", flip)
        self._check(0 <= degrees <= 180, "degrees", degrees, "in [0, 180]")
        self.pad, self.flip, self.degrees = pad, flip, degrees

    def draw(self, n: int, generator: torch.Generator) -> Params:
        return {
            "shift": torch.randint(-self.pad, self.pad + 1, (n, 2), generator=generator),  # pixels down, right
            "flip": torch.rand(n, generator=generator) < self.flip,
            "angle": uniform((n,), -self.degrees, self.degrees, generator),  # degrees
        }

    def table(self, params: Mapping[str, Tensor], height: int, width: int) -> Tensor:  # noqa: ARG002
        """(n, 4) float32: shift (2), flip, angle."""
        return torch.cat([params["shift"], params["flip"][:, None], params["angle"][:, None]], 1)

    def program(self, images: Tensor, table: Tensor) -> Tensor:
        x = shifted_rotation(images, table[:, :2], table[:, 2], table[:, 3])
        return self._images(self._normalize(to_planes(x)), *images.shape[2:])

    def kernel(self, images: Tensor, table: Tensor) -> Tensor | None:
        from ssl_bench.augment import kernels

        return kernels.pad_crop_flip_rotate(images, table, stats=self._stats(), dtype=self.dtype)


class Normalize(Augmentation):
    """The test transform: nothing random."""

    def draw(self, n: int, generator: torch.Generator) -> Params:  # noqa: ARG002
        return {}

    def table(self, params: Mapping[str, Tensor], height: int, width: int) -> Tensor:  # noqa: ARG002
        """Nothing is needed."""
        return torch.empty(0, 0)

    def program(self, images: Tensor, table: Tensor) -> Tensor:  # noqa: ARG002
        return self._images(self._normalize(to_planes(images)), *images.shape[2:])
