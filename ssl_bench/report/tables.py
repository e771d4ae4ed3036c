"""A table and its written forms: Markdown, CSV, LaTeX."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Value = str | int | float | None

SETTING = ("problem", "data set", "batch size")  # the first columns of most tables

# Printed in place of a number.
_WORDS = ("–", "diverged", "collapsed", "interrupted", "running", "not measured", "no run", "n = 1", "no pair")

_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "−": "$-$",
    "✓": r"$\checkmark$", "✗": r"$\times$", "≥": r"$\geq$", "∞": r"$\infty$", "<": r"$<$", ">": r"$>$",
})  # fmt: skip


@dataclass
class Table:
    """A table for readers (printed rows) and for programs (records).

    Attributes:
        name: the files' name, without a suffix.
        title: one line.
        columns: headings of the printed form.
        notes: what a reader must know to trust the numbers.
        rows: printed cells, one for each column.
        records: plain values by name for the CSV file; a row can have several.
        keys: for each row the key of the cell that it is about; empty where rows are not about cells.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    records: list[Mapping[str, Value]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def add(self, row: Sequence[str], *records: Mapping[str, Value], key: str | None = None) -> None:
        """Appends a printed row with its records and, where it is about one cell, that cell's key."""
        self.rows.append(tuple(row))
        self.records.extend(records)
        if key is not None:
            self.keys.append(key)

    def numeric(self) -> list[bool]:
        """Which columns are right-aligned: those of numbers, ignoring the words that stand for a missing one."""
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.columns)
        filled = [[text for text in column if text and not text.startswith(_WORDS)] for column in columns]
        return [bool(texts) and all(re.match(r"[+\-−]?\d", text) for text in texts) for texts in filled]

    def markdown(self) -> str:
        """The title as a heading, a pipe table, and the notes."""
        rule = "|" + "|".join("---:" if right else ":---" for right in self.numeric()) + "|"
        lines = [
            "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in (self.columns, *self.rows)
        ]
        body = "\n".join([lines[0], rule, *lines[1:]]) if self.rows else "Nothing to show."
        return f"## {self.title}\n\n{body}\n" + "".join(f"\n{note}\n" for note in self.notes)

    def csv(self) -> str:
        """The records, unrounded, with a header line; a missing value or NaN is an empty field."""
        names = dict.fromkeys(name for record in self.records for name in record)
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(names), lineterminator="\n")
        writer.writeheader()
        for record in self.records:
            absent = {name: "" for name, value in record.items() if isinstance(value, float) and math.isnan(value)}
            writer.writerow({**record, **absent})
        return buffer.getvalue()

    def latex(self) -> str:
        """A longtable with booktabs rules; needs \\usepackage{booktabs,longtable,amssymb}."""
        align = "".join("r" if right else "l" for right in self.numeric())
        head, *rows = (" & ".join(map(_escape, row)) + r" \\" for row in (self.columns, *self.rows))
        begin = [rf"\begin{{longtable}}{{{align}}}", rf"\caption{{{_escape(self.title)}}}\\", r"\toprule", head]
        end = [r"\bottomrule", r"\end{longtable}", ""]
        return "\n".join([*(rf"% {note}" for note in self.notes), *begin, r"\midrule", r"\endhead", *rows, *end])

    def write(self, folder: Path) -> None:
        """Writes ``<name>.md``, ``<name>.tex`` and, if there are records, ``<name>.csv``."""
        (folder / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")
        (folder / f"{self.name}.tex").write_text(self.latex(), encoding="utf-8")
        if self.records:
            (folder / f"{self.name}.csv").write_text(self.csv(), encoding="utf-8")


def number(value: float) -> str:
    """A setting, as short as possible; empty for NaN."""
    return "" if math.isnan(value) else f"{value:g}"


def points(value: Value) -> str:
    """An accuracy in percent, or a dash."""
    return f"{value:.2f}" if isinstance(value, float) else "–"


def signed(value: Value) -> str:
    """A difference in percentage points with its sign, or a dash."""
    return f"{value:+.2f}" if isinstance(value, float) else "–"


def is_number(value: object) -> bool:
    """Whether a value read from JSON is a number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _escape(text: str) -> str:
    """Plain text as LaTeX; ``**bold**`` becomes bold."""
    parts = text.translate(_LATEX).split("**")
    return "".join(rf"\textbf{{{part}}}" if index % 2 else part for index, part in enumerate(parts))
