"""A table and its written forms: Markdown, CSV, LaTeX."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Value = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table, as people read it and as programs do.

    Attributes:
        name: of its files.
        title: one sentence.
        columns: of the printed form.
        rows: printed cells, as strings; as many in each as there are columns.
        records: of the CSV file: plain values by name, one or more records for a row.
        notes: what a reader must know to believe the numbers.
        keys: of the cell behind each row, where a row is about one cell; else empty.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    records: Sequence[Mapping[str, Value]]
    notes: tuple[str, ...] = ()
    keys: Sequence[str] = ()

    def markdown(self) -> str:
        """The title as a heading, a pipe table, and the notes."""
        numeric = self.numeric()
        lines = [
            _line(self.columns),
            "|" + "|".join("---:" if right else ":---" for right in numeric) + "|",
            *map(_line, self.rows),
        ]
        body = "\n".join(lines) if self.rows else "Nothing to show."
        return f"## {self.title}\n\n{body}\n" + "".join(f"\n{note}\n" for note in self.notes)

    def csv(self) -> str:
        """The records, unrounded, with a header line."""
        names = dict.fromkeys(name for record in self.records for name in record)
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(names), lineterminator="\n")
        writer.writeheader()
        for record in self.records:
            writer.writerow({name: "" if _absent(value) else value for name, value in record.items()})
        return buffer.getvalue()

    def latex(self) -> str:
        """A longtable with booktabs rules; needs \\usepackage{booktabs,longtable,amssymb}."""
        align = "".join("r" if right else "l" for right in self.numeric())
        head = " & ".join(map(_escape, self.columns)) + r" \\"
        rows = [" & ".join(map(_escape, row)) + r" \\" for row in self.rows]
        notes = [rf"% {note}" for note in self.notes]
        return "\n".join(
            [
                *notes,
                rf"\begin{{longtable}}{{{align}}}",
                rf"\caption{{{_escape(self.title)}}}\\",
                r"\toprule",
                head,
                r"\midrule",
                r"\endhead",
                *rows,
                r"\bottomrule",
                r"\end{longtable}",
                "",
            ]
        )

    def numeric(self) -> list[bool]:
        """Which columns are right-aligned: those of numbers, whatever words stand in place of a missing one."""
        kinds = [[_is_numeric(row[index]) for row in self.rows] for index in range(len(self.columns))]
        return [True in column and False not in column for column in kinds]


def number(value: float) -> str:
    """A setting, as short as it can be."""
    return "" if math.isnan(value) else f"{value:g}"


def points(value: Value) -> str:
    """An accuracy in percent, or a dash."""
    return f"{value:.2f}" if isinstance(value, float) else "–"


def signed(value: Value) -> str:
    """A difference in points with its sign, or a dash."""
    return f"{value:+.2f}" if isinstance(value, float) else "–"


def _line(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _absent(value: Value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# What stands in place of a number.
_WORDS = ("–", "diverged", "collapsed", "interrupted", "running", "not measured", "no run", "n = 1", "no pair")


def _is_numeric(text: str) -> bool | None:
    """Whether a printed cell is a number; None for what says nothing about its column."""
    if not text or text.startswith(_WORDS):
        return None
    return text[0].isdigit() or (len(text) > 1 and text[0] in "+-−" and text[1].isdigit())


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "−": "$-$",
    "✓": r"$\checkmark$", "✗": r"$\times$", "≥": r"$\geq$", "∞": r"$\infty$", "<": r"$<$", ">": r"$>$",
}  # fmt: skip


def _escape(text: str) -> str:
    """Plain text as LaTeX; ``**bold**`` becomes bold."""
    escaped = "".join(_LATEX.get(character, character) for character in text)
    parts = escaped.split("**")
    return "".join(rf"\textbf{{{part}}}" if index % 2 else part for index, part in enumerate(parts))
