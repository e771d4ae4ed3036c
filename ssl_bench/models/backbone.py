"""Backbones: any timm model without its head, with a stem for small images, initialised from a seed."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from timm.models import load_pretrained, register_model
from timm.models.resnet import ResNet
from torch import nn

from ssl_bench.models.small_maps import use_small_maps
from ssl_bench.runtime.suggestion import nearest

Stem = Literal["cifar", "cifar_pad2", "imagenet"]
Init = Literal["timm", "torchvision", "kaiming_uniform"]
Factory = Callable[[], nn.Module]  # makes a foreign backbone: (n, 3, H, W) -> (n, num_features), an attribute of it

# With a CIFAR stem these are timm models too (resnet18_cifar, resnet18_cifar_pad2, ...), once this module is imported.
CIFAR_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

# How a backbone was made: an attribute of it, and the only entry of its file's header, because safetensors writes
# several entries in a random order and equal backbones should be equal files.
_SPEC = "ssl_bench"
_MADE_BY = {"name", "stem", "in_chans", "img_size", "patch_size", "dynamic_img_size"}


def create_backbone(
    name: str = "resnet18",
    *,
    stem: Stem = "cifar",
    init: Init = "torchvision",
    seed: int = 0,
    in_chans: int = 3,
    img_size: int | None = None,
    patch_size: int | None = None,
    dynamic_img_size: bool = False,
    factory: Factory | None = None,
) -> tuple[nn.Module, int]:
    """Creates a backbone; equal arguments give equal weights, in every process, whatever the global generator's state.

    Args:
        name: a timm model; with `factory` any name.
        stem: "cifar" makes a ResNet's first convolution 3x3 with stride 1 and drops its max pooling, for images of 32
            to 64 pixels; "cifar_pad2" is the same with a padding of 2, as solo-learn's ResNets for CIFAR have it;
            "imagenet" leaves the model as it is.
        init: "timm" keeps timm's own, which for ResNets is torchvision's but with a zero weight of the last batch norm
            of every residual branch (read in timm 1.0.31; another release may differ, so a run's record holds its
            version). "torchvision": He et al. 2015's normal by fan-out for convolutions, weight 1 and bias 0 for batch
            norms. "kaiming_uniform", the paper's text: He et al. 2015's uniform by fan-in for convolutions and linear
            layers, biases 0, batch norms as in torchvision.
        seed: >= 0.
        in_chans: the images' channels.
        img_size: side in pixels of the images that a model of one image size (ViT, Swin, ...) is made for, > 0; None
            for timm's.
        patch_size: side in pixels of the patches (ViT) or of the stem's stride (ConvNeXt), > 0; None for timm's.
        dynamic_img_size: make a ViT take images of other sizes than ``img_size`` too, with its positions interpolated.
        factory: makes the model instead of timm; ``init="timm"`` keeps its own initialisation.

    Returns:
        the model, from (n, in_chans, H, W) to (n, D) pooled features, and D, which is its `num_features` too.

    Raises:
        ValueError: an unknown name, stem or init, a model whose stem cannot be replaced, that does not take a size that
            was given, whose patches do not divide the image, or without `num_features`.
    """
    for argument, value, allowed in (("stem", stem, get_args(Stem)), ("init", init, get_args(Init))):
        if value not in allowed:
            raise ValueError(f"model {name}: {argument} must be {' or '.join(allowed)}, got {value!r}")
    sizes = _given(img_size=img_size, patch_size=patch_size, dynamic_img_size=dynamic_img_size or None)
    with seeded(seed):
        model = _make(name, stem, in_chans, sizes, factory)
        if init != "timm":
            _initialise(model, init)
    if img_size:
        _check_patches(model, name, img_size)
    use_small_maps(model)
    setattr(model, _SPEC, {"name": name, "stem": stem, "in_chans": in_chans, **sizes})
    features: Any = getattr(model, "num_features", None)
    if not isinstance(features, int) or features < 1:
        raise ValueError(f"model {name}: num_features must be an attribute, a whole number > 0, got {features!r}")
    if factory is None:
        # Pooled features may pass one more layer (MobileNetV3), or stand beside others (two class tokens): what counts
        # is what comes out, and timm's num_features is the number before.
        shape = _output_shape(model, in_chans, native_size(model))
        if not isinstance(shape, Exception):
            if len(shape) != 2:
                raise ValueError(f"model {name} must give (n, D) features, got {tuple(shape)} of two images")
            features = shape[1]
        if features != model.num_features:
            model.num_features = features
    return model, features


def _given(**values: int | None) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _make(name: str, stem: Stem, in_chans: int, sizes: dict[str, Any], factory: Factory | None) -> nn.Module:
    """The model with its stem, as timm or the factory initialises it."""
    if factory is not None:
        if sizes:
            raise ValueError(f"model {name}: {' and '.join(sizes)} must be null, got {sizes}: it is not a timm model")
        model = factory()
    else:
        _check_name(name)
        try:
            model = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans, **sizes)
        except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
            if not sizes:
                raise
            given = ", ".join(f"model.{key}={value}" for key, value in sizes.items())
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"model {name} cannot be made with {given}: {reason}") from error
    if stem != "imagenet":
        use_cifar_stem(model, name, padding=2 if stem == "cifar_pad2" else 1)
    return model


def native_size(model: nn.Module) -> int:
    """The side of the images that a timm model is made for, in pixels; a convolutional one takes others too."""
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(own, tuple) and isinstance(own[0], int):
        return own[0]
    return int((getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1])


def _output_shape(model: nn.Module, in_chans: int, side: int) -> torch.Size | Exception:
    """The shape that a model makes of two images, or what it raises; only shapes are computed (torch's meta device)."""
    # A copy of the modules alone: the memo has a tensor without data in the place of each of the model's.
    twins: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in model.parameters()}
    twins |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    try:
        with torch.no_grad():
            images = torch.empty(2, in_chans, side, side, device="meta")
            return copy.deepcopy(model, twins).eval()(images).shape
    except Exception as error:  # whatever the model's authors raise
        return error


def check_images(
    name: str,
    side: int | None,
    *,
    stem: Stem = "cifar",
    img_size: int | None = None,
    patch_size: int | None = None,
) -> None:
    """Checks that a timm model can be made and takes square images of a size, at the cost of no weights.

    Args:
        name, stem, img_size, patch_size: see `create_backbone`.
        side: of the images, in pixels; None if it is not known yet.

    Raises:
        ValueError: one line that says which size it takes and which key sets it; also as `create_backbone`.
    """
    sizes = _given(img_size=img_size, patch_size=patch_size)
    with seeded(0):
        try:
            with torch.device("meta"):
                model = _make(name, stem, 3, sizes, None)
        except (NotImplementedError, RuntimeError):  # a model whose constructor needs numbers
            model = _make(name, stem, 3, sizes, None)
    if side is None:
        return
    outcome = _output_shape(model, 3, side)
    native = native_size(model)
    if isinstance(outcome, Exception) and side != native and not isinstance(_output_shape(model, 3, native), Exception):
        other = f", or model.img_size={side}" if _takes_size(name, stem, sizes, side) else ""
        raise ValueError(
            f"model {name} takes images of {native} x {native} pixels, got {side} x {side}: data.size={native}{other}"
        ) from outcome
    _check_patches(model, name, side)


def _takes_size(name: str, stem: Stem, sizes: dict[str, Any], side: int) -> bool:
    try:
        with seeded(0), torch.device("meta"):
            model = _make(name, stem, 3, {**sizes, "img_size": side}, None)
        _check_patches(model, name, side)
    except Exception:  # whatever the model's authors raise
        return False
    return not isinstance(_output_shape(model, 3, side), Exception)


def _check_patches(model: nn.Module, name: str, side: int) -> None:
    """Refuses patches that do not tile the image: the rest of the pixels would be dropped without a word."""
    embed = getattr(model, "patch_embed", None)
    stem = getattr(model, "stem", None)
    patch: Any = getattr(embed, "patch_size", None)
    if patch is None and isinstance(stem, nn.Sequential) and isinstance(stem[0], nn.Conv2d):
        conv = stem[0]
        patch = conv.stride if conv.kernel_size == conv.stride and conv.padding == (0, 0) else None  # ConvNeXt
    patch = patch[0] if isinstance(patch, tuple) else patch
    padded = getattr(embed, "dynamic_img_pad", False) or not getattr(embed, "strict_img_size", True)
    if isinstance(patch, int) and not padded and side % patch:
        raise ValueError(f"model {name}: model.patch_size must divide the image's side of {side} pixels, got {patch}")


def _check_name(name: str) -> None:
    for stem in ("cifar", "cifar_pad2"):
        plain = name.removesuffix(f"_{stem}")
        if plain != name and plain in CIFAR_RESNETS:
            raise ValueError(f"model.name must be {plain} (with model.stem={stem}), got {name}")
    if not timm.is_model(name):
        known = timm.list_models()
        raise ValueError(
            f"unknown model {name!r}{nearest(name, known)} (known: timm {timm.__version__}'s {len(known)})"
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs the block on the CPU with the CPU's generator seeded, and restores the generator."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPUs too
        yield


def use_cifar_stem(model: nn.Module, name: str, padding: int = 1) -> None:
    """Replaces a ResNet's 7x7 convolution of stride 2 by a 3x3 one of stride 1, and removes its max pooling.

    Raises:
        ValueError: the model is not a ResNet with that stem.
    """
    conv = getattr(model, "conv1", None)
    if not isinstance(model, ResNet) or not isinstance(conv, nn.Conv2d) or conv.kernel_size != (7, 7):
        raise ValueError(
            f"model {name}: stem must be imagenet, got cifar, which replaces the 7x7 convolution that a ResNet starts "
            "with (resnet18, resnet34, resnet50, resnext50_32x4d, ...); others take stem=imagenet, and init=timm for "
            "their own initial weights"
        )
    new = nn.Conv2d(conv.in_channels, conv.out_channels, kernel_size=3, stride=1, padding=padding, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # as timm initialises the others
    model.register_module("conv1", new)
    model.register_module("maxpool", nn.Identity())


def _initialise(model: nn.Module, init: Init) -> None:
    uniform = init == "kaiming_uniform"
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not uniform:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Conv2d | nn.Linear) and uniform:
            nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def _register_cifar_resnet(name: str, stem: str, padding: int) -> None:
    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        config = pretrained_cfg.to_dict() if hasattr(pretrained_cfg, "to_dict") else dict(pretrained_cfg or {})
        if pretrained and not config.get("source"):  # of a folder or a repository, see ssl_bench.records.publish
            raise ValueError(f"model {name}_{stem}: pretrained must be False, got True: there are no such weights")
        config |= kwargs.pop("pretrained_cfg_overlay", None) or {}
        cache_dir = kwargs.pop("cache_dir", None)
        if "num_classes" in config:
            kwargs.setdefault("num_classes", config["num_classes"])
        model = timm.create_model(name, **kwargs)
        use_cifar_stem(model, name, padding)
        if pretrained:
            own: Any = model.pretrained_cfg
            setattr(model, "pretrained_cfg", {**own, **config})  # noqa: B010 - for the type checker not a module
            classes, channels = kwargs.get("num_classes", 1000), kwargs.get("in_chans", 3)
            load_pretrained(model, num_classes=classes, in_chans=channels, cache_dir=cache_dir)
        return model

    create.__name__ = f"{name}_{stem}"
    create.__doc__ = f"timm's {name} with the CIFAR stem: 3x3 convolution of stride 1, padding {padding}, no pooling."
    register_model(create)


for _name in CIFAR_RESNETS:
    _register_cifar_resnet(_name, "cifar", 1)
    _register_cifar_resnet(_name, "cifar_pad2", 2)


def backbone_bytes(backbone: nn.Module) -> bytes:
    """A backbone's weights as the bytes of a safetensors file, backbone.safetensors in a run's folder.

    `timm.create_model(name, num_classes=0, checkpoint_path=path)` loads the file; after
    `import ssl_bench.models.backbone` the name of a ResNet with the CIFAR stem is resnet18_cifar and so on.
    The header holds name, stem and in_chans as JSON. Tied weights are written once for each name.

    Args:
        backbone: made by `create_backbone` or `load_backbone`; batch norms may have become synchronised ones.

    Raises:
        ValueError: a module that those functions did not make.
    """
    spec = getattr(backbone, _SPEC, None)
    if spec is None:
        raise ValueError(f"backbone must be made by create_backbone to be saved, got {type(backbone).__name__}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    # safetensors refuses tensors that share memory, as tied weights do, and parts of a larger one.
    tensors = {
        name: tensor.clone() if places.count(place) > 1 else tensor
        for (name, tensor), place in zip(tensors.items(), places, strict=True)
    }
    return save(tensors, metadata={_SPEC: json.dumps(spec)})


def save_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Saves `backbone_bytes` (a run writes its own atomically, by `ssl_bench.records.storage`).

    Args:
        backbone: see there.
        path: must end with .safetensors, by which timm recognises the format.

    Raises:
        ValueError: another path, or as `backbone_bytes`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"backbone: the path must end with .safetensors, got {path}")
    path.write_bytes(backbone_bytes(backbone))


def load_backbone(path: str | Path, factory: Factory | None = None) -> tuple[nn.Module, int]:
    """Loads what `save_backbone` saved; a foreign backbone needs the factory that made it.

    Returns:
        the model on the CPU and the number of its features.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of `save_backbone`, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"backbone: no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        if _SPEC not in header:
            raise ValueError(f"backbone {path}: the header must hold {_SPEC}, got {', '.join(header) or 'nothing'}")
        spec = json.loads(header[_SPEC])
        if not isinstance(spec, dict) or set(spec) - _MADE_BY:
            allowed = ", ".join(sorted(_MADE_BY))
            raise ValueError(f"backbone {path}: {_SPEC} must give {allowed} alone, got {header[_SPEC][:200]}")
        model, feature_dim = create_backbone(**spec, factory=factory)
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"backbone {path}: damaged, or not its header's model ({' '.join(str(error).split())})"
        ) from error
    return model, feature_dim
