"""The tables of accuracies: ours alone, and beside the paper's Table 1 with its bold numbers checked."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from ssl_bench.records.reader import FAILURES
from ssl_bench.report.aggregate import LOST, Cell, Collection
from ssl_bench.report.inference import COVERAGE, summarize
from ssl_bench.report.protocols import beside_paper
from ssl_bench.report.scope import EPOCHS, cut_short, epochs_trained, short
from ssl_bench.report.tables import SETTING, Table, Value, between, number, points, signed

Key = tuple[str, str, int, float, str]  # problem, data set, batch size, learning rate, optimizer

OPTIMIZERS = ("lars", "lamb", "tvlars")  # the paper's, in its order

# The paper: "Bold numbers indicate better performance (>= 1% accuracy)".
BOLD_MARGIN = 1.0

# Stands wherever an interval or a mean does; the page prints a note once, under the first table that has it.
INTERVALS = (
    "Mean ± sample standard deviation over n seeds, of the last epoch; n = 1 has no deviation. A seed that "
    f"{LOST} counts as chance, in means, intervals and ranks alike, and is named. 95% interval: Student's, over "
    "seeds. Measured on normal samples (benchmarks/coverage.py) it holds the mean in "
    + ", ".join(f"{student:.0f}% at n = {n}" for n, (student, _) in COVERAGE.items())
    + f" (the BCa bootstrap at n = 3: {COVERAGE[3][1]:.0f}%). No interval knows of failures that no seed has shown: "
    "where a tenth of the seeds is lost, that of three seeds holds the mean in a third of cases.",
    "Test set ±: half the 95% interval over other test images of the same kind (binomial), beside the seeds' interval "
    "and not in it. All optimizers see the same images, so their differences have less of it.",
)

Verdict = Literal["holds", "ahead by less than 1 point", "not ahead", "open"]
MARKS: dict[Verdict, str] = {"holds": "✓", "ahead by less than 1 point": "~", "not ahead": "✗", "open": "?"}


@dataclass(frozen=True)
class PaperCell:
    """One number of the paper's Table 1: a single run, in percent, by a protocol that the text does not state."""

    key: Key
    accuracy: float
    bold: bool

    @property
    def rivals(self) -> list[Key]:
        """The other two optimizers' places at the same learning rate."""
        return [(*self.key[:4], name) for name in OPTIMIZERS if name != self.key[4]]


@cache
def table1() -> dict[Key, PaperCell]:
    """The paper's 216 numbers by their key; the optimizers of one learning rate stand together."""
    text = (files("ssl_bench.report") / "assets" / "table1.csv").read_text(encoding="utf-8")
    cells = []
    for row in csv.DictReader(text.splitlines()):
        key = (row["problem"], row["dataset"], int(row["batch_size"]), float(row["lr"]), row["optimizer"])
        cells.append(PaperCell(key, float(row["accuracy_percent"]), row["bold"] == "True"))
    cells.sort(key=lambda cell: (cell.key[0] != "classification", *cell.key[:4], OPTIMIZERS.index(cell.key[4])))
    return {cell.key: cell for cell in cells}


def bold_verdict(cell: Cell, rivals: Sequence[Cell], protocol: str) -> Verdict:
    """Whether our runs confirm a number that the paper prints bold, by the paper's own rule, on the means.

    A lost seed counts as chance; a cell of which every run was lost is never ahead.

    Args:
        cell: ours, where the paper's number is bold.
        rivals: our cells of the other optimizers at the same problem, data set, batch size and learning rate; of
            several variants of one optimizer the best counts.
        protocol: of the accuracies.

    Returns:
        "holds" if it leads every rival by a point, "open" if it or one of the paper's rivals has not ended.
    """

    own, others = cell.summary(protocol).mean, [rival.summary(protocol).mean for rival in rivals]
    known = [value for value in others if value is not None]
    missing = set(OPTIMIZERS) - {c.optimizer.lower() for c in [cell, *rivals]}
    if own is None or missing or len(known) < len(others):
        return "open"
    lead = own - max(known)
    if cell.failed or lead <= 0:
        return "not ahead"
    return "holds" if lead >= BOLD_MARGIN else "ahead by less than 1 point"


def bold_rule_broken() -> tuple[int, int]:
    """How many of the paper's bold numbers do not lead both others by a point in its own table, and of how many."""
    cells = table1()
    bold = [cell for cell in cells.values() if cell.bold]
    leads = [cell.accuracy - max(cells[rival].accuracy for rival in cell.rivals) for cell in bold]
    # Rounded, for 39.64 - 38.64 is less than 1 in binary.
    return sum(round(lead, 6) < BOLD_MARGIN for lead in leads), len(bold)


def matched(collection: Collection) -> dict[Key, list[Cell]]:
    """Our cells by their place in the paper's Table 1."""
    ours: dict[Key, list[Cell]] = defaultdict(list)
    for cell in collection.cells:
        key = (cell.problem, cell.dataset.replace("_", "-"), cell.batch_size, cell.lr, cell.optimizer.lower())
        if key in table1():
            ours[key].append(cell)
    return dict(ours)


def results_table(collection: Collection, problem: str) -> Table:
    """Every cell of one problem: each protocol's accuracy, beside it the untrained model's."""
    protocols = collection.protocols(problem) or [collection.headline(problem)]
    measured = [n for protocol in protocols for n in (f"{protocol} top-1 %", "95% interval", "test set ±", "untrained")]
    columns = ("data set", "batch size", "lr", "optimizer", "variant", *measured, "epochs", "minutes")
    notes = (*INTERVALS, "Untrained: the same protocol before the first step. Minutes: median training time.")
    table = Table(f"results-{problem}", f"Results: {problem}", columns, notes)
    for cell in collection.cells:
        if cell.problem != problem:
            continue
        accuracies = []
        for protocol in protocols:
            accuracies += [cell.text(protocol), between(cell.interval(protocol) if cell.finished(protocol) else None)]
            accuracies += [points(cell.test_error(protocol)), points(cell.untrained(protocol).mean)]
        minutes = sorted(seconds / 60 for result in cell.results if (seconds := result.clock("seconds")) is not None)
        table.add(
            (
                *(*cell.setting.cells[1:], number(cell.lr), cell.optimizer, cell.variant, *accuracies),
                *(short(epochs_trained([cell])), f"{minutes[len(minutes) // 2]:.3g}" if minutes else "–"),
            ),
            *(record_of(cell, protocol) for protocol in protocols),
            key=cell.key,
        )
    return table


def table1_long(collection: Collection, *, complete: bool) -> Table:
    """Our cells beside the paper's Table 1, one row for each.

    Args:
        collection: our cells; those that have no place in Table 1 are left out.
        complete: whether the paper's numbers for which we have no run are rows too.
    """
    ours = matched(collection)
    compared = ("ours, top-1 %", "paper", "difference", "epochs, ours / paper", "bold holds", "variant")
    columns = (*SETTING, "lr", "optimizer", *compared)
    table = Table("table1", "Table 1 of the paper, and ours", columns, table1_notes(collection))
    missing: list[Cell | None] = [None] if complete else []
    for key, paper in table1().items():
        for cell in [*ours.get(key, [])] or missing:
            record = _beside(paper, cell, ours)
            printed = f"{paper.accuracy:.2f}{' (bold)' if paper.bold else ''}"
            place = (key[0], key[1], str(key[2]), number(key[3]), key[4].upper())
            comparison = (str(record["ours"]), printed, signed(record["difference"]))
            end = (_epochs([cell], key[0]), str(record["mark"] or ""), str(record["variant"] or ""))
            table.add((*place, *comparison, *end), record, key=cell.key if cell else "")
    return table


def table1_wide(collection: Collection) -> Table:
    """Table 1 as the paper lays it out: the optimizers side by side, ours / the paper's."""
    ours = matched(collection)
    columns = (*SETTING, "lr", *(f"{name.upper()}, ours / paper" for name in OPTIMIZERS), "epochs, ours / paper")
    title = "Table 1 in the paper's layout: ours / the paper's"
    table = Table("table1-wide", title, (*columns, "variant"), table1_notes(collection))
    for place in dict.fromkeys(key[:4] for key in table1()):
        found = {name: ours.get((*place, name), []) for name in OPTIMIZERS}
        for index in range(max(map(len, found.values()))):  # several variants: several rows, the paper's in the first
            texts, shown = [], []
            for name, cells in found.items():
                cell = cells[index] if index < len(cells) else None
                if cell is None and index > 0:
                    texts.append("")
                    continue
                paper = table1()[*place, name]
                record = _beside(paper, cell, ours)
                bold = "**" if paper.bold else ""
                mine = record["ours"] if cell else "–"
                texts.append(f"{mine} / {bold}{paper.accuracy:.2f}{bold} {record['mark'] or ''}".rstrip())
                shown.append(cell)
            variants = [f"{cell.optimizer}: {cell.variant}" for cell in shown if cell and cell.variant]
            names = (place[0], place[1], str(place[2]), number(place[3]))
            table.add((*names, *texts, _epochs(shown, place[0]), "; ".join(variants)))
    return table


def table1_notes(collection: Collection) -> tuple[str, ...]:
    """How to read Table 1, with what the paper's own numbers say about its bold rule."""
    broken, bold = bold_rule_broken()
    used = ", ".join(f"{name}: {beside_paper(name)}" for name in EPOCHS)
    marks = (
        "With fewer epochs than the paper's no mark confirms or refutes a number of the paper: the order can change."
    )
    return (
        *([marks] if any(cut_short(cell) for cells in matched(collection).values() for cell in cells) else []),
        "The paper's epochs: for Barlow Twins by its text; for classification, where that states none, by its figures "
        "and its authors' code. Ours are those trained so far.",
        f"Protocol of ours: {used}, and never another beside the paper's number. The paper's are single runs.",
        "Bold in the paper means ahead by at least 1 point. In our means: ✓ it is, ~ a lead of less than 1 point, "
        "✗ no lead, ? not known yet; of several variants of a rival the best one counts.",
        f"In the paper's own table {broken} of the {bold} bold numbers do not lead both others by 1 point.",
    )


def record_of(cell: Cell, protocol: str) -> dict[str, Value]:
    """A cell's numbers by one protocol, for a CSV file."""
    summary, untrained = cell.summary(protocol), cell.untrained(protocol)
    return {
        **cell.record,
        "cell": cell.key,
        "protocol": protocol,
        "top1_mean": summary.mean,
        "top1_sd": summary.sd,
        "n": summary.n,
        **dict(zip(("student_low", "student_high"), cell.interval(protocol) or (None, None), strict=True)),
        "finished_mean": summarize(list(cell.finished(protocol).values())).mean,
        "test_set_error": cell.test_error(protocol),
        "runs": len(cell.results),
        **{word: cell.statuses[word] for word in ("finished", *FAILURES, "interrupted", "running")},
        "untrained_mean": untrained.mean,
        "untrained_sd": untrained.sd,
        "chance": cell.chance,
    }


def _epochs(cells: Sequence[Cell | None], problem: str) -> str:
    """Epochs of ours and of the paper, "4 / 100"."""
    return f"{short(epochs_trained(cell for cell in cells if cell))} / {EPOCHS.get(problem, '–')}"


def _beside(paper: PaperCell, cell: Cell | None, ours: Mapping[Key, Sequence[Cell]]) -> dict[str, Value]:
    """One number of the paper beside ours; the mark is None where the paper's is not bold."""
    key = paper.key
    protocol = beside_paper(key[0])
    summary = cell.summary(protocol) if cell else None
    mean = summary.mean if summary else None
    mark = None
    if paper.bold:
        rivals = [rival for place in paper.rivals for rival in ours.get(place, [])]
        mark = MARKS[bold_verdict(cell, rivals, protocol) if cell else "open"]
    return {
        "problem": key[0], "dataset": key[1], "batch_size": key[2], "lr": key[3], "optimizer": key[4],
        "variant": cell.variant if cell else None,
        "protocol": protocol,
        "ours": cell.text(protocol) if cell else "no run",
        "top1_mean": mean,
        "top1_sd": summary.sd if summary else None,
        "n": summary.n if summary else 0,
        "paper": paper.accuracy,
        "paper_bold": str(paper.bold),
        "difference": mean - paper.accuracy if mean is not None else None,
        "mark": mark,
        "epochs": epochs_trained([cell]) if cell else None,
        "paper_epochs": EPOCHS.get(key[0]),
    }  # fmt: skip
