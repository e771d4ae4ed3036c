"""MAE masks by the noise, sees only the rest, predicts normalised pixels, and takes timm's vision transformers only."""

import pytest
import timm
import torch
from method_cases import inputs, network, small_vit
from torch import Tensor, nn

from ssl_bench.methods import MAE, Crop, Noise
from ssl_bench.methods.parts.patches import encode

SMALL = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def mae(backbone=small_vit, **options) -> MAE:
    net = backbone()
    return MAE(net, net.num_features, **(SMALL | options)).double()


def naive_error(method: MAE, x: Tensor, noise: Tensor, patch: int) -> Tensor:
    """One image at a time, its patches in their own order, as the official code puts them back."""
    errors = []
    for image, numbers in zip(x, noise, strict=True):
        grid = image.shape[-1] // patch
        order = sorted(range(grid * grid), key=lambda i: float(numbers[i]))
        visible, masked = order[: method.visible], order[method.visible :]
        latent = method.decoder_embed(encode(method.backbone, image[None], torch.tensor([visible])))[0]
        first = len(latent) - len(visible)
        tokens = [*latent[:first]]
        for i in range(grid * grid):
            token = latent[first + visible.index(i)] if i in visible else method.mask_token[0, 0]
            tokens.append(token + method.positions[i])
        predicted = method.decoder(torch.stack(tokens)[None])[0, first:]
        total = torch.zeros((), dtype=x.dtype)
        for i in masked:
            row, column = divmod(i, grid)
            pixels = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            pixels = pixels.permute(1, 2, 0).flatten()  # rows, columns, colours
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            total = total + ((predicted[i] - target) ** 2).mean()
        errors.append(total / len(masked))
    return torch.stack(errors)


VARIANTS = {
    "class token": {},
    "average": {"global_pool": "avg"},  # a norm behind the average, which is not used
    "registers": {"reg_tokens": 3},
    "class token without position": {"no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "any size": {"dynamic_img_size": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_error_is_that_of_the_naive_loop(options):
    method = mae(lambda: small_vit(**options), mask_ratio=0.6)
    x, noise = inputs(method.views, 3)
    error = method(x, noise)["error"]
    torch.testing.assert_close(error, naive_error(method, x, noise, patch=2), rtol=1e-10, atol=0)
    terms = method.loss(error)
    torch.testing.assert_close(terms["loss"], error.mean())
    terms["loss"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_with_all_patches_visible_the_encoder_is_the_backbone(options):
    method = mae(lambda: small_vit(**options))
    x = inputs(method.views, 3)[0]
    every = torch.arange(16).expand(3, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            encode(method.backbone, x, every), method.backbone.forward_features(x), rtol=1e-6, atol=1e-7
        )


def test_no_prediction_depends_on_masked_pixels_and_every_one_on_visible_pixels():
    method = mae()
    x, noise = inputs(method.views, 2)
    x.requires_grad_()
    order = noise.argsort(1)
    tokens = method.decoder_embed(encode(method.backbone, x, order[:, : method.visible]))
    gradient = torch.autograd.grad(tokens.square().sum(), x)[0]
    seen = gradient.abs().sum(1).unfold(1, 2, 2).unfold(2, 2, 2).sum((3, 4)).flatten(1) > 0  # by patch
    expected = torch.zeros_like(seen).scatter(1, order[:, : method.visible], True)
    assert torch.equal(seen, expected)
    assert expected.sum(1).tolist() == [4, 4]  # a quarter of 16


def test_positions_are_the_official_codes():
    """Half of the width for each axis, sines then cosines, frequencies from 1 to 1 / 10000."""
    method = mae()
    for i in range(16):
        row, column = divmod(i, 4)
        expected = []
        for place in (row, column):
            angles = [place / 10000 ** (j / 4) for j in range(4)]
            expected += [torch.tensor(angles).sin(), torch.tensor(angles).cos()]
        torch.testing.assert_close(method.positions[i], torch.cat(expected).double(), rtol=1e-6, atol=1e-6)


def test_the_views_are_the_papers_crop_and_a_number_for_each_patch():
    method = mae()
    assert method.views == (Crop(scale=(0.2, 1.0), color=False), Noise(16))
    assert method.per_sample
    assert method.evaluated == "backbone"
    assert mae(crop_scale=(0.5, 0.6)).views[0] == Crop(scale=(0.5, 0.6), color=False)


def test_equal_numbers_mask_the_same_patches_in_any_batch():
    method, (x, noise) = mae(), inputs(mae().views, 6)
    noise = (noise * 2).floor()  # many ties
    torch.testing.assert_close(method(x, noise)["error"][3:], method(x[3:], noise[3:])["error"], rtol=1e-12, atol=0)


def test_under_autocast_the_error_is_float32():
    method = mae().float()
    x, noise = (view.float() for view in inputs(method.views, 4))
    expected = method(x, noise)["error"]
    with torch.autocast("cpu", torch.bfloat16):
        error = method(x.bfloat16(), noise)["error"]
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, expected, rtol=0.05, atol=0)


class Assembled(nn.Module):
    """Has every part but positions of patches in a row."""

    def __init__(self, **instead: object) -> None:
        super().__init__()
        vit = small_vit()
        for name in ("patch_embed", "blocks", "norm", "norm_pre", "pos_drop", "pos_embed"):
            setattr(self, name, instead.get(name, getattr(vit, name)))
        self.num_features = 24


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (network, "must be a vit_. of timm with a position for each patch, got Sequential"),
        (lambda: timm.create_model("resnet18"), "must be a vit_. of timm with a position for each patch, got ResNet"),
        (
            lambda: timm.create_model("vit_relpos_small_patch16_224", img_size=32),
            "must be a vit_. of timm with a position for each patch, got VisionTransformerRelPos",
        ),
        (
            lambda: timm.create_model("vit_tiny_r_s16_p8_224", num_classes=0),
            "must be .* each patch, got VisionTransformer with convolutions in front",
        ),
        (
            lambda: Assembled(pos_embed=nn.Parameter(torch.zeros(1, 4, 4, 24))),
            "must be a vit_. of timm with a position for each patch, got Assembled",
        ),
    ],
)
def test_another_backbone_is_refused(backbone, message):
    net = backbone()
    with pytest.raises(ValueError, match=f"^mae: backbone {message}$"):
        MAE(net, getattr(net, "num_features", 12), **SMALL)


def test_patches_that_do_not_divide_the_image_are_refused():
    net = small_vit(image=8, patch=3)
    with pytest.raises(ValueError, match=r"^mae: the patch size .* image size, got patches of 3 x 3 in 8 x 8 pixels$"):
        MAE(net, 24, **SMALL)


def test_images_of_another_size_are_refused():
    for options in ({}, {"dynamic_img_size": True}):
        method = mae(lambda options=options: small_vit(**options))
        x, noise = inputs(method.views, 2, side=10)
        with pytest.raises(ValueError, match=r"^mae: images must be 8 x 8 pixels, .* was made, got 10 x 10$"):
            method(x, noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.0}, "mae: mask_ratio must leave some of 16 patches and mask some, got 0.0"),
        ({"mask_ratio": 0.99}, "mae: mask_ratio must leave some of 16 patches and mask some, got 0.99"),
        ({"mask_ratio": float("nan")}, "mae: mask_ratio must leave some of 16 patches and mask some, got nan"),
        ({"decoder_width": 18}, "mae: decoder_width must be a multiple of 4, > 0, got 18"),
        ({"decoder_depth": 0}, "mae: decoder_depth must be > 0, got 0"),
        ({"decoder_heads": 3}, "mae: decoder_heads must divide decoder_width = 16, got 3"),
        ({"crop_scale": (0.5, 1.1)}, r"mae: crop_scale must be 0 < low <= high <= 1, got \(0.5, 1.1\)"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        mae(**options)
