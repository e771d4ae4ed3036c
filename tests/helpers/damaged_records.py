"""Damages a run's record in one place, in every way that a disk, a bug or a stranger could: the same way for a seed."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FILES = ("run.json", "metrics.jsonl", "results.json", "sessions.jsonl", "analysis.json", "telemetry.parquet")

DEEP = "[" * 3_000 + "]" * 3_000  # as text, for no JSON writer gets that far
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e308, -1e308, 10**400, "", "x", "nan", "inf", [], {}, [None], {"a": {"b": []}}, [[1]]),
    *("\ud800", "a/../../b", "new\nline", "\x1b[31m", "$\\frac$", "<script>", "@DEEP", float("nan"), float("inf")),
)


def damage(run: Path, seed: int) -> str:
    """Damages one file of a run directory.

    Returns:
        what was done, for the message of a failing test.
    """
    rng = random.Random(seed)
    files = [run / name for name in FILES if (run / name).is_file()]
    path = rng.choice(files)
    kinds = [_truncated, _empty, _flipped, _gone, _a_folder]
    kinds += 6 * [_table if path.suffix == ".parquet" else _lines if path.suffix == ".jsonl" else _value]
    kind = rng.choice(kinds)
    return f"seed {seed}: {path.name} {kind.__name__.strip('_')} {kind(path, rng) or ''}"


def _truncated(path: Path, rng: random.Random) -> None:
    contents = path.read_bytes()
    path.write_bytes(contents[: rng.randrange(len(contents) or 1)])


def _empty(path: Path, _: random.Random) -> None:
    path.write_bytes(b"")


def _flipped(path: Path, rng: random.Random) -> None:
    contents = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        if contents:
            contents[rng.randrange(len(contents))] = rng.randrange(256)
    path.write_bytes(contents)


def _gone(path: Path, _: random.Random) -> None:
    path.unlink()


def _a_folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _value(path: Path, rng: random.Random) -> str:
    """One value of a JSON file becomes another."""
    document = json.loads(path.read_text())
    told = _mutate(document, rng)
    path.write_text(_text(document))
    return told


def _lines(path: Path, rng: random.Random) -> str:
    """One value of one line, mostly of the last, becomes another; or the lines lose their order."""
    lines = path.read_text().splitlines()
    if rng.random() < 0.1:
        rng.shuffle(lines)
        path.write_text("\n".join(lines) + "\n")
        return "shuffled"
    index = -1 if rng.random() < 0.5 else rng.randrange(len(lines))
    row = json.loads(lines[index])
    told = _mutate(row, rng)
    lines[index] = _text(row)
    path.write_text("\n".join(lines) + "\n")
    return told


def _table(path: Path, rng: random.Random) -> str:
    """A parquet file without rows, with another column type, without a column, or with odd numbers."""
    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    place = table.column_names.index(name)
    kind = rng.randrange(4)
    if kind == 0:
        table = table.slice(0, 0)
    elif kind == 1:
        table = table.drop_columns([name])
    elif kind == 2:
        table = table.set_column(place, name, pa.array(["x"] * table.num_rows))
    else:
        value = rng.choice((None, float("nan"), float("inf"), 1e308, -1.0, 0.0))
        table = table.set_column(place, name, pa.array([value] * table.num_rows, pa.float64()))
    pq.write_table(table, path)
    return f"{name} {kind}"


def _text(document: Any) -> str:
    return json.dumps(document).replace('"@DEEP"', DEEP)


def _mutate(document: Any, rng: random.Random) -> str:
    """Replaces or removes one value, found by walking down at random; tells where and with what."""
    where, here = [], document
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        where.append(str(key))
        if isinstance(here[key], dict | list) and here[key] and rng.random() < 0.8:
            here = here[key]
            continue
        if rng.random() < 0.1:
            del here[key]
            return f"{'.'.join(where)} removed"
        here[key] = value = rng.choice(VALUES)
        return f"{'.'.join(where)} = {value!r:.30}"
