"""The backbone's keys: sizes, and the file of weights that a run starts from."""

import hashlib
import re

import pytest

from ssl_bench.recipe.compose import build, compose


def test_a_checkpoint_is_known_by_its_content_and_not_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.pth", b"one"), ("b.pth", b"one"), ("c.pth", b"two")):
        (tmp_path / name).write_bytes(content)
    plain = compose("pretrain", [])
    one, same, other, pretrained = (
        compose("pretrain", [f"model.{key}={name}"])
        for key, name in (
            ("checkpoint", "a.pth"),
            ("checkpoint", "b.pth"),
            ("checkpoint", "c.pth"),
            ("pretrained", "a.pth"),
        )
    )
    assert one.model.checkpoint_sha256 == hashlib.sha256(b"one").hexdigest()[:16]
    assert one.identity() == same.identity() == pretrained.identity()
    assert (
        len(
            {
                plain.identity(),
                one.identity(),
                other.identity(),
                compose("pretrain", ["model.pretrained=true"]).identity(),
            }
        )
        == 4
    )
    # A recorded recipe is read without the file.
    (tmp_path / "a.pth").unlink()
    assert build("pretrain", one.to_dict()).identity() == one.identity()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.checkpoint=none.pth"],
            "model.checkpoint must be a file of weights or a run's folder, got 'none.pth', which",
        ),
        (
            ["model.pretrained=none.pth"],
            "model.checkpoint must be a file of weights or a run's folder, got 'none.pth', which",
        ),
        (
            ["model.checkpoint=."],
            "model.checkpoint must hold backbone.safetensors or state.pt if it is a folder, got .",
        ),
        (["model.checkpoint=x", "model.pretrained=true"], "give model.pretrained or model.checkpoint, got true and x"),
        (["model.checkpoint=x", "model.pretrained=y"], "give model.pretrained or model.checkpoint, got y and x"),
        (["data.size=32", "model.img_size=64"], "model.img_size must be data.size=32 where both are given, got 64"),
        (["data.size=32", "model.patch_size=5"], "model.patch_size must divide the image's side of 32 pixels, got 5"),
        (
            ["model.img_size=32", "model.patch_size=5"],
            "model.patch_size must divide the image's side of 32 pixels, got 5",
        ),
        (["model.patch_size=0"], "model.patch_size must be greater than 0, got 0"),
    ],
)
def test_weights_and_sizes_that_cannot_be(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        compose("pretrain", words)


def test_a_models_file_has_the_last_word_on_its_stem():
    model = compose("pretrain", ["model=vit_tiny"]).model
    assert (model.stem, model.init, model.img_size, model.patch_size) == ("imagenet", "timm", 32, 4)
    assert compose("pretrain", ["model=vit_tiny", "model.init=torchvision"]).model.init == "torchvision"
    assert compose("pretrain", ["model=resnet34", "protocol=paper"]).model.stem == "imagenet"
