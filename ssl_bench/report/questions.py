"""What a study answers besides accuracy: time to a target, lr and batch size, early ranks, and the whole at once."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import numpy as np

from ssl_bench.report.across_settings import (
    chance_of_being_best,
    critical_batch,
    power_law,
    rank_correlation,
    stratified_bootstrap,
)
from ssl_bench.report.aggregate import Cell, Collection, Result, Setting
from ssl_bench.report.claims.analysis import analysis_of
from ssl_bench.report.claims.evidence import Load
from ssl_bench.report.claims.sharpness import noise_scale
from ssl_bench.report.comparisons import WITHIN, Arm, arms, best_arms
from ssl_bench.report.curves import Curves
from ssl_bench.report.inference import pooled
from ssl_bench.report.scope import planned
from ssl_bench.report.tables import SETTING, Table, Value, between, number

FRACTIONS = (0.1, 0.25, 0.5, 0.75)  # of a run's steps, at which the early ranking is taken
RULES = {"square root": 0.5, "linear": 1.0}  # of lr against the batch size


def metric_of(problem: str) -> str:
    """The accuracy that a run logs along training: the test set's, or the online monitor's, which is no result."""
    return "test_top1" if problem == "classification" else "online_top1"


# Time to a target ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """When a run's curve first was at a target; infinite where it never was, or where the run was lost."""

    steps: float
    samples: float
    seconds: float


def time_to_target(collection: Collection, load: Load) -> Table:
    """Steps, samples and seconds until each arm, at its best learning rate, is at the setting's target."""
    columns = (*SETTING, "target %", "optimizer", "lr", "reached", "steps", "samples", "seconds", "× the fastest")
    notes = (
        f"Target: {WITHIN:g} point below the last accuracy of the best optimizer's median seed, so it comes from the "
        "data (as AlgoPerf's do, Dahl et al. 2023). Medians over seeds; a seed that never is there, or is lost, takes "
        "for ever. Steps compare optimizers; seconds also compare the machines and the evaluations between.",
    )
    table = Table("time-to-target", "Time to a target accuracy", columns, notes)
    for setting, contenders in arms(collection).items():
        runs = {arm.name: [(run, load(run)) for run in arm.best.results] for arm in contenders if arm.best}
        last = {name: _last(found, setting.problem) for name, found in runs.items()}
        last = {name: values for name, values in last.items() if values}
        if not last:
            continue
        target = max(float(np.median(values)) for values in last.values()) - WITHIN
        times = {name: [_reached(run, curves, setting.problem, target) for run, curves in runs[name]] for name in last}
        fastest = min(float(np.median([time.steps for time in each])) for each in times.values())
        for arm in contenders:
            if arm.name not in times or arm.best is None:
                continue
            each = times[arm.name]
            medians = {name: float(np.median([getattr(time, name) for time in each])) for name in vars(each[0])}
            count = sum(math.isfinite(time.steps) for time in each)
            shown = [f"{value:.4g}" if math.isfinite(value) else "not reached" for value in medians.values()]
            share = medians["steps"] / fastest if math.isfinite(fastest) and fastest > 0 else math.inf
            factor = f"{share:.2f}" if math.isfinite(share) else "–"
            table.add(
                (
                    *(*setting.cells, f"{target:.2f}", arm.name, number(arm.best.lr), f"{count} of {len(each)}"),
                    *(*shown, factor),
                ),
                arm.best.record | {"target": target, "reached": count, "runs": len(each)} | _finite(medians),
            )
    return table


def _last(runs: Sequence[tuple[Result, Curves]], problem: str) -> list[float]:
    """The last logged accuracy of each run that has a curve of two points or more and was not lost."""
    found = []
    for run, curves in runs:
        _, values = curves.metric(metric_of(problem))
        if len(values) > 1 and not run.lost:
            found.append(float(values[-1]))
    return found


def _reached(run: Result, curves: Curves, problem: str, target: float) -> Reached:
    name = metric_of(problem)
    times = []
    for clock in ("step", "samples", "seconds"):
        x, y = curves.metric(name, clock)
        there = np.flatnonzero(y >= target)
        times.append(float(x[there[0]]) if len(there) and not run.lost else math.inf)
    return Reached(*times)


def _finite(values: Mapping[str, float]) -> dict[str, Value]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


# The learning rate and the batch size --------------------------------------------------------------------------------


def rate_scaling(collection: Collection) -> Table:
    """The best learning rate against the batch size: the exponent of lr* ~ B^p, beside the two rules in use."""
    columns = ("problem", "data set", "optimizer", "best lr by batch size", "at the grid's edge", "exponent")
    notes = (
        "The best learning rate, seed by seed: the grid's best, refined by the parabola through it and its "
        "neighbours in log lr. Where it is the grid's smallest or largest the true one may lie beyond. Exponent: of "
        "lr* = c B^p by least squares on logarithms, its mean over seeds and Student's interval. Square root: 0.5 "
        "(Krizhevsky 2014, as the paper assumes); linear: 1 (Goyal et al. 2017).",
    )
    table = Table(
        "lr-scaling", "The best learning rate against the batch size", (*columns, "95% interval", "fits"), notes
    )
    for (problem, dataset, name), here in _along_batch_size(collection).items():
        by_seed: dict[int, dict[int, tuple[float, bool]]] = defaultdict(dict)
        for arm in here:
            for seed, best in _best_rates(arm).items():
                by_seed[seed][arm.setting.batch_size] = best
        exponents = {
            seed: exponent
            for seed, best in by_seed.items()
            if (exponent := power_law(list(best), [rate for rate, _ in best.values()])) is not None
        }
        estimate = pooled([list(exponents.values())])
        if estimate is None:
            continue
        edges = [edge for seed in exponents for _, edge in by_seed[seed].values()]
        sizes = sorted({size for seed in exponents for size in by_seed[seed]})
        means = {size: geometric_mean([by_seed[s][size][0] for s in exponents if size in by_seed[s]]) for size in sizes}
        ends = estimate.interval
        fits = "undecided (n = 1)" if ends is None else " and ".join(
            rule for rule, exponent in RULES.items() if ends[0] <= exponent <= ends[1]
        ) or "neither rule"  # fmt: skip
        table.add(
            (
                *(problem, dataset, name, ", ".join(f"{size}: {mean:.3g}" for size, mean in means.items())),
                *(f"{sum(edges)} of {len(edges)}", f"{estimate.mean:.2f}", between(ends), fits),
            ),
            *(
                _law_record((problem, dataset, name), seed, exponent, by_seed[seed])
                for seed, exponent in exponents.items()
            ),
        )
    return table


def _law_record(
    place: tuple[str, str, str], seed: int, exponent: float, best: Mapping[int, tuple[float, bool]]
) -> dict[str, Value]:
    record: dict[str, Value] = dict(zip(("problem", "dataset", "arm"), place, strict=True))
    record |= {"seed": seed, "exponent": exponent}
    return record | {f"best_lr_{size}": rate for size, (rate, _) in sorted(best.items())}


def _along_batch_size(collection: Collection) -> dict[tuple[str, str, str], list[Arm]]:
    """The arms of one name by problem and data set, one for each batch size; only those of two or more."""
    found: dict[tuple[str, str, str], list[Arm]] = defaultdict(list)
    for setting, contenders in arms(collection).items():
        for arm in contenders:
            found[setting.problem, setting.dataset, arm.name].append(arm)
    return {key: here for key, here in found.items() if len(here) > 1}


def _best_rates(arm: Arm) -> dict[int, tuple[float, bool]]:
    """By seed the best learning rate, and whether it is an end of the seed's grid; seeds with two rates or more."""
    scores: dict[int, dict[float, float]] = defaultdict(dict)
    for cell in arm.cells:
        if cell.lr > 0:
            for seed, top1 in cell.top1(arm.protocol).items():
                scores[seed][cell.lr] = top1
    return {seed: _peak(found) for seed, found in scores.items() if len(found) > 1}


def _peak(scores: Mapping[float, float]) -> tuple[float, bool]:
    """The learning rate of the highest accuracy, by a parabola in log lr where it has neighbours on both sides."""
    rates = sorted(scores)
    place = max(range(len(rates)), key=lambda index: scores[rates[index]])
    if place in (0, len(rates) - 1):
        return rates[place], True
    x = np.log(rates[place - 1 : place + 2])
    bend, slope, _ = np.polyfit(x, [scores[rate] for rate in rates[place - 1 : place + 2]], 2)
    vertex = -slope / (2 * bend) if bend < 0 else x[1]
    return float(np.exp(np.clip(vertex, x[0], x[2]))), False


def critical_batches(collection: Collection, load: Load) -> Table:
    """Steps to one target against the batch size, the critical batch of their law, and the measured noise scale."""
    columns = ("problem", "data set", "optimizer", "target %", "steps by batch size", "least steps", "critical batch")
    notes = (
        "Steps to a target, at each batch size's best learning rate, follow least x (1 + critical / B) (McCandlish "
        f"et al. 2018): beyond the critical batch, larger ones save few steps. Target: {WITHIN:g} point below the "
        "lowest of the batch sizes' last accuracies (median seed). Means over seeds of the logarithm, with Student's "
        "interval. Noise scale: the median B_simple = B tr Cov(g_B) / |E g|² of these runs, where `ssl-bench "
        "analyze` measured it.",
    )
    table = Table("critical-batch", "The critical batch size", (*columns, "95% interval", "noise scale"), notes)
    for (problem, dataset, name), here in _along_batch_size(collection).items():
        runs = {arm.setting.batch_size: [(r, load(r)) for r in arm.best.results] for arm in here if arm.best}
        last = {size: _last(found, problem) for size, found in runs.items()}
        if len(last) < 2 or not all(last.values()):
            continue
        target = min(float(np.median(values)) for values in last.values()) - WITHIN
        steps: dict[int, dict[int, float]] = defaultdict(dict)  # by seed, by batch size
        for size, found in runs.items():
            for run, curves in found:
                reached = _reached(run, curves, problem, target).steps
                if math.isfinite(reached):
                    steps[run.seed][size] = reached
        fits = {s: fit for s, each in steps.items() if (fit := critical_batch(list(each), list(each.values())))}
        estimate = pooled([[math.log(fit[1]) for fit in fits.values()]])
        if estimate is None:
            continue
        ends = estimate.interval and (math.exp(estimate.interval[0]), math.exp(estimate.interval[1]))
        reaching = {size: [each[size] for each in steps.values() if size in each] for size in runs}
        means = {size: geometric_mean(found) for size, found in reaching.items() if found}
        least = geometric_mean([fit[0] for fit in fits.values()])
        measured = [scale for found in runs.values() for run, _ in found for scale in _noise_scales(run)]
        noise = float(np.median(measured)) if measured else None
        table.add(
            (
                *(problem, dataset, name, f"{target:.2f}", ", ".join(f"{z}: {m:.3g}" for z, m in means.items())),
                *(f"{least:.3g}", f"{math.exp(estimate.mean):.3g}"),
                *(f"{ends[0]:.3g} … {ends[1]:.3g}" if ends else "–", "–" if noise is None else f"{noise:.3g}"),
            ),
            *(
                {
                    "problem": problem,
                    "dataset": dataset,
                    "arm": name,
                    "target": target,
                    "seed": seed,
                    "least_steps": fit[0],
                    "critical_batch": fit[1],
                    "noise_scale": noise,
                }
                for seed, fit in fits.items()
            ),
        )
    return table


def _noise_scales(run: Result) -> list[float]:
    analysis = analysis_of(run)
    rows = analysis.gradient_noise if analysis else ()
    return [scale for row in rows if "squared_error" in row and (scale := noise_scale(row)) is not None]


# Early and late ------------------------------------------------------------------------------------------------------


def early_ranking(collection: Collection, load: Load) -> Table:
    """Whether the order of the recipes early in training is that of the end: rank correlations."""
    columns = (*SETTING, "recipes", *(f"ρ at {100 * fraction:.0f}%" for fraction in FRACTIONS))
    notes = (
        "Spearman's rank correlation, over the recipes (optimizers, variants and learning rates) of a setting, of "
        "the accuracy after so much of the run with the result at the end; means over seeds, a lost seed at chance. "
        "Near 1: a short run would have ranked them alike.",
    )
    table = Table("early-ranking", "Early against late ranking", columns, notes)
    by_setting: dict[Setting, list[Cell]] = defaultdict(list)
    for cell in collection.cells:
        by_setting[cell.setting].append(cell)
    for setting, cells in by_setting.items():
        protocol = collection.headline(setting.problem)
        pairs = [
            (early, cell.summary(protocol).mean)
            for cell in cells
            if (early := _early(cell, load)) and cell.top1(protocol)
        ]
        if len(pairs) < 3:
            continue
        found = [
            rank_correlation([e[i] for e, _ in pairs], [m or 0.0 for _, m in pairs]) for i in range(len(FRACTIONS))
        ]
        table.add(
            (*setting.cells, str(len(pairs)), *("–" if math.isnan(rho) else f"{rho:+.2f}" for rho in found)),
            *(
                setting.record | {"recipes": len(pairs), "fraction": fraction, "spearman": rho}
                for fraction, rho in zip(FRACTIONS, found, strict=True)
            ),
        )
    return table


def _early(cell: Cell, load: Load) -> list[float] | None:
    """A cell's mean accuracy after each of ``FRACTIONS``; None unless every ended run has logged one by the first."""
    rows = []
    for run in cell.results:
        if run.status != "finished" and not run.lost:
            continue
        steps, values = load(run).metric(metric_of(cell.problem))
        total = planned(run, "total_steps") or (steps[-1] if len(steps) else 0)
        row = []
        for fraction in FRACTIONS:
            logged = values[steps <= fraction * total]
            if not len(logged):
                return None
            row.append(float(logged[-1]))
        rows.append(row)
    return np.mean(rows, axis=0).tolist() if rows else None


# Methods -------------------------------------------------------------------------------------------------------------


def methods(collection: Collection) -> Table:
    """Methods against methods: each optimizer's best accuracy under every method, where two or more ran."""
    found: dict[tuple[str, int, str], dict[str, Arm]] = defaultdict(dict)
    for setting, contenders in arms(collection).items():
        if setting.problem != "classification":  # which is no method, and has no probe
            for arm in best_arms(contenders):
                found[setting.dataset, setting.batch_size, arm.optimizer][setting.problem] = arm
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    notes = (
        "Each optimizer at its best learning rate and variant under each method: mean ± sd over seeds, with the "
        "protocol where the methods' differ. The runs of two methods need not be equally long: see their epochs "
        "below.",
    )
    table = Table("methods", "Methods compared", ("data set", "batch size", "optimizer", *names), notes)
    for (dataset, batch_size, optimizer), row in found.items():
        if len(row) < 2:
            continue
        alike = len({arm.protocol for arm in row.values()}) == 1
        texts = {}
        for name, arm in row.items():
            if arm.stands_for:
                texts[name] = arm.stands_for.text(arm.protocol) + ("" if alike else f", {arm.protocol}")
        tops = {f"top1_{name}": arm.top1 for name, arm in row.items()}
        place: dict[str, Value] = {"dataset": dataset, "batch_size": batch_size, "optimizer": optimizer}
        shown = (texts.get(name, "–") for name in names)
        table.add((dataset, str(batch_size), optimizer, *shown), place | tops)
    return table


# All settings at once ------------------------------------------------------------------------------------------------


def aggregates(collection: Collection) -> Table:
    """The optimizers over all settings that they share: interquartile mean with its interval, and P(best)."""
    columns = ("optimizer", "settings", "runs", "interquartile mean", "95% interval", "mean", "P(best)")
    notes = (
        "Scores: (top-1 - chance) / (100 - chance), of every seed of each optimizer's best arm, over the settings "
        "that all of these optimizers have. Interquartile mean: of the middle half of all runs, with the stratified "
        "bootstrap's interval; P(best): how often a run drawn at random in each setting is the best one (Agarwal et "
        "al. 2021). The best arm is chosen on the same runs: `at equal tuning` in the leaderboard corrects for that.",
    )
    table = Table("aggregates", "All settings at once", columns, notes)
    scores = dict(_shared_scores(collection))
    names = list(next(iter(scores.values()), {}))
    if len(names) < 2 or len(scores) < 2:
        return table
    best = chance_of_being_best({name: [row[name] for row in scores.values()] for name in names})
    for name in names:
        tasks = [row[name] for row in scores.values()]
        every = [score for task in tasks for score in task]
        estimate, low, high = stratified_bootstrap(tasks)
        interval = "–" if math.isnan(low) else f"{low:.3f} … {high:.3f}"
        mean = sum(every) / len(every)
        table.add(
            (
                *(name, str(len(tasks)), str(len(every)), f"{estimate:.3f}", interval),
                *(f"{mean:.3f}", f"{best[name]:.2f}"),
            ),
            dict[str, Value](optimizer=name, settings=len(tasks), runs=len(every), interquartile_mean=estimate)
            | {"low": low, "high": high, "mean": mean, "p_best": best[name]},
        )
    return table


def _shared_scores(collection: Collection) -> Iterator[tuple[Setting, dict[str, list[float]]]]:
    """By setting the scores of each optimizer's best arm; settings that lack one of the optimizers are left out."""
    found: dict[Setting, dict[str, list[float]]] = {}
    for setting, contenders in arms(collection).items():
        found[setting] = {}
        for arm in best_arms(contenders):
            cell = arm.stands_for
            if cell is not None and cell.chance < 100:
                scores = cell.top1(arm.protocol).values()
                found[setting][arm.optimizer] = [(top1 - cell.chance) / (100 - cell.chance) for top1 in scores]
    # An optimizer that few settings have would leave few settings to compare by: it needs more than half of them.
    counts = Counter(name for row in found.values() for name in row)
    names = [name for name, count in counts.items() if 2 * count > len(found)]
    for setting, row in found.items():
        if names and all(row.get(name) for name in names):
            yield setting, {name: row[name] for name in names}
