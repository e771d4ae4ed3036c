"""The trust ratio at the start of training, and how much TVLARS's phi changes over a run."""

import math

import numpy as np

from ssl_bench.report.aggregate import Collection
from ssl_bench.report.claims.evidence import Claim, Load, grouped, run_of, verdict_of, warm_and_cold
from ssl_bench.report.curves import RATIO, Curves
from ssl_bench.report.inference import pooled
from ssl_bench.report.recipes import lookup
from ssl_bench.report.tables import SETTING, Table, is_number, number

PHI_NOTE = (
    "No claim: λ × steps decides it, whatever the data. Where φ hardly falls, TVLARS is LARS at a constant learning "
    "rate of half the size."
)


def check_start(collection: Collection, load: Load) -> Claim:
    """(e): whether the trust ratio of the initial phase is higher without a warm-up."""
    columns = (*SETTING, "lr", "optimizer", "seed", "first, warm-up", "first, without")
    table = Table("claim-e", "Ratio |w|/|u| at the start", (*columns, "peak, warm-up", "peak, without"))
    found, same_start = [], []
    for warm, cold, seed in warm_and_cold(collection):
        # Both runs are read over the length of the warm-up; a tenth of the run where the record does not say.
        plan = warm.results[0].record.provenance.get("plan", {})
        steps, total = lookup(plan, "schedule.warmup_steps"), lookup(plan, "total_steps")
        ends = steps if is_number(steps) else max(1, total // 10) if is_number(total) else 1
        with_warmup, without = (_at_start(load(run_of(cell, seed)), ends) for cell in (warm, cold))
        if with_warmup is None or without is None:
            continue
        found.append(((warm.key, cold.key), math.log(without[1] / with_warmup[1])))
        same_start.append(math.isclose(with_warmup[0], without[0], rel_tol=1e-3))
        values = {"first_warmup": with_warmup[0], "first_without": without[0]}
        values |= {"peak_warmup": with_warmup[1], "peak_without": without[1]}
        names = (*warm.setting.cells, number(warm.lr), warm.optimizer, str(seed))
        table.add((*names, *(f"{value:.4g}" for value in values.values())), warm.record | {"seed": seed} | values)
    estimate = pooled(grouped(found))
    finding = (
        "No pair of LARS or LAMB runs with and without warm-up, of one learning rate and seed, has telemetry of more "
        "than one step of the warm-up."
    )
    if estimate is not None:
        ends_of = estimate.interval
        interval = f" (95%: {math.exp(ends_of[0]):.3g} to {math.exp(ends_of[1]):.3g})" if ends_of else ""
        finding = (
            f"Within the warm-up's length the largest |w|/|u| (median over layers) is {math.exp(estimate.mean):.3g} "
            f"times as large without warm-up{interval}; n = {len(found)}. At the first step it is the same in "
            f"{sum(same_start)} of {len(found)} pairs: a warm-up changes the learning rate, and the ratio only through "
            "the steps that follow."
        )
    says = "Without warm-up the ratio of the initial phase is higher than with it (section 3.2, observation 3)."
    rule = (
        "The largest ratio without over that with a warm-up, paired by seed: supported where the 95% interval of its "
        "geometric mean is at 1 or above, contradicted where it is below."
    )
    title = "The ratio at the start, with and without warm-up"
    return Claim("e", title, says, rule, verdict_of(estimate, 0.0), finding, table)


def _at_start(curves: Curves, ends: float) -> tuple[float, float] | None:
    """The median over layers of |w|/|u| at the first step, and its largest value up to step ``ends``."""
    if not curves.has(RATIO.column) or curves.steps[0] > 1:
        return None
    early = curves.of_adapted(RATIO)[curves.steps <= max(ends, 1)]
    medians = [float(np.median(row[np.isfinite(row)])) for row in early if np.isfinite(row).any()]
    medians = [value for value in medians if value > 0]
    # With one record there is the first step alone, which no schedule has touched yet.
    return (medians[0], max(medians)) if len(medians) > 1 else None


def phi_table(collection: Collection, load: Load) -> Table:
    """phi at the first and at the last step of each TVLARS cell's first run with telemetry."""
    columns = (*SETTING, "lr", "optimizer", "λ", "λ × steps", "φ first", "φ last", "fall %")
    table = Table("phi", "TVLARS's φ over a run", columns, (PHI_NOTE,))
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
        shown = (number(decay) if is_number(decay) else "–", f"{product:.3g}", f"{phi[0]:.4f}", f"{phi[-1]:.4f}")
        table.add(
            (*cell.setting.cells, number(cell.lr), cell.arm, *shown, f"{100 * change:.2f}"),
            cell.record
            | {"seed": cell.results[0].seed, "lambda": decay, "lambda_x_steps": product}
            | {"phi_first": float(phi[0]), "phi_last": float(phi[-1]), "change": change},
        )
    return table
