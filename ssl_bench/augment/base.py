"""What every augmentation shares: checks, blocks that fit a CPU's caches, normalisation, and its parameters' slices."""

import subprocess
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ssl_bench.augment.resample import Params
from ssl_bench.runtime.cuda_graph import Replayed

BLOCK = (
    128 * 3 * 32 * 32
)  # values a core works on at a time: fit its caches, and are enough to hide the calls' overhead


def take(params: Mapping[str, Tensor], index: slice | Tensor) -> Params:
    """The parameters of some samples of the batch."""
    return {name: value[index] for name, value in params.items()}


class View(Protocol):
    """Makes one of the network's inputs from images and what was drawn for them."""

    def draw(self, n: int, generator: torch.Generator) -> Params:
        """Draws for n samples from a CPU generator: tensors of n rows, on the CPU."""

    def __call__(self, images: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """(n, 3, H, W) uint8 images and their rows of what was drawn -> (n, ...) on the images' device."""


class Noise:
    """Numbers from U[0, 1) in the images' stead, (n, width) float32.

    Args:
        width: numbers a sample, > 0.
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise ValueError(f"Noise: width must be > 0, got {width}")
        self.width = width

    def draw(self, n: int, generator: torch.Generator) -> Params:
        """(n, width) "noise"."""
        return {"noise": torch.rand((n, self.width), generator=generator)}

    def __call__(self, images: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """The noise, on the images' device."""
        return to_device(params["noise"], images.device)


class Labels:
    """The images' labels in their stead, (n,) int64; the pipeline knows them, nothing is drawn."""

    def draw(self, n: int, generator: torch.Generator) -> Params:  # noqa: ARG002
        """Nothing."""
        return {}

    def __call__(self, images: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """The labels, on the images' device."""
        return to_device(params["labels"], images.device)


class Augmentation(ABC):
    """uint8 images -> normalised images, each with its own random parameters.

    A subclass draws parameters (`draw`), packs them into one table on the CPU (`table`), and computes the result from
    images and their rows of the table without any work on the CPU (`program`).

    Args:
        mean: of each channel, for pixels in [0, 1].
        std: of each channel, > 0.
        dtype: of the result.
        compile: fuse the program by torch.compile: for GPUs, where launching kernels takes the time; slower on CPUs.
        graph: launch the program as one CUDA graph, for batches of the first one's shape; for GPUs only.
    """

    size = 0  # pixels of the output's sides, where they are not the images'

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
        *,
        compile: bool = False,
        graph: bool = False,
    ) -> None:
        self._check(len(mean) == 3 and len(std) == 3, "mean and std", (mean, std), "three numbers each")
        self._check(all(value > 0 for value in std), "std", std, "numbers > 0")
        self._check(dtype.is_floating_point, "dtype", dtype, "a floating-point type")
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype
        whole: Callable[[Tensor, Tensor], Tensor] = self.fused
        if compile:
            whole = torch.compile(self.program, fullgraph=True, dynamic=False)
        if graph:
            whole = Replayed(whole)
        self._whole = whole if compile or graph else None
        self._has_kernel = True  # until it fails

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Params:
        """Draws the parameters of n samples from a CPU generator: tensors of n rows, on the CPU."""

    @abstractmethod
    def table(self, params: Mapping[str, Tensor], height: int, width: int) -> Tensor:
        """(n, columns) float32 on the CPU: what the program needs of the parameters for images of this size."""

    @abstractmethod
    def program(self, images: Tensor, table: Tensor) -> Tensor:
        """(n, 3, H, W) uint8 and (n, columns) on one device -> (n, 3, h, w), channels_last; never waits for a GPU."""

    def kernel(self, images: Tensor, table: Tensor) -> Tensor | None:  # noqa: ARG002
        """The program as one kernel on a GPU: (n, h * w, 3); None where there is none for images of this shape."""
        return None

    def fused(self, images: Tensor, table: Tensor) -> Tensor:
        """The program, by its own kernel where there is one."""
        if images.is_cuda and self._has_kernel:
            try:
                pixels = self.kernel(images.contiguous(), table)
            except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                # Before anything is recorded: the first call compiles, for which Triton wants a C compiler.
                self._has_kernel = False
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(
                    f"{type(self).__name__} runs without its own kernel: {reason}", RuntimeWarning, stacklevel=2
                )
            else:
                if pixels is not None:
                    side = (self.size, self.size) if self.size else images.shape[2:]
                    return self._images(pixels, *side)
        return self.program(images, table)

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def __call__(self, images: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Augments a batch.

        Args:
            images: (n, 3, H, W) uint8 on any device.
            params: of these n samples, from `draw` and `take`, on the CPU; None where nothing is random.

        Returns:
            (n, 3, h, w) of the dtype chosen at construction, channels_last, on the images' device.
        """
        params = params or {}
        self._check_images(images, params)
        table = self.table(params, *images.shape[2:])
        if self._whole is not None:
            return self._whole(images, to_device(table, images.device))
        return self.apply(images, table, params)

    def apply(self, images: Tensor, table: Tensor, params: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """The program, block by block, on a table that is still on the CPU."""
        table = to_device(table, images.device)
        outputs = [self.fused(images[block], table[block]) for block in self._blocks(images)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _check(self, holds: bool, argument: str, got: object, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {argument} must be {allowed}, got {got!r}")

    def _check_probability(self, argument: str, got: float) -> None:
        self._check(0 <= got <= 1, argument, got, "in [0, 1]")

    def _check_range(self, argument: str, got: tuple[float, float], most: float = float("inf")) -> None:
        allowed = f"(low, high) with 0 < low <= high{'' if most == float('inf') else f' <= {most:g}'}"
        self._check(len(got) == 2 and 0 < got[0] <= got[1] <= most, argument, got, allowed)

    def _check_images(self, images: Tensor, params: Mapping[str, Tensor]) -> None:
        shape = tuple(images.shape)
        good = images.ndim == 4 and shape[1] == 3 and images.dtype == torch.uint8
        self._check(good, "images", f"{shape} {images.dtype}", "(n, 3, H, W) uint8")
        for name, value in params.items():
            if value.shape[0] != shape[0] or value.device.type != "cpu":
                got, allowed = f"{len(value)} on {value.device}", f"{shape[0]} rows, one per image, on the CPU"
                self._check(False, f"params[{name!r}]", got, allowed)

    def _blocks(self, images: Tensor) -> list[slice]:
        """The batch in pieces that the caches of a CPU's cores hold; a GPU takes all at once."""
        n = len(images)
        pixels = 3 * max(self.size**2, images.shape[2] * images.shape[3])
        length = max(1, torch.get_num_threads() * BLOCK // pixels) if images.device.type == "cpu" else n
        return [slice(start, min(start + length, n)) for start in range(0, n, length)]

    def _stats(self) -> dict[str, Any]:
        """The kernels' arguments for the normalisation."""
        found = {f"mean_{name}": value for name, value in zip("rgb", self.mean, strict=True)}
        return found | {f"scale_{name}": 1 / value for name, value in zip("rgb", self.std, strict=True)}

    def _normalize(self, planes: Tensor) -> Tensor:
        """(3, n, P) float in [0, 1], overwritten -> (n, P, 3) of the output's dtype."""
        for plane, mean, std in zip(planes, self.mean, self.std, strict=True):
            plane.sub_(mean).mul_(1 / std)
        pixels = torch.empty((*planes.shape[1:], 3), device=planes.device)
        return pixels.copy_(planes.permute(1, 2, 0)).to(self.dtype)

    @staticmethod
    def _images(pixels: Tensor, height: int, width: int) -> Tensor:
        """(n, height * width, 3) as (n, 3, height, width), channels_last; no copy."""
        return pixels.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a small CPU tensor without waiting for the device."""
    pinned = device.type == "cuda" and tensor.numel() > 0
    return tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor.to(device)


def to_planes(images: Tensor) -> Tensor:
    """(n, 3, H, W) uint8 -> (3, n, H * W) float32 in [0, 1]."""
    planes = torch.empty((3, len(images), images.shape[2] * images.shape[3]), device=images.device)
    return planes.copy_(images.flatten(2).transpose(0, 1)).div_(255)
