"""Backbones: any timm model without its head, with a stem for small images, initialised from a seed."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
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

Stem = Literal["cifar", "imagenet"]
Init = Literal["timm", "torchvision", "kaiming_uniform"]

# With the CIFAR stem these are timm models too (resnet18_cifar, ...), once this module is imported.
CIFAR_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

# How a backbone was made: an attribute of it, and the one entry of its file's header (safetensors writes several
# entries in a random order, and equal backbones shall be equal files).
_SPEC = "ssl_bench"


def create_backbone(
    name: str = "resnet18", *, stem: Stem = "cifar", init: Init = "torchvision", seed: int = 0, in_chans: int = 3
) -> tuple[nn.Module, int]:
    """Creates a backbone; equal arguments give equal weights, in every process, whatever the global generator's state.

    Args:
        name: a timm model.
        stem: "cifar" makes a ResNet's first convolution 3x3 with stride 1 and drops its max pooling, for images of 32
            to 64 pixels; "imagenet" leaves the model as it is.
        init: "timm" keeps timm's own, which for ResNets is torchvision's but with a zero weight of the last batch norm
            of every residual branch (read in timm 1.0.31; another release may differ, so a run's record holds its
            version). "torchvision": He et al. 2015's normal by fan-out for convolutions, weight 1 and bias 0 for batch
            norms. "kaiming_uniform", the paper's text: He et al. 2015's uniform by fan-in for convolutions and linear
            layers, biases 0, batch norms as in torchvision.
        seed: >= 0.
        in_chans: the images' channels.

    Returns:
        the model, from (n, in_chans, H, W) to (n, D) pooled features, and D.

    Raises:
        ValueError: an unknown name, stem or init, or a model whose stem cannot be exchanged.
    """
    for argument, value, allowed in (("stem", stem, get_args(Stem)), ("init", init, get_args(Init))):
        if value not in allowed:
            raise ValueError(f"model {name}: {argument} must be {' or '.join(allowed)}, got {value!r}")
    _check_name(name)
    with seeded(seed):
        model = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans)
        if stem == "cifar":
            use_cifar_stem(model, name)
        if init != "timm":
            _initialise(model, init)
    use_small_maps(model)
    setattr(model, _SPEC, {"name": name, "stem": stem, "in_chans": in_chans})
    # Where the pooled features go through one more layer (MobileNetV3), timm tells their number apart.
    features: Any = getattr(model, "head_hidden_size", None) or model.num_features
    return model, int(features)


def _check_name(name: str) -> None:
    if name in _cifar_names():
        raise ValueError(f"model: {name} is spelled model.name={name.removesuffix('_cifar')} model.stem=cifar here")
    if not timm.is_model(name):
        nearest = get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise ValueError(f"model: timm {timm.__version__} has no model {name!r} among {len(timm.list_models())}{hint}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs the block with the CPU's generator seeded, on the CPU, and puts the generator back as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPUs too
        yield


def use_cifar_stem(model: nn.Module, name: str) -> None:
    """Exchanges a ResNet's 7x7 convolution of stride 2 for a 3x3 one of stride 1, and its max pooling for nothing.

    Raises:
        ValueError: the model is no ResNet with that stem.
    """
    conv = getattr(model, "conv1", None)
    if not isinstance(model, ResNet) or not isinstance(conv, nn.Conv2d) or conv.kernel_size != (7, 7):
        raise ValueError(
            f"model {name}: stem=cifar needs a ResNet that starts with one 7x7 convolution (resnet18, resnet34, "
            "resnet50, resnext50_32x4d, ...); stem=imagenet takes any model"
        )
    new = nn.Conv2d(conv.in_channels, conv.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # as timm initialises the others
    model.register_module("conv1", new)
    model.register_module("maxpool", nn.Identity())


def _initialise(model: nn.Module, init: Init) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if init == "torchvision":
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and init == "kaiming_uniform":
            nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            continue
        else:
            continue
        if init == "kaiming_uniform" and module.bias is not None:
            nn.init.zeros_(module.bias)


def _cifar_names() -> tuple[str, ...]:
    return tuple(f"{name}_cifar" for name in CIFAR_RESNETS)


def _register_cifar_resnets() -> None:
    def entry_point(name: str) -> Callable[..., nn.Module]:
        def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            if pretrained:
                raise ValueError(f"model {name}_cifar: there are no pretrained weights")
            model = timm.create_model(name, **kwargs)
            use_cifar_stem(model, name)
            return model

        create.__name__ = f"{name}_cifar"
        create.__doc__ = f"timm's {name} with the CIFAR stem: 3x3 convolution of stride 1, no max pooling."
        return create

    for name in CIFAR_RESNETS:
        register_model(entry_point(name))


_register_cifar_resnets()


def save_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Saves a backbone's weights as safetensors, in one rename.

    `timm.create_model(name, num_classes=0, checkpoint_path=path)` loads the file; after
    `import ssl_bench.models.backbone` the name of a ResNet with the CIFAR stem is resnet18_cifar and so on.
    The header holds name, stem and in_chans as JSON.

    Args:
        backbone: made by `create_backbone` or `load_backbone`; batch norms may have become synchronised ones.
        path: ends with .safetensors, which is how timm knows the format.

    Raises:
        ValueError: another path, or a module that those functions did not make.
    """
    path, spec = Path(path), getattr(backbone, _SPEC, None)
    if path.suffix != ".safetensors":
        raise ValueError(f"backbone: the path must end with .safetensors, got {path}")
    if spec is None:
        raise ValueError(f"backbone: only a module made by create_backbone can be saved, got {type(backbone).__name__}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={_SPEC: json.dumps(spec)})
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def load_backbone(path: str | Path) -> tuple[nn.Module, int]:
    """Loads what `save_backbone` saved.

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
        model, feature_dim = create_backbone(**json.loads(header[_SPEC]))
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"backbone {path}: damaged, or not its header's model ({' '.join(str(error).split())})"
        ) from error
    return model, feature_dim
