"""Which optimizer, and how sure: rankings, paired differences, tuning effort, and where the variance comes from.

Within a setting (problem, data set, batch size) the contenders are *arms*: an optimizer with its variant. An arm's
trials are its learning rates.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from ssl_bench.report.aggregate import Cell, Collection
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
from ssl_bench.report.tables import Table, Value, number, points, signed

Setting = tuple[str, str, int]

WITHIN = 1.0  # points; a learning rate this close to the best one is as good
GAPS = tuple(0.25 * step for step in range(81))  # points, 0 to 20: the profile's axis
FEW_PAIRS = 5


@dataclass(frozen=True)
class Arm:
    """One optimizer with its variant in one setting; its cells differ in the learning rate."""

    setting: Setting
    name: str
    protocol: str
    cells: tuple[Cell, ...]

    @property
    def best(self) -> Cell | None:
        """The cell of the highest mean; None where no run has an accuracy."""
        measured = [cell for cell in self.cells if cell.summary(self.protocol).n]
        return max(measured, key=lambda cell: cell.summary(self.protocol).mean or 0.0, default=None)

    def trials(self, chance: float) -> list[float]:
        """What each learning rate reached: the mean of its finished runs, or chance where all of them failed.

        Cells that have not ended are no trials.
        """
        values = []
        for cell in self.cells:
            mean = cell.summary(self.protocol).mean
            if mean is not None:
                values.append(mean)
            elif cell.statuses["diverged"] + cell.statuses["collapsed"] == len(cell.results):
                values.append(chance)
        return values


def arms(collection: Collection) -> dict[Setting, list[Arm]]:
    """All arms by setting, in the tables' order."""
    found: dict[tuple[Setting, str], list[Cell]] = defaultdict(list)
    for cell in collection.cells:
        found[cell.setting, cell.arm].append(cell)
    grouped: dict[Setting, list[Arm]] = defaultdict(list)
    for (setting, name), cells in found.items():
        grouped[setting].append(Arm(setting, name, collection.headline(setting[0]), tuple(cells)))
    return dict(grouped)


def chance_of(arms_: Sequence[Arm]) -> float:
    """A guesser's accuracy in a setting, percent; 0 where no run recorded it."""
    known = [cell.chance(arm.protocol) for arm in arms_ for cell in arm.cells]
    return next((chance for chance in known if chance is not None), 0.0)


def leaderboard(collection: Collection) -> Table:
    """Every arm at its best learning rate, ranked within each setting."""
    rows, records, keys = [], [], []
    for setting, contenders in arms(collection).items():
        ranked = sorted(contenders, key=_height, reverse=True)
        for rank, arm in enumerate(ranked, start=1):
            cell = arm.best
            shown = cell or arm.cells[0]
            place = str(rank) if cell else "–"
            untrained = points(shown.untrained(arm.protocol).mean)
            grid = f"{sum(1 for c in arm.cells if c.summary(arm.protocol).n)} of {len(arm.cells)}"
            text = shown.text(arm.protocol) if cell else _failures(arm)
            names = (*_setting(setting), place, arm.name, number(shown.lr))
            rows.append((*names, text, untrained, short(epochs_trained([shown])), grid, arm.protocol))
            records.append({"rank": rank if cell else None, **record_of(shown, arm.protocol)})
            keys.append(shown.key)
    columns = (
        "problem",
        "data set",
        "batch size",
        "rank",
        "optimizer",
        "best lr",
        "top-1 %",
        "untrained",
        "epochs",
    )
    notes = (
        *scope(collection),
        "Each optimizer at the learning rate of its highest mean. Where that was chosen on the test set, as here, the "
        "number favours whoever tried more rates; the sensitivity and best-of-k tables show how much.",
    )
    return Table("leaderboard", "Leaderboard", (*columns, "lrs finished", "protocol"), rows, records, notes, keys)


def comparisons(collection: Collection) -> Table:
    """Differences between arms, paired by seed: at each learning rate that two share, and best against best."""
    rows, records = [], []
    for setting, contenders in arms(collection).items():
        for left, right in combinations(contenders, 2):
            for where, one, other in _meetings(left, right):
                paired = paired_difference(one.top1(left.protocol), other.top1(right.protocol))
                seeds = {r.seed for r in one.results} & {r.seed for r in other.results}
                lost = len(seeds) - (paired.n if paired else 0)
                if paired is None and not lost:
                    continue
                rows.append((*_setting(setting), where, left.name, right.name, *_paired_text(paired, lost)))
                records.append(_paired_record(setting, where, left, right, paired, lost))
    columns: tuple[str, ...]
    columns = ("problem", "data set", "batch size", "lr", "optimizer", "against", "difference", "pairs")
    notes = (
        "Mean of (optimizer - against) in points over the seeds that both finished. Intervals are of 95%: bootstrap "
        f"is BCa with {RESAMPLES:,} resamples from a fixed seed; with fewer than {FEW_PAIRS} pairs it is too narrow, "
        "and the verdict is Student's. One pair has no interval. Nothing is corrected for the number of comparisons "
        "in this table: of twenty true ties one is expected to look decided.",
        "Lost: seeds of which one run diverged, collapsed or has not ended; what is left may then favour either side.",
    )
    columns = (*columns, "95% bootstrap", "95% Student", "verdict")
    return Table("comparisons", "Optimizers compared, paired by seed", columns, rows, records, notes)


def sensitivity(collection: Collection) -> Table:
    """How much of its learning-rate grid serves an arm, and what the best of k trials of it is expected to be."""
    rows, records = [], []
    for setting, contenders in arms(collection).items():
        chance = chance_of(contenders)
        for arm in contenders:
            trials = arm.trials(chance)
            if not trials:
                continue
            curve = best_of_k(trials)
            best = arm.best
            share = share_near_best(trials, WITHIN) if best else None  # where every rate failed none is near a best
            failed = sum(not cell.summary(arm.protocol).n for cell in arm.cells)
            lrs = [cell.lr for cell in arm.cells]
            rows.append(
                (
                    *(*_setting(setting), arm.name, f"{number(min(lrs))} – {number(max(lrs))}", str(len(trials))),
                    *("–" if share is None else f"{100 * share:.0f}", number(best.lr) if best else "–", str(failed)),
                    " → ".join(f"{value:.1f}" for value in curve),
                )
            )
            setting_record = _setting_record(setting)
            for k, value in enumerate(curve, start=1):
                records.append(
                    {**setting_record, "arm": arm.name, "trials": len(trials), "share_within_1": share, "k": k}
                    | {"expected_best": value, "failed": failed}
                )
    columns: tuple[str, ...]
    columns = ("problem", "data set", "batch size", "optimizer", "lr grid", "trials", "within 1 point %", "best lr")
    notes = (
        "Within 1 point: the share of the learning rates whose mean is within a point of the best one's. Best of k: "
        "the expected best of k learning rates drawn at random from the grid without replacement, k = 1, 2, ...; a "
        "learning rate of which every run failed counts as chance.",
    )
    columns = (*columns, "failed", "best of k = 1, 2, … %")
    return Table("sensitivity", "Sensitivity to the learning rate", columns, rows, records, notes)


def profiles(collection: Collection) -> dict[str, list[float]]:
    """Performance profiles over the settings: by optimizer the share of settings within each of ``GAPS`` of the best.

    An arm stands for its optimizer by its best learning rate, several variants of one by the best variant. Settings
    with one optimizer compare nothing and are left out.
    """
    scores: dict[str, dict[str, float]] = {}
    for setting, contenders in arms(collection).items():
        row: dict[str, float] = {}
        for arm in contenders:
            optimizer = arm.cells[0].optimizer
            if arm.best is not None:
                row[optimizer] = max(row.get(optimizer, 0.0), arm.best.summary(arm.protocol).mean or 0.0)
        if len({arm.cells[0].optimizer for arm in contenders}) > 1 and row:
            scores[" ".join(map(str, setting))] = row
    return performance_profile(scores, GAPS)


def profile_table(collection: Collection) -> Table:
    """The performance profiles at a few gaps."""
    found = profiles(collection)
    chosen = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
    at = [GAPS.index(gap) for gap in chosen]
    rows = [(name, *(f"{100 * shares[index]:.0f}" for index in at)) for name, shares in found.items()]
    records: list[dict[str, Value]] = [
        {"optimizer": name, "points_behind": gap, "share_of_settings": share}
        for name, shares in found.items()
        for gap, share in zip(GAPS, shares, strict=True)
    ]
    columns = ("optimizer", *(f"within {number(gap)}" if gap else "the best" for gap in chosen))
    notes = (
        "The share, in percent, of the settings (problem, data set, batch size) in which the optimizer at its best "
        "learning rate is within so many points of the best optimizer. One that failed everywhere in a setting is "
        "never near.",
    )
    return Table("profiles", "Performance profiles across settings", columns, rows, records, notes)


def variances(collection: Collection) -> Table:
    """Where the deviation comes from: the pretraining's seed or the probe's."""
    rows, records = [], []
    for cell in collection.cells:
        for protocol in collection.protocols(cell.problem):
            finished = [r for r in cell.results if r.status == "finished" and protocol in r.scores]
            table = [r.scores[protocol].probes for r in finished if len(r.scores[protocol].probes) > 1]
            split = two_level(table) if len({len(row) for row in table}) == 1 else None
            if split is None:
                continue
            rows.append(
                (
                    *(*_setting(cell.setting), cell.arm, number(cell.lr), protocol, f"{split.runs} × {split.probes}"),
                    *(f"{split.sd_runs:.2f}", f"{split.sd_probes:.2f}", f"{split.sd_mean:.2f}"),
                )
            )
            levels = {
                "runs": split.runs,
                "probes": split.probes,
                "sd_runs": split.sd_runs,
                "sd_probes": split.sd_probes,
            }
            records.append({**record_of(cell, protocol), **levels, "se_mean": split.sd_mean})
    columns: tuple[str, ...]
    columns = ("problem", "data set", "batch size", "optimizer", "lr", "protocol", "runs × probe seeds")
    notes = (
        "One-way random effects, by the method of moments: the deviation between pretraining seeds beyond what the "
        "probe seeds explain (0 where that estimate is negative), that between probe seeds, and the mean's standard "
        "error.",
    )
    columns = (*columns, "sd of runs", "sd of probes", "se of mean")
    return Table("variance", "Two levels of variance: pretraining and probe", columns, rows, records, notes)


def _height(arm: Arm) -> float:
    best = arm.best
    mean = best.summary(arm.protocol).mean if best else None
    return float("-inf") if mean is None else mean


def _failures(arm: Arm) -> str:
    words = dict.fromkeys(word for cell in arm.cells for word in cell.statuses)
    return ", ".join(f"{sum(cell.statuses[word] for cell in arm.cells)} {word}" for word in words)


def _setting(setting: Setting) -> tuple[str, str, str]:
    return setting[0], setting[1], str(setting[2])


def _setting_record(setting: Setting) -> dict[str, Value]:
    return {"problem": setting[0], "dataset": setting[1], "batch_size": setting[2]}


def _meetings(left: Arm, right: Arm) -> list[tuple[str, Cell, Cell]]:
    """Where two arms can be compared: at the learning rates that both have, and each at its best."""
    rates = {cell.lr: cell for cell in right.cells}
    found = [(number(cell.lr), cell, rates[cell.lr]) for cell in left.cells if cell.lr in rates]
    if left.best is not None and right.best is not None:
        found.append((f"best: {number(left.best.lr)}, {number(right.best.lr)}", left.best, right.best))
    return found


def _paired_text(paired: Paired | None, lost: int) -> tuple[str, ...]:
    count = f"{paired.n if paired else 0}{f' ({lost} lost)' if lost else ''}"
    if paired is None:
        return "–", count, "–", "–", "no pair"
    intervals = [f"{pair[0]:+.2f} … {pair[1]:+.2f}" if pair else "n = 1" for pair in (paired.bootstrap, paired.student)]
    return signed(paired.mean), count, *intervals, paired.verdict


def _paired_record(
    setting: Setting, where: str, left: Arm, right: Arm, paired: Paired | None, lost: int
) -> dict[str, Value]:
    record = _setting_record(setting)
    record |= {"protocol": left.protocol, "lr": where, "optimizer": left.name, "against": right.name}
    record |= {"pairs": paired.n if paired else 0, "lost": lost}
    if paired is None:
        return record
    record |= {"difference": paired.mean, "sd": paired.sd, "verdict": paired.verdict}
    for name, interval in (("bootstrap", paired.bootstrap), ("student", paired.student)):
        low, high = interval or (None, None)
        record |= {f"{name}_low": low, f"{name}_high": high}
    return record
