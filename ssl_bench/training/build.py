"""From a recipe to the objects of a run: outside ``ssl_bench.recipe`` this is the one place that reads a recipe."""

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_bench.augment.views import Normalize, RandomResizedCropFlip
from ssl_bench.data import sampler
from ssl_bench.data.dataset import Dataset
from ssl_bench.data.pipeline import Pipeline
from ssl_bench.methods.base import Method
from ssl_bench.optim.averaging import WeightAverage, has_evaluation_point
from ssl_bench.optim.groups import build_groups, hold_frozen
from ssl_bench.optim.layerwise import is_replayable
from ssl_bench.optim.schedules import batch_scale
from ssl_bench.optim.telemetry import Telemetry
from ssl_bench.recipe import registry
from ssl_bench.recipe.identity import differences, flatten, is_its_path
from ssl_bench.recipe.schema import Recipe
from ssl_bench.recipe.trial import make_schedule
from ssl_bench.records.provenance import collect_provenance
from ssl_bench.records.tracker import Tracker
from ssl_bench.runtime.distributed import assert_equal_parameters, synchronize_batch_norm
from ssl_bench.runtime.paths import file_name
from ssl_bench.runtime.sync_batchnorm import SyncBatchNorm
from ssl_bench.training.build_data import about_images, dataset, evaluation_dataset, pipeline, stats, views
from ssl_bench.training.build_networks import backbone, check_images, classifier, method, trained_backbone
from ssl_bench.training.evaluation import Evaluation
from ssl_bench.training.evaluation_point import evaluation_point
from ssl_bench.training.gradient import compute_gradient, unreached_parameters
from ssl_bench.training.graphs import GraphedGradient, GraphedUpdate, averaged
from ssl_bench.training.loop import Hook, Trainer
from ssl_bench.training.memory.recompute import recompute_blocks, recomputed
from ssl_bench.training.micro_gradients import MicroBatches
from ssl_bench.training.plan import Plan, Rhythm
from ssl_bench.training.processes import Processes, processes
from ssl_bench.training.rehearsal import listed
from ssl_bench.training.session import Session

__all__ = [
    "about_images",
    "backbone",
    "check_images",
    "classifier",
    "dataset",
    "evaluation",
    "evaluation_dataset",
    "method",
    "optimizer",
    "pipeline",
    "plan",
    "plan_at",
    "processes",
    "provenance",
    "schedule",
    "session",
    "stats",
    "trained_backbone",
    "trainer",
    "views",
]

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
        length=_length(recipe),
        precision=recipe.precision,
        resume=recipe.resume,
        differences=differences,
        keep=recipe.checkpoint.keep,
        keep_last=recipe.checkpoint.final,
        tracker=Tracker(recipe.tracker, Path(recipe.folder()), recipe.name(), flatten(recipe.to_dict()))
        if recipe.tracker
        else None,
    )


def _length(recipe: Recipe) -> str:
    if recipe.steps:
        return f"{recipe.steps} step{'s' if recipe.steps != 1 else ''}"
    return f"{recipe.epochs:g} epoch{'s' if recipe.epochs != 1 else ''}"


def _graph_obstacle(recipe: Recipe, where: Processes) -> str | None:
    """Why steps cannot be CUDA graphs here; None where they can."""
    if where.device.type != "cuda":
        return f"the device is {where.device.type}"
    if recipe.chunk_size not in (None, recipe.batch_size):
        return "chunk_size splits the batch"
    if recipe.recompute != "none":
        return f"recompute={recipe.recompute} keeps track of random numbers on the host"
    return "fp16's gradient scaler waits for the device" if recipe.precision == "fp16" else None


def _graphs_steps(recipe: Recipe, where: Processes) -> bool:
    """With several processes on request only: no run has shown yet how NCCL's collectives are replayed."""
    wanted = recipe.cuda_graphs is not False if where.world_size == 1 else bool(recipe.cuda_graphs)
    return wanted and _graph_obstacle(recipe, where) is None


# --------------------------------------------------------------------------------------------------------- training


def plan(recipe: Recipe, train_size: int) -> Plan:
    """All durations in steps, from the number of train images."""
    return plan_at(recipe, sampler.steps_per_epoch(recipe.batch_size, train_size, recipe.last_batch))


def plan_at(recipe: Recipe, per_epoch: float) -> Plan:
    """The same from the number of steps in an epoch."""
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
    return made, schedule(recipe, plan)


def schedule(recipe: Recipe, plan: Plan) -> Callable[[int], float]:
    """The learning rate's multiplier by step, for a plan's length."""
    return make_schedule(recipe.schedule.target, plan.total, recipe.batch_size, plan.schedule)


def _loss_in_tf32(recipe: Recipe) -> bool:
    return recipe.precision != "fp32"


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
    if recipe.recompute == "blocks":
        recompute_blocks(task)
    made, multiplier = optimizer(recipe, task, plan)
    if hasattr(made, "micro_gradients"):
        made.micro_gradients = MicroBatches.of(plan.optimizer, task, batches, where)
    gradient: Callable[..., dict[str, Tensor]] = partial(compute_gradient, tf32=_loss_in_tf32(recipe))
    update = None
    if graphs := _graphs_steps(recipe, where):
        if where.world_size > 1:
            assert_equal_parameters(task)  # as DistributedDataParallel would see to
            gradient = averaged(gradient, task)
        gradient = graphed = GraphedGradient(gradient, task, partial(_without_graphs, recipe, where))
        if is_replayable(made):
            update = GraphedUpdate(made, lambda: graphed.replaying, partial(_plain_update, where))
    starts_kernels = where.device.type == "cuda" and where.world_size > 1 and not graphs
    unused = []
    if where.world_size > 1:
        unused = _unused_parameters(task, batches, where)
    if recipe.compile:
        for part in task.children():
            part.compile()
    with warnings.catch_warnings():
        # Accelerate knows DistributedDataParallel's broadcast_buffers by the name that torch is about to drop.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model = where.accelerator.prepare_model(task, evaluation_mode=graphs)  # true: not for several processes
        wrapped = where.accelerator.prepare_optimizer(made)
    return Trainer(
        model=model,
        optimizer=wrapped,
        schedule=multiplier,
        gradient=gradient,
        pipeline=batches,
        rhythm=_rhythm(recipe, plan, where),
        accelerator=where.accelerator,
        telemetry=Telemetry(made, every=recipe.telemetry.every),
        io=run,
        hooks=hooks,
        loss_scale=recipe.loss_scale,
        evaluation_point=evaluation_point(made, task, batches, where.accelerator.autocast),
        graphed_update=update,
        unused=unused,
        host_bound=partial(_host_bound, where) if starts_kernels else None,
    )


def _unused_parameters(task: Method, batches: Pipeline, where: Processes) -> list[str]:
    """Parameters without a gradient; where there are some, DistributedDataParallel looks for them at every step."""
    rows = next(iter(batches.batches(0, 1))).views(0)
    with where.accelerator.autocast():
        names = unreached_parameters(task, [view[:4] for view in rows])
    where.accelerator.ddp_handler.find_unused_parameters = bool(names)
    if names:
        where.say(f"not trained, as no output depends on it: {listed(names)}")
    return names


def _host_bound(where: Processes, milliseconds: float) -> None:
    """The host's time does not fall with a process's share of the batch: then more of them are no faster."""
    where.say(
        f"the GPUs wait for the host, which takes {milliseconds:.1f} ms to start a step on any number of them: "
        "fewer may be as fast (see cuda_graphs in docs/speed.md)"
    )


def _without_graphs(recipe: Recipe, where: Processes, reason: str) -> None:
    if recipe.cuda_graphs:
        raise ValueError(f"cuda_graphs must be null or false, got true: {reason}")
    where.say(f"without CUDA graphs: {reason}")


def _plain_update(where: Processes, reason: str) -> None:
    where.say(f"the optimizer's step runs without a CUDA graph: {reason}")


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
        "tf32": "the loss's matrix products" if where.device.type == "cuda" and _loss_in_tf32(recipe) else "nowhere",
        "recomputed": recomputed(trainer.module),
        "evaluated": trainer.module.evaluated,
        "evaluated_weights": str(getattr(trainer.evaluation_point, "about", "the last step's")),
        "batch_norm": f"batch norm over {seen} of {recipe.batch_size} images" if has_norm else "none",
        "batch_norm_computed": _batch_norm_kernel(trainer.module, where) if has_norm else "none",
    }


def _batch_norm_kernel(module: nn.Module, where: Processes) -> str:
    """What computes batch norm: on the CPU two ways differ by rounding, which a network of ReLUs amplifies."""
    if where.world_size == 1 or not any(isinstance(layer, SyncBatchNorm) for layer in module.modules()):
        return f"by torch's kernel ({where.device.type})"
    return "by torch's kernels for several processes" if where.device.type == "cuda" else "by plain operations (cpu)"


# ------------------------------------------------------------------------------------------------------- evaluation


def _label(data: Dataset) -> str:
    """A data set's name in a protocol's; with its content where the name does not say what it is."""
    name = file_name(data.name.split(":")[-1])
    return f"{name}-{data.content[:8]}" if is_its_path(data.name) and data.content else name


def evaluation(recipe: Recipe, data: Dataset, where: Processes) -> Evaluation:
    """How the recipe's models are evaluated; normalised by the statistics of what they were trained on."""
    normalization, options = stats(recipe, data), recipe.eval
    on = evaluation_dataset(recipe, data, where)
    return Evaluation(
        processes=where,
        dataset=on,
        elsewhere="" if on is data else _label(on),
        evaluators=[registry.resolve("evaluator", name) for name in options.protocols],
        transform=Normalize(**normalization),
        augment=RandomResizedCropFlip(data.train.image_shape[-1], **normalization),
        seed=options.seed,
        precision=options.precision,
        batch_size=options.batch_size,
        own_statistics=where.world_size > 1 and not recipe.sync_batch_norm,
    )
