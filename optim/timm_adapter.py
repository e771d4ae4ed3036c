"""Any optimizer of timm by its name."""

import difflib
from typing import Any

from torch.optim import Optimizer

from ssl_bench.optim.layerwise import check_range


def timm_optimizer(
    params: Any,
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
) -> Optimizer:
    """Make one of timm's optimizers; the groups' own lr and weight_decay hold, "adapt" has no meaning here.

    Args:
        params: Parameters, (name, parameter) pairs, or groups.
        name: timm's name of the optimizer (`timm.optim.list_optimizers()`), such as "lars", "lamb" or "lion".
        lr: Learning rate, >= 0.
        weight_decay: Weight decay as the optimizer understands it, >= 0; 0 turns it off.
        momentum: Momentum in [0, 1), for optimizers that have it; None for the optimizer's own default.
        betas: Decay rates of the moments, for optimizers that have them; None for the optimizer's own default.
        eps: The optimizer's eps, >= 0, for optimizers that have it; None for its own default.

    Raises:
        ValueError: for an unknown name (the nearest are listed), a keyword that the optimizer does not have, a value
            out of range, or an optimizer that needs second-order gradients.
    """
    import timm.optim  # a heavy import that only this optimizer needs

    component = f"timm_optimizer[{name}]"
    known = [str(known_name) for known_name in timm.optim.list_optimizers()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        raise ValueError(
            f"timm_optimizer: unknown name {name!r}, nearest: {', '.join(near) or '-'}; known: {', '.join(known)}"
        )
    info = timm.optim.get_optimizer_info(name)
    if info.second_order:
        raise ValueError(
            f"{component}: needs second-order gradients, which the loop does not make; allowed: first-order"
        )
    check_range(component, "lr", lr)
    check_range(component, "weight_decay", weight_decay)
    keywords: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    given = (("momentum", momentum, info.has_momentum), ("betas", betas, info.has_betas), ("eps", eps, info.has_eps))
    for keyword, value, has in given:
        if value is None:
            continue
        if not has:
            raise ValueError(f"{component}: has no {keyword}; allowed: None, got {value!r}")
        keywords[keyword] = value
    try:
        return timm.optim.get_optimizer_class(name)(params, **keywords)
    except (TypeError, ImportError, RuntimeError) as error:  # e.g. an optimizer whose own package is not installed
        raise ValueError(f"{component}: cannot be made: {error}") from error
