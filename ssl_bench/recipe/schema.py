"""The typed recipe: every choice that makes up one run, checked before anything is read.

Each field carries its help: what it is, its unit, its range, and the value that turns it off. ``ssl-bench pretrain
--help`` prints exactly these texts. The recipe is built from Hydra's config groups by `ssl_bench.recipe.compose`;
methods, optimizers and schedules are plug-ins, whose own keys `ssl_bench.recipe.registry` checks against their
signatures.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid")

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]

# What cannot change a result: two recipes that differ only here are the same experiment. `steps`-like durations and
# the number of processes do not appear, because the first do change it and the second is not part of a recipe.
IRRELEVANT = frozenset(
    {"run_dir", "resume", "tracker", "log_every", "check_every_epochs", "device", "compile", "cuda_graphs"}
    | {"data.workers", "data.cache_dir", "data.resident", "optimizer.foreach", "optimizer.fused"}
    | {"checkpoint.every_steps", "checkpoint.every_epochs", "checkpoint.keep", "checkpoint.final"}
    | {"checkpoint.snapshots"}
)

# Keys that recipes have not had from the start, each with the value that a recipe without it means. At that value a key
# is no part of the identity, so that the experiments recorded before keep theirs. Every key whose default leaves things
# as they were belongs here; none is ever taken out, and no value changed.
ADDED: dict[str, Any] = {
    "loss_scale": 1.0,
    "sync_batch_norm": True,
    "last_batch": "carry",
    "method.divisor": None,
}


def without_additions(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's dotted keys less those of `ADDED` that say nothing new: equal for records of every age."""
    return {name: value for name, value in flat.items() if name not in ADDED or value != ADDED[name]}


def key(default: Any, text: str) -> Any:
    """A recipe field with its default and its help text."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class DataOptions:
    """Which images."""

    __pydantic_config__ = STRICT
    name: str = key("cifar10", "data set: cifar10, cifar100, stl10, fashion_mnist, tiny_imagenet, digits, hf or folder")
    path: str | None = key(
        None,
        "folder to read (for data=hf also a hub id): Hugging Face parquet files, an archive's folder, class folders or "
        "torchvision's root; null = torchvision's download into the cache",
    )
    size: PositiveInt | None = key(
        None, "pixels of the square images; shorter side resized, then centre crop; null = as stored"
    )
    holdout: Annotated[float, Field(ge=0, lt=1)] = key(
        0.0, "share of each class of the train set to hold out and measure on instead of the test set; 0 = none"
    )
    resident: Literal["auto"] | bool = key(
        "auto",
        "keep all images as uint8 on the device (true), stream them through workers (false), or by memory (auto)",
    )
    workers: Count = key(2, "processes that read when streaming; 0 = in the main process")
    cache_dir: str | None = key(None, "folder of the decoded cache; null = $SSL_BENCH_CACHE or ~/.cache/ssl_bench")


@dataclass
class ModelOptions:
    """Which backbone."""

    __pydantic_config__ = STRICT
    name: str = key("resnet18", "any timm model")
    stem: Literal["cifar", "imagenet"] = key(
        "cifar", "ResNets' first layers: cifar = 3x3 stride 1 without pooling, imagenet = 7x7 stride 2 and max pool"
    )
    init: Literal["timm", "torchvision", "kaiming_uniform"] = key(
        "torchvision", "weights at the start: timm's default (last norm of a block zero), torchvision's, or the paper's"
    )


@dataclass
class Plugin:
    """A method, an optimizer or a schedule: which one, and its own keys (see --help with it selected)."""

    target: str = key("", "a known name, an installed entry point, or package.module:Class")
    options: dict[str, Any] = key({}, "its keyword arguments")


@dataclass
class ScalingOptions:
    """How the learning rate depends on the batch size."""

    __pydantic_config__ = STRICT
    rule: Literal["none", "sqrt", "linear"] = key(
        "none", "lr times 1, sqrt(B / base_batch) or B / base_batch; none = lr is what it says"
    )
    base_batch: PositiveInt = key(256, "images; the batch size at which lr is meant literally")


@dataclass
class GroupOptions:
    """How bias and norm parameters (ndim <= 1) are treated."""

    __pydantic_config__ = STRICT
    decay_1d: bool = key(False, "weight decay on parameters of ndim <= 1; false = none")
    adapt_1d: bool = key(False, "layer-wise adaptation of parameters of ndim <= 1; false = plain momentum")
    lr_1d: NonNegative | None = key(None, "learning rate of parameters of ndim <= 1; null = the same as the others")
    exclude: list[str] = key([], "names or glob patterns of further parameters treated like ndim <= 1; [] = none")


@dataclass
class AugmentOptions:
    """What happens to images in training."""

    __pydantic_config__ = STRICT
    crop_scale: tuple[Probability, Probability] = key((0.08, 1.0), "pretraining: area of a crop over the image's")
    flip: Probability = key(0.5, "probability of a horizontal flip; 0 = never")
    jitter: tuple[NonNegative, NonNegative, NonNegative, Annotated[float, Field(ge=0, le=0.5)]] = key(
        (0.4, 0.4, 0.2, 0.1), "pretraining: brightness, contrast, saturation, hue; 0 = leave that one out"
    )
    jitter_p: Probability = key(0.8, "pretraining: probability of the colour jitter; 0 = never")
    gray_p: Probability = key(0.2, "pretraining: probability of grayscale; 0 = never")
    blur_p: tuple[Probability, Probability] = key(
        (1.0, 0.1), "pretraining: probability of Gaussian blur in view 1 and view 2; 0 = never"
    )
    blur_sigma: tuple[Positive, Positive] = key((0.1, 2.0), "pretraining: pixels; range of the blur's sigma")
    blur: Literal["off", "scaled", "full"] = key(
        "off", "pretraining: no blur, sigma scaled by image size / 224, or sigma as given"
    )
    solarize_p: tuple[Probability, Probability] = key(
        (0.0, 0.2), "pretraining: probability of solarisation in view 1 and view 2; 0 = never"
    )
    pad: Count = key(4, "classification: pixels of padding before the random crop; 0 = no crop")
    rotation: Annotated[float, Field(ge=0, le=180)] = key(
        15.0, "classification: degrees; rotation drawn from +- this; 0 = none"
    )
    stats: Literal["own", "imagenet"] = key("own", "mean and std to normalise with: of this train set, or ImageNet's")


@dataclass
class EvalOptions:
    """What is measured, and when."""

    __pydantic_config__ = STRICT
    protocols: list[str] = key(
        ["knn-v1", "linear-cached-v1"], "pretraining: evaluators at the end of the run; [] = none"
    )
    baseline: bool = key(True, "evaluate the untrained model too, by the same protocols; false = leave it out")
    online_every_epochs: NonNegative = key(
        0.0, "pretraining: epochs between the online monitor's measurements, never a result; 0 = off"
    )
    test_every_epochs: NonNegative = key(
        1.0, "classification: epochs between measurements on the whole test set; 0 = only at the end"
    )
    batch_size: PositiveInt = key(1000, "images per forward pass, on each process")
    seed: Count = key(0, "seed of the probes, independent of the run's")
    precision: Literal["fp32", "bf16"] = key("fp32", "arithmetic of the feature extraction")


@dataclass
class TelemetryOptions:
    """Norms and ratios of every layer."""

    __pydantic_config__ = STRICT
    every: Count = key(10, "steps between records of every layer's norms and trust ratio; 0 = off")


@dataclass
class CheckpointOptions:
    """What a crash can cost."""

    __pydantic_config__ = STRICT
    every_steps: Count | None = key(None, "steps between checkpoints; 0 = only when interrupted (or give every_epochs)")
    every_epochs: NonNegative | None = key(
        5.0, "epochs between checkpoints; 0 = only when interrupted (or give every_steps)"
    )
    keep: PositiveInt = key(2, "how many checkpoints stay on disk while the run goes on")
    final: bool = key(False, "keep the last checkpoint (projector or head and optimizer too) after the run; false = no")
    snapshots: list[Probability] = key(
        [],
        "shares of the run, [0, 0.5, 1] = start, middle and end, at which the network's weights are kept for "
        "ssl-bench analyze; [] = none",
    )


@dataclass
class Recipe:
    """One run, whole."""

    __pydantic_config__ = STRICT
    track: Literal["pretrain", "classify"]
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    method: Plugin = field(default_factory=Plugin)
    optimizer: Plugin = field(default_factory=Plugin)
    schedule: Plugin = field(default_factory=Plugin)
    scaling: ScalingOptions = field(default_factory=ScalingOptions)
    param_groups: GroupOptions = field(default_factory=GroupOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    telemetry: TelemetryOptions = field(default_factory=TelemetryOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    batch_size: PositiveInt = key(512, "images per step over all processes; exactly this many (but see last_batch)")
    last_batch: Literal["carry", "short"] = key(
        "carry",
        "what an epoch that batch_size does not divide ends in: carry = a full batch, filled up from the next epoch; "
        "short = the images that are left, which must share evenly into processes and chunks",
    )
    epochs: Positive | None = key(None, "passes over the train set; give this or steps, not both")
    steps: PositiveInt | None = key(None, "optimizer steps; give this or epochs, not both")
    chunk_size: PositiveInt | None = key(
        None, "images of the global batch that are in memory at a time, with the exact gradient; null = the whole batch"
    )
    sync_batch_norm: bool = key(
        True,
        "batch norm over all processes' images; false = each process normalises its own share, so that the result "
        "depends on their number (on one process chunk_size shows the same effect)",
    )
    loss_scale: Positive = key(
        1.0,
        "factor on the loss before the backward pass, not on the recorded loss; 1 = none. An in-place all_reduce in a "
        "loss, as in the TVLARS authors' Barlow Twins, amounts to 1 / the number of GPUs",
    )
    seed: Count = key(0, "seed of the weights, the order of the samples and their augmentation")
    precision: Literal["fp32", "bf16", "fp16"] = key("fp32", "arithmetic of the forward pass; losses are always fp32")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "where to run; auto = the GPU if there is one")
    compile: bool = key(False, "torch.compile the network and, on a GPU, the augmentation; false = off")
    cuda_graphs: bool | None = key(
        None,
        "start a step's augmentation, and its forward and backward pass, as CUDA graphs, checked against plain steps; "
        "null = where that can be (the passes: one GPU, the whole batch, not fp16); true = refuse to run the passes "
        "otherwise; false = off",
    )
    deterministic: bool = key(False, "bitwise equal runs on the same machine and world size; false = faster kernels")
    run_dir: str | None = key(None, "folder of the run's record; null = runs/<what it is>-<identity>")
    resume: Literal["never", "auto"] = key("never", "auto = continue the run in run_dir from its last checkpoint")
    log_every: PositiveInt = key(10, "steps between lines of metrics.jsonl (means over the interval)")
    check_every_epochs: NonNegative = key(
        1.0, "epochs between checks that all processes hold equal parameters; 0 = off"
    )
    tracker: str | None = key(
        None, "one of Accelerate's trackers (tensorboard, wandb, trackio, ...) besides; null = none"
    )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested plain values, as `run.json` holds it; a plug-in's options stand beside its target."""
        plain = dataclasses.asdict(self)
        for name, value in plain.items():
            if isinstance(value, dict) and set(value) == {"target", "options"}:
                plain[name] = {"target": value["target"], **value["options"]} if value["target"] else None
        return json.loads(json.dumps(plain))

    def identity(self) -> str:
        """16 hex digits that name the experiment: equal where, and only where, the result must be equal."""
        irrelevant = IRRELEVANT if self.data.name in ("hf", "folder") else IRRELEVANT | {"data.path"}
        flat = without_additions(flatten(self.to_dict()))
        relevant = {name: value for name, value in flat.items() if name not in irrelevant}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]

    def name(self) -> str:
        """A readable folder name, distinct for distinct experiments."""
        what = self.method.target.split(":")[-1] if self.track == "pretrain" else "clf"
        optimizer = self.optimizer.options.get("name") or self.optimizer.target.split(":")[-1]
        return f"{self.data.name}-{what}-{optimizer}-b{self.batch_size}-s{self.seed}-{self.identity()}".lower()

    def folder(self) -> str:
        """The run's directory: ``run_dir``, or one named after the experiment under ``runs/``."""
        return self.run_dir or f"runs/{self.name()}"


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
