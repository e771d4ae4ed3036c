"""A recipe's optimizer and schedule made once on next to nothing: what they refuse is known before data is read."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ssl_bench.recipe import registry
from ssl_bench.recipe.schema import Plugin, Recipe

# Steps of an epoch, before the data set's size is known: more than any has, and few. What both refuse is refused.
_MANY = 1e9


def trial(recipe: Recipe) -> Any:
    """Makes the optimizer on two small tensors, and the suite's own schedule; one from outside takes a step too.

    Returns:
        the optimizer.

    Raises:
        ValueError: one line that names the key; a value out of range. An optimizer from outside cannot be made, or
            wants what the training loop does not give: a closure (SAM, LBFGS) or second-order gradients.
    """
    node = recipe.schedule
    if node.target in registry.builtin("schedule"):
        _made(
            recipe, node, "schedule", lambda total, given: make_schedule(node.target, total, recipe.batch_size, given)
        )
    if recipe.optimizer.target not in registry.builtin("optimizer"):
        return _outside(recipe.optimizer.target, recipe.optimizer.options)
    factory = registry.resolve("optimizer", recipe.optimizer.target)
    return _made(recipe, recipe.optimizer, "optimizer", lambda _, given: factory(_two_tensors(), **given))


def make_schedule(target: str, total_steps: int, batch_size: int, options: Mapping[str, Any]) -> Callable[[int], float]:
    """A learning rate's multiplier by step.

    Args:
        target: the schedule's name.
        total_steps, batch_size: the run's length and global batch, passed where the schedule takes them.
        options: its keywords, all durations in steps.
    """
    make = registry.resolve("schedule", target)
    known = {"total_steps": total_steps, "batch_size": batch_size}
    passed = {name: value for name, value in known.items() if name in inspect.signature(make).parameters}
    return make(**passed, **options)


def _made(recipe: Recipe, node: Plugin, kind: str, make: Callable[[int, dict[str, Any]], Any]) -> Any:
    refused = ""
    for per_epoch in (1e-3 if recipe.steps else 1.0, _MANY):  # a run of so many steps may be short of an epoch
        total = recipe.steps or max(1, round((recipe.epochs or 0) * per_epoch))
        given = registry.in_steps(registry.resolve(kind, node.target), node.options, per_epoch, total)
        try:
            return make(total, given)
        except ValueError as error:
            refused = str(error)
    whole = {"steps": "total_steps" if recipe.steps is None else f"steps={recipe.steps}"}
    whole |= {"fraction": "1", "epochs": f"epochs={recipe.epochs or 0:g}"}
    raise ValueError(registry.in_recipes_terms(kind, refused, node.options, whole))


def _outside(target: str, values: dict[str, Any]) -> Any:
    factory = registry.resolve("optimizer", target)
    params = _two_tensors()
    try:
        made = factory(params, **registry.in_steps(factory, values, 1.0, 1))
    except Exception as error:  # whatever outside code raises
        raise ValueError(f"optimizer {target!r} cannot be made: {_line(error)}") from error
    for param in params:
        param.grad = param.detach().clone()
    try:
        if callable(getattr(made, "train", None)):
            made.train()
        if not hasattr(made, "micro_gradients"):
            made.step()
    except Exception as error:
        raise ValueError(
            f"optimizer {target!r} must step from the gradients alone (no closure, no second-order gradients), got "
            f"{_line(error)}"
        ) from error
    return made


def _two_tensors() -> list[Any]:
    import torch  # here, because a mistake in the recipe is told without waiting for torch

    return [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
