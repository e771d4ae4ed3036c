"""Any optimizer of timm by its name, with the defaults that timm's factory gives it."""

import difflib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer

from ssl_bench.optim.layerwise import check_betas, check_range

# How a step is computed, not what it computes; not part of a record.
EXECUTION = frozenset({"foreach", "fused", "capturable", "differentiable", "verbose"})


def timm_optimizer(
    params: Any,
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float | None = None,
    betas: tuple[float, ...] | None = None,
    eps: Any = None,
    **others: Any,
) -> Optimizer:
    """Make one of timm's optimizers as `timm.optim.create_optimizer_v2` does: momentum 0.9 where it has momentum.

    The groups' own lr and weight_decay hold; "adapt" has no meaning here.

    Args:
        params: Parameters, (name, parameter) pairs, or groups.
        name: timm's name of the optimizer (`timm.optim.list_optimizers()`), such as "lars", "lamb" or "lion".
        lr: Learning rate, >= 0.
        weight_decay: Weight decay as the optimizer understands it, >= 0; 0 turns it off.
        momentum: Momentum in [0, 1), for optimizers that have it; None for timm's default.
        betas: Decay rates of the moments, for optimizers that have them; None for timm's default.
        eps: The optimizer's eps, >= 0 (Adafactor has two), for optimizers that have it; None for timm's default.
        others: Any other keyword of the optimizer, such as trust_coeff of "lars".

    Raises:
        ValueError: for an unknown name, a keyword that the optimizer does not have, a value out of range, an optimizer
            that needs second-order gradients, or one whose package or device is not here.
    """
    given = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps, **others}
    return _create(params, name, _keywords(name, given))


def resolve_options(options: dict[str, Any]) -> dict[str, Any]:
    """The keywords with every default of timm's in words, as a run's record has it; made before any data is read.

    Raises:
        ValueError: as `timm_optimizer`.
    """
    name = options["name"]
    given = {key: value for key, value in options.items() if key != "name"}
    keywords = _keywords(name, given)
    _create([torch.nn.Parameter(torch.ones(2, 2))], name, keywords)  # refuses values out of range
    effective = {key: p.default for key, p in _signature(name).items() if p.default is not inspect.Parameter.empty}
    effective |= {"momentum": 0.9} if _info(name).has_momentum else {}
    effective |= (_info(name).defaults or {}) | keywords
    recorded = {
        key: value for key, value in effective.items() if (key not in EXECUTION and _plain(value)) or key in given
    }
    return {"name": name, **recorded}


timm_optimizer.resolve_options = resolve_options  # type: ignore[attr-defined]


def _plain(value: Any) -> bool:
    """Whether a record can hold the value; a dtype or a function that is the default cannot have been set."""
    return (
        value is None
        or isinstance(value, (bool, int, float, str))
        or (isinstance(value, (tuple, list)) and all(map(_plain, value)))
    )


def _keywords(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The keywords that are not None, each known to the optimizer and in its range."""
    component = f"timm_optimizer[{name}]"
    known = _signature(name)
    keywords = {}
    for key, value in given.items():
        if value is None:
            continue
        if key not in known:
            allowed = ", ".join(sorted(known))
            raise ValueError(f"{component}: {key} must be None, got {value!r} ({name} has no {key}; it has: {allowed})")
        keywords[key] = tuple(value) if isinstance(value, list) else value
    for key in ("lr", "weight_decay"):
        check_range(component, key, keywords[key])
    if "momentum" in keywords:
        check_range(component, "momentum", keywords["momentum"], 0.0, 1.0)
    if "betas" in keywords and _info(name).has_betas:
        check_betas(component, keywords["betas"], _info(name).num_betas)
    return keywords


def _info(name: str) -> Any:
    """What timm knows of an optimizer."""
    import timm.optim  # heavy, and only this optimizer needs it

    known = [str(known_name) for known_name in timm.optim.list_optimizers()]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"timm_optimizer: unknown optimizer {name!r}{hint} (known: {', '.join(known)})")
    info = timm.optim.get_optimizer_info(name)
    if info.second_order:
        raise ValueError(
            f"timm_optimizer: name must be a first-order optimizer, got {name!r} (the training loop makes no "
            "second-order gradients)"
        )
    return info


@cache
def _signature(name: str) -> dict[str, inspect.Parameter]:
    """The keywords of an optimizer's class."""
    import timm.optim

    _info(name)
    with _one_line(name):
        found = timm.optim.get_optimizer_class(name, bind_defaults=False)
        return {key: p for key, p in inspect.signature(found).parameters.items() if key != "params"}


def _create(params: Any, name: str, keywords: dict[str, Any]) -> Optimizer:
    import timm.optim

    with _one_line(name):
        return timm.optim.create_optimizer_v2(params, name, **keywords)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Says in one line why an optimizer cannot be made: apex's and bitsandbytes's assert a GPU and their package."""
    try:
        yield
    except (AssertionError, AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"timm_optimizer[{name}]: cannot be created here: {reason}") from error
