"""Backbones: any timm model without its head, with a stem for small images, initialised from a seed."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import register_model
from timm.models.resnet import ResNet
from torch import nn

from ssl_bench.models.small_maps import use_small_maps
from ssl_bench.runtime.suggestion import nearest

Stem = Literal["cifar", "imagenet"]
Init = Literal["timm", "torchvision", "kaiming_uniform"]
Factory = Callable[[], nn.Module]  # makes a foreign backbone: (n, 3, H, W) -> (n, num_features), an attribute of it

# With the CIFAR stem these are timm models too (resnet18_cifar, ...), once this module is imported.
CIFAR_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

# How a backbone was made: an attribute of it, and the only entry of its file's header, because safetensors writes
# several entries in a random order and equal backbones should be equal files.
_SPEC = "ssl_bench"


def create_backbone(
    name: str = "resnet18",
    *,
    stem: Stem = "cifar",
    init: Init = "torchvision",
    seed: int = 0,
    in_chans: int = 3,
    factory: Factory | None = None,
) -> tuple[nn.Module, int]:
    """Creates a backbone; equal arguments give equal weights, in every process, whatever the global generator's state.

    Args:
        name: a timm model; with `factory` any name.
        stem: "cifar" makes a ResNet's first convolution 3x3 with stride 1 and drops its max pooling, for images of 32
            to 64 pixels; "imagenet" leaves the model as it is.
        init: "timm" keeps timm's own, which for ResNets is torchvision's but with a zero weight of the last batch norm
            of every residual branch (read in timm 1.0.31; another release may differ, so a run's record holds its
            version). "torchvision": He et al. 2015's normal by fan-out for convolutions, weight 1 and bias 0 for batch
            norms. "kaiming_uniform", the paper's text: He et al. 2015's uniform by fan-in for convolutions and linear
            layers, biases 0, batch norms as in torchvision.
        seed: >= 0.
        in_chans: the images' channels.
        factory: makes the model instead of timm; ``init="timm"`` keeps its own initialisation.

    Returns:
        the model, from (n, in_chans, H, W) to (n, D) pooled features, and D.

    Raises:
        ValueError: an unknown name, stem or init, a model whose stem cannot be replaced, or without `num_features`.
    """
    for argument, value, allowed in (("stem", stem, get_args(Stem)), ("init", init, get_args(Init))):
        if value not in allowed:
            raise ValueError(f"model {name}: {argument} must be {' or '.join(allowed)}, got {value!r}")
    if factory is None:
        _check_name(name)
    with seeded(seed):
        model = factory() if factory else timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans)
        if stem == "cifar":
            use_cifar_stem(model, name)
        if init != "timm":
            _initialise(model, init)
    use_small_maps(model)
    setattr(model, _SPEC, {"name": name, "stem": stem, "in_chans": in_chans})
    # If the pooled features pass one more layer (MobileNetV3), timm's num_features is their number before it.
    features: Any = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
    if not isinstance(features, int) or features < 1:
        raise ValueError(f"model {name}: num_features must be an attribute, a whole number > 0, got {features!r}")
    return model, features


def _check_name(name: str) -> None:
    plain = name.removesuffix("_cifar")
    if plain != name and plain in CIFAR_RESNETS:
        raise ValueError(f"model.name must be {plain} (with model.stem=cifar), got {name}")
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


def use_cifar_stem(model: nn.Module, name: str) -> None:
    """Replaces a ResNet's 7x7 convolution of stride 2 by a 3x3 one of stride 1, and removes its max pooling.

    Raises:
        ValueError: the model is not a ResNet with that stem.
    """
    conv = getattr(model, "conv1", None)
    if not isinstance(model, ResNet) or not isinstance(conv, nn.Conv2d) or conv.kernel_size != (7, 7):
        raise ValueError(
            f"model {name}: stem must be imagenet, got cifar, which replaces the 7x7 convolution that a ResNet starts "
            "with (resnet18, resnet34, resnet50, resnext50_32x4d, ...)"
        )
    new = nn.Conv2d(conv.in_channels, conv.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
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


def _register_cifar_resnet(name: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"model {name}_cifar: pretrained must be False, got True: there are no such weights")
        model = timm.create_model(name, **kwargs)
        use_cifar_stem(model, name)
        return model

    create.__name__ = f"{name}_cifar"
    create.__doc__ = f"timm's {name} with the CIFAR stem: 3x3 convolution of stride 1, no max pooling."
    register_model(create)


for _name in CIFAR_RESNETS:
    _register_cifar_resnet(_name)


def save_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Saves a backbone's weights as safetensors, in one rename.

    `timm.create_model(name, num_classes=0, checkpoint_path=path)` loads the file; after
    `import ssl_bench.models.backbone` the name of a ResNet with the CIFAR stem is resnet18_cifar and so on.
    The header holds name, stem and in_chans as JSON.

    Args:
        backbone: made by `create_backbone` or `load_backbone`; batch norms may have become synchronised ones.
        path: must end with .safetensors, by which timm recognises the format.

    Raises:
        ValueError: another path, or a module that those functions did not make.
    """
    path, spec = Path(path), getattr(backbone, _SPEC, None)
    if path.suffix != ".safetensors":
        raise ValueError(f"backbone: the path must end with .safetensors, got {path}")
    if spec is None:
        raise ValueError(f"backbone must be made by create_backbone to be saved, got {type(backbone).__name__}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={_SPEC: json.dumps(spec)})
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


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
        model, feature_dim = create_backbone(**json.loads(header[_SPEC]), factory=factory)
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"backbone {path}: damaged, or not its header's model ({' '.join(str(error).split())})"
        ) from error
    return model, feature_dim
