"""What the paper claims of LARS, warm-up and TVLARS, held against the runs: each with a verdict and its evidence."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from ssl_bench.report.aggregate import Cell, Collection, Result, lookup
from ssl_bench.report.curves import G_NORM, PHI, RATIO, W_NORM, Curves
from ssl_bench.report.evidence import (
    Claim,
    Load,
    Verdict,
    is_number,
    of_seed,
    record_for,
    verdict_of,
    warm_and_cold,
    where,
)
from ssl_bench.report.gradient_noise import check_gradient_noise
from ssl_bench.report.landscape import check_sharpness
from ssl_bench.report.scope import cut_short
from ssl_bench.report.tables import Table, Value, number

# A gradient this much smaller than the decay's pull has vanished: the ratio is then within 11% of its limit.
VANISHED = 0.1
# Below this relative change of phi, TVLARS was LARS times a constant.
PHI_MOVED = 0.1

ERRATA = (
    "Equations 5, 12 and 13 leave out the + gamma_min that equation 4 adds to phi.",
    "With alpha = 1, phi(0) = 1 / (1 + exp(-lambda d_e)) lies in (0.5, 1): the learning rate starts reduced, not "
    "unchanged as section 4 says.",
    "gamma_target, which the experiments vary as the learning rate, appears nowhere in Algorithm 1.",
    "With weight decay in the norm the ratio tends to eta / beta (2 at the paper's 1e-3 and 5e-4), not to infinity, as "
    "the gradient vanishes (appendix D).",
    "Theorem 1 bounds E[g_B - g], which is 0; E|g_B - g|^2 is meant.",
    "Figure 65's caption repeats lambda = 0.01; by its place it is 0.005.",
    "Every Tiny ImageNet classification accuracy in Table 1 is a multiple of 0.04, so it comes of 2,500 test images, a "
    "quarter of the set.",
)


def check_claims(collection: Collection, load: Load) -> list[Claim]:
    """Every claim, checked on what the runs recorded.

    Args:
        collection: the runs.
        load: a run's curves.
    """
    return [
        _start_of_the_ratio(collection, load),
        _limit_of_the_ratio(collection, load),
        check_sharpness(collection),
        check_gradient_noise(collection),
        _change_of_phi(collection, load),
    ]


# (a) -----------------------------------------------------------------------------------------------------------------


def _start_of_the_ratio(collection: Collection, load: Load) -> Claim:
    says = "Without warm-up the ratio of the initial phase is higher than with it (section 3.2, observation 3)."
    rows, records, higher, same_start = [], [], [], []
    for warm, cold, seed in warm_and_cold(collection):
        measured = [_ratio_at_start(load(of_seed(cell, seed)), _warmup_steps(warm)) for cell in (warm, cold)]
        if None in measured:
            continue
        (first_warm, peak_warm), (first_cold, peak_cold) = measured  # type: ignore[misc]
        higher.append(peak_cold > peak_warm)
        same_start.append(math.isclose(first_warm, first_cold, rel_tol=1e-3))
        names = (*where(warm), number(warm.lr), warm.optimizer, str(seed))
        rows.append((*names, *(f"{value:.4g}" for value in (first_warm, first_cold, peak_warm, peak_cold))))
        records.append(
            record_for(warm, seed)
            | {
                "first_warmup": first_warm,
                "first_without": first_cold,
                "peak_warmup": peak_warm,
                "peak_without": peak_cold,
            }
        )
    finding = (
        "No pair of LARS or LAMB runs with and without warm-up, of one learning rate and seed, has telemetry of more "
        "than one step of the warm-up."
    )
    if rows:
        finding = (
            f"Within the warm-up's length the largest |w|/|u| (median over layers) is higher without warm-up in "
            f"{sum(higher)} of {len(higher)} pairs. At the first step it is the same in {sum(same_start)} of them: a "
            "warm-up changes the learning rate, and the ratio only through the steps that follow."
        )
    columns = ("problem", "data set", "batch size", "lr", "optimizer", "seed", "first, warm-up", "first, without")
    table = Table("claim-a", "Ratio |w|/|u| at the start", (*columns, "peak, warm-up", "peak, without"), rows, records)
    return Claim("a", "The ratio at the start, with and without warm-up", says, verdict_of(higher), finding, table)


def _warmup_steps(cell: Cell) -> int:
    """The warm-up's length; a tenth of the run where the record does not say."""
    plan = cell.results[0].record.provenance.get("plan", {})
    steps = lookup(plan, "schedule.warmup_steps")
    return int(steps) if is_number(steps) else max(1, int(lookup(plan, "total_steps", 10)) // 10)


def _ratio_at_start(curves: Curves, ends: int) -> tuple[float, float] | None:
    """The median over layers of |w|/|u| at the first step, and its largest value up to step ``ends``."""
    if not curves.has(RATIO.column) or curves.steps[0] > 1:
        return None
    early = curves.telemetry[RATIO.column][curves.steps <= max(ends, 1)][:, curves.adapted()]
    medians = [float(np.median(row[np.isfinite(row)])) for row in early if np.isfinite(row).any()]
    # With one record there is the first step alone, which no schedule has touched yet.
    return (medians[0], max(medians)) if len(medians) > 1 else None


# (b) -----------------------------------------------------------------------------------------------------------------


def _limit_of_the_ratio(collection: Collection, load: Load) -> Claim:
    says = "The ratio |w|/|g| goes to infinity as the gradient vanishes, which lets LARS escape (appendix D)."
    rows, records = [], []
    near: list[float] = []
    smallest = math.inf
    for cell, result, curves in _adapted_by_decay(collection, load):
        decay = float(lookup(cell.recipe, "optimizer.weight_decay", 0.0))
        w, g, ratio = (curves.telemetry[q.column][:, curves.adapted()] for q in (W_NORM, G_NORM, RATIO))
        usable = np.isfinite(ratio) & (w > 0)
        pull = g[usable] / (decay * w[usable])  # the gradient over the decay's pull
        scaled = decay * ratio[usable]
        if not len(pull):
            continue
        least = int(pull.argmin())
        smallest = min(smallest, float(pull[least]))
        vanished = scaled[pull <= VANISHED]
        near += vanished.tolist()
        names = (*where(cell), number(cell.lr), cell.arm, str(result.seed))
        rows.append((*names, f"{pull[least]:.3g}", f"{scaled[least]:.3f}", f"{scaled.max():.3g}", str(len(vanished))))
        records.append(
            record_for(cell, result.seed)
            | {"smallest_pull": float(pull[least]), "scaled_ratio_there": float(scaled[least])}
            | {"largest_scaled_ratio": float(scaled.max()), "vanished": len(vanished)}
        )
    verdict, finding = _limit_verdict(near, smallest)
    columns: tuple[str, ...] = ("problem", "data set", "batch size", "lr", "optimizer", "seed", "least |g|/(β|w|)")
    columns = (*columns, "β|w|/|u| there", "largest β|w|/|u|", "layer-steps vanished")
    table = Table("claim-b", "The ratio over its limit 1/β", columns, rows, records)
    return Claim("b", "The ratio's limit as gradients vanish", says, verdict, finding, table)


def _limit_verdict(near: Sequence[float], smallest: float) -> tuple[Verdict, str]:
    if math.isinf(smallest):
        return "not measured", "No LARS or TVLARS run with weight decay in the ratio's denominator has telemetry."
    if not near:
        return "not reached", (
            f"No gradient vanished beside the decay: the smallest |g|/(β|w|) is {smallest:.3g}, where {VANISHED:g} "
            "would show the limit. The algebra stands: u = g + βw tends to βw, and the ratio to 1/β (times η: η/β)."
        )
    low, high = min(near), max(near)
    bounded = low >= 1 / (1 + VANISHED) - 1e-3 and high <= 1 / (1 - VANISHED) + 1e-3
    return "contradicted" if bounded else "mixed", (
        f"Where |g| is at most {VANISHED:g} of β|w| ({len(near)} layer-steps, the smallest {smallest:.2g}), the ratio "
        f"is {low:.3f} to {high:.3f} times 1/β. It tends to 1/β, and LARS's factor to η/β, not to infinity."
    )


def _adapted_by_decay(collection: Collection, load: Load) -> Iterable[tuple[Cell, Result, Curves]]:
    """Runs whose ratio is |w| over a norm with the decay in it and nothing clamped, with their telemetry."""
    for cell in collection.cells:
        plain = cell.optimizer == "LARS" or lookup(cell.recipe, "optimizer.variant", "paper") == "paper"
        if cell.optimizer not in ("LARS", "TVLARS") or not plain or not lookup(cell.recipe, "optimizer.weight_decay"):
            continue
        for result in cell.results:
            curves = load(result)
            if all(curves.has(quantity.column) for quantity in (W_NORM, G_NORM, RATIO)):
                yield cell, result, curves


# (e) -----------------------------------------------------------------------------------------------------------------


def _change_of_phi(collection: Collection, load: Load) -> Claim:
    says = "phi anneals the learning rate from exploration to a stable phase (section 4)."
    rows, records, moved, cut = [], [], [], []
    for cell in collection.cells:
        if cell.optimizer != "TVLARS":
            continue
        curves = load(cell.results[0])
        if not curves.has(PHI.column):
            continue
        recorded = curves.telemetry[PHI.column]
        phi = [row[np.isfinite(row)][0] for row in recorded if np.isfinite(row).any()]  # the same in every layer
        plan = cell.results[0].record.provenance.get("plan", {})
        decay = lookup(plan, "optimizer.decay", lookup(cell.recipe, "optimizer.decay"))
        unit = lookup(plan, "optimizer.time_unit_steps", 1.0)
        product = decay * lookup(plan, "total_steps", math.nan) / unit if is_number(decay) else math.nan
        change = float(1 - phi[-1] / phi[0])
        moved.append(change >= PHI_MOVED)
        cut.append(cut_short(cell) and change < PHI_MOVED)  # in the paper's epochs it may have moved
        shown = (number(decay) if is_number(decay) else "–", f"{product:.3g}", f"{phi[0]:.4f}", f"{phi[-1]:.4f}")
        rows.append((*where(cell), number(cell.lr), cell.arm, *shown, f"{100 * change:.2f}"))
        values: dict[str, Value] = {"lambda": decay, "lambda_x_steps": product, "phi_first": float(phi[0])}
        records.append(record_for(cell, cell.results[0].seed) | values | {"phi_last": float(phi[-1]), "change": change})
    finding = "No TVLARS run has telemetry."
    if rows:
        finding = (
            f"Over the whole run phi fell by less than {100 * PHI_MOVED:g}% in {len(moved) - sum(moved)} of "
            f"{len(moved)} cells: there TVLARS is LARS at a constant factor. Only λ × steps decides it."
        )
    if any(cut):
        finding += (
            f" {sum(cut)} of these were cut short of the paper's epochs, over which λ × steps is larger, and are left "
            "out of the verdict."
        )
    decided = [outcome for outcome, left_out in zip(moved, cut, strict=True) if not left_out]
    verdict: Verdict = "not reached" if rows and not decided else verdict_of(decided)
    columns = ("problem", "data set", "batch size", "lr", "optimizer", "λ", "λ × steps", "φ first", "φ last", "fall %")
    table = Table("claim-e", "phi's change over a run", columns, rows, records)
    return Claim("e", "How much phi changes over a run", says, verdict, finding, table)
