"""Which optimizer is better, and how sure we are: rankings, paired differences, tuning effort, sources of variance.

Within a setting (problem, data set, batch size) the contenders are *arms*: an optimizer with its variant. An arm's
trials are its learning rates.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from ssl_bench.report.across_settings import performance_profile, share_near_best
from ssl_bench.report.aggregate import Cell, Collection, Setting
from ssl_bench.report.inference import Paired, best_of_k, holm, paired_difference, two_level
from ssl_bench.report.results import INTERVALS, record_of
from ssl_bench.report.scope import epochs_trained, short
from ssl_bench.report.tables import SETTING, Table, Value, between, number, points, signed

WITHIN = 1.0  # points; a learning rate this close to the best one is as good
GAPS = tuple(0.25 * step for step in range(81))  # points, 0 to 20: the profile's axis


@dataclass(frozen=True)
class Arm:
    """One optimizer with its variant in one setting.

    Attributes:
        setting: where it competes.
        name: the optimizer with its variant.
        protocol: of the accuracies.
        cells: one for each learning rate.
    """

    setting: Setting
    name: str
    protocol: str
    cells: tuple[Cell, ...]

    @cached_property
    def best(self) -> Cell | None:
        """The cell of the highest mean, lost seeds at chance; None where no run has ended with an accuracy."""
        ended = [cell for cell in self.cells if cell.finished(self.protocol)]
        return max(ended, key=lambda cell: cell.summary(self.protocol).mean or 0.0, default=None)

    @cached_property
    def stands_for(self) -> Cell | None:
        """The cell that it is compared by: the best one, else one that lost every run; None where none has ended."""
        return self.best or next((cell for cell in self.cells if cell.failed), None)

    @property
    def top1(self) -> float | None:
        """That cell's mean, percent, which is chance where every run was lost; None where none has ended."""
        return self.stands_for.summary(self.protocol).mean if self.stands_for else None

    @property
    def optimizer(self) -> str:
        """Without the variant."""
        return self.cells[0].optimizer

    @property
    def trials(self) -> list[float]:
        """The mean top-1 of each learning rate, lost seeds at chance; cells that have not ended are no trials."""
        means = [cell.summary(self.protocol).mean for cell in self.cells]
        return [mean for mean in means if mean is not None]


@dataclass(frozen=True)
class Comparison:
    """Two arms at one learning rate each, paired by seed.

    Attributes:
        lr: printed.
        left, right: the arms' names; the difference is left - right.
        paired: None where they share no seed that ended.
        adjusted: the p value after Holm's correction for the family; None without a test.
        unpaired: seeds that both started and at least one has not ended.
        test_error: half the 95% interval over other test images, as if the two had seen different ones; it is less,
            for they saw the same. None where no images are counted.
    """

    lr: str
    left: str
    right: str
    paired: Paired | None
    adjusted: float | None
    unpaired: int
    test_error: float | None

    @property
    def verdict(self) -> str:
        """Of the left one: "ahead", "behind", "undecided", "undecided (n = 1)" or "no pair"."""
        return self.paired.verdict(self.adjusted) if self.paired else "no pair"

    @property
    def decided(self) -> bool:
        """Whether the test says which is better."""
        return self.verdict in ("ahead", "behind")


def arms(collection: Collection) -> dict[Setting, list[Arm]]:
    """All arms by setting, in the tables' order."""
    found: dict[Setting, dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in collection.cells:
        found[cell.setting][cell.arm].append(cell)
    return {
        setting: [
            Arm(setting, name, collection.headline(setting.problem), tuple(cells)) for name, cells in each.items()
        ]
        for setting, each in found.items()
    }


def at_their_best(contenders: Sequence[Arm]) -> list[Comparison]:
    """Every pair of a setting's arms, each at its best learning rate: one family of tests."""
    pairs = []
    for left, right in combinations(contenders, 2):
        one, other = left.stands_for, right.stands_for
        if one is not None and other is not None:
            pairs.append((f"best: {number(one.lr)}, {number(other.lr)}", left, right, one, other))
    return _family(pairs)


def at_shared_rates(contenders: Sequence[Arm]) -> list[Comparison]:
    """Every pair of a setting's arms at every learning rate that both have: another family."""
    pairs = []
    for left, right in combinations(contenders, 2):
        rates = {cell.lr: cell for cell in right.cells}
        pairs += [(number(c.lr), left, right, c, rates[c.lr]) for c in left.cells if c.lr in rates]
    return _family(pairs)


def _family(pairs: Sequence[tuple[str, Arm, Arm, Cell, Cell]]) -> list[Comparison]:
    paired = [paired_difference(one.top1(left.protocol), other.top1(left.protocol)) for _, left, _, one, other in pairs]
    adjusted = holm([found.p_value if found else None for found in paired])
    family = []
    for (lr, left, right, one, other), found, p in zip(pairs, paired, adjusted, strict=True):
        shared = {result.seed for result in one.results} & {result.seed for result in other.results}
        unpaired = len(shared) - (found.n if found else 0)
        if found is not None or unpaired:
            errors = [cell.test_error(left.protocol) for cell in (one, other)]
            known = [error for error in errors if error is not None]
            both = math.hypot(*known) if known else None
            family.append(Comparison(lr, left.name, right.name, found, p, unpaired, both))
    return family


def ranks(contenders: Sequence[Arm], family: Sequence[Comparison]) -> dict[str, tuple[int, int]]:
    """The best and the worst rank of each arm that the comparisons allow: arms that cannot be told apart share both.

    Args:
        contenders: a setting's arms.
        family: ``at_their_best`` of them.
    """
    names = [arm.name for arm in contenders if arm.top1 is not None]
    ahead: Counter[str] = Counter()
    behind: Counter[str] = Counter()
    for one in family:
        if one.decided:
            better, worse = (one.left, one.right) if one.verdict == "ahead" else (one.right, one.left)
            ahead[worse] += 1
            behind[better] += 1
    return {name: (1 + ahead[name], len(names) - behind[name]) for name in names}


def best_arms(contenders: Sequence[Arm]) -> list[Arm]:
    """The arm of each optimizer with the highest mean, in the tables' order; without optimizers that have none."""
    best: dict[str, Arm] = {}
    for arm in contenders:
        other = best.get(arm.optimizer)
        if arm.top1 is not None and (other is None or arm.top1 > (other.top1 or 0.0)):
            best[arm.optimizer] = arm
    return list(best.values())


def by_optimizer(contenders: Sequence[Arm]) -> dict[str, list[float]]:
    """All trials of each optimizer in a setting: every variant at every learning rate."""
    trials: dict[str, list[float]] = defaultdict(list)
    for arm in contenders:
        trials[arm.optimizer] += arm.trials
    return {name: found for name, found in trials.items() if found}


def at_equal_tuning(contenders: Sequence[Arm]) -> tuple[int, dict[str, float]]:
    """The expected best of k random trials of each optimizer, k being the fewest that any of them had.

    An optimizer tried in more variants and rates has more chances at a lucky best; at equal k it has not.
    """
    trials = by_optimizer(contenders)
    k = min(map(len, trials.values()), default=0)
    return k, {name: best_of_k(found)[k - 1] for name, found in trials.items()}


def leaderboard(collection: Collection) -> Table:
    """Every arm at its best learning rate, ranked within each setting."""
    measured = ("top-1 %", "95% interval", "test set ±", "at equal tuning", "untrained", "epochs", "lrs ended")
    columns = (*SETTING, "rank", "optimizer", "best lr", *measured, "protocol")
    notes = (
        *INTERVALS,
        "Each optimizer at the learning rate of its highest mean. Rank: 1 + how many are decidedly ahead of it, to how "
        "many it is not decidedly ahead of, by tests paired by seed with Holm's correction; optimizers that cannot be "
        "told apart share their ranks.",
        "At equal tuning: the optimizer's expected best of k trials, drawn at random from all its variants and "
        "learning rates, k (in brackets) being the fewest that any optimizer of the setting had. Of several rates the "
        "best is chosen on the test set here, which favours whoever tried more; at equal k it does not.",
    )
    table = Table("leaderboard", "Leaderboard", columns, notes)
    for setting, contenders in arms(collection).items():
        ranked = sorted(contenders, key=lambda arm: float("-inf") if arm.top1 is None else arm.top1, reverse=True)
        places = ranks(contenders, at_their_best(contenders))
        k, equal = at_equal_tuning(contenders)
        for arm in ranked:
            best = arm.best
            cell = best or arm.cells[0]
            # Without an accuracy the runs of all learning rates are named, not only the first one's.
            states = sum((each.statuses for each in arm.cells), Counter[str]())
            text = best.text(arm.protocol) if best else ", ".join(f"{count} {word}" for word, count in states.items())
            ended, place = len(arm.trials), places.get(arm.name)
            shared = "–" if place is None else str(place[0]) if place[0] == place[1] else f"{place[0]}–{place[1]}"
            tuned = equal.get(arm.optimizer)
            interval, error = cell.interval(arm.protocol), cell.test_error(arm.protocol)
            table.add(
                (
                    *(*setting.cells, shared, arm.name, number(cell.lr), text, between(interval) if best else "–"),
                    *(points(error), f"{tuned:.2f} ({k})" if tuned is not None else "–"),
                    *(points(cell.untrained(arm.protocol).mean), short(epochs_trained([cell]))),
                    *(f"{ended} of {len(arm.cells)}", arm.protocol),
                ),
                {
                    "rank_best": place[0] if place else None,
                    "rank_worst": place[1] if place else None,
                    **record_of(cell, arm.protocol),
                    "equal_tuning_top1": tuned,
                    "equal_tuning_k": k,
                },
                key=cell.key,
            )
    return table


def comparisons(collection: Collection) -> Table:
    """Differences between arms, paired by seed: best against best, and at each learning rate that two share."""
    tests: list[tuple[Setting, str, Comparison]] = []
    for setting, contenders in arms(collection).items():
        families = (at_their_best(contenders), at_shared_rates(contenders))
        protocol = contenders[0].protocol
        tests += [(setting, protocol, one) for family in families for one in family]
    decided = sum(one.decided for _, _, one in tests)
    notes = (
        f"{decided} of {len(tests)} comparisons are decided." if tests else "",
        "Mean of (optimizer - against) in points over the seeds that both ended. The interval is Student's of 95%, of "
        "this comparison alone. The verdict is corrected by Holm's method within two families for each setting: all "
        "pairs at their best learning rates, and all pairs at shared ones; of true ties one family in "
        "twenty decides anything. One pair decides nothing.",
        *INTERVALS[1:],
    )
    measured = ("difference", "pairs", "95% interval", "test set ±, at most", "p, Holm", "verdict")
    columns = (*SETTING, "lr", "optimizer", "against", *measured)
    table = Table("comparisons", "Optimizers compared, paired by seed", columns, tuple(filter(None, notes)))
    for setting, protocol, one in tests:
        record: dict[str, Value] = setting.record | {"protocol": protocol, "lr": one.lr}
        record |= {"optimizer": one.left, "against": one.right, "verdict": one.verdict}
        record |= {"pairs": one.paired.n if one.paired else 0, "unpaired": one.unpaired, "test_error": one.test_error}
        texts = ["–", "0", "–"]
        if one.paired:
            ends = one.paired.interval
            record |= {"difference": one.paired.mean, "sd": one.paired.sd}
            record |= dict(zip(("student_low", "student_high"), ends or (None, None), strict=True))
            record |= {"p_value": one.paired.p_value, "p_holm": one.adjusted}
            texts = [signed(one.paired.mean), str(one.paired.n), between(ends, signs=True) if ends else "n = 1"]
        texts[1] += f" ({one.unpaired} not ended)" if one.unpaired else ""
        p = "–" if one.adjusted is None else f"{one.adjusted:.2g}" if one.adjusted >= 1e-4 else "< 0.0001"
        table.add((*setting.cells, one.lr, one.left, one.right, *texts, points(one.test_error), p, one.verdict), record)
    return table


def sensitivity(collection: Collection) -> Table:
    """The share of an arm's learning rates that are near its best, and the expected best of k of them."""
    notes = (
        "Within 1 point: the share of the learning rates whose mean is within a point of the best one's. Best of k: "
        "the expected best of k learning rates drawn at random from the grid without replacement, k = 1, 2, ...; a "
        "learning rate of which every run failed counts as chance.",
    )
    measured = ("trials", "within 1 point %", "best lr", "failed", "best of k = 1, 2, … %")
    columns = (*SETTING, "optimizer", "lr grid", *measured)
    table = Table("sensitivity", "Sensitivity to the learning rate", columns, notes)
    for setting, contenders in arms(collection).items():
        for arm in contenders:
            trials, best = arm.trials, arm.best
            if not trials:
                continue
            curve = best_of_k(trials)
            share = share_near_best(trials, WITHIN) if best else None  # if every rate failed, none is near a best
            failed = sum(cell.failed for cell in arm.cells)
            lrs = [cell.lr for cell in arm.cells]
            record = setting.record | {"arm": arm.name, "trials": len(trials), "share_within_1": share}
            table.add(
                (
                    *(*setting.cells, arm.name, f"{number(min(lrs))} – {number(max(lrs))}", str(len(trials))),
                    *("–" if share is None else f"{100 * share:.0f}", number(best.lr) if best else "–", str(failed)),
                    " → ".join(f"{value:.1f}" for value in curve),
                ),
                *(record | {"k": k, "expected_best": v, "failed": failed} for k, v in enumerate(curve, start=1)),
            )
    return table


def profiles(collection: Collection) -> dict[str, list[float]]:
    """Performance profiles over the settings: by optimizer the share of settings within each of ``GAPS`` of the best.

    An optimizer stands by its expected best at equal tuning. Settings with one optimizer compare nothing and are left
    out.
    """
    rows = {str(setting): at_equal_tuning(contenders)[1] for setting, contenders in arms(collection).items()}
    return performance_profile({name: row for name, row in rows.items() if len(row) > 1}, GAPS)


def profile_table(collection: Collection) -> Table:
    """The performance profiles at a few gaps."""
    chosen = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
    columns = ("optimizer", *(f"within {number(gap)}" if gap else "the best" for gap in chosen))
    notes = (
        "The share, in percent, of the settings (problem, data set, batch size) in which the optimizer is within so "
        "many points of the best one, each by its expected best at equal tuning.",
    )
    table = Table("profiles", "Performance profiles across settings", columns, notes)
    for name, shares in profiles(collection).items():
        records: list[dict[str, Value]] = [
            {"optimizer": name, "points_behind": gap, "share_of_settings": share}
            for gap, share in zip(GAPS, shares, strict=True)
        ]
        table.add((name, *(f"{100 * shares[GAPS.index(gap)]:.0f}" for gap in chosen)), *records)
    return table


def variances(collection: Collection) -> Table:
    """Whether the deviation comes from the pretraining's seed or from the probe's."""
    measured = ("runs × probe seeds", "sd of runs", "sd of probes", "se of mean")
    columns = (*SETTING, "optimizer", "lr", "protocol", *measured)
    notes = (
        "One-way random effects, by the method of moments: the deviation between pretraining seeds beyond what the "
        "probe seeds explain (0 where that estimate is negative), that between probe seeds, and the mean's standard "
        "error.",
    )
    table = Table("variance", "Two levels of variance: pretraining and probe", columns, notes)
    for cell in collection.cells:
        for protocol in collection.protocols(cell.problem):
            finished = [r for r in cell.results if r.status == "finished" and protocol in r.scores]
            probes = [r.scores[protocol].probes for r in finished if len(r.scores[protocol].probes) > 1]
            split = two_level(probes) if len({len(row) for row in probes}) == 1 else None
            if split is None:
                continue
            deviations = {"sd_runs": split.sd_runs, "sd_probes": split.sd_probes, "se_mean": split.sd_mean}
            table.add(
                (
                    *(*cell.setting.cells, cell.arm, number(cell.lr), protocol, f"{split.runs} × {split.probes}"),
                    *(f"{value:.2f}" for value in deviations.values()),
                ),
                record_of(cell, protocol) | {"runs": split.runs, "probes": split.probes} | deviations,
            )
    return table
