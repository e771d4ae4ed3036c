"""From encoded images to blocks of pixels and their statistics: every kind of image."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from made_data import all_images, encode, one_parquet, parquet_set, pixels
from PIL import Image
from torchvision.transforms.v2.functional import resize

from ssl_bench.data import decode as decode_module
from ssl_bench.data.dataset import load_dataset
from ssl_bench.data.raw import RawSplit


@pytest.mark.parametrize("kind", ["grey jpeg", "cmyk jpeg", "rgba png", "palette png", "grey-alpha png", "jpeg"])
def test_every_kind_of_image_becomes_rgb(tmp_path, kind):
    """An image of one orange (or its grey), in each mode; a palette with transparency is what Pillow warns of."""
    orange = Image.new("RGB", (8, 8), (240, 120, 30))
    grey = 120
    palette = orange.quantize(4)
    data, expected = {
        "jpeg": (encode(orange, "JPEG", quality=95), (240, 120, 30)),
        "grey jpeg": (encode(Image.new("L", (8, 8), grey), "JPEG"), (grey,) * 3),
        "cmyk jpeg": (encode(orange.convert("CMYK"), "JPEG", quality=95), (240, 120, 30)),
        "rgba png": (encode(orange.convert("RGBA")), (240, 120, 30)),
        "palette png": (encode(palette, transparency=b"\x80\xff\xff\xff"), (240, 120, 30)),
        "grey-alpha png": (encode(Image.new("LA", (8, 8), (grey, 9))), (grey,) * 3),
    }[kind]
    one_parquet(tmp_path, [encode(pixels(1)[0]), data])
    image = all_images(load_dataset("hf", path=tmp_path).train)[1]
    np.testing.assert_allclose(image.astype(int), [[expected] * 8] * 8, atol=3)


def test_size_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    wide = pixels(1, 30)[0][:10]  # 10 high, 30 wide; its transpose is the other way round
    one_parquet(tmp_path, [encode(wide), encode(wide.transpose(1, 0, 2)), encode(pixels(1, 12)[0])])
    images = all_images(load_dataset("hf", path=tmp_path, size=5).train)
    assert images.shape == (3, 5, 5, 3)
    np.testing.assert_array_equal(images[0], images[1].transpose(1, 0, 2))
    whole = resize(torch.from_numpy(wide).permute(2, 0, 1), [5, 15], antialias=True).permute(1, 2, 0)
    np.testing.assert_allclose(images[0].astype(int), whole[:, 5:10].numpy().astype(int), atol=1)


def test_resizing_is_antialiased_as_torchvision_does_it(tmp_path):
    images = pixels(2, 40)
    one_parquet(tmp_path, [encode(image) for image in images])
    ours = all_images(load_dataset("hf", path=tmp_path, size=16).train)
    theirs = resize(torch.from_numpy(images).permute(0, 3, 1, 2), [16, 16], antialias=True).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours.astype(int), theirs.numpy().astype(int), atol=1)


def test_mean_and_std_are_those_of_all_train_pixels(tmp_path):
    train, _ = parquet_set(tmp_path)
    data = load_dataset("cifar10", path=tmp_path)
    np.testing.assert_allclose(data.mean, (train / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, (train / 255).std(axis=(0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("images", [1, 5, 6])  # of 25 pixels: odd and even numbers of values
def test_statistics_count_every_value_block_by_block(tmp_path, monkeypatch, images):
    monkeypatch.setattr(decode_module, "_BLOCK_BYTES", 2 * 3 * 5 * 5)
    train = pixels(images, 5)
    one_parquet(tmp_path, list(map(encode, train)), [0] * images)
    data = load_dataset("hf", path=tmp_path)
    np.testing.assert_allclose(data.mean, (train / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, (train / 255).std(axis=(0, 1, 2)), rtol=1e-12)


def test_blocks_that_threads_decode_ahead_keep_their_order_and_end_at_the_first_damage(monkeypatch):
    images = pixels(7, 9)
    raws = list(map(encode, images))
    monkeypatch.setattr(decode_module, "_BLOCK_BYTES", 2 * 3 * 9 * 9)

    def blocks(raws: list[bytes]) -> Iterator[np.ndarray]:
        split = RawSplit(np.zeros(7, dtype=np.int64), lambda: iter(raws), lambda index: f"image {index}")
        return decode_module.decode_blocks(split, 9, (3, 9, 9))

    got = list(blocks(raws))
    assert list(map(len, got)) == [2, 2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(got).transpose(0, 2, 3, 1), images)
    raws[4] = raws[4][:40]
    damaged, before = blocks(raws), []
    with pytest.raises(ValueError, match="image 4: the image cannot be decoded"):
        before += damaged
    np.testing.assert_array_equal(np.concatenate(before).transpose(0, 2, 3, 1), images[:4])
