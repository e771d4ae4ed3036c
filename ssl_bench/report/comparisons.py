"""Which optimizer is better, and how sure we are: rankings, paired differences, tuning effort, sources of variance.

Within a setting (problem, data set, batch size) the contenders are *arms*: an optimizer with its variant. An arm's
trials are its learning rates.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from ssl_bench.report.aggregate import Cell, Collection, Setting
from ssl_bench.report.inference import (
    RESAMPLES,
    Paired,
    best_of_k,
    paired_difference,
    performance_profile,
    share_near_best,
    two_level,
)
from ssl_bench.report.results import record_of
from ssl_bench.report.scope import epochs_trained, scope, short
from ssl_bench.report.tables import SETTING, Table, Value, number, points, signed

WITHIN = 1.0  # points; a learning rate this close to the best one is as good
GAPS = tuple(0.25 * step for step in range(81))  # points, 0 to 20: the profile's axis
FEW_PAIRS = 5


@dataclass(frozen=True)
class Arm:
    """One optimizer with its variant in one setting.

    Attributes:
        setting: where it competes.
        name: the optimizer with its variant.
        protocol: of the accuracies.
        chance: a guesser's accuracy in the setting, percent; 0 where no run recorded it.
        cells: one for each learning rate.
    """

    setting: Setting
    name: str
    protocol: str
    chance: float
    cells: tuple[Cell, ...]

    @property
    def best(self) -> Cell | None:
        """The cell of the highest mean; None where no run has an accuracy."""
        measured = [cell for cell in self.cells if cell.summary(self.protocol).n]
        return max(measured, key=lambda cell: cell.summary(self.protocol).mean or 0.0, default=None)

    @property
    def top1(self) -> float | None:
        """The best cell's mean, percent."""
        return self.best.summary(self.protocol).mean if self.best else None

    @property
    def optimizer(self) -> str:
        """Without the variant."""
        return self.cells[0].optimizer

    @property
    def trials(self) -> list[float]:
        """The mean top-1 of each learning rate's finished runs, or chance where all of them failed.

        Cells that have not ended are no trials.
        """
        means = [(cell, cell.summary(self.protocol).mean) for cell in self.cells]
        return [self.chance if mean is None else mean for cell, mean in means if mean is not None or cell.failed]


def arms(collection: Collection) -> dict[Setting, list[Arm]]:
    """All arms by setting, in the tables' order."""
    found: dict[Setting, dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in collection.cells:
        found[cell.setting][cell.arm].append(cell)
    grouped = {}
    for setting, by_arm in found.items():
        protocol = collection.headline(setting.problem)
        known = [cell.chance(protocol) for cells in by_arm.values() for cell in cells]
        chance = next((value for value in known if value is not None), 0.0)
        grouped[setting] = [Arm(setting, name, protocol, chance, tuple(cells)) for name, cells in by_arm.items()]
    return grouped


def leaderboard(collection: Collection) -> Table:
    """Every arm at its best learning rate, ranked within each setting."""
    columns = (*SETTING, "rank", "optimizer", "best lr", "top-1 %", "untrained", "epochs", "lrs finished", "protocol")
    notes = (
        *scope(collection),
        "Each optimizer at the learning rate of its highest mean. Where that was chosen on the test set, as here, the "
        "number favours whoever tried more rates; the sensitivity and best-of-k tables show how much.",
    )
    table = Table("leaderboard", "Leaderboard", columns, notes)
    for setting, contenders in arms(collection).items():
        ranked = sorted(contenders, key=lambda arm: float("-inf") if arm.top1 is None else arm.top1, reverse=True)
        for rank, arm in enumerate(ranked, start=1):
            best = arm.best
            cell = best or arm.cells[0]
            # Without an accuracy the runs of all learning rates are named, not only the first one's.
            states = sum((each.statuses for each in arm.cells), Counter[str]())
            text = best.text(arm.protocol) if best else ", ".join(f"{count} {word}" for word, count in states.items())
            finished = sum(1 for each in arm.cells if each.summary(arm.protocol).n)
            table.add(
                (
                    *(*setting.cells, str(rank) if best else "–", arm.name, number(cell.lr), text),
                    *(points(cell.untrained(arm.protocol).mean), short(epochs_trained([cell]))),
                    *(f"{finished} of {len(arm.cells)}", arm.protocol),
                ),
                {"rank": rank if best else None, **record_of(cell, arm.protocol)},
                key=cell.key,
            )
    return table


def comparisons(collection: Collection) -> Table:
    """Differences between arms, paired by seed: at each learning rate that two share, and best against best."""
    notes = (
        "Mean of (optimizer - against) in points over the seeds that both finished. Intervals are of 95%: bootstrap "
        f"is BCa with {RESAMPLES:,} resamples from a fixed seed; with fewer than {FEW_PAIRS} pairs it is too narrow, "
        "and the verdict is Student's. One pair has no interval. Nothing is corrected for the number of comparisons "
        "in this table: of twenty true ties one is expected to look decided.",
        "Lost: seeds of which one run diverged, collapsed or has not ended; the remaining ones may favour either side.",
    )
    measured = ("difference", "pairs", "95% bootstrap", "95% Student", "verdict")
    columns = (*SETTING, "lr", "optimizer", "against", *measured)
    table = Table("comparisons", "Optimizers compared, paired by seed", columns, notes)
    for setting, contenders in arms(collection).items():
        for left, right in combinations(contenders, 2):
            for lr, one, other in _meetings(left, right):
                paired = paired_difference(one.top1(left.protocol), other.top1(right.protocol))
                shared = {result.seed for result in one.results} & {result.seed for result in other.results}
                lost = len(shared) - (paired.n if paired else 0)
                if paired is None and not lost:
                    continue
                record: dict[str, Value] = setting.record | {"protocol": left.protocol, "lr": lr}
                record |= {"optimizer": left.name, "against": right.name}
                texts, values = _paired(paired, lost)
                table.add((*setting.cells, lr, left.name, right.name, *texts), record | values)
    return table


def _meetings(left: Arm, right: Arm) -> Iterator[tuple[str, Cell, Cell]]:
    """Where two arms can be compared: at the learning rates that both have, and each at its best."""
    rates = {cell.lr: cell for cell in right.cells}
    for cell in left.cells:
        if cell.lr in rates:
            yield number(cell.lr), cell, rates[cell.lr]
    if left.best is not None and right.best is not None:
        yield f"best: {number(left.best.lr)}, {number(right.best.lr)}", left.best, right.best


def _paired(paired: Paired | None, lost: int) -> tuple[tuple[str, ...], dict[str, Value]]:
    """A paired difference as the last columns of a row and of its record."""
    pairs = paired.n if paired else 0
    count, record = f"{pairs}{f' ({lost} lost)' if lost else ''}", {"pairs": pairs, "lost": lost}
    if paired is None:
        return ("–", count, "–", "–", "no pair"), {**record}
    intervals = {"bootstrap": paired.bootstrap, "student": paired.student}
    texts = [f"{ends[0]:+.2f} … {ends[1]:+.2f}" if ends else "n = 1" for ends in intervals.values()]
    values: dict[str, Value] = {"difference": paired.mean, "sd": paired.sd, "verdict": paired.verdict}
    for name, ends in intervals.items():
        values |= dict(zip((f"{name}_low", f"{name}_high"), ends or (None, None), strict=True))
    return (signed(paired.mean), count, *texts, paired.verdict), record | values


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
            failed = sum(not cell.summary(arm.protocol).n for cell in arm.cells)
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

    An arm stands for its optimizer by its best learning rate, several variants of one by the best variant. Settings
    with one optimizer compare nothing and are left out.
    """
    scores: dict[str, dict[str, float]] = {}
    for setting, contenders in arms(collection).items():
        row: dict[str, float] = {}
        for arm in contenders:
            if arm.top1 is not None:
                row[arm.optimizer] = max(row.get(arm.optimizer, 0.0), arm.top1)
        if len({arm.optimizer for arm in contenders}) > 1 and row:
            scores[str(setting)] = row
    return performance_profile(scores, GAPS)


def profile_table(collection: Collection) -> Table:
    """The performance profiles at a few gaps."""
    chosen = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
    columns = ("optimizer", *(f"within {number(gap)}" if gap else "the best" for gap in chosen))
    notes = (
        "The share, in percent, of the settings (problem, data set, batch size) in which the optimizer at its best "
        "learning rate is within so many points of the best optimizer. One that failed everywhere in a setting is "
        "never near.",
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
