"""Whether warm-up ends in sharper minima: claim (c), on what `ssl-bench analyze` measured.

Two runs of a pair are compared at their last measured step, by the top Hessian eigenvalue as it is and by the
scale-invariant one. A difference no larger than the sum of the two residuals is none.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ssl_bench.report.aggregate import Cell, Collection
from ssl_bench.report.analysis import (
    MEASURES,
    SAM,
    SCALED,
    TOP,
    TRACE,
    Analysis,
    Analyzed,
    Measure,
    analyzed,
    measured_how,
    measured_on,
    sharpness_settings,
)
from ssl_bench.report.evidence import Claim, Verdict, record_for, warm_and_cold, warm_lars_and_tvlars, where
from ssl_bench.report.scope import cut_short
from ssl_bench.report.tables import Table, Value, number

SAYS = "Warm-up traps LARS in sharp minimizers, and TVLARS avoids them (sections 3.3 and 4). The paper measures none."
NOTES = (
    "Top eigenvalue: of the loss's Hessian in all trainable parameters, by Lanczos, ± its residual: an eigenvalue lies "
    "that close, and the largest is not below. Trace: Hutchinson's estimate ± its standard error. SAM: how much the "
    "loss rises at the end of a step of length ρ up its gradient. Loss: of the same batch.",
    "× |w|²: batch norm makes the loss blind to the scale of the weights before it. Growing by c, they leave the "
    "network's function alone and divide this part of the Hessian by c², so that raw sharpness falls just because "
    "weights grow (Dinh et al. 2017); times |w|² it stays. |w| is of all parameters, also of the few (last layer, "
    "batch norm's own) whose scale does matter, so the product is invariant only nearly.",
    "Verdict: supported where in every pair both measures find the warm-up's end sharper, contradicted where both find "
    "it flatter in every pair, undecided where no pair shows a difference by either, else mixed: above all where the "
    "two measures disagree. Sharpness is of the point that a run has reached; one cut short has reached no minimum.",
)

Outcome = Literal["sharper", "flatter", "no difference"]


@dataclass
class _Tally:
    """How the pairs of one question came out.

    Attributes:
        question: "With a warm-up against without it", say; the outcomes are the first one's.
        by: the outcomes of each measure, pair by pair; both lists are equally long.
        left_out: pairs that cannot be compared, by reason.
    """

    question: str
    by: dict[Measure, list[Outcome]] = field(default_factory=lambda: {TOP: [], SCALED: []})
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def pairs(self) -> int:
        return len(self.by[TOP])


def check_sharpness(collection: Collection) -> Claim:
    """(c): whether training ends in sharper minima with a warm-up than without, and than TVLARS does.

    Args:
        collection: the runs; those without an analysis say nothing.
    """
    runs = [run for run in analyzed(collection) if run.analysis.sharpness]
    by_run = {(run.cell.key, run.result.seed): run.analysis for run in runs}
    tallies = [
        _compare("With a warm-up against without it (LARS, LAMB)", warm_and_cold(collection), by_run),
        _compare("LARS with a warm-up against TVLARS", warm_lars_and_tvlars(collection), by_run),
    ]
    return Claim("c", "Warm-up and sharp minima", SAYS, _verdict(tallies), _finding(runs, tallies), _table(runs))


def _compare(question: str, pairs: Iterable[tuple[Cell, Cell, int]], by_run: dict[tuple[str, int], Analysis]) -> _Tally:
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
            outcomes.append(_outcome(measure, left, right))
    return tally


def _incomparable(left: Analysis, right: Analysis) -> str:
    """Why two analyses cannot be compared; empty where they can."""
    settings = sharpness_settings(left), sharpness_settings(right)
    if None in settings:
        return "the settings are not recorded"
    if settings[0] != settings[1]:
        return "measured with different settings"
    if left.sharpness[-1]["step"] != right.sharpness[-1]["step"]:
        return "the last measured steps differ"
    for measure in (TOP, SCALED):
        for analysis in (left, right):
            found = measure.of(analysis.sharpness[-1])
            if found is None or found[1] is None:
                return "eigenvalue, residual or |w| is missing"
    return ""


def _outcome(measure: Measure, left: Analysis, right: Analysis) -> Outcome:
    """How the left one's end is, beside the right one's."""
    (one, error), (other, other_error) = (measure.of(a.sharpness[-1]) or (0.0, 0.0) for a in (left, right))
    if abs(one - other) <= (error or 0.0) + (other_error or 0.0):
        return "no difference"
    return "sharper" if one > other else "flatter"


def _verdict(tallies: Sequence[_Tally]) -> Verdict:
    """One word for the pairs of both questions; see the table's notes."""
    seen = {outcome for tally in tallies for outcomes in tally.by.values() for outcome in outcomes}
    if not seen:
        return "not measured"
    words: dict[Outcome, Verdict]
    words = {"sharper": "supported", "flatter": "contradicted", "no difference": "undecided"}
    return words[seen.pop()] if len(seen) == 1 else "mixed"


def _finding(runs: Sequence[Analyzed], tallies: Sequence[_Tally]) -> str:
    if not runs:
        return "No run has sharpness in its analysis.json (ssl-bench analyze RUN)."
    counted = [tally for tally in tallies if tally.pairs]
    said = [_counts(tally) for tally in counted]
    if not counted:
        said = ["Sharpness is measured, but in no pair of one setting, learning rate and seed that can be compared."]
    said.append(f"Measured with {measured_how(runs)}.")
    short = sum(cut_short(run.cell) for run in runs)
    if short:
        said.append(
            f"{short} of {len(runs)} runs were cut short of the paper's epochs: where they ended is no minimum."
        )
    left_out = sum((tally.left_out for tally in tallies), Counter[str]())
    said += [f"Left out: {count} {_pairs(count)}, {reason}." for reason, count in left_out.items()]
    return " ".join(said)


def _counts(tally: _Tally) -> str:
    """Both measures' counts in one sentence."""
    parts = []
    for measure, outcomes in tally.by.items():
        count = Counter(outcomes)
        parts.append(
            f"by the {measure.text} sharper in {count['sharper']}, flatter in {count['flatter']}, no difference in "
            f"{count['no difference']}"
        )
    return (
        f"{tally.question}, {tally.pairs} {_pairs(tally.pairs)} of one learning rate and seed at the last measured "
        f"step: {'; '.join(parts)}."
    )


def _pairs(count: int) -> str:
    return "pair" if count == 1 else "pairs"


def _table(runs: Sequence[Analyzed]) -> Table:
    lines = list(_lines(runs))
    columns: tuple[str, ...]
    columns = ("problem", "data set", "batch size", "lr", "optimizer", "seed", "step", "loss", TOP.text, "|w|")
    columns = (*columns, SCALED.text, TRACE.text, SAM.text, "batch norm, images")
    rows, records = [row for row, _ in lines], [record for _, record in lines]
    return Table("claim-c", "Sharpness along training", columns, rows, records, NOTES)


def _lines(runs: Sequence[Analyzed]) -> Iterator[tuple[tuple[str, ...], dict[str, Value]]]:
    """The table's rows and records, one for each measured step."""
    for run in runs:
        settings = run.analysis.settings
        for row in run.analysis.sharpness:
            names = (*where(run.cell), number(run.cell.lr), run.cell.arm, str(run.result.seed), f"{row['step']:g}")
            loss, norm = (f"{row[name]:.4g}" if name in row else "–" for name in ("loss", "weight_norm"))
            shown = [measure.printed(row) for measure in MEASURES]
            scaled = SCALED.of(row)
            record: dict[str, Value] = record_for(run.cell, run.result.seed) | dict(row)
            record |= {"top_eigenvalue_times_weights": scaled[0] if scaled else None}
            record |= {name: settings.get(name) for name in ("batch_norm", "images", "rho")}
            yield (*names, loss, shown[0], norm, *shown[1:], measured_on(settings)), record
