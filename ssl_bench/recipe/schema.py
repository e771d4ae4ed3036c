"""The typed recipe: every setting of one run, checked before any data is read.

Each field carries the help text that ``--help`` prints: what it is, its unit, its range, and the value that turns it
off. `ssl_bench.recipe.compose` builds recipes; the keys of methods, optimizers and schedules are not listed here but
checked against their signatures by `ssl_bench.recipe.registry`.
"""

import json
import os
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from ssl_bench.recipe.identity import identity
from ssl_bench.runtime.paths import file_name

STRICT = ConfigDict(extra="forbid")

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


def key(default: Any, text: str) -> Any:
    """A recipe field with its default and its help text."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class DataOptions:
    """The images."""

    __pydantic_config__ = STRICT
    name: str = key(
        "cifar10",
        "cifar10, cifar100, stl10, stl10_unlabeled, fashion_mnist, tiny_imagenet, digits, hf, folder, webdataset, an "
        "installed entry point, or package.module:function",
    )
    path: str | None = key(
        None,
        "directory to read (for data=hf also a hub id): Hugging Face parquet files, the original archive, class "
        "folders, images without labels, WebDataset's shards, or torchvision's root; null = download into the cache",
    )
    hf_config: str | None = key(
        None, "data=hf: which configuration of the data set; null = the only one, or the default that it names"
    )
    content: str | None = key(
        None,
        "16 hex digits of what lies at the path of data=hf, data=folder and others whose name does not say it: names, "
        "sizes, label counts, samples. The run fills it in and is known by it, wherever the files are moved; given, it "
        "must be right. null = whatever is there",
    )
    size: PositiveInt | None = key(
        None, "side of the square images in pixels; shorter side resized, then centre crop; null = as stored"
    )
    holdout: Annotated[float, Field(ge=0, lt=1)] = key(
        0.0, "fraction of each train class to hold out and evaluate on instead of the test set; 0 = none"
    )
    resident: Literal["auto"] | bool = key(
        "auto",
        "true = keep all images as uint8 on the device, false = stream them through workers, auto = whichever fits",
    )
    workers: Count = key(2, "threads that read ahead while streaming; 0 = read when needed")
    cache_dir: str | None = key(None, "directory of the decoded cache; null = $SSL_BENCH_CACHE or ~/.cache/ssl_bench")


@dataclass
class ModelOptions:
    """The backbone."""

    __pydantic_config__ = STRICT
    name: str = key("resnet18", "any timm model, an installed entry point, or package.module:function")
    stem: Literal["cifar", "cifar_pad2", "imagenet"] = key(
        "cifar",
        "first layers of a ResNet: cifar = 3x3 stride 1 without pooling, cifar_pad2 = the same padded by 2 as in "
        "solo-learn, imagenet = 7x7 stride 2 and max pool, and any other model as it is",
    )
    init: Literal["timm", "torchvision", "kaiming_uniform"] = key(
        "torchvision", "initial weights: timm's default (last norm of each block zero), torchvision's, or the paper's"
    )
    img_size: PositiveInt | None = key(
        None,
        "side in pixels of the images that a model of one image size (ViT, Swin, ...) is made for; null = timm's, "
        "mostly 224",
    )
    patch_size: PositiveInt | None = key(
        None, "side in pixels of a ViT's patches or of ConvNeXt's stem, which must divide the image's; null = timm's"
    )
    dynamic_img_size: bool = key(
        False, "ViT: take images of other sizes than img_size too, as the small crops of DINO and SwAV are; false = one"
    )
    pretrained: bool | str = key(
        False, "weights to start from: true = timm's of this name, fetched; a file = as checkpoint; false = init"
    )
    checkpoint: str | None = key(
        None,
        "file of weights to start from, in the names of timm, torchvision, lightly, solo-learn, an official release or "
        "this suite (also a run's folder); at least 90% of the tensors must fit; null = init",
    )
    checkpoint_sha256: str | None = key(
        None, "filled in: the first 16 hex digits of the SHA-256 of checkpoint, by which a run knows its content"
    )


@dataclass
class Plugin:
    """A method, optimizer or schedule, with its own keys (select it and see --help)."""

    target: str = key("", "a known name, an installed entry point, or package.module:Name")
    options: dict[str, Any] = key({}, "its keyword arguments")


@dataclass
class ScalingOptions:
    """How the learning rate depends on the batch size."""

    __pydantic_config__ = STRICT
    rule: Literal["none", "sqrt", "linear"] = key(
        "none", "multiply lr by 1 (none), sqrt(B / base_batch) or B / base_batch"
    )
    base_batch: PositiveInt = key(256, "images; the batch size at which lr is not rescaled")


@dataclass
class GroupOptions:
    """How bias and norm parameters (ndim <= 1) are treated."""

    __pydantic_config__ = STRICT
    decay_1d: bool = key(False, "apply weight decay to parameters with ndim <= 1; false = none")
    adapt_1d: bool = key(False, "apply layer-wise adaptation to parameters with ndim <= 1; false = plain momentum")
    lr_1d: NonNegative | None = key(None, "learning rate of parameters with ndim <= 1; null = the same as the others")
    exclude: list[str] = key([], "names or glob patterns of other parameters to treat like ndim <= 1; [] = none")
    freeze: list[str] = key(
        [], "names or glob patterns of parameters held still for the first freeze_epochs, such as [head.*]; [] = none"
    )
    freeze_epochs: NonNegative = key(0.0, "epochs before the parameters of freeze are trained; 0 = from the start")


@dataclass
class AveragingOptions:
    """An average of the weights, evaluated and saved in their place."""

    __pydantic_config__ = STRICT
    kind: Literal["none", "ema", "mean"] = key(
        "none",
        "what is evaluated and saved: none = the last weights, ema = their exponential moving average, mean = their "
        "mean (SWA); training itself is the same",
    )
    decay: Annotated[float, Field(ge=0, lt=1)] = key(0.999, "ema: decay per step; 0 = the last weights")
    start_fraction: Annotated[float, Field(ge=0, lt=1)] = key(
        0.0, "part of the run before the first step that counts; 0 = none"
    )


@dataclass
class AugmentOptions:
    """Training augmentation."""

    __pydantic_config__ = STRICT
    crop_scale: tuple[Probability, Probability] = key(
        (0.08, 1.0), "pretraining: range of the crop's area as a fraction of the image's"
    )
    flip: Probability = key(0.5, "probability of a horizontal flip; 0 = never")
    jitter: tuple[NonNegative, NonNegative, NonNegative, Annotated[float, Field(ge=0, le=0.5)]] = key(
        (0.4, 0.4, 0.2, 0.1), "pretraining: brightness, contrast, saturation, hue; 0 = leave that one out"
    )
    jitter_p: Probability = key(0.8, "pretraining: probability of the colour jitter; 0 = never")
    gray_p: Probability = key(0.2, "pretraining: probability of grayscale; 0 = never")
    blur_p: tuple[Probability, Probability] = key(
        (1.0, 0.1), "pretraining: probability of Gaussian blur in view 1 and view 2; 0 = never"
    )
    blur_sigma: tuple[Positive, Positive] = key((0.1, 2.0), "pretraining: range of the blur's sigma in pixels")
    blur: Literal["off", "scaled", "full"] = key(
        "off", "pretraining: no blur, sigma scaled by image size / 224, or sigma as given"
    )
    solarize_p: tuple[Probability, Probability] = key(
        (0.0, 0.2), "pretraining: probability of solarisation in view 1 and view 2; 0 = never"
    )
    pad: Count = key(4, "classification: padding in pixels before the random crop; 0 = no crop")
    rotation: Annotated[float, Field(ge=0, le=180)] = key(
        15.0, "classification: rotation drawn from +- this many degrees; 0 = none"
    )
    stats: Literal["own", "imagenet"] = key("own", "mean and std for normalisation: this train set's, or ImageNet's")


@dataclass
class EvalOptions:
    """Evaluation."""

    __pydantic_config__ = STRICT
    protocols: list[str] = key(
        ["knn-v1", "linear-cached-v1"], "pretraining: evaluators at the end of the run; [] = none"
    )
    data: str | None = key(
        None, "pretraining: the data set to evaluate on, by the names of data.name; null = the one trained on"
    )
    data_path: str | None = key(None, "where eval.data is, as data.path; null = download into the cache")
    data_size: PositiveInt | None = key(
        None, "side of eval.data's images in pixels, as data.size; null = that of the images trained on"
    )
    data_content: str | None = key(None, "what lies at eval.data_path, as data.content; null = whatever is there")
    baseline: bool = key(True, "also evaluate the untrained model, by the same protocols; false = off")
    online_every_epochs: NonNegative = key(
        0.0, "pretraining: epochs between measurements of the online monitor, which are never results; 0 = off"
    )
    test_every_epochs: NonNegative = key(
        1.0, "classification: epochs between measurements on the whole test set; 0 = only at the end"
    )
    batch_size: PositiveInt = key(1000, "images per forward pass, on each process")
    seed: Count = key(0, "seed of the probes, independent of the run's")
    precision: Literal["fp32", "bf16"] = key("fp32", "precision of the feature extraction; fp32 is without TF32")


@dataclass
class TelemetryOptions:
    """Layer statistics."""

    __pydantic_config__ = STRICT
    every: Count = key(10, "steps between records of each layer's norms and trust ratio; 0 = off")


@dataclass
class CheckpointOptions:
    """Checkpoints and snapshots."""

    __pydantic_config__ = STRICT
    every_steps: Count | None = key(None, "steps between checkpoints; 0 = only when interrupted (or give every_epochs)")
    every_epochs: NonNegative | None = key(
        5.0, "epochs between checkpoints; 0 = only when interrupted (or give every_steps)"
    )
    keep: PositiveInt = key(2, "how many checkpoints to keep while the run goes on")
    final: bool = key(
        False, "keep the last checkpoint (with projector or head, and optimizer) after the run; false = delete it"
    )
    snapshots: list[Probability] = key(
        [],
        "fractions of the run, [0, 0.5, 1] = start, middle and end, at which to keep the network's weights for "
        "ssl-bench analyze; [] = none",
    )


@dataclass
class Recipe:
    """All settings of one run."""

    __pydantic_config__ = STRICT
    track: Literal["pretrain", "classify"]
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    method: Plugin = field(default_factory=Plugin)
    optimizer: Plugin = field(default_factory=Plugin)
    schedule: Plugin = field(default_factory=Plugin)
    scaling: ScalingOptions = field(default_factory=ScalingOptions)
    param_groups: GroupOptions = field(default_factory=GroupOptions)
    averaging: AveragingOptions = field(default_factory=AveragingOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    telemetry: TelemetryOptions = field(default_factory=TelemetryOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    batch_size: PositiveInt = key(512, "images per step over all processes, in every step (but see last_batch)")
    last_batch: Literal["carry", "short"] = key(
        "carry",
        "the last batch of an epoch that batch_size does not divide: carry = filled up from the next epoch; short = "
        "the images that are left, whose number the processes and chunks must divide",
    )
    epochs: Positive | None = key(None, "passes over the train set; give this or steps, not both")
    steps: PositiveInt | None = key(None, "optimizer steps; give this or epochs, not both")
    chunk_size: PositiveInt | None = key(
        None,
        "images of the global batch in memory at a time; for networks without batch norm the gradient is the whole "
        "batch's, batch norm is over a chunk; null = the whole batch",
    )
    recompute: Literal["none", "blocks"] = key(
        "none",
        "blocks = keep the inputs of the network's blocks (residual blocks, transformer blocks, the projector) alone "
        "and compute them again in the backward pass: the same result, batch norm over the whole batch, in less memory "
        "and a third more time; not with compile, and without CUDA graphs; none = off",
    )
    sync_batch_norm: bool = key(
        True,
        "batch norm over the images of all processes; false = each process normalises its own, so that results depend "
        "on their number (chunk_size has the same effect on one process)",
    )
    loss_scale: Positive = key(
        1.0,
        "factor on the loss before the backward pass, not on the recorded loss; 1 = none. (An in-place all_reduce in a "
        "loss, as in the TVLARS authors' Barlow Twins, amounts to 1 / number of GPUs.)",
    )
    seed: Count = key(0, "seed of the initial weights, the sample order and the augmentation")
    precision: Literal["fp32", "bf16", "fp16"] = key(
        "fp32", "precision of the forward pass; losses are always fp32, with TF32 on a GPU unless this is fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto = the GPU if there is one")
    compile: bool = key(False, "torch.compile the network and, on a GPU, the augmentation; false = off")
    cuda_graphs: bool | None = key(
        None,
        "replay the augmentation and the forward and backward pass as CUDA graphs, checked against plain steps; null = "
        "where possible (the passes: one GPU, the whole batch, not fp16, no recompute); true = refuse to run the "
        "passes otherwise, and record several GPUs' too (gradients are averaged in one piece); false = off",
    )
    deterministic: bool = key(False, "bitwise reproducible on the same machine and world size; false = faster kernels")
    run_dir: str | None = key(None, "directory of the run's record; null = runs/<what, lr, length, seed>-<identity>")
    resume: Literal["never", "auto"] = key("never", "auto = continue the run in run_dir from its last checkpoint")
    log_every: PositiveInt = key(10, "steps between lines of metrics.jsonl (means over the interval)")
    check_every_epochs: NonNegative = key(
        1.0, "epochs between checks that all processes hold equal parameters; 0 = off"
    )
    tracker: str | None = key(
        None, "also log to one of Accelerate's trackers (tensorboard, wandb, trackio, mlflow, ...); null = none"
    )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested plain values, as in `run.json`; a plug-in's options stand beside its target."""
        plain: dict[str, Any] = json.loads(json.dumps(self, default=vars))  # a third of asdict's time
        for name, value in plain.items():
            if isinstance(value, dict) and set(value) == {"target", "options"}:
                plain[name] = {"target": value["target"], **value["options"]} if value["target"] else None
        return plain

    def identity(self) -> str:
        """16 hex digits that name the experiment: equal if and only if the result must be equal."""
        return identity(self.to_dict())

    def name(self, identity: str | None = None) -> str:
        """A readable directory name, distinct for distinct experiments; with the identity, where it is known.

        DATA-METHOD-MODEL-OPTIMIZER-bBATCH-lrRATE-eEPOCHS (or -stepsSTEPS)-sSEED-IDENTITY.
        """
        what = self.method.target.split(":")[-1] if self.track == "pretrain" else "clf"
        optimizer = self.optimizer.options.get("name") or self.optimizer.target.split(":")[-1]
        data, model = (name.split(":")[-1] for name in (self.data.name, self.model.name))
        length = f"steps{self.steps}" if self.steps else f"e{self.epochs:g}"
        names = [file_name(str(name))[:40] for name in (data, what, model, optimizer)]
        lr = self.optimizer.options.get("lr", 0)  # what only evaluates has no optimizer
        numbers = [f"b{self.batch_size}", f"lr{lr:g}", length, f"s{self.seed}"]
        return "-".join([*names, *numbers, identity or self.identity()]).lower()

    def folder(self) -> str:
        """The run's directory: ``run_dir``, or one named after the experiment under ``runs/``."""
        return os.path.expanduser(self.run_dir) if self.run_dir else f"runs/{self.name()}"
