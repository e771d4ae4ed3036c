"""What a method asks to be drawn for every image of the global batch: the inputs of its ``forward``, in order."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Crop:
    """A random resized crop with flip, colour jitter, greyscale, blur and solarisation: (n, 3, size, size).

    What is left at None comes from the recipe's ``augment`` section.

    Attributes:
        size: pixels of its sides; a fraction below 1 is a share of the images' side (96 / 224 for DINO's small crops);
            None = the images' own.
        scale: the range of its share of the image's area, within (0, 1].
        color: False leaves crop and flip only, as masked image modelling has it.
        blur_p, solarize_p: probabilities; None = the recipe's, of view 1 for a method's first, third, ... crop and of
            view 2 for the others.
    """

    size: int | float | None = None
    scale: tuple[float, float] | None = None
    color: bool = True
    blur_p: float | None = None
    solarize_p: float | None = None


@dataclass(frozen=True)
class PaddedCrop:
    """Supervised training's view: a crop of the zero-padded image, flip and rotation, (n, 3, H, W)."""


@dataclass(frozen=True)
class Noise:
    """Numbers from U[0, 1) that belong to the image, (n, width) float32: a mask's, for instance.

    Attributes:
        width: numbers an image, > 0.
    """

    width: int


@dataclass(frozen=True)
class Labels:
    """The images' labels: (n,) int64."""


View = Crop | PaddedCrop | Noise | Labels
