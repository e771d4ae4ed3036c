"""Weights of others into a backbone: every layout, features bitwise those of the source, and what does not fit."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from ssl_bench.models.backbone import create_backbone, save_backbone
from ssl_bench.models.pretrained import fill, load_published, load_weights, read_tensors

NAMED = {"stem": "imagenet", "init": "timm"}


def source(name: str = "resnet18", seed: int = 3) -> nn.Module:
    """A torchvision model with weights and running statistics unlike anybody's initial ones."""
    torch.manual_seed(seed)
    model = getattr(torchvision.models, name)(num_classes=7).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.add_(torch.rand_like(tensor))
        elif tensor.is_floating_point():
            tensor.add_(0.02 * torch.randn_like(tensor))
    return model


def features(model: nn.Module, side: int = 96) -> torch.Tensor:
    """At 96 pixels no map of a ResNet is so small that our convolutions are matrix products, which round otherwise."""
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)


def without_head(model: nn.Module) -> nn.Module:
    model.fc = nn.Identity()
    return model


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


def projector() -> dict[str, torch.Tensor]:
    return nn.Sequential(nn.Linear(512, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16)).state_dict()


def layouts(model: nn.Module) -> dict[str, Any]:
    """What the authors of each project write, in their nesting and names, with the tensors that lie beside."""
    state = model.state_dict()
    bare = {name: value for name, value in state.items() if not name.startswith("fc.")}
    head = prefixed(projector(), "projector.")
    sequential = nn.Sequential(*list(model.children())[:-1]).state_dict()
    other = {name: torch.randn_like(value.float()) for name, value in bare.items()}
    lightning = {
        "epoch": 3,
        "global_step": 9,
        "pytorch-lightning_version": "2.1.0",
        "optimizer_states": [{"state": {}}],
    }
    return {
        "torchvision": state,
        "barlow_twins resnet50.pth": bare,
        "barlow_twins checkpoint.pth": {
            "epoch": 3,
            "model": prefixed({**prefixed(bare, "backbone."), **head, "bn.running_mean": torch.ones(4)}, "module."),
            "optimizer": {"state": {0: {"mu": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        },
        "solo-learn": {
            **lightning,
            "state_dict": {**prefixed(bare, "backbone."), **head, "classifier.weight": torch.ones(2)},
        },
        "solo-learn before 1.0": {**lightning, "state_dict": {**prefixed(bare, "encoder."), **head}},
        "solo-learn byol": {
            **lightning,
            "state_dict": {**prefixed(other, "momentum_backbone."), **prefixed(bare, "backbone."), **head},
        },
        "lightly benchmark": {
            **lightning,
            "state_dict": {**prefixed(bare, "backbone."), **head, "online_classifier.w": torch.ones(2)},
        },
        "lightly tutorial": {
            **lightning,
            "state_dict": {**prefixed(sequential, "backbone."), **prefixed(projector(), "projection_head.")},
        },
        "lightly byol": {"state_dict": {**prefixed(other, "backbone_momentum."), **prefixed(sequential, "backbone.")}},
        "moco v2": {
            "arch": "resnet18",
            "state_dict": prefixed(
                {
                    **prefixed(bare, "encoder_q."),
                    **prefixed(other, "encoder_k."),
                    "encoder_q.fc.0.weight": torch.ones(3),
                    "queue": torch.ones(2, 2),
                },
                "module.",
            ),
        },
        "moco v3": {
            "state_dict": prefixed(
                {**prefixed(other, "momentum_encoder."), **prefixed(bare, "base_encoder.")}, "module."
            )
        },
        "dino": {"student": prefixed(other, "module.backbone."), "teacher": prefixed(bare, "backbone."), "epoch": 1},
        "swav": prefixed(
            {**bare, **prefixed(projector(), "projection_head."), "prototypes.weight": torch.ones(3, 4)}, "module."
        ),
        "this suite's checkpoint": {"step": 5, "model": {**prefixed(bare, "backbone."), **head}},
    }


@pytest.mark.parametrize("name", layouts(source()))
def test_features_are_bitwise_the_sources(tmp_path, name):
    model = source()
    torch.save(layouts(model)[name], tmp_path / "weights.pth")
    backbone, _ = create_backbone("resnet18", **NAMED)
    line = load_weights(backbone, tmp_path / "weights.pth")
    assert torch.equal(features(backbone), features(without_head(model)))
    assert f"{tmp_path}/weights.pth: 100 of 100 tensors loaded" in line
    assert "left as initialised" not in line
    assert "\n" not in line


def test_timms_files_and_this_suites_own(tmp_path):
    torch.manual_seed(1)
    for name, classes in (("resnet18", 10), ("convnext_atto", 10)):
        model = timm.create_model(name, num_classes=classes).eval()
        save_file(model.state_dict(), tmp_path / "timm.safetensors")
        backbone, _ = create_backbone(name, **NAMED)
        load_weights(backbone, tmp_path / "timm.safetensors")
        assert torch.equal(features(backbone), features(timm_without_head(model)))
    made, _ = create_backbone("resnet18", stem="cifar", seed=5)
    save_backbone(made, tmp_path / "backbone.safetensors")
    backbone, _ = create_backbone("resnet18", stem="cifar", seed=6)
    line = load_weights(backbone, tmp_path / "backbone.safetensors")
    assert torch.equal(features(backbone), features(made))
    assert line.endswith("100 of 100 tensors loaded")


def timm_without_head(model: nn.Module) -> nn.Module:
    model.reset_classifier(0)
    return model


def test_solo_learns_resnets_for_cifar_pad_their_first_convolution_by_two(tmp_path):
    model = without_head(source())
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    model.maxpool = nn.Identity()
    torch.save({"state_dict": prefixed(model.state_dict(), "backbone.")}, tmp_path / "solo.ckpt")
    backbone, _ = create_backbone("resnet18", stem="cifar_pad2")
    assert "model.stem" not in load_weights(backbone, tmp_path / "solo.ckpt")
    assert torch.equal(features(backbone), features(model))
    # The weights alone cannot tell, so it is said where it may matter.
    backbone, _ = create_backbone("resnet18", stem="cifar")
    assert "pad their first convolution by 2: model.stem=cifar_pad2" in load_weights(backbone, tmp_path / "solo.ckpt")


@pytest.mark.parametrize("old_names", [False, True])
def test_torchvisions_vit_and_convnext_have_names_of_their_own(old_names):
    model = torchvision.models.VisionTransformer(32, 4, 12, 3, 192, 768, num_classes=5).eval()
    model.heads = nn.Identity()
    for tensor in model.state_dict().values():
        tensor.add_(0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)))
    state = model.state_dict()
    if old_names:
        state = {
            name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): v
            for name, v in state.items()
        }
    backbone, _ = create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=4, **NAMED)
    assert "150 of 150 tensors loaded" in fill(backbone, state, "x")
    torch.testing.assert_close(
        features(backbone, 32), features(model, 32), rtol=1e-5, atol=1e-5
    )  # another attention kernel


def test_torchvisions_convnext():
    model = source("convnext_tiny")
    backbone, _ = create_backbone("convnext_tiny", **NAMED)
    fill(backbone, model.state_dict(), "x")
    model.classifier[2] = nn.Identity()
    torch.testing.assert_close(features(backbone), features(model), rtol=1e-4, atol=1e-4)


def test_a_position_embedding_of_another_image_size_is_resampled_and_said():
    torch.manual_seed(0)
    large = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, num_classes=3)
    backbone, _ = create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, **NAMED)
    line = fill(backbone, large.state_dict(), "x")
    assert "resampled: pos_embed" in line
    assert "left as initialised" not in line
    assert torch.equal(backbone.blocks[3].attn.qkv.weight, large.blocks[3].attn.qkv.weight)
    # As timm itself does it when it loads such weights.
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        num_classes=0,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": large.state_dict(), "num_classes": 3},
    )
    assert torch.equal(features(backbone, 32), features(theirs, 32))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet34", r"got \d\d%: another architecture's\? First mismatches: layer1\.2\.conv1\.weight \(not here\)"),
        ("resnet50", r"layer1\.0\.conv1\.weight \(64x64x1x1 in the file, 64x64x3x3 here\)"),
        ("mobilenet_v3_small", r"conv1\.weight \(not in the file\)"),
    ],
)
def test_another_architecture_is_refused_with_the_first_mismatches(name, message):
    backbone, _ = create_backbone("resnet18", **NAMED)
    before = features(backbone)
    with pytest.raises(
        ValueError, match=rf"^FILE must fit the backbone in at least 90% of the tensors, .*{message}"
    ) as caught:
        fill(backbone, source(name).state_dict(), "FILE")
    assert "\n" not in str(caught.value)
    assert torch.equal(features(backbone), before)


def test_what_was_not_loaded_is_said():
    backbone, _ = create_backbone("resnet18", stem="cifar")
    first = backbone.conv1.weight.clone()
    line = fill(backbone, {**source().state_dict(), "extra.weight": torch.ones(2)}, "FILE")
    assert line == (
        "FILE: 99 of 100 tensors loaded; left as initialised: conv1.weight (64x3x7x7 in the file, 64x3x3x3 here); "
        "3 of the file not used: fc.weight, fc.bias, extra.weight"
    )
    assert torch.equal(backbone.conv1.weight, first)


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("harm",))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": source().state_dict(), "hyper_parameters": Payload()}, "a.ckpt")
    Path("b.pth").write_bytes(pickle.dumps(Payload()))
    Path("c.pth").write_bytes(b"not a checkpoint")
    Path("d.safetensors").write_bytes(b"neither")
    torch.save([1, 2], "e.pth")
    for name, message in {
        "a.ckpt": r"must hold tensors, numbers and text alone, got posix.mkdir: nothing is unpickled here",
        "b.pth": "must hold tensors, numbers and text alone|must be a file of safetensors or torch",
        "c.pth": "must hold tensors, numbers and text alone|must be a file of safetensors or torch",
        "d.safetensors": "must be a file of safetensors or torch",
        "e.pth": "must hold tensors by name, got a list without",
    }.items():
        with pytest.raises(ValueError, match=rf"checkpoint {name} ({message})") as caught:
            read_tensors(name)
        assert "\n" not in str(caught.value)
    assert not Path("harm").exists()
    with pytest.raises(FileNotFoundError, match=r"no file none\.pth"):
        read_tensors("none.pth")


def test_timms_published_weights_from_the_hubs_cache(tmp_path, monkeypatch):
    torch.manual_seed(4)
    published = timm.create_model("resnet18", num_classes=1000).eval()
    tag = timm.get_pretrained_cfg("resnet18").hf_hub_id
    folder = tmp_path / f"models--{tag.replace('/', '--')}"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    save_file(published.state_dict(), folder / "snapshots/abc/model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    backbone, _ = create_backbone("resnet18", **NAMED)
    assert load_published(backbone, "resnet18") == "timm's weights of resnet18: 100 of 100 tensors loaded"
    assert torch.equal(features(backbone), features(timm_without_head(published)))
    with pytest.raises(
        ValueError, match=r"^model\.pretrained must be weights that can be fetched, .*got true for resnet34: "
    ) as caught:
        load_published(backbone, "resnet34")
    assert "\n" not in str(caught.value)
