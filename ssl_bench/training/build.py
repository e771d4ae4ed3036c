"""From a recipe to the objects of a run: outside ``ssl_bench.recipe`` this is the one place that reads a recipe."""

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_bench.augment.views import (
    Labels,
    Noise,
    Normalize,
    PadCropFlipRotate,
    RandomResizedCropFlip,
    SSLView,
    View,
)
from ssl_bench.data import sampler
from ssl_bench.data.dataset import Dataset, hold_out, load_dataset
from ssl_bench.data.pipeline import Pipeline
from ssl_bench.methods import views as declarations
from ssl_bench.methods.base import Method
from ssl_bench.methods.classifier import Classifier
from ssl_bench.methods.views import Crop, PaddedCrop
from ssl_bench.models import backbone as backbones
from ssl_bench.models.backbone import create_backbone, load_backbone, seeded
from ssl_bench.models.pretrained import load_published, load_weights
from ssl_bench.optim.averaging import WeightAverage, has_evaluation_point
from ssl_bench.optim.groups import build_groups, hold_frozen
from ssl_bench.optim.schedules import batch_scale
from ssl_bench.optim.telemetry import Telemetry
from ssl_bench.recipe import registry, weights
from ssl_bench.recipe.schema import Recipe, differences, flatten, is_its_path
from ssl_bench.records.provenance import collect_provenance
from ssl_bench.runtime import seeds
from ssl_bench.runtime.console import say
from ssl_bench.runtime.distributed import synchronize_batch_norm
from ssl_bench.training.evaluation import Evaluation
from ssl_bench.training.evaluation_point import evaluation_point
from ssl_bench.training.gradient import compute_gradient
from ssl_bench.training.graphs import GraphedGradient
from ssl_bench.training.loop import Hook, Trainer
from ssl_bench.training.micro_gradients import MicroBatches
from ssl_bench.training.plan import Plan, Rhythm
from ssl_bench.training.processes import Processes, contents, processes
from ssl_bench.training.session import Session

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLUR_REFERENCE = 224  # pixels; the side of the images for which Barlow Twins' sigma of 0.1 to 2.0 is meant

# --------------------------------------------------------------------------------------------------------- session


def session(recipe: Recipe) -> Session:
    """The run that a recipe describes, in its directory, to be entered.

    Raises:
        ValueError: in one line; the recipe does not fit this machine or its processes.
    """
    where = processes(recipe)
    sampler.images_per_chunk(recipe.batch_size, recipe.chunk_size, where.world_size)  # before any data is read
    check_images(recipe, recipe.data.size)
    if recipe.model.checkpoint or recipe.model.pretrained:
        backbone(recipe)  # weights that do not fit are found before the folder is made and data is read
    if where.world_size > 1 and hasattr(registry.resolve("optimizer", recipe.optimizer.target), "micro_gradients"):
        name = recipe.optimizer.target
        raise ValueError(
            f"optimizer={name} must run on one process, whose micro-batches it takes, got {where.world_size}"
        )
    obstacle = _graph_obstacle(recipe, where)
    if recipe.cuda_graphs and obstacle:
        raise ValueError(f"cuda_graphs must be null or false, got true: {obstacle}")
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = where.device.type == "cuda"
    return Session(
        where,
        folder=recipe.folder(),
        recipe=recipe.to_dict(),
        identity=recipe.identity(),
        title=recipe.name(),
        precision=recipe.precision,
        resume=recipe.resume,
        differences=differences,
        keep=recipe.checkpoint.keep,
        keep_last=recipe.checkpoint.final,
        tracker=flatten(recipe.to_dict()) if recipe.tracker else None,
    )


def _graph_obstacle(recipe: Recipe, where: Processes) -> str | None:
    """Why steps cannot be CUDA graphs here; None where they can."""
    if where.device.type != "cuda":
        return f"the device is {where.device.type}"
    if where.world_size > 1:
        return f"there are {where.world_size} processes"
    if recipe.chunk_size not in (None, recipe.batch_size):
        return "chunk_size splits the batch"
    return "fp16's gradient scaler waits for the device" if recipe.precision == "fp16" else None


def _graphs_steps(recipe: Recipe, where: Processes) -> bool:
    return recipe.cuda_graphs is not False and _graph_obstacle(recipe, where) is None


# ------------------------------------------------------------------------------------------------------------- data


def dataset(recipe: Recipe, where: Processes) -> Dataset:
    """The recipe's data set, on the device.

    Raises:
        ValueError, OSError: in one line; among others, it lacks the labels or the test split that the run needs.
    """
    options, evaluation = recipe.data, recipe.eval
    classify = recipe.track == "classify"
    own = evaluation.data is None and bool(evaluation.protocols or evaluation.online_every_epochs)
    loaded = load_dataset(
        options.name,
        locate=registry.foreign("dataset", options.name),
        path=options.path,
        size=options.size,
        resident=options.resident,
        workers=options.workers,
        cache_dir=options.cache_dir,
        hf_config=options.hf_config,
        content=options.content,
        labels=classify or own or options.holdout > 0,
        test=(classify or own) and options.holdout == 0,
    )
    check_images(recipe, loaded.train.image_shape[-1])
    data = (hold_out(loaded, options.holdout) if options.holdout else loaded).to(where.device)
    where.compare(contents(data) if where.world_size > 1 else {})
    return data


def evaluation_dataset(recipe: Recipe, data: Dataset, where: Processes) -> Dataset:
    """What the recipe's backbones are evaluated on, on the device: ``eval.data``, or what they are trained on."""
    options = recipe.eval
    if options.data is None or recipe.track == "classify":
        return data
    return load_dataset(
        options.data,
        locate=registry.foreign("dataset", options.data),
        path=options.data_path,
        size=options.data_size or data.train.image_shape[-1],
        resident=recipe.data.resident,
        workers=recipe.data.workers,
        cache_dir=recipe.data.cache_dir,
        content=options.data_content,
    ).to(where.device)


def _stats(recipe: Recipe, data: Dataset) -> dict[str, Any]:
    if recipe.augment.stats == "imagenet":
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return {"mean": data.mean, "std": data.std}


def about_images(recipe: Recipe, data: Dataset) -> dict[str, Any]:
    """What a user of the backbone must do to images: "mean" and "std" of each channel, and "size" in pixels."""
    return {key: [float(x) for x in value] for key, value in _stats(recipe, data).items()} | {
        "size": data.train.image_shape[-1]
    }


def _view_options(recipe: Recipe, data: Dataset, where: Processes) -> dict[str, Any]:
    """What all training views share. On a CPU, compiling them costs time; on a GPU it saves kernels."""
    gpu = where.device.type == "cuda"
    return {
        "dtype": COMPUTE_DTYPE[recipe.precision],
        "compile": recipe.compile and gpu,
        "graph": recipe.cuda_graphs is not False and gpu,
        **_stats(recipe, data),
    }


def views(recipe: Recipe, data: Dataset, declared: Sequence[Any], where: Processes) -> list[View]:
    """Makes what a method declares as its views, with what it leaves open taken from the recipe.

    Raises:
        ValueError: in one line; an unknown view, or a crop that the images are too small for.
    """
    options, crops, made = recipe.augment, 0, list[View]()
    shared = _view_options(recipe, data, where)
    for number, view in enumerate(declared):
        if isinstance(view, Crop):
            made.append(_crop(recipe, data, view, f"views[{number}]", crops % 2, shared))
            crops += 1
        elif isinstance(view, PaddedCrop):
            made.append(PadCropFlipRotate(pad=options.pad, flip=options.flip, degrees=options.rotation, **shared))
        elif isinstance(view, declarations.Noise):
            made.append(Noise(view.width))
        elif isinstance(view, declarations.Labels):
            made.append(Labels())
        else:
            raise ValueError(f"views[{number}] must be a Crop, PaddedCrop, Noise or Labels, got {view!r}")
    return made


def _crop(recipe: Recipe, data: Dataset, crop: Crop, name: str, like: int, shared: dict[str, Any]) -> SSLView:
    """One random crop; blur is drawn for pixels of the crop, whose scale is that of the images."""
    options, side = recipe.augment, data.train.image_shape[-1]
    size = side if crop.size is None else crop.size if not 0 < crop.size < 1 else max(1, round(crop.size * side))
    if not 0 < size <= side or size != int(size):
        raise ValueError(f"{name}: a crop's size must be pixels up to the images' {side}, or a fraction, got {size}")
    factor = side / BLUR_REFERENCE if options.blur == "scaled" else 1.0
    blur_p = options.blur_p[like] if crop.blur_p is None else crop.blur_p
    solarize_p = options.solarize_p[like] if crop.solarize_p is None else crop.solarize_p
    return SSLView(
        int(size),
        crop_scale=options.crop_scale if crop.scale is None else crop.scale,
        flip=options.flip,
        jitter=options.jitter,
        jitter_p=options.jitter_p if crop.color else 0.0,
        gray_p=options.gray_p if crop.color else 0.0,
        blur_p=blur_p if crop.color and options.blur != "off" else 0.0,
        blur_sigma=(options.blur_sigma[0] * factor, options.blur_sigma[1] * factor),
        solarize_p=solarize_p if crop.color else 0.0,
        **shared,
    )


def pipeline(recipe: Recipe, data: Dataset, views: Sequence[View], where: Processes, **instead: Any) -> Pipeline:
    """The run's batches.

    Args:
        recipe: whose batch size, seed and track count.
        data: the data set, on the device.
        views: make the network's inputs.
        where: which share of each batch this process computes.
        instead: keywords of `Pipeline` that replace the recipe's (a measurement of a run's snapshots has its own seed).
    """
    options = {
        "seed": recipe.seed,
        "batch_size": recipe.batch_size,
        "chunk_size": recipe.chunk_size,
        "last_batch": recipe.last_batch,
        **instead,
    }
    return Pipeline(data.train, views, rank=where.rank, world_size=where.world_size, device=where.device, **options)


# --------------------------------------------------------------------------------------------------------- networks


def backbone(recipe: Recipe, *, fresh: bool = False) -> tuple[nn.Module, int]:
    """The backbone before the first step and its feature dimension; the same for equal seeds.

    Args:
        recipe: whose model and seed count.
        fresh: leave out the weights that the recipe starts from (``model.checkpoint``, ``model.pretrained``).

    Raises:
        ValueError, OSError: in one line; no such model, or weights that are not there or do not fit.
    """
    model = recipe.model
    sizes: dict[str, Any] = {"img_size": model.img_size, "patch_size": model.patch_size}
    network, feature_dim = create_backbone(
        model.name,
        stem=model.stem,
        init=model.init,
        seed=seeds.derive_seed(recipe.seed, seeds.INIT),
        factory=registry.foreign("backbone", model.name),
        **sizes,
    )
    if not fresh and model.checkpoint is not None:
        found = weights.digest(model.checkpoint)
        if found != model.checkpoint_sha256:
            raise ValueError(
                f"model.checkpoint must be the file that the run started from, SHA-256 {model.checkpoint_sha256}..., "
                f"got {model.checkpoint} with {found}..."
            )
        _say_once(load_weights(network, weights.locate(model.checkpoint)))
    elif not fresh and model.pretrained:
        given = {key: value for key, value in sizes.items() if value is not None}
        _say_once(load_published(network, model.name, **given))
    return network, feature_dim


@cache  # a run also evaluates what it started from
def _say_once(line: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        say(line)


def check_images(recipe: Recipe, side: int | None) -> None:
    """Checks that the recipe's model takes images of a size (None = of any); one from outside says so itself.

    Raises:
        ValueError: in one line.
    """
    model = recipe.model
    if registry.foreign("backbone", model.name) is None:
        backbones.check_images(model.name, side, stem=model.stem, img_size=model.img_size, patch_size=model.patch_size)


def trained_backbone(recipe: Recipe, path: Path) -> nn.Module:
    """The backbone that a run of the recipe left as ``backbone.safetensors``."""
    return load_backbone(path, factory=registry.foreign("backbone", recipe.model.name))[0]


def method(recipe: Recipe) -> Method:
    """The untrained backbone with the pretraining method around it; the same for equal seeds."""
    network, feature_dim = backbone(recipe)
    make = registry.resolve("method", recipe.method.target)
    with seeded(seeds.derive_seed(recipe.seed, seeds.PROJECTOR)):
        return make(network, feature_dim, **recipe.method.options)


def classifier(recipe: Recipe, num_classes: int) -> Classifier:
    """The untrained classifier; the same for equal seeds."""
    network, feature_dim = backbone(recipe)
    with seeded(seeds.derive_seed(seeds.derive_seed(recipe.seed, seeds.INIT), seeds.INIT, 1)):
        return Classifier(network, feature_dim, num_classes)


# --------------------------------------------------------------------------------------------------------- training


def plan(recipe: Recipe, train_size: int) -> Plan:
    """All durations in steps, from the number of train images."""
    per_epoch = sampler.steps_per_epoch(recipe.batch_size, train_size, recipe.last_batch)
    total = recipe.steps or max(1, round((recipe.epochs or 0) * per_epoch))
    optimizer, schedule = (
        registry.in_steps(registry.resolve(kind, node.target), node.options, per_epoch, total)
        for kind, node in (("optimizer", recipe.optimizer), ("schedule", recipe.schedule))
    )
    return Plan(per_epoch, total, optimizer, schedule)


def optimizer(recipe: Recipe, task: nn.Module, plan: Plan) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """The optimizer of a network's parameters, each group with its ``initial_lr``, and the schedule."""
    options = dict(plan.optimizer)
    scale = batch_scale(recipe.scaling.rule, recipe.batch_size, recipe.scaling.base_batch)
    options["lr"] = options["lr"] * scale
    groups = recipe.param_groups
    params = build_groups(
        task,
        lr=options["lr"],
        weight_decay=options.get("weight_decay", 0.0),
        decay_1d=groups.decay_1d,
        adapt_1d=groups.adapt_1d,
        lr_1d=None if groups.lr_1d is None else groups.lr_1d * scale,
        exclude=tuple(groups.exclude),
        freeze=tuple(groups.freeze),
        freeze_steps=round(groups.freeze_epochs * plan.steps_per_epoch),
    )
    made = registry.resolve("optimizer", recipe.optimizer.target)(params, **options)
    for group in made.param_groups:
        group["initial_lr"] = group["lr"]
    hold_frozen(made)
    average = recipe.averaging
    if average.kind != "none":
        WeightAverage(made, average.kind, average.decay, round(average.start_fraction * plan.total))
    if has_evaluation_point(made):
        made.train()
    make = registry.resolve("schedule", recipe.schedule.target)
    known = {"total_steps": plan.total, "batch_size": recipe.batch_size}
    passed = {name: value for name, value in known.items() if name in inspect.signature(make).parameters}
    return made, make(**passed, **plan.schedule)


def _rhythm(recipe: Recipe, plan: Plan, where: Processes) -> Rhythm:
    checkpoint = recipe.checkpoint
    every = checkpoint.every_steps if checkpoint.every_steps is not None else plan.every(checkpoint.every_epochs or 0)
    check_equal = plan.every(recipe.check_every_epochs) if where.world_size > 1 else 0
    snapshots = frozenset(round(share * plan.total) for share in checkpoint.snapshots)
    return Rhythm(plan.total, recipe.log_every, every, check_equal, snapshots)


def trainer(
    recipe: Recipe, plan: Plan, task: Method, batches: Pipeline, hooks: Sequence[Hook], run: Session
) -> Trainer:
    """The loop with everything that it works with.

    Args:
        recipe: whose optimizer, schedule, precision and intervals count.
        plan: its durations in steps.
        task: the method, which is moved to the device.
        batches: what it trains on.
        hooks: what is measured during training.
        run: the session, which the loop writes to.
    """
    where = run.processes
    task = task.to(where.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if where.world_size > 1 and recipe.sync_batch_norm:
        synchronize_batch_norm(task)  # in place: a method is no batch norm itself
    made, schedule = optimizer(recipe, task, plan)
    if hasattr(made, "micro_gradients"):
        made.micro_gradients = MicroBatches.of(plan.optimizer, task, batches, where)
    gradient: Callable[..., dict[str, Tensor]] = compute_gradient
    if _graphs_steps(recipe, where):
        gradient = GraphedGradient(compute_gradient, task, partial(_without_graphs, recipe, where))
    if recipe.compile:
        for part in task.children():
            part.compile()
    with warnings.catch_warnings():
        # Accelerate knows DistributedDataParallel's broadcast_buffers by the name that torch is about to drop.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model, wrapped = where.accelerator.prepare(task, made)
    return Trainer(
        model=model,
        optimizer=wrapped,
        schedule=schedule,
        gradient=gradient,
        pipeline=batches,
        rhythm=_rhythm(recipe, plan, where),
        accelerator=where.accelerator,
        telemetry=Telemetry(made, every=recipe.telemetry.every),
        io=run,
        hooks=hooks,
        loss_scale=recipe.loss_scale,
        evaluation_point=evaluation_point(made, task, batches, where.accelerator.autocast),
    )


def _without_graphs(recipe: Recipe, where: Processes, reason: str) -> None:
    if recipe.cuda_graphs:
        raise ValueError(f"cuda_graphs must be null or false, got true: {reason}")
    where.say(f"without CUDA graphs: {reason}")


def provenance(recipe: Recipe, plan: Plan, trainer: Trainer, where: Processes) -> dict[str, Any]:
    """What run.json says of this start besides the recipe: versions, hardware, groups, durations, batch norm."""
    seen = (recipe.chunk_size or recipe.batch_size) // (1 if recipe.sync_batch_norm else where.world_size)
    has_norm = any(isinstance(module, _BatchNorm) for module in trainer.module.modules())
    return {
        **collect_provenance(
            track=recipe.track,
            seeds={"run": recipe.seed, "probes": recipe.eval.seed},
            world_size=where.world_size,
            param_groups=trainer.optimizer.param_groups,
            device=where.device,
        ),
        "plan": {
            "total_steps": plan.total,
            "steps_per_epoch": plan.steps_per_epoch,
            "optimizer": plan.optimizer,
            "schedule": plan.schedule,
        },
        "cuda_graphs": _graphs_steps(recipe, where),
        "evaluated": trainer.module.evaluated,
        "evaluated_weights": str(getattr(trainer.evaluation_point, "about", "the last step's")),
        "batch_norm": f"batch norm over {seen} of {recipe.batch_size} images" if has_norm else "none",
    }


# ------------------------------------------------------------------------------------------------------- evaluation


def _label(data: Dataset) -> str:
    """A data set's name in a protocol's; with its content where the name does not say what it is."""
    return f"{data.name}-{data.content[:8]}" if is_its_path(data.name) else data.name


def evaluation(recipe: Recipe, data: Dataset, where: Processes) -> Evaluation:
    """How the recipe's models are evaluated; normalised by the statistics of what they were trained on."""
    stats, options = _stats(recipe, data), recipe.eval
    on = evaluation_dataset(recipe, data, where)
    return Evaluation(
        processes=where,
        dataset=on,
        elsewhere="" if on is data else _label(on),
        evaluators=[registry.resolve("evaluator", name) for name in options.protocols],
        transform=Normalize(**stats),
        augment=RandomResizedCropFlip(data.train.image_shape[-1], **stats),
        seed=options.seed,
        precision=options.precision,
        batch_size=options.batch_size,
        own_statistics=where.world_size > 1 and not recipe.sync_batch_norm,
    )
