"""Masked autoencoder (He et al. 2022, arXiv 2111.06377)."""

from typing import Any

import torch
from torch import Tensor, nn

from ssl_bench.methods.base import Method, check, check_scales
from ssl_bench.methods.parts import patches
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
        grid, self.patch = patches.patch_grid(backbone)
        n_patches = grid[0] * grid[1]
        self.visible = round(n_patches * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0
        if not 0 < self.visible < n_patches:
            raise ValueError(f"mae: mask_ratio must leave some of {n_patches} patches and mask some, got {mask_ratio}")
        if decoder_width < 1 or decoder_width % 4:
            raise ValueError(f"mae: decoder_width must be a multiple of 4, > 0, got {decoder_width}")
        check("mae", "> 0", decoder_depth=decoder_depth)
        if decoder_heads < 1 or decoder_width % decoder_heads:
            raise ValueError(f"mae: decoder_heads must divide decoder_width = {decoder_width}, got {decoder_heads}")
        check_scales("mae", crop_scale=crop_scale)
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
        self.register_buffer("positions", patches.positions(grid, decoder_width))
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
        tokens = self.decoder_embed(patches.encode(self.backbone, x, order[:, : self.visible]))
        first = tokens.shape[1] - self.visible
        masks = self.mask_token.expand(len(x), order.shape[1] - self.visible, -1)
        # Attention does not see the tokens' order, so that they can stay in the noise's: visible, then masked.
        tokens = torch.cat([tokens, masks.to(tokens.dtype)], 1)
        tokens = torch.cat([tokens[:, :first], tokens[:, first:] + self.positions[order]], 1)  # type: ignore[index]
        predicted = self.decoder(tokens)[:, first + self.visible :]
        pixels = patches.take(patches.pixels(x, self.patch), order[:, self.visible :])
        mean, variance = pixels.mean(dim=2, keepdim=True), pixels.var(dim=2, keepdim=True)
        target = (pixels - mean) / (variance + EPS).sqrt()
        return {"error": (predicted.to(target.dtype) - target).square().mean(dim=(1, 2))}

    def loss(self, error: Tensor) -> dict[str, Tensor]:
        """The images' mean error.

        Args:
            error: (n,).
        """
        return {"loss": error.mean()}
