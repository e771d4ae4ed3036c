"""What a method declares becomes the views that the recipe and the images allow, the same however they are shared."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ssl_bench.augment import views as made
from ssl_bench.data.dataset import Dataset
from ssl_bench.data.sources import ResidentSource
from ssl_bench.methods import DINO, MAE, METHODS, Crop, Labels, Noise, PaddedCrop
from ssl_bench.recipe.compose import compose
from ssl_bench.training import build

HERE = SimpleNamespace(device=torch.device("cpu"), rank=0, world_size=1)
GLOBAL, LOCAL = Crop(scale=(0.4, 1.0)), Crop(size=96 / 224, scale=(0.05, 0.4), blur_p=0.5, solarize_p=0.0)
EVERYTHING = (GLOBAL, GLOBAL, LOCAL, LOCAL, Noise(7), Labels(), PaddedCrop(), Crop(color=False))


def dataset(n: int = 24, side: int = 32) -> Dataset:
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = ResidentSource(images, torch.arange(n))
    return Dataset("made", source, source, ("a",), (0.5,) * 3, (0.25,) * 3)


def views(declared, *words: str, side: int = 32) -> list:
    return build.views(compose("pretrain", words), dataset(side=side), declared, HERE)


def test_what_a_crop_leaves_open_is_the_recipes_alternating():
    words = ("augment.blur=full", "augment.crop_scale=[0.3,0.9]", "augment.gray_p=0.25", "augment.flip=0.4")
    crops = views((Crop(), Noise(3), Crop(), Crop(), Crop()), *words)
    del crops[1]  # which is no crop and does not count
    assert [crop.size for crop in crops] == [32] * 4
    assert [crop.blur_p for crop in crops] == [1.0, 0.1, 1.0, 0.1]
    assert [crop.solarize_p for crop in crops] == [0.0, 0.2, 0.0, 0.2]
    assert {(crop.crop_scale, crop.gray_p, crop.flip, crop.jitter_p) for crop in crops} == {
        ((0.3, 0.9), 0.25, 0.4, 0.8)
    }


def test_what_a_crop_declares_counts():
    declared = (Crop(), Crop(size=14, scale=(0.05, 0.4), blur_p=0.5, solarize_p=0.3), Crop(size=0.5), Crop(color=False))
    _, small, half, plain = views(declared, "augment.blur=full")
    assert (small.size, small.crop_scale, small.blur_p, small.solarize_p) == (14, (0.05, 0.4), 0.5, 0.3)
    assert (half.size, half.crop_scale, half.blur_p) == (16, (0.08, 1.0), 1.0)
    assert (plain.jitter_p, plain.gray_p, plain.blur_p, plain.solarize_p) == (0.0,) * 4
    assert (plain.flip, plain.crop_scale) == (0.5, (0.08, 1.0))


@pytest.mark.parametrize(("blur", "sigma"), [("off", None), ("full", (0.1, 2.0)), ("scaled", (0.1 / 7, 2 / 7))])
def test_blur_is_switched_off_or_scaled_by_the_recipe_alone(blur, sigma):
    """A small crop's pixels are as large as the images', on ImageNet as here: its sigma is theirs."""
    for crop in views((Crop(blur_p=1.0), Crop(size=14, blur_p=0.5)), f"augment.blur={blur}"):
        assert (crop.blur_p > 0) == (sigma is not None)
        assert sigma is None or crop.blur_sigma == pytest.approx(sigma)


def test_the_other_views():
    padded, noise, labels = views((PaddedCrop(), Noise(9), Labels()), "augment.pad=3", "augment.rotation=7")
    assert isinstance(padded, made.PadCropFlipRotate)
    assert (padded.pad, padded.degrees) == (3, 7.0)
    assert isinstance(noise, made.Noise)
    assert noise.width == 9
    assert isinstance(labels, made.Labels)


@pytest.mark.parametrize(("side", "small"), [(32, 14), (64, 27), (224, 96)])
def test_multi_crop_has_the_papers_sizes(side, small):
    declared = DINO(torch.nn.Identity(), 4, projector=(4,), prototypes=5).views
    assert [crop.size for crop in views(declared, side=side)] == [side] * 2 + [small] * 8


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name] is not MAE])
def test_every_methods_views_can_be_made(name):
    recipe = compose("pretrain", [f"method={name}"])
    method = METHODS[name](torch.nn.Identity(), 4, **{**recipe.method.options, "projector": (4, 4)})
    assert len(views(method.views)) == len(method.views)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (Crop(size=33), "views[1]: a crop's size must be pixels up to the images' 32, or a fraction, got 33"),
        (Crop(size=14.5), "views[1]: a crop's size must be pixels up to the images' 32, or a fraction, got 14.5"),
        (Crop(size=0), "views[1]: a crop's size must be pixels up to the images' 32, or a fraction, got 0"),
        (Crop(size=-0.5), "views[1]: a crop's size must be pixels up to the images' 32, or a fraction, got -0.5"),
        (Crop(scale=(0.5, 0.1)), "SSLView: crop_scale must be (low, high) with 0 < low <= high <= 1, got (0.5, 0.1)"),
        (Crop(blur_p=1.5), "SSLView: blur_p must be in [0, 1], got 1.5"),
        (Noise(0), "Noise: width must be > 0, got 0"),
        ("crop", "views[1] must be a Crop, PaddedCrop, Noise or Labels, got 'crop'"),
        (Crop, "views[1] must be a Crop, PaddedCrop, Noise or Labels, got <class 'ssl_bench.methods.views.Crop'>"),
    ],
)
def test_views_that_cannot_be_made_are_refused_in_one_line(declared, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        views((Crop(), declared), "augment.blur=full")


def batches(world_size: int, chunk_size: int | None) -> list[list[tuple[int, tuple[Tensor, ...]]]]:
    """For each of two steps, every row of all processes and chunks: its place in the batch, and its views."""
    recipe, data = compose("pretrain", ["augment.blur=scaled", "batch_size=12"]), dataset()
    steps: list[list] = [[], []]
    for rank in range(world_size):
        where = SimpleNamespace(device=torch.device("cpu"), rank=rank, world_size=world_size)
        pipeline = build.pipeline(
            recipe, data, build.views(recipe, data, EVERYTHING, where), where, chunk_size=chunk_size
        )
        for step, batch in zip(steps, pipeline.batches(0, 2), strict=True):
            for chunk in range(pipeline.n_chunks):
                rows = zip(*batch.views(chunk), strict=True)
                step += zip(batch.positions(chunk).tolist(), rows, strict=True)
    return [sorted(step, key=lambda row: row[0]) for step in steps]


@pytest.mark.parametrize(("world_size", "chunk_size"), [(2, None), (3, None), (1, 4), (2, 4), (3, 6)])
def test_views_are_the_same_however_they_are_shared(world_size, chunk_size):
    for whole, shared in zip(batches(1, None), batches(world_size, chunk_size), strict=True):
        assert [place for place, _ in shared] == list(range(12))
        for (_, expected), (_, found) in zip(whole, shared, strict=True):
            assert [view.shape for view in found[:5]] == [(3, 32, 32)] * 2 + [(3, 14, 14)] * 2 + [(7,)]
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_every_view_has_random_numbers_of_its_own():
    rows = batches(1, None)[0]
    pairs = [(found[i], found[i + 1]) for _, found in rows for i in (0, 2)]
    assert not any(torch.equal(a, b) for a, b in pairs)
    noise = torch.stack([found[4] for _, found in rows])
    assert len(noise.unique()) == noise.numel()
