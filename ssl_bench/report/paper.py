"""The paper's Table 1, and where its bold numbers hold in our runs."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from ssl_bench.report.aggregate import Cell

Key = tuple[str, str, int, float, str]  # problem, data set, batch size, learning rate, optimizer

# The paper: "Bold numbers indicate better performance (>= 1% accuracy)".
BOLD_MARGIN = 1.0

# For Barlow Twins by the paper's text (appendix); for classification it states none, its figures and its authors' code
# say so.
EPOCHS = {"classification": 100, "barlow_twins": 1000}

Verdict = Literal["holds", "ahead by less than 1 point", "not ahead", "open"]
MARKS: dict[Verdict, str] = {"holds": "✓", "ahead by less than 1 point": "~", "not ahead": "✗", "open": "?"}


@dataclass(frozen=True)
class PaperCell:
    """One number of Table 1: one run, percent, by a protocol that the text does not state."""

    key: Key
    accuracy: float
    bold: bool


@cache
def table1() -> dict[Key, PaperCell]:
    """The paper's 216 numbers by their key."""
    cells = {}
    text = (files("ssl_bench.report") / "table1.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        key = (row["problem"], row["dataset"], int(row["batch_size"]), float(row["lr"]), row["optimizer"])
        cells[key] = PaperCell(key, float(row["accuracy_percent"]), row["bold"] == "True")
    return cells


def paper_key(cell: Cell) -> Key:
    """Where a cell of ours would stand in Table 1."""
    return cell.problem, cell.dataset.replace("_", "-"), cell.batch_size, cell.lr, cell.optimizer.lower()


def bold_verdict(cell: Cell, rivals: Sequence[Cell], protocol: str) -> Verdict:
    """Whether a number that the paper prints bold deserves it in our runs, by the paper's own rule, on the means.

    Args:
        cell: ours, where the paper's number is bold.
        rivals: our cells of the other optimizers at the same problem, data set, batch size and learning rate; of
            several variants of one optimizer the best counts.
        protocol: of the accuracies.

    Returns:
        "holds" if it leads every rival by a point, "open" if it or one of the paper's rivals has not ended.
    """
    own, others = _height(cell, protocol), [_height(rival, protocol) for rival in rivals]
    known = [value for value in others if value is not None]
    missing = {"lars", "lamb", "tvlars"} - {c.optimizer.lower() for c in [cell, *rivals]}
    if own is None or missing or len(known) < len(others):
        return "open"
    lead = own - max(known)
    if own == float("-inf") or lead <= 0:
        return "not ahead"
    return "holds" if lead >= BOLD_MARGIN else "ahead by less than 1 point"


def bold_rule_broken() -> tuple[int, int]:
    """How many of the paper's bold numbers do not lead both others by a point in its own table, and of how many."""
    cells = table1()
    broken = 0
    bold = [cell for cell in cells.values() if cell.bold]
    for cell in bold:
        rivals = [cells[*cell.key[:4], name].accuracy for name in ("lars", "lamb", "tvlars") if name != cell.key[4]]
        # Rounded, for 39.64 - 38.64 is less than 1 in binary.
        broken += round(cell.accuracy - max(rivals), 6) < BOLD_MARGIN
    return broken, len(bold)


def _height(cell: Cell, protocol: str) -> float | None:
    """The mean accuracy; minus infinity where every run failed, None where there is nothing yet."""
    mean = cell.summary(protocol).mean
    if mean is not None:
        return mean
    failed = cell.statuses["diverged"] + cell.statuses["collapsed"]
    return float("-inf") if failed == len(cell.results) else None
