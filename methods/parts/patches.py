"""A vision transformer on some of an image's patches: what masked image modelling asks of timm's ``vit_*``."""

from typing import Any

import torch
from torch import Tensor, nn


def patch_grid(vit: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many patches there are (down, right), and their pixels.

    Raises:
        ValueError: not a vision transformer with a position for each patch, or patches that do not divide its images.
    """
    patches = getattr(vit, "patch_embed", None)
    sizes = [getattr(patches, name, None) or () for name in ("img_size", "patch_size", "grid_size")]
    positions, *parts = (getattr(vit, name, None) for name in ("pos_embed", "pos_drop", "norm_pre", "blocks", "norm"))
    has_positions = isinstance(positions, Tensor) and positions.ndim == 3 and getattr(vit, "rope", None) is None
    hybrid = getattr(patches, "backbone", None) is not None  # whose patches are of a convolutional network's map
    if () in sizes or hybrid or not has_positions or not all(isinstance(part, nn.Module) for part in parts):
        kind = type(vit).__name__ + (" with convolutions in front" if hybrid else "")
        raise ValueError(f"mae: backbone must be a vit_* of timm with a position for each patch, got {kind}")
    image, patch, grid = (tuple(size) for size in sizes)
    if any(p * g != s for p, g, s in zip(patch, grid, image, strict=True)):
        shown = " in ".join(" x ".join(map(str, size)) for size in (patch, image))
        raise ValueError(f"mae: the patch size must divide the image size, got patches of {shown} pixels")
    return grid, patch


def encode(vit: Any, x: Tensor, visible: Tensor) -> Tensor:
    """The transformer on the chosen patches alone, up to its norm.

    Args:
        vit: what `patch_grid` takes.
        x: (n, 3, H, W) images.
        visible: (n, v) int64 numbers of patches, in the order of their tokens.

    Returns:
        (n, class and register tokens + v, feature_dim).

    Raises:
        ValueError: images of another size.
    """
    if tuple(x.shape[-2:]) != tuple(vit.patch_embed.img_size):
        size, got = (" x ".join(map(str, s)) for s in (vit.patch_embed.img_size, x.shape[-2:]))
        raise ValueError(f"mae: images must be {size} pixels, for which the backbone was made, got {got}")
    tokens = vit.patch_embed(x).flatten(1, -2)  # (n, patches, feature_dim) from these or from a map of them
    n, n_patches, _ = tokens.shape
    tokens = take(tokens + vit.pos_embed[:, -n_patches:], visible)
    if (first := _first_tokens(vit)) is not None:
        if vit.pos_embed.shape[1] > n_patches:
            first = first + vit.pos_embed[:, : first.shape[1]]
        tokens = torch.cat([first.expand(n, -1, -1).to(tokens.dtype), tokens], 1)
    return vit.norm(vit.blocks(vit.norm_pre(vit.pos_drop(tokens))))


def _first_tokens(vit: Any) -> Tensor | None:
    """(1, t, D) the tokens that are no patches, as timm puts them in front."""
    names = ("cls_token", "dist_token", "reg_token")
    tokens = [token for name in names if (token := getattr(vit, name, None)) is not None]
    return torch.cat(tokens, 1) if tokens else None


def pixels(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """The patches of images (n, 3, H, W): (n, patches, pixels), in float32 at least."""
    height, width = patch
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def take(tokens: Tensor, chosen: Tensor) -> Tensor:
    """(n, t, D) and numbers (n, v) -> (n, v, D)."""
    return tokens.gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[2]))


def positions(grid: tuple[int, int], width: int) -> Tensor:
    """(patches, width) sines and cosines of a patch's row and column, as in the official code."""
    frequency = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(float(size)) for size in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (rows, columns)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
