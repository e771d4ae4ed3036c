"""Parameter groups: which tensors have weight decay, which are adapted layer-wise, and at what learning rate."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_bench.optim.layerwise import check_range

Filter = Sequence[str] | Callable[[str, Tensor], bool]


def build_groups(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    decay_1d: bool = False,
    adapt_1d: bool = False,
    lr_1d: float | None = None,
    exclude: Filter = (),
    exclude_decay: Filter = (),
    exclude_adapt: Filter = (),
    freeze: Filter = (),
    freeze_steps: int = 0,
) -> list[dict[str, Any]]:
    """Sort a module's trainable parameters into groups that any optimizer of this package takes.

    "1-d" tensors are those with ndim <= 1: biases and the scales of normalisation layers.

    Args:
        module: the whole model; a tied parameter counts once, under its first name.
        lr: learning rate, >= 0.
        weight_decay: beta of the tensors that have decay, >= 0; 0 turns it off.
        decay_1d: whether 1-d tensors have decay.
        adapt_1d: whether 1-d tensors are adapted layer-wise.
        lr_1d: learning rate of the 1-d tensors; None for `lr`.
        exclude: name patterns (`*.bn1.*`) or a function (name, parameter) -> bool; neither decay nor adaptation.
        exclude_decay: likewise, no decay.
        exclude_adapt: likewise, no adaptation.
        freeze: likewise, not trained for the first `freeze_steps` steps (see `hold_frozen`).
        freeze_steps: steps, >= 0; 0 freezes nothing.

    Returns:
        Non-empty groups with "params", "param_names", "lr", "weight_decay" and "adapt" ("frozen_steps" where any are
        frozen), in the order of their first parameter, covering every trainable parameter exactly once.

    Raises:
        ValueError: for a negative value, a module without trainable parameters, or a pattern that matches no name.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("lr_1d", lr if lr_1d is None else lr_1d)):
        check_range("build_groups", name, value)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"build_groups: module must have trainable parameters, got a {type(module).__name__} without")
    neither, undecayed, unadapted, frozen = (
        _matching(chosen, named) for chosen in (exclude, exclude_decay, exclude_adapt, freeze)
    )
    groups: dict[tuple[float, float, bool, bool], dict[str, Any]] = {}
    for name, param in named:
        is_1d = param.ndim <= 1
        decays = (decay_1d or not is_1d) and name not in neither | undecayed
        adapts = (adapt_1d or not is_1d) and name not in neither | unadapted
        rate = lr if lr_1d is None or not is_1d else lr_1d
        key = (rate, weight_decay if decays else 0.0, adapts, freeze_steps > 0 and name in frozen)
        group = groups.setdefault(
            key, {"params": [], "param_names": [], "lr": key[0], "weight_decay": key[1], "adapt": key[2]}
        )
        if key[3]:
            group["frozen_steps"] = freeze_steps
        group["params"].append(param)
        group["param_names"].append(name)
    result = list(groups.values())
    check_cover(module, result)
    return result


def hold_frozen(optimizer: Optimizer) -> None:
    """Hold the groups with "frozen_steps" still for so many steps: no update, no momentum, no decay.

    Frozen last layers do what a warm-up does (Gotmare et al. 2019, arXiv 1810.13243). The steps that are left are
    counted down in the group, so a checkpoint has them.
    """

    def hide(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("frozen_steps", 0) > 0:
                for param in group["params"]:
                    param.grad = None

    def count(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("frozen_steps", 0) > 0:
                group["frozen_steps"] -= 1

    if any("frozen_steps" in group for group in optimizer.param_groups):
        optimizer.register_step_pre_hook(hide)
        optimizer.register_step_post_hook(count)
        vars(optimizer)["replayable"] = False  # which is counted on the host


def check_cover(module: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    """Check that groups hold every trainable parameter of a module exactly once, and nothing else.

    Args:
        module: the model.
        groups: parameter groups, or an optimizer's `param_groups`.

    Raises:
        ValueError: names the first parameter that is missing or in more than one place.
    """
    wanted = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    seen: set[int] = set()
    for group in groups:
        for i, param in enumerate(group["params"]):
            if id(param) not in wanted:
                raise ValueError(
                    "check_cover: groups must hold only trainable parameters of the module, got another as number "
                    f"{i} of its group"
                )
            if id(param) in seen:
                name = wanted[id(param)]
                raise ValueError(f"check_cover: groups must hold each parameter once, got {name!r} more than once")
            seen.add(id(param))
    missing = [name for key, name in wanted.items() if key not in seen]
    if missing:
        lost = f"{missing[0]!r} ({len(missing)} in all)"
        raise ValueError(f"check_cover: groups must hold every trainable parameter, got none with {lost}")


def _matching(chosen: Filter, named: Sequence[tuple[str, Tensor]]) -> set[str]:
    """Names of the parameters that a filter chooses."""
    if callable(chosen):
        return {name for name, param in named if chosen(name, param)}
    found: set[str] = set()
    for pattern in chosen:
        hits = {name for name, _ in named if fnmatchcase(name, pattern)}
        if not hits:
            raise ValueError(
                f"build_groups: a pattern must match a parameter name (such as {named[0][0]!r}), got {pattern!r}"
            )
        found |= hits
    return found
