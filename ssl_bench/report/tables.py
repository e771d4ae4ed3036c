"""A table and its written forms, Markdown, CSV and LaTeX: each escapes what a record's text could do there."""

import csv
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeGuard

from ssl_bench.records.reader import FAILURES

Value = str | int | float | None

SETTING = ("problem", "data set", "batch size")  # the first columns of most tables

# Printed in place of a number.
_WORDS = (
    "–",
    *FAILURES,
    "interrupted",
    "running",
    "not measured",
    "no run",
    "n = 1",
    "no pair",
)

_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "−": "$-$",
    "✓": r"$\checkmark$", "✗": r"$\times$", "≥": r"$\geq$", "∞": r"$\infty$", "<": r"$<$", ">": r"$>$",
    "×": r"$\times$", "→": r"$\to$", "…": r"\dots{}", "²": "$^2$", "λ": r"$\lambda$", "β": r"$\beta$", "η": r"$\eta$",
    "φ": r"$\varphi$", "ρ": r"$\rho$", "|": r"$|$", '"': "''",
})  # fmt: skip
_MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\`*[]<>|"})
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell of text that begins so is computed by spreadsheets

_BOLD = re.compile(r"\*\*(\d+\.\d+)\*\*")  # the one markup in printed cells, and no record's text can do more with it
LAST_LATEX_LETTER = 0x17F  # Latin Extended-A
PAGE_ROWS = 45  # of a table of LaTeX's, in footnotesize
LONGEST_NAME = 100  # characters of a file's name without its suffix
LONGEST_TEXT = 300  # characters of a record's name or option in a table


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

    def pruned(self) -> "Table":
        """The table without the columns in which no row has a value; its records keep them."""
        kept = [index for index, column in enumerate(zip(*self.rows, strict=True)) if set(column) - {"", "–"}]
        if not self.rows or len(kept) == len(self.columns):
            return self
        rows = [tuple(row[index] for index in kept) for row in self.rows]
        return replace(self, columns=tuple(self.columns[index] for index in kept), rows=rows)

    def markdown(self) -> str:
        """The title as a heading, a pipe table, and the notes."""
        rule = "|" + "|".join("---:" if right else ":---" for right in self.numeric()) + "|"
        lines = ["| " + " | ".join(map(markdown, row)) + " |" for row in (self.columns, *self.rows)]
        body = "\n".join([lines[0], rule, *lines[1:]]) if self.rows else "Nothing to show."
        return f"## {markdown(self.title)}\n\n{body}\n" + "".join(f"\n{markdown(note)}\n" for note in self.notes)

    def csv(self) -> str:
        """The records, unrounded, with a header line; a missing value or NaN is an empty field.

        A text that a spreadsheet would take for a formula begins with an apostrophe.
        """

        def plain(value: Value) -> Value:
            if isinstance(value, float) and math.isnan(value):
                return ""
            return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value

        names = dict.fromkeys(name for record in self.records for name in record)
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(names), lineterminator="\n")
        writer.writeheader()
        for record in self.records:
            writer.writerow({name: plain(value) for name, value in record.items()})
        return buffer.getvalue()

    def latex(self) -> str:
        """Tables that fit a page each; needs \\usepackage{booktabs,graphicx,amssymb}.

        One for each data set, if that is a column and there is more than a page, and of at most `PAGE_ROWS` rows. What
        is wider than the text is scaled down to it.
        """
        align = "".join("r" if right else "l" for right in self.numeric())
        notes = [f"% {' '.join(note.split())}" for note in self.notes]
        parts, lines = self._pages(), [*notes]
        for number, (about, rows) in enumerate(parts, 1):
            of = f" ({', '.join(filter(None, [about, f'{number} of {len(parts)}']))})" if len(parts) > 1 else ""
            head, *body = (_latex_row(row) for row in (self.columns, *rows))
            lines += [r"\begin{table}[htbp]", rf"\caption{{{latex(self.title + of)}}}", r"\centering\footnotesize"]
            lines += [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{\begin{tabular}{" + align + "}"]
            lines += [r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]
        return "\n".join([*lines, ""])

    def _pages(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """The rows as they fit on pages, each with the data set that they are about, if it is one."""
        if len(self.rows) <= PAGE_ROWS:
            return [("", self.rows)]
        column = self.columns.index("data set") if "data set" in self.columns else None
        by_data: dict[str, list[tuple[str, ...]]] = {}
        for row in self.rows:
            by_data.setdefault("" if column is None else row[column], []).append(row)
        return [
            (name, rows[i : i + PAGE_ROWS]) for name, rows in by_data.items() for i in range(0, len(rows), PAGE_ROWS)
        ]

    def write(self, folder: Path) -> None:
        """Writes ``<name>.md``, ``<name>.tex`` and, if there are records, ``<name>.csv``."""
        name = name_of(self.name)
        (folder / f"{name}.md").write_text(self.markdown(), encoding="utf-8")
        (folder / f"{name}.tex").write_text(self.latex(), encoding="utf-8")
        if self.records:
            (folder / f"{name}.csv").write_text(self.csv(), encoding="utf-8")


def one_line(value: object) -> str:
    """A record's value as text for a reader: one line of printable characters, cut where nobody reads on."""
    text = on_one_line(str(value))
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def markdown(text: str) -> str:
    """Plain text as Markdown on one line; a number between ``**`` stays bold."""
    parts = _BOLD.split(on_one_line(text))
    return "".join(f"**{part}**" if index % 2 else part.translate(_MARKDOWN) for index, part in enumerate(parts))


def latex(text: str) -> str:
    """Plain text as LaTeX on one line; a number between ``**`` becomes bold."""
    parts = _BOLD.split(on_one_line(text))
    return "".join(rf"\textbf{{{part}}}" if index % 2 else _latex_text(part) for index, part in enumerate(parts))


def _latex_text(text: str) -> str:
    """The text escaped; a letter that pdflatex's fonts lack becomes its number."""
    return "".join(
        c.translate(_LATEX) if ord(c) <= LAST_LATEX_LETTER or ord(c) in _LATEX else f"[U+{ord(c):04X}]" for c in text
    )


def _latex_row(row: Sequence[str]) -> str:
    """The cells of a row; after a rule or another row a bracket or star would be taken for that one's argument."""
    text = " & ".join(map(latex, row))
    return ("{}" if text.startswith(("[", "*", "(")) else "") + text + r" \\"


def on_one_line(text: str) -> str:
    """The text on one line, without characters that no reader sees."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def name_of(*parts: object) -> str:
    """A file name of plain characters."""
    text = "-".join(str(part) for part in parts)
    text = "".join(c if (c.isascii() and c.isalnum()) or c in ".-_" else "-" for c in text.replace("=", ""))
    text = text.strip("-.").replace("--", "-") or "unnamed"
    if len(text) <= LONGEST_NAME:
        return text
    # A variant of many keys: file systems allow 255 bytes, and nobody reads that much.
    return f"{text[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def number(value: float) -> str:
    """A setting, as short as possible; empty for NaN."""
    return "" if math.isnan(value) else f"{value:g}"


def points(value: Value) -> str:
    """An accuracy in percent, or a dash."""
    return f"{value:.2f}" if isinstance(value, float) else "–"


def between(ends: tuple[float, float] | None, *, signs: bool = False) -> str:
    """An interval, or a dash."""
    if ends is None:
        return "–"
    low, high = (f"{end:+.2f}" if signs else f"{end:.2f}" for end in ends)
    return f"{low} … {high}"


def signed(value: Value) -> str:
    """A difference in percentage points with its sign, or a dash."""
    return f"{value:+.2f}" if isinstance(value, float) else "–"


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value read from JSON is a number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
