"""Learning-rate schedules: pure functions of the step that multiply each group's initial learning rate."""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Callable[[int], float]


def constant() -> Schedule:
    """Multiplier 1 at every step (TVLARS carries its own phi)."""
    return lambda step: 1.0  # noqa: ARG005


def warmup_cosine(total_steps: int, warmup_steps: int, final: float = 1e-3, strict: bool = False) -> Schedule:
    """Linear warm-up, then half a cosine ("WA" in the paper, appendix A; Barlow Twins, SimCLR, VICReg).

    k < K_w: k / K_w. Else q = (1 + cos(pi (k - K_w) / (K - K_w))) / 2 and q + final (1 - q).

    Args:
        total_steps: K, the run's length in steps, >= 1.
        warmup_steps: K_w in steps, 0 <= K_w <= K; 0 for no warm-up.
        final: multiplier at step K, in [0, 1] (1e-3 in Barlow Twins).
        strict: whether a step beyond K raises an error; else it gets the multiplier of K.

    Returns:
        The schedule; it raises ValueError for a negative step.

    Raises:
        ValueError: for a value out of range.
    """
    _check("warmup_cosine", total_steps, warmup_steps, final)

    def schedule(k: int) -> float:
        if k < warmup_steps:
            return k / warmup_steps
        done = (k - warmup_steps) / (total_steps - warmup_steps) if total_steps > warmup_steps else 1.0
        q = (1 + math.cos(math.pi * done)) / 2
        return q + final * (1 - q)

    return _within("warmup_cosine", total_steps, strict, schedule)


def gradual_warmup(
    total_steps: int,
    batch_size: int,
    warmup_steps: int,
    base_batch: int = 256,
    milestones: tuple[float, ...] = (1 / 3, 2 / 3, 8 / 9),
    factor: float = 0.1,
) -> Schedule:
    """Goyal et al. 2017 (arXiv 1706.02677, section 2.2): from the base batch's rate up to the peak, then in steps down.

    With r = min(1, B0 / B): k < K_w: r + (1 - r) k / K_w. Else factor^n, n the number of milestones passed. So the
    first step has the rate of a batch of B0 images where the peak grows with B (scaling.rule=linear, as in the paper).

    Args:
        total_steps: K, the run's length in steps, >= 1.
        batch_size: B, the global batch, >= 1.
        warmup_steps: K_w in steps, 0 <= K_w <= K (5 epochs in the paper); 0 for no warm-up.
        base_batch: B0 in images, >= 1; 256 in the paper.
        milestones: fractions of the run after which the rate drops, ascending in (0, 1]: 30, 60 and 80 of 90 epochs; ()
            for none.
        factor: of each drop, in (0, 1].

    Returns:
        The schedule; it raises ValueError for a negative step.

    Raises:
        ValueError: for a value out of range.
    """
    _check("gradual_warmup", total_steps, warmup_steps, 0.0)
    for name, value in (("batch_size", batch_size), ("base_batch", base_batch)):
        if value < 1:
            raise ValueError(f"gradual_warmup: {name} must be >= 1, got {value!r}")
    if list(milestones) != sorted(set(milestones)) or not all(0 < one <= 1 for one in milestones):
        raise ValueError(f"gradual_warmup: milestones must be ascending in (0, 1], got {milestones!r}")
    if not 0 < factor <= 1:
        raise ValueError(f"gradual_warmup: factor must be in (0, 1], got {factor!r}")
    ratio = min(1.0, base_batch / batch_size)

    def schedule(k: int) -> float:
        if k < warmup_steps:
            return ratio + (1 - ratio) * k / warmup_steps
        return factor ** sum(k >= one * total_steps for one in milestones)

    return _within("gradual_warmup", total_steps, False, schedule)


def polynomial(total_steps: int, power: float = 1.0, final: float = 1e-3, strict: bool = False) -> Schedule:
    """Polynomial decay without warm-up ("NOWA" in the paper): (1 - final) (1 - k/K)^power + final.

    Args:
        total_steps: K, the run's length in steps, >= 1.
        power: exponent, > 0: 1 in Codreanu et al., whom the paper cites, 2 in You et al. 2017.
        final: multiplier at step K, in [0, 1].
        strict: whether a step beyond K raises an error; else it gets the multiplier of K.

    Returns:
        The schedule; it raises ValueError for a negative step.

    Raises:
        ValueError: for a value out of range.
    """
    _check("polynomial", total_steps, 0, final)
    if not 0 < power < math.inf:
        raise ValueError(f"polynomial: power must be a number in (0, inf), got {power!r}")

    return _within("polynomial", total_steps, strict, lambda k: (1 - final) * (1 - k / total_steps) ** power + final)


def released_warmup_cosine(
    total_steps: int, warmup_steps: int, schedule_steps: int, final: float = 1e-3, strict: bool = False
) -> Schedule:
    """The authors' schedule with its fault: the cosine's length is not the run's.

    GitHub KhoiDOO/tvlars, scheduler/lars_warmup.py at commit 89c3291, computes K from `args.epochs`, which in Barlow
    Twins is the linear probe's 100 epochs, while pretraining runs `args.cl_epochs` = 1000. So the cosine cycles, and
    the run ends at 0.854 of the peak. (The code also multiplies by B/256: `batch_scale("linear", B, 256)`.)

    Args:
        total_steps: the run's length in steps, >= 1; used only to clamp or refuse steps beyond it.
        warmup_steps: K_w in steps, 0 <= K_w < schedule_steps (20 epochs in the code).
        schedule_steps: the K of the formula in steps (100 epochs in the code).
        final: multiplier at the cosine's lowest points, in [0, 1].
        strict: whether a step beyond total_steps raises an error; else it gets that step's multiplier.

    Returns:
        The schedule; it raises ValueError for a negative step.

    Raises:
        ValueError: for a value out of range.
    """
    _check("released_warmup_cosine", total_steps, 0, final)
    if not 0 <= warmup_steps < schedule_steps:
        raise ValueError(
            f"released_warmup_cosine: warmup_steps must be in [0, schedule_steps={schedule_steps}), "
            f"got {warmup_steps!r}"
        )

    def schedule(k: int) -> float:
        if k < warmup_steps:
            return k / warmup_steps
        q = (1 + math.cos(math.pi * (k - warmup_steps) / (schedule_steps - warmup_steps))) / 2
        return q + final * (1 - q)

    return _within("released_warmup_cosine", total_steps, strict, schedule)


def batch_scale(rule: Literal["none", "sqrt", "linear"], batch_size: int, base_batch: int) -> float:
    """Factor on the learning rate for the batch size.

    Args:
        rule: "none" 1 (the paper's grid is given per batch size), "sqrt" sqrt(B / B0), "linear" B / B0.
        batch_size: B, the global batch, >= 1.
        base_batch: B0, the batch for which the learning rate is meant, >= 1.

    Raises:
        ValueError: for an unknown rule or a size below 1.
    """
    if batch_size < 1 or base_batch < 1:
        raise ValueError(f"batch_scale: batch_size and base_batch must be >= 1, got {batch_size!r} and {base_batch!r}")
    if rule == "none":
        return 1.0
    if rule == "sqrt":
        return math.sqrt(batch_size / base_batch)
    if rule == "linear":
        return batch_size / base_batch
    raise ValueError(f"batch_scale: rule must be one of none, sqrt, linear, got {rule!r}")


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "warmup_cosine": warmup_cosine,
    "gradual_warmup": gradual_warmup,
    "polynomial": polynomial,
    "released_warmup_cosine": released_warmup_cosine,
}


def _check(component: str, total_steps: int, warmup_steps: int, final: float) -> None:
    """Refuse (ValueError) lengths and a final multiplier out of range."""
    if total_steps < 1:
        raise ValueError(f"{component}: total_steps must be >= 1, got {total_steps!r}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"{component}: warmup_steps must be in [0, total_steps={total_steps}], got {warmup_steps!r}")
    if not 0 <= final <= 1:
        raise ValueError(f"{component}: final must be in [0, 1], got {final!r}")


def _within(component: str, total_steps: int, strict: bool, multiplier: Schedule) -> Schedule:
    """The multiplier of the steps 0 to K; beyond K that of K or, if strict, an error."""

    def schedule(step: int) -> float:
        if step < 0 or (strict and step > total_steps):
            raise ValueError(f"{component}: step must be in [0, total_steps={total_steps}], got {step!r}")
        return multiplier(min(step, total_steps))

    return schedule
