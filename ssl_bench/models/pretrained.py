"""Published weights into a backbone: files of timm, torchvision, lightly, solo-learn and others, and this suite's own.

A file is read by safetensors or by torch with ``weights_only=True``; nothing is unpickled, so a file cannot run code.
Which of its tensors are the backbone's is found by their names: the backbone's own name behind a prefix
(``module.backbone.conv1.weight``), in one of the layouts of `_layouts`. The layouts were read in the code that writes
them. Barlow Twins' and VICReg's official releases save ``{"model": {"module.backbone.*", ...}}`` and a plain
``resnet50.pth``; solo-learn and lightly Lightning's ``{"state_dict": {"backbone.*"}}`` (solo-learn once ``encoder.*``);
lightly's tutorials a ResNet as `nn.Sequential` of its children; MoCo ``module.encoder_q.*`` and
``module.base_encoder.*``; DINO ``{"teacher": {"backbone.*"}}``.
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_bench.models.backbone import seeded

ENOUGH = 0.9  # of the tensors must fit

# Of two copies of a network in one file the trained one counts, not its slow copy, except DINO's teacher, which its
# authors publish. The words are parts of prefixes.
_SECOND = ("momentum", "target", "encoder_k", "key_", "student", "_ema", "ema_")

_SOLO_STEM = "solo-learn's ResNets for CIFAR pad their first convolution by 2: model.stem=cifar_pad2"

Tensors = dict[str, Tensor]


class _Match(NamedTuple):
    """The file's tensors under the backbone's names, and how well they fit."""

    prefix: str
    found: Tensors  # by the backbone's names, of any shape
    fits: int
    over: list[str]  # of the file's, that should be in the backbone too

    def share(self, names: int) -> float:
        return self.fits / max(names, len(self.found) + len(self.over))


def load_weights(model: nn.Module, path: str | Path) -> str:
    """Loads a file of weights into a backbone.

    Args:
        model: from `create_backbone`.
        path: .safetensors, or one of torch's: .pt, .pth, .ckpt, .bin, ...

    Returns:
        one line: what was loaded and what was not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one line; not a file of weights, one that holds more than tensors, or another architecture's.
    """
    return fill(model, read_tensors(path), f"checkpoint {path}")


def load_published(model: nn.Module, name: str, **options: Any) -> str:
    """Loads timm's published weights of a model, fetched or from the cache of `huggingface_hub`.

    Args:
        model: from `create_backbone`.
        name: timm's.
        options: in_chans, img_size and patch_size, where they are not timm's own.

    Returns:
        as `load_weights`.

    Raises:
        ValueError: one line; there are no weights of that name, they cannot be fetched, or they do not fit.
    """
    try:
        with seeded(0):  # the initial weights, which are replaced, must not move the global generator
            source = timm.create_model(name, pretrained=True, num_classes=0, **options)
    except Exception as error:  # timm's, huggingface_hub's and the network's
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model.pretrained must be weights that can be fetched, or a file of them, got true for {name}: {reason}"
        ) from error
    return fill(model, source.state_dict(), f"timm's weights of {name}")


def read_tensors(path: str | Path) -> Tensors:
    """The tensors of a file by their dotted names, those of nested dicts included; see `load_weights`."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol; what matters follows
            content = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"checkpoint {file} must hold tensors, numbers and text alone, got {match[1] if match else 'another'}: "
            "nothing is unpickled here, because that can run code; where you trust the file, save its state_dict alone"
        ) from error
    except Exception as error:  # torch raises many kinds for files that are no checkpoint
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"checkpoint {file} must be a file of safetensors or torch, got one that is not: {reason}"
        ) from error
    tensors = dict(_flat(content, ""))
    if not tensors:
        raise ValueError(f"checkpoint {file} must hold tensors by name, got a {type(content).__name__} without")
    return tensors


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str) and not key.startswith("optim"):
                yield from _flat(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, Tensor):
        yield prefix, value


def fill(model: nn.Module, tensors: Tensors, what: str) -> str:
    """Copies tensors into a backbone by name.

    Args:
        model: from `create_backbone`.
        tensors: by the names of a file.
        what: where they are from, for the line and the error.

    Returns:
        one line: what was loaded and what was not.

    Raises:
        ValueError: under 90% fit; names the first that do not.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    match = max(_matches(model, own, tensors), key=lambda each: (each.share(len(own)), -_rank(each.prefix)))
    wrong = [
        f"{name} ({_size(match.found[name])} in the file, {_size(value)} here)"
        for name, value in own.items()
        if name in match.found and match.found[name].shape != value.shape
    ]
    absent = [name for name in own if name not in match.found]
    share = match.share(len(own))
    if share < ENOUGH:
        faults = [
            *wrong,
            *(f"{name} (not in the file)" for name in absent),
            *(f"{name} (not here)" for name in match.over),
        ]
        raise ValueError(
            f"{what} must fit the backbone in at least {ENOUGH:.0%} of the tensors, got {_percent(share)}%: another "
            f"architecture's? First mismatches: {_few(faults)}"
        )
    counts = {name: value for name, value in tensors.items() if name.endswith("num_batches_tracked")}
    for name, value in model.state_dict().items():
        source = match.found.get(name, counts.get(match.prefix + name))
        if source is not None and source.shape == value.shape:
            value.copy_(source)
    parts = [
        f"{what}: {match.fits} of {len(own)} tensors loaded" + (f" (named {match.prefix}*)" if match.prefix else "")
    ]
    before = {name: tensors.get(match.prefix + name) for name in match.found}
    if resampled := [
        name for name, old in before.items() if old is not None and old.numel() != match.found[name].numel()
    ]:
        parts.append(f"resampled: {_few(resampled)}")
    if wrong or absent:
        parts.append(f"left as initialised: {_few([*wrong, *absent])}")
    if left := len(tensors) - len(match.found) - sum(name.startswith(match.prefix) for name in counts):
        unused = [name for name in tensors if name not in counts and not _named(name, match)]
        parts.append(f"{left} of the file not used" + (f": {_few(unused)}" if unused else ""))
    conv: Any = getattr(model, "conv1", None)
    lightning = match.prefix in ("state_dict.backbone.", "state_dict.encoder.")
    if lightning and isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.padding == (1, 1):
        parts.append(_SOLO_STEM)
    return "; ".join(parts)


def _matches(model: nn.Module, own: Tensors, tensors: Tensors) -> Iterator[_Match]:
    """Every way to read the file that is worth a look."""
    for layout in _layouts(model, own):
        endings = {theirs: ours for ours, theirs in layout.items()}
        prefixes: Counter[str] = Counter([""])
        for name in tensors:
            parts = name.split(".")
            for start in range(len(parts)):
                if ".".join(parts[start:]) in endings:
                    prefixes["".join(f"{part}." for part in parts[:start])] += 1
        for prefix, _ in prefixes.most_common(8):
            under = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
            yield _match(own, prefix, {endings.get(name, name): value for name, value in under.items()})
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return
    # timm's own conversion for the model's family: official releases' names, position embeddings of another size.
    prefixes = Counter("".join(f"{part}." for part in name.split(".")[:n]) for name in tensors for n in range(4))
    for prefix in ["", *(prefix for prefix, n in prefixes.most_common(12) if n >= len(own) / 2)]:
        under = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        try:
            yield _match(own, prefix, convert(under, model))
        except Exception:  # whatever a foreign layout makes the conversion raise: it is not the file's
            continue


def _match(own: Tensors, prefix: str, named: Mapping[str, Tensor]) -> _Match:
    """What of the tensors under a prefix, by the backbone's names, is the backbone's."""
    found = {}
    for name, value in own.items():
        if (other := named.get(name)) is not None:
            # The same numbers: torchvision's layer scale is (C, 1, 1), a 1x1 convolution may be a linear layer.
            same = [n for n in other.shape if n > 1] == [n for n in value.shape if n > 1]
            found[name] = other.reshape(value.shape) if same else other
    parts = {name.partition(".")[0] for name in own}
    over = [
        name
        for name in named
        if name not in own and name.partition(".")[0] in parts and not name.endswith("num_batches_tracked")
    ]
    return _Match(prefix, found, sum(found[name].shape == own[name].shape for name in found), over)


def _layouts(model: nn.Module, own: Tensors) -> Iterator[dict[str, str]]:
    """The backbone's names as others write them: {ours: theirs}, the plain ones first."""
    yield {name: name for name in own}
    rules: list[tuple[str, str]] = []
    if isinstance(model, ResNet):  # `nn.Sequential(*resnet.children())`, as in lightly's tutorials
        rules = [(r"^conv1\.", "0."), (r"^bn1\.", "1.")]
        rules += [(rf"^layer{number}\.", f"{number + 3}.") for number in range(1, 5)]
    elif isinstance(model, VisionTransformer):  # torchvision's
        rules = [
            (r"^patch_embed\.proj\.", "conv_proj."),
            (r"^cls_token$", "class_token"),
            (r"^pos_embed$", "encoder.pos_embedding"),
            (r"^norm\.", "encoder.ln."),
            (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
            (r"\.norm([12])\.", r".ln_\1."),
            (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
            (r"\.attn\.proj\.", ".self_attention.out_proj."),
            (r"\.mlp\.fc1\.", ".mlp.0."),
            (r"\.mlp\.fc2\.", ".mlp.3."),
        ]
    elif isinstance(model, ConvNeXt):  # torchvision's
        rules = [
            (r"^stem\.", "features.0."),
            (r"^head\.norm\.", "classifier.0."),
            (r"\.conv_dw\.", ".block.0."),
            (r"\.norm\.", ".block.2."),
            (r"\.mlp\.fc1\.", ".block.3."),
            (r"\.mlp\.fc2\.", ".block.5."),
            (r"\.gamma$", ".layer_scale"),
        ]
        rules += [(rf"^stages\.{stage}\.blocks\.", f"features.{2 * stage + 1}.") for stage in range(4)]
        rules += [(rf"^stages\.{stage}\.downsample\.", f"features.{2 * stage}.") for stage in range(1, 4)]
    if rules:
        yield {name: _rename(name, rules) for name in own}
    if isinstance(model, VisionTransformer):  # torchvision's published files, older than its names
        yield {
            name: _rename(name, [*rules, (r"\.mlp\.0\.", ".mlp.linear_1."), (r"\.mlp\.3\.", ".mlp.linear_2.")])
            for name in own
        }


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _rank(prefix: str) -> int:
    """How little a prefix looks like that of the network to take, where two fit alike."""
    return 1000 * any(word in prefix for word in _SECOND) + len(prefix)


def _named(name: str, match: _Match) -> bool:
    """Whether a tensor of the file is one of those found, by its prefix and its first word."""
    if not name.startswith(match.prefix):
        return False
    rest = name[len(match.prefix) :]
    return rest in match.found or rest.partition(".")[0] in {found.partition(".")[0] for found in match.found}


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _percent(share: float) -> int:
    return int(100 * share)  # 89.9% is under 90%


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
