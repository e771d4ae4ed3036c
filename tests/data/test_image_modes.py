"""Every Pillow mode: its values become 8 bits by one rule, or the file is refused by its name."""

import io

import numpy as np
import pytest
from made_data import encode, pixels
from PIL import Image

from ssl_bench.data.decode import decode, image_shape
from ssl_bench.data.raw import RawSplit


def saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


GREY = np.random.default_rng(0).integers(0, 2**12, (6, 5)).astype(np.uint16) * 16  # 12 bits, as a microscope gives


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_becomes_its_high_byte(kind):
    got = decode(saved(Image.fromarray(GREY), kind), None)
    np.testing.assert_array_equal(got, np.repeat((GREY >> 8)[:, :, None], 3, axis=2))


def test_a_16_bit_png_that_pillow_opens_as_32_bits_too(monkeypatch):
    """As older versions of Pillow did."""
    raw, original = saved(Image.fromarray(GREY), "PNG"), Image.open

    def as_integers(file):
        image = original(file).convert("I")
        image.format = "PNG"
        return image

    monkeypatch.setattr(Image, "open", as_integers)
    np.testing.assert_array_equal(decode(raw, None)[..., 0], GREY >> 8)


def test_a_16_bit_pgm_is_scaled_by_its_own_maximum():
    """Pillow opens it as "I" with values up to 65535, whatever the file's maximum."""
    values = np.array([[0, 2048, 4095]], dtype=">u2")
    got = decode(b"P5 3 1 4095\n" + values.tobytes(), None)[0, :, 0]
    np.testing.assert_allclose(got.astype(int), [0, 128, 255], atol=1)


def test_big_endian_and_resized_ones_too():
    image = Image.frombytes("I;16B", (5, 6), GREY.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode(saved(image, "TIFF"), None)[..., 0], GREY >> 8)
    flat = np.full((8, 8), 40_000, dtype=np.uint16)
    assert (decode(saved(Image.fromarray(flat), "PNG"), 4) == 40_000 >> 8).all()


def test_rgb_of_16_bits_is_read_by_the_same_rule():
    """Pillow does that one itself: a PNG of 16 bits a channel, written by hand."""
    import struct
    import zlib

    values = np.array([[[65535, 32768, 255], [256, 0, 4096]]], dtype=">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode(png, None), values >> 8)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_a_mode_without_a_defined_range_is_refused_by_the_files_name(mode):
    raw = saved(Image.new(mode, (4, 4), 7), "TIFF")
    split = RawSplit(np.zeros(1, np.int64), lambda: iter([raw]), lambda _index: "scan_7.tif")
    with pytest.raises(ValueError, match=rf"scan_7\.tif: .*mode {mode} has no defined range of values"):
        image_shape(split, None)


def test_pixels_of_another_type_are_refused_too():
    split = RawSplit(np.zeros(1, np.int64), lambda: iter([np.zeros((4, 4, 3), np.int64)]), lambda _index: "row 0")
    with pytest.raises(ValueError, match="row 0: the image cannot be decoded"):
        image_shape(split, None)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "La", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_modes_of_8_bits_are_converted(mode, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda _file: Image.new(mode, (4, 4)))
    assert decode(b"", None).shape == (4, 4, 3)


def test_an_orientation_tag_is_not_applied():
    """As torchvision's ImageFolder and timm do it."""
    image, tags = Image.fromarray(pixels(1)[0][:4]), Image.Exif()
    tags[0x0112] = 6  # "rotate by 90 degrees to show it"
    got = decode(encode(image, exif=tags), None)
    np.testing.assert_array_equal(got, np.asarray(image))
