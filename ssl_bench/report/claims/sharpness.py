"""Sharpness and gradient noise: claims (f) and (g), checked on what `ssl-bench analyze` measured.

(f) Two runs of a pair are compared at their last measured step, by the top Hessian eigenvalue as it is and by the
scale-invariant one. A difference no larger than the sum of the two residuals counts as none.
(g) The gradient's squared error should fall as 1 / B.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from ssl_bench.report.aggregate import Collection
from ssl_bench.report.claims.analysis import (
    MEASURES,
    SAM,
    SCALED,
    TOP,
    TRACE,
    Analysis,
    Analyzed,
    Measure,
    NoiseCurve,
    Row,
    analyzed,
    measured_how,
    measured_on,
    noise_curves,
    uncertain,
)
from ssl_bench.report.claims.evidence import (
    Claim,
    Pair,
    Verdict,
    grouped,
    joint_verdict,
    verdict_of,
    warm_and_cold,
    warm_lars_and_tvlars,
)
from ssl_bench.report.inference import pooled
from ssl_bench.report.scope import cut_short
from ssl_bench.report.tables import SETTING, Table, Value, number

SHARPNESS_NOTES = (
    "Top eigenvalue: of the loss's Hessian in all trainable parameters, by Lanczos, ± its residual: an eigenvalue lies "
    "that close, and the largest is not below. Trace: Hutchinson's estimate ± its standard error. SAM: how much the "
    "loss rises at the end of a step of length ρ up its gradient. Loss: of the same batch.",
    "× |w|²: batch norm makes the loss blind to the scale of the weights before it. Growing by c, they leave the "
    "network's function alone and divide this part of the Hessian by c², so that raw sharpness falls just because "
    "weights grow (Dinh et al. 2017); multiplied by |w|² it does not. |w| is of all parameters, including the few "
    "(last layer, batch norm's own) whose scale does matter, so the product is only nearly invariant.",
    "Sharpness is that of the point a run has reached; one cut short has reached no minimum.",
)
NOISE_NOTES = (
    "Error: E|g_B - E g_B|², the variance of the gradient summed over all parameters, about the mean of batches "
    "of that size, which are disjoint parts of one shuffled set. It is not taken about the whole set's gradient: with "
    "batch norm in train mode, and with a loss that is no mean over images (Barlow Twins, SimCLR, VICReg), the "
    "expected gradient itself depends on B, and the theorem's assumption of independent terms does not hold.",
    "Noise scale: B_simple = B × error / |E g|², the batch size at which the noise is as large as the gradient "
    "(McCandlish et al. 2018), in images; a dash where the unbiased estimate of |E g|² is not above 0.",
)

# What the numbers of a sharpness row depend on, besides the weights.
SHARPNESS_SETTINGS = ("images", "batch_norm", "iterations", "samples", "rho", "seed")

# Slope of log E|g_B - E g_B|^2 over log B: -1 in theory, and this close to it in a measurement.
SLOPE_TOLERANCE = 0.15

Outcome = Literal["sharper", "flatter", "no difference"]


@dataclass
class _Tally:
    """The outcomes of all pairs for one question.

    Attributes:
        question: e.g. "With a warm-up against without it"; the outcomes are the first one's.
        values: the relative difference by each measure, with what it belongs to, pair by pair.
        by: the outcomes of each measure, pair by pair; both lists are equally long.
        left_out: pairs that cannot be compared, by reason.
    """

    question: str
    values: dict[Measure, list[tuple[object, float]]] = field(default_factory=lambda: {TOP: [], SCALED: []})
    by: dict[Measure, list[Outcome]] = field(default_factory=lambda: {TOP: [], SCALED: []})
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Both measures' counts in one sentence; empty without a pair."""
        pairs, parts = len(self.by[TOP]), []
        for measure, outcomes in self.by.items():
            counts = [f"{word} in {outcomes.count(word)}" for word in get_args(Outcome)]
            estimate = pooled(grouped(self.values[measure]))
            parts.append(f"by the {measure.text} {', '.join(counts)}, relative difference {estimate}")
        where = f"{_pairs(pairs)} of one learning rate and seed at the last measured step"
        return f"{self.question}, {where}: {'; '.join(parts)}." if pairs else ""


def check_sharpness(collection: Collection) -> Claim:
    """(f): whether training ends in sharper minima with a warm-up than without, and than TVLARS does.

    Args:
        collection: the runs; those without an analysis are ignored.
    """
    runs = [run for run in analyzed(collection) if run.analysis.sharpness]
    by_run = {(run.cell.key, run.result.seed): run.analysis for run in runs}
    tallies = [
        _compare("With a warm-up against without it (LARS, LAMB)", warm_and_cold(collection), by_run),
        _compare("LARS with a warm-up against TVLARS", warm_lars_and_tvlars(collection), by_run),
    ]
    estimates = [pooled(grouped(values)) for tally in tallies for values in tally.values.values() if values]
    verdict = joint_verdict(verdict_of(estimate, 0.0) for estimate in estimates)
    says = (
        "Warm-up traps LARS in sharp minimizers, and TVLARS avoids them (sections 3.3 and 4). The paper measures none."
    )
    rule = (
        "The relative difference (a - b) / mean(|a|, |b|) of the top eigenvalue at the last measured step, and of the "
        "eigenvalue x |w|^2, paired by seed: supported where the 95% intervals of both are at 0 or above in both "
        "comparisons, contradicted where all are below, mixed where they disagree."
    )
    return Claim("f", "Warm-up and sharp minima", says, rule, verdict, _finding(runs, tallies), _sharpness_table(runs))


def _compare(question: str, pairs: Iterable[Pair], by_run: Mapping[tuple[str, int], Analysis]) -> _Tally:
    """Compares the last measured steps of pairs; the first of each pair is the one that the paper expects sharper."""
    tally = _Tally(question)
    for one, other, seed in pairs:
        left, right = by_run.get((one.key, seed)), by_run.get((other.key, seed))
        if left is None or right is None:
            continue
        reason = _incomparable(left, right)
        if reason:
            tally.left_out[reason] += 1
            continue
        for measure, outcomes in tally.by.items():
            (a, a_error), (b, b_error) = (measure.of(x.sharpness[-1]) or (0.0, 0.0) for x in (left, right))
            size = (abs(a) + abs(b)) / 2
            tally.values[measure].append(((one.key, other.key), (a - b) / size if size else 0.0))
            # The residuals bound the error of each eigenvalue: within their sum the order of the two is not known.
            if abs(a - b) <= (a_error or 0.0) + (b_error or 0.0):
                outcomes.append("no difference")
            else:
                outcomes.append("sharper" if a > b else "flatter")
    return tally


def _incomparable(left: Analysis, right: Analysis) -> str:
    """Why two analyses cannot be compared; empty where they can."""
    settings = [tuple(each.settings.get(name) for name in SHARPNESS_SETTINGS) for each in (left, right)]
    if any(None in each for each in settings):
        return "the settings are not recorded"
    if settings[0] != settings[1]:
        return "measured with different settings"
    if left.sharpness[-1]["step"] != right.sharpness[-1]["step"]:
        return "the last measured steps differ"
    found = [measure.of(each.sharpness[-1]) for measure in (TOP, SCALED) for each in (left, right)]
    return "eigenvalue, residual or |w| is missing" if any(pair is None or pair[1] is None for pair in found) else ""


def _finding(runs: Sequence[Analyzed], tallies: Sequence[_Tally]) -> str:
    if not runs:
        return "No run has sharpness in its analysis.json (ssl-bench analyze RUN)."
    none = "Sharpness is measured, but in no pair of one setting, learning rate and seed that can be compared."
    sentences = [text for tally in tallies if (text := str(tally))] or [none]
    sentences.append(f"Measured with {measured_how(runs)}.")
    short = f"{sum(cut_short(run.cell) for run in runs)} of {len(runs)} runs were cut short of the paper's epochs"
    if any(cut_short(run.cell) for run in runs):
        sentences.append(f"{short}: where they ended is no minimum.")
    left_out = sum((tally.left_out for tally in tallies), Counter[str]())
    sentences += [f"Left out: {_pairs(count)}, {reason}." for reason, count in left_out.items()]
    return " ".join(sentences)


def _pairs(count: int) -> str:
    return f"{count} {'pair' if count == 1 else 'pairs'}"


def _sharpness_table(runs: Sequence[Analyzed]) -> Table:
    """One row for each measured step."""
    measured = ("loss", TOP.text, "|w|", SCALED.text, TRACE.text, SAM.text, "batch norm, images")
    columns = (*SETTING, "lr", "optimizer", "seed", "step", *measured)
    table = Table("claim-f", "Sharpness along training", columns, SHARPNESS_NOTES)
    for run in runs:
        settings = run.analysis.settings
        for row in run.analysis.sharpness:
            loss, norm = (f"{row[name]:.4g}" if name in row else "–" for name in ("loss", "weight_norm"))
            top, *others = (uncertain(*found) if (found := measure.of(row)) else "–" for measure in MEASURES)
            scaled = SCALED.of(row)
            table.add(
                (*_names(run, row["step"]), loss, top, norm, *others, measured_on(settings)),
                run.cell.record
                | {"seed": run.result.seed, **row, "top_eigenvalue_times_weights": scaled[0] if scaled else None}
                | {name: settings.get(name) for name in ("batch_norm", "images", "rho")},
            )
    return table


def check_gradient_noise(collection: Collection) -> Claim:
    """(g): whether the squared error of the batch gradient falls as 1 / B.

    Args:
        collection: the runs; those without an analysis are ignored.
    """
    curves = list(noise_curves(analyzed(collection)))
    slopes = [curve.slope for curve in curves]
    fits = [abs(slope + 1) <= SLOPE_TOLERANCE for slope in slopes]
    runs = grouped(((curve.run.cell.key, curve.run.result.seed), curve.slope) for curve in curves)
    estimate = pooled([[sum(own) / len(own)] for own in runs])  # the steps of one run are no independent measurements
    finding = "No run has gradient noise of two batch sizes in its analysis.json (ssl-bench analyze RUN)."
    if curves:
        how = measured_how((curve.run for curve in curves), "noise_images")
        finding = (
            f"The slope of log E|g_B - E g_B|² over log B, -1 in theory, is within {SLOPE_TOLERANCE:g} of it in "
            f"{sum(fits)} of {len(fits)} measurements ({min(slopes):.2f} to {max(slopes):.2f}); over runs {estimate}. "
            f"Measured as the "
            f"variance of the gradients of disjoint batches of one size about their mean, with {how} for each size."
        )
    says = (
        "Theorem 1: the batch gradient's error is at most σ²/B (stated for its mean, which is 0; its square is meant)."
    )
    rule = (
        f"The mean of the slopes over runs: supported where its 95% interval lies within {SLOPE_TOLERANCE:g} of -1, "
        "contradicted where it lies outside."
    )
    verdict: Verdict = "not measured" if estimate is None else "undecided (n = 1)"
    if estimate is not None and estimate.interval is not None:
        low, high = (end + 1 for end in estimate.interval)
        within = low >= -SLOPE_TOLERANCE and high <= SLOPE_TOLERANCE
        apart = low > SLOPE_TOLERANCE or high < -SLOPE_TOLERANCE
        verdict = "supported" if within else "contradicted" if apart else "undecided"
    return Claim("g", "Theorem 1: noise and batch size", says, rule, verdict, finding, _noise_table(curves))


def noise_scale(row: Row) -> float | None:
    """B_simple = B tr(Cov g_B) / |E g|^2 (McCandlish et al. 2018, eq. 2.9), in images; None unless |E g|^2 > 0."""
    squared = row.get("gradient_squared", 0.0)
    return row["batch_size"] * row["squared_error"] / squared if squared > 0 else None


def _noise_table(curves: Sequence[NoiseCurve]) -> Table:
    measured = ("B measured", "error, least B", "error, largest B", "slope", "B_simple, least B", "largest B")
    columns = (*SETTING, "lr", "optimizer", "seed", "step", *measured, "batch norm, images")
    table = Table("claim-g", "Gradient noise against the batch size", columns, NOISE_NOTES)
    for curve in curves:
        run, ends = curve.run, (curve.rows[0], curve.rows[-1])
        sizes = ", ".join(number(row["batch_size"]) for row in curve.rows)
        errors = [f"{row['squared_error']:.3g}" for row in ends]
        scales = [noise_scale(row) for row in ends]
        shown = ["–" if scale is None else number(float(f"{scale:.3g}")) for scale in scales]
        on = measured_on(run.analysis.settings, "noise_images")
        record: dict[str, Value] = run.cell.record | {"seed": run.result.seed, "step": curve.step}
        record |= {"points": len(curve.rows), "slope": curve.slope}
        for end, row, scale in zip(("least", "largest"), ends, scales, strict=True):
            record |= {f"{end}_batch_size": row["batch_size"], f"{end}_squared_error": row["squared_error"]}
            record |= {f"{end}_noise_scale": scale}
        record |= {name: run.analysis.settings.get(name) for name in ("batch_norm", "noise_images")}
        table.add((*_names(run, curve.step), sizes, *errors, f"{curve.slope:.3f}", *shown, on), record)
    return table


def _names(run: Analyzed, step: float) -> tuple[str, ...]:
    """The first columns of both tables."""
    return *run.cell.setting.cells, number(run.cell.lr), run.cell.arm, str(run.result.seed), f"{step:g}"
