"""The paper's main claims: TVLARS ahead of LARS, what a warm-up is worth, how soon each is done, the best lambda."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from ssl_bench.report.aggregate import Cell, Collection
from ssl_bench.report.claims.evidence import (
    Claim,
    Load,
    Pair,
    Verdict,
    grouped,
    run_of,
    verdict_of,
    warm_and_cold,
    warm_lars_and_tvlars,
)
from ssl_bench.report.curves import Curves
from ssl_bench.report.inference import Estimate, pooled
from ssl_bench.report.protocols import beside_paper
from ssl_bench.report.recipes import lookup
from ssl_bench.report.results import BOLD_MARGIN
from ssl_bench.report.scope import cut_short
from ssl_bench.report.tables import SETTING, Table, is_number, number, points, signed

LAMBDA = {"classification": 1e-4, "barlow_twins": 1e-5}  # of Table 1
WARMUP_WORTH = 3.0  # points: the lower end of "approximately 3 - 5%"
SOONER = 3.0  # times: 60 epochs of LARS for 20 of TVLARS, the lower end of "60 ~ 80"
LARGE_BATCH = 4096  # from here on the paper says so
NEAR = 1.0  # points below the run's best accuracy: there it has arrived

CUT = "The runs were cut short of the paper's epochs, so this decides nothing about its claim: "


def check_ahead(collection: Collection) -> Claim:
    """(a): whether TVLARS leads LARS by a point, as Table 1's bold numbers say."""
    pairs = [
        pair
        for pair in warm_lars_and_tvlars(collection)
        if lookup(pair[1].recipe, "optimizer.decay") == LAMBDA.get(pair[1].problem)
    ]
    says = "TVLARS is ahead of LARS with warm-up by at least 1 point in almost every cell (Table 1, section 5.1)."
    return _difference(
        "a", "TVLARS against LARS", says, "TVLARS - LARS", [(rival, lars, seed) for lars, rival, seed in pairs],
        BOLD_MARGIN,
    )  # fmt: skip


def check_warmup(collection: Collection) -> Claim:
    """(b): whether LARS loses 3 to 5 points without its warm-up."""
    pairs = [pair for pair in warm_and_cold(collection) if pair[0].optimizer == "LARS"]
    says = "Without a warm-up LARS loses approximately 3 to 5 points (section 3.2, quantitative results)."
    return _difference("b", "What the warm-up is worth", says, "with - without warm-up", pairs, WARMUP_WORTH)


def _difference(letter: str, title: str, says: str, what: str, pairs: Sequence[Pair], threshold: float) -> Claim:
    """A claim on a difference of accuracies: of each pair the first one's minus the second one's."""
    columns = (*SETTING, "lr", "optimizer", "against", "seed", "one", "the other", "difference")
    table = Table(f"claim-{letter}", f"{title}, pair by pair", columns)
    found: list[tuple[tuple[str, str], float]] = []
    whole: list[bool] = []
    for one, other, seed in pairs:
        protocol = beside_paper(one.problem)
        both = one.top1(protocol).get(seed), other.top1(protocol).get(seed)
        if both[0] is None or both[1] is None:
            continue
        difference = both[0] - both[1]
        found.append(((one.key, other.key), difference))
        whole.append(not cut_short(one))
        values = (*map(points, both), signed(difference))
        table.add(
            (*one.setting.cells, number(one.lr), one.arm, other.arm, str(seed), *values),
            one.record | {"seed": seed, "against": other.arm, "one": both[0], "other": both[1], "by": difference},
        )
    verdict, estimate = _decide(found, whole, threshold)
    finding = "No pair of runs that differ in nothing else has accuracies by the paper's protocol."
    if estimate is not None:
        finding = f"{CUT if verdict == 'not reached' else ''}{what} is {estimate} points."
    rule = (
        f"{what} in points, paired by seed, the mean over settings and learning rates: supported where its whole 95% "
        f"interval is at {threshold:g} or above, contradicted where all of it is below."
    )
    return Claim(letter, title, says, rule, verdict, finding, table)


def _decide(
    found: Sequence[tuple[object, float]], whole: Sequence[bool], threshold: float
) -> tuple[Verdict, Estimate | None]:
    """The verdict by the pairs of the paper's length; where there are none the estimate of the others, undecided."""
    full = [pair for pair, is_full in zip(found, whole, strict=True) if is_full]
    if found and not full:
        return "not reached", pooled(grouped(found))
    estimate = pooled(grouped(full))
    return verdict_of(estimate, threshold), estimate


def check_speed(collection: Collection, load: Load) -> Claim:
    """(c): whether TVLARS is at its optimum in a third of LARS's epochs."""
    columns = (*SETTING, "lr", "TVLARS", "seed", "epochs, LARS", "epochs, TVLARS", "LARS / TVLARS")
    table = Table("claim-c", "Epochs to the optimum, pair by pair", columns)
    found, whole = [], []
    for lars, rival, seed in warm_lars_and_tvlars(collection):
        runs = [run_of(cell, seed) for cell in (lars, rival)]
        if lars.batch_size < LARGE_BATCH or any(run.status != "finished" for run in runs):
            continue
        first, second = (arrival(load(run)) for run in runs)
        if first is None or second is None:
            continue
        found.append(((lars.key, rival.key), math.log(first / second)))
        whole.append(not cut_short(lars))
        texts = (f"{first:.3g}", f"{second:.3g}", f"{first / second:.2f}")
        table.add(
            (*lars.setting.cells, number(lars.lr), rival.arm, str(seed), *texts),
            lars.record | {"seed": seed, "rival": rival.arm, "epochs_lars": first, "epochs_tvlars": second},
        )
    verdict, estimate = _decide(found, whole, math.log(SOONER))
    finding = "No pair of LARS with warm-up and TVLARS at B >= 4096 has test accuracies along training."
    if estimate is not None:
        ends = estimate.interval or (math.nan, math.nan)
        interval = "" if estimate.interval is None else f" (95%: {math.exp(ends[0]):.3g} to {math.exp(ends[1]):.3g})"
        cut = CUT if verdict == "not reached" else ""
        finding = f"{cut}LARS needs {math.exp(estimate.mean):.3g} times TVLARS's epochs{interval}; n = {len(found)}."
    says = "At large batches TVLARS is at its optimum after 20 epochs, LARS after 60 to 80 (section 5.1, appendix D)."
    rule = (
        f"The epochs until a run is within {NEAR:g} point of its own best test accuracy, LARS's over TVLARS's at B >= "
        f"{LARGE_BATCH}: supported where the 95% interval of the geometric mean is at {SOONER:g} or above, "
        "contradicted where it is below."
    )
    return Claim("c", "Epochs to the optimum", says, rule, verdict, finding, table)


def arrival(curves: Curves) -> float | None:
    """The first epoch at which a run's test accuracy is within ``NEAR`` of its best; None below five measurements."""
    epochs, top1 = curves.metric("test_top1", "epochs")
    epochs, top1 = epochs[epochs > 0], top1[epochs > 0]
    if len(top1) < 5:
        return None
    return float(epochs[np.flatnonzero(top1 >= top1.max() - NEAR)[0]])


def check_lambda(collection: Collection) -> Claim:
    """(d): whether TVLARS's best lambda rises with the batch size."""
    columns = ("problem", "data set", "seed", "best λ by batch size", "slope")
    table = Table("claim-d", "TVLARS's best lambda, seed by seed", columns)
    families: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in collection.cells:
        if cell.optimizer == "TVLARS":
            families[cell.problem, cell.dataset].append(cell)
    found, whole = [], []
    for (problem, dataset), cells in families.items():
        for seed, best in _best_lambdas(cells, beside_paper(problem)):
            sizes, lambdas = zip(*sorted(best.items()), strict=True)
            slope = float(np.polyfit(np.log2(sizes), np.log10(lambdas), 1)[0])
            found.append(((problem, dataset), slope))
            whole.append(not any(map(cut_short, cells)))
            text = ", ".join(f"{size}: {number(value)}" for size, value in sorted(best.items()))
            row = (problem, dataset, str(seed), text, f"{slope:+.2f}")
            table.add(row, {"problem": problem, "dataset": dataset, "seed": seed, "best": text, "slope": slope})
    verdict, estimate = _decide(found, whole, 0.0)
    finding = "No seed has TVLARS at two values of λ or more for two batch sizes or more."
    if estimate is not None:
        cut = CUT if verdict == "not reached" else ""
        finding = f"{cut}Per doubling of B the best λ changes by {estimate} decades."
    says = "Small λ is best at B = 1024, large λ at 16,384: the best λ rises with B (section 5.2.1, figure 4)."
    rule = (
        "The slope of log10 of the best λ (over all learning rates) over log2 B, seed by seed: supported where its 95% "
        "interval is at 0 or above, contradicted where it is below."
    )
    return Claim("d", "The best lambda and the batch size", says, rule, verdict, finding, table)


def _best_lambdas(cells: Iterable[Cell], protocol: str) -> Iterable[tuple[int, dict[int, float]]]:
    """By seed the best lambda of each batch size at which the seed ran two or more; seeds with two sizes or more."""
    scores: dict[int, dict[int, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for cell in cells:
        decay = lookup(cell.recipe, "optimizer.decay")
        if is_number(decay) and decay > 0:
            for seed, top1 in cell.top1(protocol).items():
                found = scores[seed][cell.batch_size]
                found[decay] = max(top1, found.get(decay, 0.0))
    for seed, by_size in sorted(scores.items()):
        best = {size: max(found, key=lambda decay: found[decay]) for size, found in by_size.items() if len(found) > 1}
        if len(best) > 1:
            yield seed, best
