"""What a recipe comes to for a train set of a given size: steps, optimizer, schedule and rhythm."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssl_bench.data import sampler
from ssl_bench.optim.groups import build_groups
from ssl_bench.optim.schedules import batch_scale
from ssl_bench.recipe import registry
from ssl_bench.recipe.schema import Recipe
from ssl_bench.training.loop import Rhythm


@dataclass(frozen=True)
class Plan:
    """Every duration of a run in steps, computed once."""

    steps_per_epoch: float
    total: int
    optimizer: dict[str, Any]
    schedule: dict[str, Any]

    def every(self, epochs: float) -> int:
        """A period given in epochs, in steps; 0 stays 0 = never."""
        return max(1, round(epochs * self.steps_per_epoch)) if epochs else 0


def make_plan(recipe: Recipe, train_size: int) -> Plan:
    """All durations in steps, from the number of train images."""
    per_epoch = sampler.steps_per_epoch(recipe.batch_size, train_size, recipe.last_batch)
    total = recipe.steps or max(1, round((recipe.epochs or 0) * per_epoch))
    return Plan(
        per_epoch,
        total,
        *(
            registry.in_steps(registry.resolve(kind, node.target), node.options, per_epoch, total)
            for kind, node in (("optimizer", recipe.optimizer), ("schedule", recipe.schedule))
        ),
    )


def build_optimizer(
    recipe: Recipe, task: nn.Module, plan: Plan
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """The optimizer of a network's parameters, each group with its ``initial_lr``, and the schedule."""
    options = dict(plan.optimizer)
    scale = batch_scale(recipe.scaling.rule, recipe.batch_size, recipe.scaling.base_batch)
    options["lr"] = options["lr"] * scale
    groups = recipe.param_groups
    built = build_groups(
        task,
        lr=options["lr"],
        weight_decay=options.get("weight_decay", 0.0),
        decay_1d=groups.decay_1d,
        adapt_1d=groups.adapt_1d,
        lr_1d=None if groups.lr_1d is None else groups.lr_1d * scale,
        exclude=tuple(groups.exclude),
    )
    optimizer = registry.resolve("optimizer", recipe.optimizer.target)(built, **options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    make = registry.resolve("schedule", recipe.schedule.target)
    length = {"total_steps": plan.total} if "total_steps" in inspect.signature(make).parameters else {}
    return optimizer, make(**length, **plan.schedule)


def make_rhythm(recipe: Recipe, plan: Plan, *, several: bool) -> Rhythm:
    """How often what happens; ``several`` processes have something to compare."""
    checkpoint = recipe.checkpoint
    every = checkpoint.every_steps if checkpoint.every_steps is not None else plan.every(checkpoint.every_epochs or 0)
    check_equal = plan.every(recipe.check_every_epochs) if several else 0
    snapshots = frozenset(round(share * plan.total) for share in checkpoint.snapshots)
    return Rhythm(plan.total, recipe.log_every, every, check_equal, snapshots)
