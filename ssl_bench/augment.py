"""Augmentation in one batched pass: parameters drawn for the global batch, applied to any slice of it on any device.

    augmentation = SSLView(32, blur_p=0.5, solarize_p=0.0, mean=mean, std=std)
    params = augmentation.draw(batch_size, generator)           # on the CPU, a pure function of the generator's seed
    x = augmentation(images[rows], take(params, rows))          # on the images' device

Each sample's result depends on its own image and parameters alone, so however a batch is split over processes and
chunks, its samples see the same augmentation. Parameters stay on the CPU, where lists of the samples that need an
operation are made without waiting for a device; they travel in one packed copy per call.

The pipelines are those of torchvision with the same names, and its semantics on float images: see `ssl_bench.color`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_bench import color
from ssl_bench.resample import (
    Params,
    crop_boxes,
    crop_geometry,
    crop_resize,
    draw_crops,
    gaussian_blur,
    shifted_rotation,
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

BLOCK = 128 * 3 * 32 * 32  # values a CPU works on at a time: what its caches hold, and enough to hide the calls


def take(params: Params, index: slice | Tensor) -> Params:
    """The parameters of some samples of the batch."""
    return {name: value[index] for name, value in params.items()}


class Augmentation(ABC):
    """uint8 images -> normalised images, each with its own random parameters.

    Args:
        mean: of each channel, for pixels in [0, 1].
        std: of each channel, > 0.
        dtype: of the result.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        self._check(len(mean) == 3 and len(std) == 3, "mean and std", (mean, std), "three numbers each")
        self._check(all(value > 0 for value in std), "std", std, "numbers > 0")
        self._check(dtype.is_floating_point, "dtype", dtype, "a floating-point type")
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Params:
        """Draws the parameters of n samples from a CPU generator: tensors of n rows, on the CPU."""

    @abstractmethod
    def __call__(self, images: Tensor, params: Params) -> Tensor:
        """Augments a batch.

        Args:
            images: (n, 3, H, W) uint8 on any device.
            params: of these n samples, from `draw` and `take`, on the CPU.

        Returns:
            (n, 3, h, w) of the dtype chosen at construction, channels_last, on the images' device.
        """

    def _check(self, holds: bool, argument: str, got: object, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {argument} must be {allowed}, got {got!r}")

    def _check_probability(self, argument: str, got: float) -> None:
        self._check(0 <= got <= 1, argument, got, "in [0, 1]")

    def _check_range(self, argument: str, got: tuple[float, float], most: float = float("inf")) -> None:
        allowed = f"(low, high) with 0 < low <= high{'' if most == float('inf') else f' <= {most:g}'}"
        self._check(len(got) == 2 and 0 < got[0] <= got[1] <= most, argument, got, allowed)

    def _check_images(self, images: Tensor, params: Params) -> None:
        shape = tuple(images.shape)
        good = images.ndim == 4 and shape[1] == 3 and images.dtype == torch.uint8
        self._check(good, "images", f"{shape} {images.dtype}", "(n, 3, H, W) uint8")
        for name, value in params.items():
            got = f"{len(value)} on {value.device}"
            self._check(len(value) == len(images), f"params[{name!r}]", got, f"{len(images)} rows, one per image")
            self._check(value.device.type == "cpu", f"params[{name!r}]", got, "on the CPU")

    def _blocks(self, images: Tensor, size: int) -> list[slice]:
        """The batch in pieces that the caches of a CPU hold; a GPU takes all at once."""
        n = len(images)
        pixels = 3 * max(size * size, images.shape[2] * images.shape[3])
        length = max(1, BLOCK // pixels) if images.device.type == "cpu" else n
        return [slice(start, min(start + length, n)) for start in range(0, n, length)]

    def _empty(self, images: Tensor, height: int, width: int) -> Tensor:
        shape = (len(images), 3, height, width)
        return torch.empty(shape, dtype=self.dtype, device=images.device, memory_format=torch.channels_last)

    def _normalize(self, planes: Tensor) -> Tensor:
        """(3, n, P) float in [0, 1], overwritten -> (n, P, 3) of the output's dtype."""
        for plane, mean, std in zip(planes, self.mean, self.std, strict=True):
            plane.sub_(mean).mul_(1 / std)
        pixels = torch.empty((*planes.shape[1:], 3), device=planes.device)
        return pixels.copy_(planes.permute(1, 2, 0)).to(self.dtype)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a small CPU tensor without waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _planes(images: Tensor) -> Tensor:
    """(n, 3, H, W) uint8 -> (3, n, H * W) float32 in [0, 1]."""
    planes = torch.empty((3, len(images), images.shape[2] * images.shape[3]), device=images.device)
    return planes.copy_(images.flatten(2).transpose(0, 1)).div_(255)


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
    ) -> None:
        super().__init__(mean, std, dtype)
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

    def draw(self, n: int, generator: torch.Generator) -> Params:
        params = draw_crops(n, self.crop_scale, self.crop_ratio, self.flip, generator)
        params |= color.draw_jitter(n, self.jitter, self.jitter_p, generator)
        for name, p in (("gray", self.gray_p), ("blur", self.blur_p), ("solarize", self.solarize_p)):
            params[name] = torch.rand(n, generator=generator) < p
        params["sigma"] = uniform((n,), *self.blur_sigma, generator)
        return params

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def __call__(self, images: Tensor, params: Params) -> Tensor:
        self._check_images(images, params)
        height, width = images.shape[2:]
        # Samples are sorted by how many colour operations come before the hue's, the only one that is not a blend:
        # then each of the steps below is one operation on a run of neighbours.
        position = color.hue_position(params)
        order = position.argsort(stable=True)
        position = position[order]
        boxes = crop_boxes(params, height, width, self.crop_ratio)
        numbers = [
            color.blend_coefficients(params).flatten(1),
            params["hue"][:, None],
            params["sigma"][:, None],
            crop_geometry(boxes, params["flip"], height, width, self.size),
        ]
        table = torch.cat(numbers, 1).index_select(0, order)
        chosen = torch.stack([params["gray"], params["blur"], params["solarize"]])[:, order]
        pixels = torch.empty((len(images), self.size**2, 3), dtype=self.dtype, device=images.device)
        for block in self._blocks(images, self.size):
            lists = [order[block], *(mask.nonzero().squeeze(1) for mask in chosen[:, block])]
            rows, *lists = _to(torch.cat(lists), images.device).split([len(rows) for rows in lists])
            ends = torch.searchsorted(position[block], torch.arange(5)).tolist()
            planes = self._augment(images.index_select(0, rows), _to(table[block], images.device), ends[1:], lists)
            pixels[block] = self._normalize(planes)
        unsorted = pixels.index_select(0, _to(order.argsort(), images.device))
        return unsorted.unflatten(1, (self.size, self.size)).permute(0, 3, 1, 2)

    def _augment(self, images: Tensor, table: Tensor, ends: list[int], lists: list[Tensor]) -> Tensor:
        """A block of samples: (n, 3, H, W) uint8 -> (3, n, size * size) float32 in [0, 1].

        Args:
            images: sorted by the hue's position.
            table: (n, ...) three blends (9), hue, sigma, the crop's geometry.
            ends: how many samples have their hue at position 0, at most 1, ..., at most 3.
            lists: the samples that become grey, blurred, solarized.
        """
        blends, hue, sigma, geometry = table.tensor_split([9, 10, 11], 1)
        square = crop_resize(images, geometry, self.size, "bicubic")
        planes = square.flatten(2)
        blends = blends.unflatten(1, (3, 3))
        jittered = ends[3]
        for step in range(3):  # blends before the hue
            color.blend(planes[:, ends[step] : jittered], blends[ends[step] : jittered, step])
        color.rotate_hue(planes[:, :jittered], hue[:jittered])
        for step in range(3):  # and after it
            color.blend(planes[:, : ends[step]], blends[: ends[step], step])
        gray, blur, solarize = lists
        if len(gray):
            planes.index_copy_(1, gray, color.luma(planes.index_select(1, gray)).expand(3, -1, -1))
        if len(blur) == len(images):
            gaussian_blur(square, sigma, self.blur_kernel)
        elif len(blur):
            blurred = gaussian_blur(square.index_select(1, blur), sigma.index_select(0, blur), self.blur_kernel)
            square.index_copy_(1, blur, blurred)
        if len(solarize):
            inverted = color.solarize(planes.index_select(1, solarize), self.solarize_threshold)
            planes.index_copy_(1, solarize, inverted)
        return planes


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

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def __call__(self, images: Tensor, params: Params) -> Tensor:
        self._check_images(images, params)
        height, width = images.shape[2:]
        boxes = crop_boxes(params, height, width, self.crop_ratio)
        geometry = _to(crop_geometry(boxes, params["flip"], height, width, self.size), images.device)
        output = self._empty(images, self.size, self.size)
        flat = output.permute(0, 2, 3, 1).flatten(1, 2)
        for block in self._blocks(images, self.size):
            planes = crop_resize(images[block], geometry[block], self.size, "bilinear")
            flat[block] = self._normalize(planes.flatten(2))
        return output


class PadCropFlipRotate(Augmentation):
    """The supervised track's: a zero-padded random crop of the image's size, flip, rotation (nearest, zero outside).

    Args:
        pad: pixels of padding on each side, >= 0; 0 = off.
        flip: the probability of a horizontal flip.
        degrees: rotations are drawn from U(-degrees, degrees), in [0, 180]; 0 = off.
        mean, std, dtype: see `Augmentation`.
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
    ) -> None:
        super().__init__(mean, std, dtype)
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

    def __call__(self, images: Tensor, params: Params) -> Tensor:
        self._check_images(images, params)
        table = torch.cat([params["shift"], params["flip"][:, None], params["angle"][:, None]], 1)
        table = _to(table, images.device)
        output = self._empty(images, *images.shape[2:])
        flat = output.permute(0, 2, 3, 1).flatten(1, 2)
        for block in self._blocks(images, 0):
            x = shifted_rotation(images[block], table[block, :2], table[block, 2], table[block, 3])
            flat[block] = self._normalize(_planes(x))
        return output


class Normalize(Augmentation):
    """The test transform: nothing random."""

    def draw(self, n: int, generator: torch.Generator) -> Params:  # noqa: ARG002
        return {}

    def __call__(self, images: Tensor, params: Params | None = None) -> Tensor:
        self._check_images(images, params or {})
        output = self._empty(images, *images.shape[2:])
        flat = output.permute(0, 2, 3, 1).flatten(1, 2)
        for block in self._blocks(images, 0):
            flat[block] = self._normalize(_planes(images[block]))
        return output
