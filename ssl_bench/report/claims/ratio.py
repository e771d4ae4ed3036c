"""The paper's claims about LARS, warm-up and TVLARS, checked against the runs: each with a verdict and its evidence."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from ssl_bench.report.aggregate import Cell, Collection, Result, lookup
from ssl_bench.report.claims.evidence import Claim, Load, Verdict, verdict_of, warm_and_cold
from ssl_bench.report.claims.sharpness import check_gradient_noise, check_sharpness
from ssl_bench.report.curves import G_NORM, RATIO, W_NORM, Curves
from ssl_bench.report.scope import cut_short
from ssl_bench.report.tables import SETTING, Table, is_number, number

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
    "Figure 65's caption repeats lambda = 0.01; judging by its position it is 0.005.",
    "Every Tiny ImageNet classification accuracy in Table 1 is a multiple of 0.04, so it was measured on 2,500 test "
    "images, a quarter of the set.",
)


def check_claims(collection: Collection, load: Load) -> list[Claim]:
    """Checks every claim on what the runs recorded.

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


def _start_of_the_ratio(collection: Collection, load: Load) -> Claim:
    """(a): whether the trust ratio starts higher without a warm-up."""
    columns = (*SETTING, "lr", "optimizer", "seed", "first, warm-up", "first, without")
    table = Table("claim-a", "Ratio |w|/|u| at the start", (*columns, "peak, warm-up", "peak, without"))
    higher, same_start = [], []
    for warm, cold, seed in warm_and_cold(collection):
        # Both runs are read over the length of the warm-up; a tenth of the run where the record does not say.
        plan = warm.results[0].record.provenance.get("plan", {})
        steps = lookup(plan, "schedule.warmup_steps")
        ends = int(steps) if is_number(steps) else max(1, int(lookup(plan, "total_steps", 10)) // 10)
        runs = [next(result for result in cell.results if result.seed == seed) for cell in (warm, cold)]
        with_warmup, without = (_ratio_at_start(load(run), ends) for run in runs)
        if with_warmup is None or without is None:
            continue
        higher.append(without[1] > with_warmup[1])
        same_start.append(math.isclose(with_warmup[0], without[0], rel_tol=1e-3))
        values = {"first_warmup": with_warmup[0], "first_without": without[0]}
        values |= {"peak_warmup": with_warmup[1], "peak_without": without[1]}
        names = (*warm.setting.cells, number(warm.lr), warm.optimizer, str(seed))
        table.add((*names, *(f"{value:.4g}" for value in values.values())), warm.record | {"seed": seed} | values)
    finding = (
        "No pair of LARS or LAMB runs with and without warm-up, of one learning rate and seed, has telemetry of more "
        "than one step of the warm-up."
    )
    if higher:
        finding = (
            f"Within the warm-up's length the largest |w|/|u| (median over layers) is higher without warm-up in "
            f"{sum(higher)} of {len(higher)} pairs. At the first step it is the same in {sum(same_start)} of them: a "
            "warm-up changes the learning rate, and the ratio only through the steps that follow."
        )
    says = "Without warm-up the ratio of the initial phase is higher than with it (section 3.2, observation 3)."
    return Claim("a", "The ratio at the start, with and without warm-up", says, verdict_of(higher), finding, table)


def _ratio_at_start(curves: Curves, ends: int) -> tuple[float, float] | None:
    """The median over layers of |w|/|u| at the first step, and its largest value up to step ``ends``."""
    if not curves.has(RATIO.column) or curves.steps[0] > 1:
        return None
    early = curves.of_adapted(RATIO)[curves.steps <= max(ends, 1)]
    medians = [float(np.median(row[np.isfinite(row)])) for row in early if np.isfinite(row).any()]
    # With one record there is the first step alone, which no schedule has touched yet.
    return (medians[0], max(medians)) if len(medians) > 1 else None


def _limit_of_the_ratio(collection: Collection, load: Load) -> Claim:
    """(b): whether the trust ratio grows without bound as the gradient vanishes."""
    columns = (*SETTING, "lr", "optimizer", "seed", "least |g|/(β|w|)", "β|w|/|u| there", "largest β|w|/|u|")
    table = Table("claim-b", "The ratio over its limit 1/β", (*columns, "layer-steps vanished"))
    near: list[float] = []
    smallest = math.inf
    for cell, result, curves in _adapted_by_decay(collection, load):
        decay = float(lookup(cell.recipe, "optimizer.weight_decay", 0.0))
        w, g, ratio = (curves.of_adapted(quantity) for quantity in (W_NORM, G_NORM, RATIO))
        usable = np.isfinite(ratio) & (w > 0)
        # u = g + βw, so that β|w|/|u| lies within 1 / (1 ± pull); scaled by β, runs of any decay share the limit 1.
        pull = g[usable] / (decay * w[usable])  # |g| / (β|w|)
        scaled = decay * ratio[usable]  # β|w| / |u|
        if not len(pull):
            continue
        least = int(pull.argmin())
        smallest = min(smallest, float(pull[least]))
        vanished = scaled[pull <= VANISHED]
        near += vanished.tolist()
        names = (*cell.setting.cells, number(cell.lr), cell.arm, str(result.seed))
        table.add(
            (*names, f"{pull[least]:.3g}", f"{scaled[least]:.3f}", f"{scaled.max():.3g}", str(len(vanished))),
            cell.record
            | {"seed": result.seed, "smallest_pull": float(pull[least]), "scaled_ratio_there": float(scaled[least])}
            | {"largest_scaled_ratio": float(scaled.max()), "vanished": len(vanished)},
        )
    verdict, finding = _limit_verdict(near, smallest)
    says = "The ratio |w|/|g| goes to infinity as the gradient vanishes, which lets LARS escape (appendix D)."
    return Claim("b", "The ratio's limit as gradients vanish", says, verdict, finding, table)


def _limit_verdict(near: Sequence[float], smallest: float) -> tuple[Verdict, str]:
    """The verdict from the ratios (over their limit) where gradients vanished, and from the smallest |g|/(β|w|)."""
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
    """Runs with telemetry whose ratio is |w| over a norm that includes the decay, with nothing clamped."""
    for cell in collection.cells:
        # LAMB divides by Adam's direction and the released TVLARS clamps the ratio: neither has this limit.
        plain = cell.optimizer == "LARS" or lookup(cell.recipe, "optimizer.variant", "paper") == "paper"
        if cell.optimizer in ("LARS", "TVLARS") and plain and lookup(cell.recipe, "optimizer.weight_decay"):
            for result in cell.results:
                curves = load(result)
                if curves.has(W_NORM.column, G_NORM.column, RATIO.column):
                    yield cell, result, curves


def _change_of_phi(collection: Collection, load: Load) -> Claim:
    """(e): whether phi, and with it the learning rate, changes over a run."""
    columns = (*SETTING, "lr", "optimizer", "λ", "λ × steps", "φ first", "φ last", "fall %")
    table = Table("claim-e", "phi's change over a run", columns)
    moved, cut = [], []
    for cell in collection.cells:
        if cell.optimizer != "TVLARS":
            continue
        _, phi = load(cell.results[0]).phi()
        if not len(phi):
            continue
        plan = cell.results[0].record.provenance.get("plan", {})
        decay = lookup(plan, "optimizer.decay", lookup(cell.recipe, "optimizer.decay"))
        unit = lookup(plan, "optimizer.time_unit_steps", 1.0)
        product = decay * lookup(plan, "total_steps", math.nan) / unit if is_number(decay) else math.nan
        change = float(1 - phi[-1] / phi[0])
        moved.append(change >= PHI_MOVED)
        cut.append(cut_short(cell) and change < PHI_MOVED)  # in the paper's epochs it may have moved
        shown = (number(decay) if is_number(decay) else "–", f"{product:.3g}", f"{phi[0]:.4f}", f"{phi[-1]:.4f}")
        table.add(
            (*cell.setting.cells, number(cell.lr), cell.arm, *shown, f"{100 * change:.2f}"),
            cell.record
            | {"seed": cell.results[0].seed, "lambda": decay, "lambda_x_steps": product}
            | {"phi_first": float(phi[0]), "phi_last": float(phi[-1]), "change": change},
        )
    finding = "No TVLARS run has telemetry."
    if moved:
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
    verdict: Verdict = "not reached" if moved and not decided else verdict_of(decided)
    says = "phi anneals the learning rate from exploration to a stable phase (section 4)."
    return Claim("e", "How much phi changes over a run", says, verdict, finding, table)
