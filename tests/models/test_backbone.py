"""Backbones: the stems, the initialisations, and files that timm loads."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ssl_bench.methods.barlow_twins import BarlowTwins
from ssl_bench.models.backbone import check_images, create_backbone, load_backbone, save_backbone


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("name", "stem"), [("resnet18", "cifar"), ("resnet18", "imagenet"), ("resnet50", "cifar")])
def test_features_have_the_promised_size(name, stem):
    model, feature_dim = create_backbone(name, stem=stem)
    model.eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, feature_dim)


def test_a_model_with_one_more_layer_after_pooling():
    model, feature_dim = create_backbone("mobilenetv3_small_050", stem="imagenet", init="timm")
    model.eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, feature_dim)


def test_num_features_is_what_comes_out_so_that_a_method_takes_the_backbone():
    """timm's num_features of a MobileNetV3 is 288, before one more layer."""
    model, feature_dim = create_backbone("mobilenetv3_small_050", stem="imagenet", init="timm")
    assert feature_dim == model.num_features == 1024
    assert BarlowTwins(model, feature_dim, projector=(8,)).projector[0].in_features == 1024


@pytest.mark.parametrize(
    ("name", "arguments", "tokens"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4}, 65),
        ("vit_tiny_patch16_224", {"img_size": 32}, 5),
    ],
)
def test_a_vit_of_small_images_and_patches(tmp_path, name, arguments, tokens):
    model, feature_dim = create_backbone(name, stem="imagenet", init="timm", **arguments)
    assert model.pos_embed.shape == (1, tokens, 192)
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, feature_dim)
    save_backbone(model, tmp_path / "b.safetensors")
    loaded, _ = load_backbone(tmp_path / "b.safetensors")
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    theirs = timm.create_model(name, num_classes=0, checkpoint_path=str(tmp_path / "b.safetensors"), **arguments)
    assert torch.equal(theirs.eval()(images), model(images))


def test_convnext_takes_a_smaller_stem_and_tied_weights_are_saved(tmp_path):
    model, _ = create_backbone("convnext_atto", stem="imagenet", init="timm", patch_size=2)
    assert model.stem(torch.randn(1, 3, 32, 32)).shape[-2:] == (16, 16)
    coat, _ = create_backbone("coat_lite_tiny", stem="imagenet", init="timm")
    save_backbone(coat, tmp_path / "b.safetensors")
    assert equal_weights(load_backbone(tmp_path / "b.safetensors")[0], coat)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 5}, r"patch_size must divide .* 32 pixels, got 5"),
        ("vit_tiny_patch16_224", {"img_size": 8}, r"patch_size must divide the image's side of 8 pixels, got 16"),
        ("resnet18", {"img_size": 32}, r"resnet18 cannot be made with model\.img_size=32: .*img_size"),
        ("resnet18", {"patch_size": 4}, r"resnet18 cannot be made with model\.patch_size=4: .*patch_size"),
    ],
)
def test_sizes_that_a_model_cannot_have(name, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_backbone(name, stem="imagenet", init="timm", **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "side", "arguments", "message"),
    [
        (
            "vit_tiny_patch16_224",
            32,
            {},
            r"takes images of 224 x 224 pixels, got 32 x 32: data\.size=224, or model\.img_size=32$",
        ),
        ("vit_tiny_patch16_224", 40, {}, r"got 40 x 40: data\.size=224$"),
        (
            "vit_tiny_patch16_224",
            64,
            {"img_size": 32},
            r"takes images of 32 x 32 pixels, got 64 .* model\.img_size=64$",
        ),
        ("convnext_atto", 33, {"patch_size": 2}, r"patch_size must divide the image's side of 33 pixels, got 2"),
    ],
)
def test_images_of_a_size_that_a_model_does_not_take(name, side, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_images(name, side, stem="imagenet", **arguments)
    assert "\n" not in str(caught.value)


def test_images_of_a_size_that_a_model_takes_leave_the_generator():
    before = torch.get_rng_state()
    check_images("vit_tiny_patch16_224", 32, stem="imagenet", img_size=32, patch_size=4)
    check_images("vit_tiny_patch16_224", 224, stem="imagenet")
    for side in (8, 32, 33, 224):
        check_images("resnet18", side)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cifar_stem_keeps_the_resolution_and_the_imagenet_stem_divides_it_by_four():
    for stem, side in (("cifar", 32), ("imagenet", 8)):
        model, _ = create_backbone("resnet18", stem=stem)
        seen = []
        model.layer1.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs[0].shape))
        model(torch.randn(2, 3, 32, 32))
        assert seen == [(2, 64, side, side)]
    assert create_backbone("resnet18", stem="imagenet")[0].conv1.kernel_size == (7, 7)


def test_the_imagenet_stem_is_timms_model_untouched():
    ours, _ = create_backbone("resnet18", stem="imagenet", init="timm", seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = timm.create_model("resnet18", num_classes=0)
    assert equal_weights(ours, theirs)


@pytest.mark.parametrize("init", ["timm", "torchvision", "kaiming_uniform"])
def test_weights_depend_on_the_seed_alone_and_leave_the_global_generator(init):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = create_backbone("resnet18", init=init, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, _ = create_backbone("resnet18", init=init, seed=7)
    other, _ = create_backbone("resnet18", init=init, seed=8)
    assert equal_weights(first, again)
    assert not equal_weights(first, other)


def last_norms(model: nn.Module) -> torch.Tensor:
    return torch.cat([block.bn2.weight for layer in (model.layer1, model.layer4) for block in layer])


def test_init_torchvision_is_normal_by_fan_out_without_zero_norms():
    model, _ = create_backbone("resnet18", stem="imagenet", init="torchvision")
    conv = model.layer4[0].conv1  # 256 -> 512, stride 2: fan-in and fan-out differ
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)
    assert conv.weight.abs().max() > 3.5 * conv.weight.std()  # no uniform distribution reaches beyond sqrt(3) sd
    assert last_norms(model).eq(1).all()


def test_init_timm_zeroes_the_last_norm_of_a_block():
    assert last_norms(create_backbone("resnet18", init="timm")[0]).eq(0).all()


def test_init_kaiming_uniform_is_uniform_by_fan_in():
    model, _ = create_backbone("resnet18", stem="cifar", init="kaiming_uniform")
    for conv, fan_in in ((model.conv1, 3 * 9), (model.layer4[0].conv1, 256 * 9)):
        bound = math.sqrt(6 / fan_in)
        assert 0.99 * bound < conv.weight.abs().max().item() <= bound
        assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert last_norms(model).eq(1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet81"}, r"unknown model 'resnet81'; did you mean 'resnet\d+\w*'\? \(known: timm "),
        ({"name": "resnet18", "stem": "cifer"}, "stem must be cifar or cifar_pad2 or imagenet, got 'cifer'"),
        ({"name": "resnet18", "init": "xavier"}, "init must be timm or torchvision or kaiming_uniform, got 'xavier'"),
        ({"name": "vit_tiny_patch16_224", "stem": "cifar"}, "vit_tiny_patch16_224: stem must be imagenet, got cifar"),
        ({"name": "resnet18d", "stem": "cifar"}, "resnet18d: stem must be imagenet, got cifar, which replaces the 7x7"),
        ({"name": "resnet18_cifar"}, r"model\.name must be resnet18 \(with model\.stem=cifar\), got resnet18_cifar"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_backbone(**arguments)
    assert "\n" not in str(caught.value)


class Foreign(nn.Sequential):
    """A backbone from outside timm."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_foreign_backbone_is_seeded_saved_and_loaded_like_the_others(tmp_path):
    arguments = {"stem": "imagenet", "init": "timm", "factory": Foreign}
    backbone, feature_dim = create_backbone("mine:Foreign", seed=3, **arguments)
    assert feature_dim == backbone(torch.randn(2, 3, 8, 8)).shape[1] == 6
    assert equal_weights(backbone, create_backbone("mine:Foreign", seed=3, **arguments)[0])
    assert not equal_weights(backbone, create_backbone("mine:Foreign", seed=4, **arguments)[0])
    save_backbone(backbone, tmp_path / "b.safetensors")
    loaded, _ = load_backbone(tmp_path / "b.safetensors", Foreign)
    assert equal_weights(loaded, backbone)
    with pytest.raises(ValueError, match="unknown model 'mine:Foreign'"):
        load_backbone(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="model x: num_features must be an attribute, a whole number > 0, got None"):
        create_backbone("x", stem="imagenet", factory=lambda: nn.Linear(2, 2))


@pytest.mark.parametrize(("stem", "timm_name"), [("imagenet", "resnet18"), ("cifar", "resnet18_cifar")])
def test_timm_loads_a_saved_backbone(tmp_path, stem, timm_name):
    backbone, _ = create_backbone("resnet18", stem=stem, seed=1)
    backbone = backbone.to(memory_format=torch.channels_last)
    backbone(torch.randn(4, 3, 32, 32))  # running statistics that differ from the initial ones
    path = tmp_path / "backbone.safetensors"
    save_backbone(backbone, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

    model = timm.create_model(timm_name, num_classes=0, checkpoint_path=str(path))
    assert equal_weights(model, backbone)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), backbone.eval()(images))


def test_a_loaded_backbone_is_the_saved_one_and_can_be_saved_again(tmp_path):
    backbone, feature_dim = create_backbone("resnet18", stem="cifar", init="timm", seed=5, in_chans=1)
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_backbone(backbone, first)
    loaded, loaded_dim = load_backbone(first)
    assert loaded_dim == feature_dim
    assert equal_weights(loaded, backbone)
    save_backbone(loaded, second)
    assert second.read_bytes() == first.read_bytes()
    with safe_open(first, framework="pt") as file:
        assert json.loads(file.metadata()["ssl_bench"]) == {"name": "resnet18", "stem": "cifar", "in_chans": 1}


def test_saving_refuses_another_suffix_and_a_foreign_module(tmp_path):
    with pytest.raises(ValueError, match=r"must end with \.safetensors, got .*b\.pt"):
        save_backbone(create_backbone("resnet18")[0], tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"must be made by create_backbone.*got Linear"):
        save_backbone(nn.Linear(2, 2), tmp_path / "b.safetensors")
    assert not list(tmp_path.iterdir())


def foreign_file(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def cut_file(path: Path) -> None:
    save_backbone(create_backbone("resnet18")[0], path)
    path.write_bytes(path.read_bytes()[:-1000])


def other_models_weights(path: Path) -> None:
    tensors = create_backbone("resnet18", stem="imagenet")[0].state_dict()
    spec = {"name": "resnet18", "stem": "cifar", "in_chans": 3}
    save_file(tensors, path, metadata={"ssl_bench": json.dumps(spec)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign_file, "header must hold ssl_bench, got nothing"),
        (cut_file, "damaged"),
        (other_models_weights, "size mismatch"),
    ],
)
def test_loading_a_bad_file_names_it(tmp_path, make, message):
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(ValueError, match=rf"bad\.safetensors.*{message}") as caught:
        load_backbone(path)
    assert "\n" not in str(caught.value)


def test_loading_a_missing_file_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_backbone(tmp_path / "none.safetensors")
