"""Augmentation in one batched pass: parameters drawn for the global batch, applied to any slice of it on any device.

    augmentation = SSLView(32, blur_p=0.5, solarize_p=0.0, mean=mean, std=std)
    params = augmentation.draw(batch_size, generator)           # on the CPU, a pure function of the generator's seed
    x = augmentation(images[rows], take(params, rows))          # on the images' device

Each sample's result depends on its own image and parameters alone, so however a batch is split over processes and
chunks, its samples see the same augmentation. Parameters stay on the CPU, where lists of the samples that need an
operation are made without waiting for a device; they travel in one packed copy per call.

The pipelines are those of torchvision with the same names, and its semantics on float images: see `color`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ssl_bench.augment import color
from ssl_bench.augment.base import Augmentation, take, to_device, to_planes
from ssl_bench.augment.resample import (
    Params,
    crop_boxes,
    crop_geometry,
    crop_resize,
    draw_crops,
    gaussian_blur,
    shifted_rotation,
    tap_matrices,
    uniform,
)

__all__ = [
    "Augmentation",
    "Normalize",
    "PadCropFlipRotate",
    "Params",
    "RandomResizedCropFlip",
    "SSLView",
    "take",
]

NO_BLUR = 1e-3  # a standard deviation, in pixels, that leaves an image as it is


class SSLView(Augmentation):
    """One view of self-supervised learning, as in Barlow Twins, SimCLR and VICReg.

    In this order: random resized crop (bicubic, antialiased) and flip; colour jitter, its four operations in an order
    of each sample's own; greyscale; Gaussian blur; solarization; normalisation.

    Args:
        size: pixels of the output's sides.
        crop_scale: the crop's share of the image's area, within (0, 1].
        crop_ratio: its width / height.
        flip: the probability of a horizontal flip.
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
        super().__init__(mean, std, dtype, compile=compile, graph=graph)
        self._check(size > 0, "size", size, "a number of pixels > 0")
        self._check_range("crop_scale", crop_scale, 1)
        self._check_range("crop_ratio", crop_ratio)
        self._check_range("blur_sigma", blur_sigma)
        good = len(jitter) == 4 and min(jitter) >= 0 and jitter[3] <= 0.5
        self._check(good, "jitter", jitter, "four numbers >= 0, the last <= 0.5")
        for name, p in {"flip": flip, "jitter_p": jitter_p, "gray_p": gray_p, "blur_p": blur_p}.items():
            self._check_probability(name, p)
        self._check_probability("solarize_p", solarize_p)
        self._check(0 <= solarize_threshold <= 1, "solarize_threshold", solarize_threshold, "in [0, 1]")
        if blur_kernel is None:
            blur_kernel = 2 * min(int(3 * blur_sigma[1] + 0.999), size - 1) + 1
        good = blur_kernel % 2 == 1 and 0 < blur_kernel < 2 * size
        self._check(good, "blur_kernel", blur_kernel, f"odd, > 0 and < 2 size = {2 * size}")
        self.size, self.flip = size, flip
        self.crop_scale, self.crop_ratio = crop_scale, crop_ratio
        self.jitter, self.jitter_p, self.gray_p = jitter, jitter_p, gray_p
        self.blur_p, self.blur_sigma, self.blur_kernel = blur_p, blur_sigma, blur_kernel
        self.solarize_p, self.solarize_threshold = solarize_p, solarize_threshold
        self._taps = tap_matrices(size, blur_kernel)

    def draw(self, n: int, generator: torch.Generator) -> Params:
        params = draw_crops(n, self.crop_scale, self.crop_ratio, self.flip, generator)
        params |= color.draw_jitter(n, self.jitter, self.jitter_p, generator)
        for name, p in (("gray", self.gray_p), ("blur", self.blur_p), ("solarize", self.solarize_p)):
            params[name] = torch.rand(n, generator=generator) < p
        params["sigma"] = uniform((n,), *self.blur_sigma, generator)
        return params

    def table(self, params: Mapping[str, Tensor], height: int, width: int) -> Tensor:
        """(n, 29) float32: what a sample needs of its parameters; an operation that it skips is the identity.

        Blends before the hue (9), hue, blends after it (9), grey (3), sigma, solarize, the crop's box (4), flip.
        """
        before, after = color.blend_coefficients(params)
        columns = [
            before.flatten(1),
            (params["hue"] * params["jitter"])[:, None],
            after.flatten(1),
            torch.where(params["gray"][:, None], torch.tensor(color.GREY), torch.tensor(color.IDENTITY)),
            torch.where(params["blur"], params["sigma"], NO_BLUR)[:, None],
            params["solarize"][:, None],
            crop_boxes(params, height, width, self.crop_ratio),
            params["flip"][:, None],
        ]
        return torch.cat(columns, 1)

    def _split(self, table: Tensor) -> tuple[Tensor, ...]:
        before, hue, after, grey, sigma, solarize, boxes, flip = table.tensor_split([9, 10, 19, 22, 23, 24, 28], 1)
        return before.unflatten(1, (3, 3)), hue, after.unflatten(1, (3, 3)), grey, sigma, solarize, boxes, flip

    def program(self, images: Tensor, table: Tensor) -> Tensor:
        self._move_taps(images.device)
        before, hue, after, grey, sigma, solarize, boxes, flip = self._split(table)
        geometry = crop_geometry(boxes, flip.squeeze(1), images.shape[2], images.shape[3], self.size)
        square = crop_resize(images, geometry, self.size, "bicubic")
        planes = square.flatten(2)
        for step in range(3):
            color.blend(planes, before[:, step])
        color.rotate_hue(planes, hue)
        for step in range(3):
            color.blend(planes, after[:, step])
        if self.gray_p:
            color.blend(planes, grey)
        if self.blur_p:
            gaussian_blur(square, sigma, self._taps)
        if self.solarize_p:
            color.solarize(planes, self.solarize_threshold, solarize)
        return self._images(self._normalize(planes))

    def _move_taps(self, device: torch.device) -> None:
        if self._taps.device != device:
            self._taps = self._taps.to(device)

    def _images(self, pixels: Tensor) -> Tensor:
        return pixels.unflatten(1, (self.size, self.size)).permute(0, 3, 1, 2)

    def apply(self, images: Tensor, table: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Each sample through its own operations only.

        Samples are sorted by how many colour operations come before the hue's, the only one that is not a blend: then
        each step is one operation on a run of neighbours.
        """
        self._move_taps(images.device)
        position = color.hue_position(params)
        order = position.argsort(stable=True)
        position, table = position[order], table.index_select(0, order)
        chosen = torch.stack([params["gray"], params["blur"], params["solarize"]])[:, order]
        pixels = torch.empty((len(images), self.size**2, 3), dtype=self.dtype, device=images.device)
        for block in self._blocks(images):
            lists = [order[block], *(mask.nonzero().squeeze(1) for mask in chosen[:, block])]
            rows, *lists = to_device(torch.cat(lists), images.device).split([len(rows) for rows in lists])
            ends = torch.searchsorted(position[block], torch.arange(1, 5)).tolist()
            block_table = to_device(table[block], images.device)
            pixels[block] = self._sorted_block(images.index_select(0, rows), block_table, ends, lists)
        return self._images(pixels.index_select(0, to_device(order.argsort(), images.device)))

    def _sorted_block(self, images: Tensor, table: Tensor, ends: list[int], lists: list[Tensor]) -> Tensor:
        """As `program`, for samples sorted by the hue's position: (n, size * size, 3).

        Args:
            images: (n, 3, H, W) uint8.
            table: (n, ...) from `_table`.
            ends: how many samples have their hue at position 0, at most 1, ..., at most 3; the others no jitter.
            lists: the samples that become grey, blurred, solarized.
        """
        before, hue, after, _, sigma, _, boxes, flip = self._split(table)
        geometry = crop_geometry(boxes, flip.squeeze(1), images.shape[2], images.shape[3], self.size)
        square = crop_resize(images, geometry, self.size, "bicubic")
        planes = square.flatten(2)
        jittered = ends[3]
        for step in range(3):
            color.blend(planes[:, ends[step] : jittered], before[ends[step] : jittered, step])
        color.rotate_hue(planes[:, :jittered], hue[:jittered])
        for step in range(3):
            color.blend(planes[:, : ends[step]], after[: ends[step], step])
        gray, blur, solarize = lists
        if len(gray):
            planes.index_copy_(1, gray, color.luma(planes.index_select(1, gray)).expand(3, -1, -1))
        if len(blur) == len(images):
            gaussian_blur(square, sigma, self._taps)
        elif len(blur):
            blurred = gaussian_blur(square.index_select(1, blur), sigma.index_select(0, blur), self._taps)
            square.index_copy_(1, blur, blurred)
        if len(solarize):
            inverted = color.solarize(planes.index_select(1, solarize), self.solarize_threshold)
            planes.index_copy_(1, solarize, inverted)
        return self._normalize(planes)


class RandomResizedCropFlip(Augmentation):
    """Random resized crop (bilinear, antialiased: torchvision's default) and flip, for a linear probe's training.

    Args:
        size, crop_scale, crop_ratio, flip: see `SSLView`.
        mean, std, dtype: see `Augmentation`.
    """

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
    ) -> None:
        super().__init__(mean, std, dtype)
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

    def program(self, images: Tensor, table: Tensor) -> Tensor:
        geometry = crop_geometry(table[:, :4], table[:, 4], images.shape[2], images.shape[3], self.size)
        planes = crop_resize(images, geometry, self.size, "bilinear")
        return self._normalize(planes.flatten(2)).unflatten(1, (self.size, self.size)).permute(0, 3, 1, 2)


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
        return self._normalize(to_planes(x)).unflatten(1, images.shape[2:]).permute(0, 3, 1, 2)


class Normalize(Augmentation):
    """The test transform: nothing random."""

    def draw(self, n: int, generator: torch.Generator) -> Params:  # noqa: ARG002
        return {}

    def table(self, params: Mapping[str, Tensor], height: int, width: int) -> Tensor:  # noqa: ARG002
        """Nothing is needed."""
        return torch.empty(0, 0)

    def program(self, images: Tensor, table: Tensor) -> Tensor:  # noqa: ARG002
        return self._normalize(to_planes(images)).unflatten(1, images.shape[2:]).permute(0, 3, 1, 2)
