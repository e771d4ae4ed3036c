"""Masked autoencoder (He et al. 2022, arXiv 2111.06377)."""

from typing import Any

import torch
from torch import Tensor, nn

from ssl_bench.methods.base import Method
from ssl_bench.methods.views import Crop, Noise

EPS = 1e-6  # added to a patch's variance; official code


class MAE(Method):
    """Predicts the pixels of masked patches from the others; the encoder sees only these, a small decoder all.

    The backbone is one of timm's ``vit_*``. Its learned positions stay learned (the paper's are fixed), and what it has
    behind its last common norm (a pooling's own norm or attention) is not used and not trained. No loss asks for a good
    class token: the average of the patches is the better feature (timm's ``global_pool="avg"``).

    Args:
        backbone: a vision transformer with a position for each patch, for images of the data's size.
        feature_dim: the number of its features, > 0.
        mask_ratio: share of the patches that are masked, in (0, 1), at least one and not all. Paper: 0.75.
        decoder_width: of the decoder's tokens, > 0, a multiple of 4. Paper: 512; ``method=mae`` takes 192, vit_tiny's.
        decoder_depth: its blocks, > 0. Paper: 8; ``method=mae`` takes 4.
        decoder_heads: attention heads of each, > 0, which divide the width. Paper: 16; ``method=mae`` takes 3.
        crop_scale: range of the crop's share of the image's area, in (0, 1]; colours stay. Paper: 0.2 to 1.

    Raises:
        ValueError: another kind of backbone, patches that do not divide its images, or a value out of its range.
    """

    per_sample = True

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        mask_ratio: float = 0.75,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        crop_scale: tuple[float, float] = (0.2, 1.0),
    ) -> None:
        grid, self.patch = _grid(backbone)
        n_patches = grid[0] * grid[1]
        self.visible = round(n_patches * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0
        if not 0 < self.visible < n_patches:
            raise ValueError(f"mae: mask_ratio must leave some of {n_patches} patches and mask some, got {mask_ratio}")
        for name, value in (("decoder_width", decoder_width), ("decoder_depth", decoder_depth)):
            if value < 1 or (name == "decoder_width" and value % 4):
                allowed = "a multiple of 4, > 0" if name == "decoder_width" else "> 0"
                raise ValueError(f"mae: {name} must be {allowed}, got {value}")
        if decoder_heads < 1 or decoder_width % decoder_heads:
            raise ValueError(f"mae: decoder_heads must divide decoder_width = {decoder_width}, got {decoder_heads}")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"mae: crop_scale must be 0 < low <= high <= 1, got {tuple(crop_scale)}")
        super().__init__(backbone, feature_dim, nn.Identity())
        for name in ("fc_norm", "attn_pool", "head"):  # without a gradient, several processes would wait for one
            if isinstance(part := getattr(backbone, name, None), nn.Module):
                part.requires_grad_(False)
        self.views = (Crop(scale=crop_scale, color=False), Noise(n_patches))
        self.decoder_embed = nn.Linear(feature_dim, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        options: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.0}
        blocks = [
            nn.TransformerEncoderLayer(decoder_width, decoder_heads, 4 * decoder_width, **options)
            for _ in range(decoder_depth)
        ]
        pixels = nn.Linear(decoder_width, 3 * self.patch[0] * self.patch[1])
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(decoder_width), pixels)
        self.register_buffer("positions", _positions(grid, decoder_width))
        for name, p in [*self.decoder_embed.named_parameters(), *self.decoder.named_parameters()]:
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Masks each image's patches of the greatest noise and predicts them.

        Args:
            x: (n, 3, H, W) images.
            noise: (n, patches) from U[0, 1).

        Returns:
            "error", (n,): mean squared error of the masked patches' pixels, normalised patch by patch.
        """
        order = noise.argsort(dim=1, stable=True)
        tokens = self.decoder_embed(self.encode(x, order[:, : self.visible]))
        first = tokens.shape[1] - self.visible
        masks = self.mask_token.expand(len(x), order.shape[1] - self.visible, -1)
        # Attention does not see the tokens' order, so that they can stay in the noise's: visible, then masked.
        tokens = torch.cat([tokens, masks.to(tokens.dtype)], 1)
        tokens = torch.cat([tokens[:, :first], tokens[:, first:] + self.positions[order]], 1)  # type: ignore[index]
        predicted = self.decoder(tokens)[:, first + self.visible :]
        pixels = _take(self._patches(x), order[:, self.visible :])
        mean, variance = pixels.mean(dim=2, keepdim=True), pixels.var(dim=2, keepdim=True)
        target = (pixels - mean) / (variance + EPS).sqrt()
        return {"error": (predicted.to(target.dtype) - target).square().mean(dim=(1, 2))}

    def encode(self, x: Tensor, visible: Tensor) -> Tensor:
        """The backbone on the chosen patches alone, up to its norm.

        Args:
            x: (n, 3, H, W) images.
            visible: (n, v) int64 numbers of patches, in the order of their tokens.

        Returns:
            (n, class and register tokens + v, feature_dim).
        """
        vit: Any = self.backbone
        if tuple(x.shape[-2:]) != tuple(vit.patch_embed.img_size):
            size, got = (" x ".join(map(str, s)) for s in (vit.patch_embed.img_size, x.shape[-2:]))
            raise ValueError(f"mae: images must be {size} pixels, for which the backbone was made, got {got}")
        tokens = vit.patch_embed(x).flatten(1, -2)  # (n, patches, feature_dim) from these or from a map of them
        n, n_patches, _ = tokens.shape
        tokens = _take(tokens + vit.pos_embed[:, -n_patches:], visible)
        if (first := _first_tokens(vit)) is not None:
            if vit.pos_embed.shape[1] > n_patches:
                first = first + vit.pos_embed[:, : first.shape[1]]
            tokens = torch.cat([first.expand(n, -1, -1).to(tokens.dtype), tokens], 1)
        return vit.norm(vit.blocks(vit.norm_pre(vit.pos_drop(tokens))))

    def loss(self, error: Tensor) -> dict[str, Tensor]:
        """The images' mean error.

        Args:
            error: (n,).
        """
        return {"loss": error.mean()}

    def _patches(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, patches, pixels), in float32 at least."""
        height, width = self.patch
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def _take(tokens: Tensor, chosen: Tensor) -> Tensor:
    """(n, t, D) and numbers (n, v) -> (n, v, D)."""
    return tokens.gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[2]))


def _first_tokens(vit: Any) -> Tensor | None:
    """(1, t, D) the tokens that are no patches, as timm puts them in front."""
    names = ("cls_token", "dist_token", "reg_token")
    tokens = [token for name in names if (token := getattr(vit, name, None)) is not None]
    return torch.cat(tokens, 1) if tokens else None


def _grid(vit: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many patches there are (down, right), and their pixels; refuses what is not such a vision transformer."""
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


def _positions(grid: tuple[int, int], width: int) -> Tensor:
    """(patches, width) sines and cosines of a patch's row and column, as in the official code."""
    frequency = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(float(size)) for size in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (rows, columns)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
