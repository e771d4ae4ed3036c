"""``ssl-bench show RUN`` and ``ssl-bench compare RUN RUN ...``: what runs were and what came out, side by side."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_bench.records.reader import RUN, RecordError, RunRecord, read_run
from ssl_bench.records.summary import summary

CLOCKS = ("step", "samples", "epochs", "seconds")
GROUPS = ("data", "method", "optimizer", "schedule", "model")


def find_run(text: str, runs: str | Path = "runs") -> Path:
    """The run that a word names: its folder, or the start of the folder's name or of the identity at the name's end.

    Args:
        text: the word; with a slash in it, the start of a path.
        runs: where names are looked up, at any depth.

    Raises:
        RecordError: none or several; one line.
    """
    path = Path(text)
    if (path / RUN).is_file():
        return path
    if path.is_dir():
        raise RecordError(f"{text}: not a run directory, it has no {RUN}")
    where = path.parent if path.name != text else Path(runs)
    found = [one for one in _folders(where) if _is_meant(one.name, path.name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise RecordError(
            f"RUN must be a run's folder, or the start of its name in {where}, got {text!r}, which is none"
        )
    shown = ", ".join(map(str, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    raise RecordError(f"RUN must be one run, got {text!r}, with which {len(found)} begin: {shown}")


def _is_meant(name: str, start: str) -> bool:
    return bool(start) and (name.startswith(start) or name.rpartition("-")[2].startswith(start))


def _folders(folder: Path) -> Iterator[Path]:
    for name, folders, files in os.walk(folder):
        folders[:] = sorted(child for child in folders if not child.startswith("."))
        if RUN in files:
            folders.clear()
            yield Path(name)


def show(text: str, runs: str = "runs") -> int:
    """Prints a run: where it is, how far it came, the recipe that matters, its results and its files."""
    record = read_run(find_run(text, runs), metrics=False)
    print(f"{record.folder}: {record.status}")
    for name, about in _about(record):
        print(f"  {name:<10} {about}")
    print("recipe (what differs from the defaults):")
    rows = list(_matters(record.recipe).items())
    width = max((len(key) for key, _ in rows), default=0)
    for key, value in rows:
        print(f"  {key:<{width}}  {_shown(value)}")
    lines = summary(record.results) if record.results else []
    print("\n".join(["results:", *(lines or ["  none" if record.results else "  none yet"])]))
    print("files:")
    for name, size in _files(record.folder):
        print(f"  {name:<22} {_bytes(size)}")
    return 0


def _about(record: RunRecord) -> Iterator[tuple[str, str]]:
    head, recipe = record.provenance, record.recipe
    names = {group: _name(recipe.get(group)) for group in GROUPS}
    what = names["method"] or "supervised"
    rate = f" lr {lr:g}" if isinstance(lr := (recipe.get("optimizer") or {}).get("lr"), int | float) else ""
    optimizer = f"{names['optimizer']}{rate}"
    yield "what", f"{what} on {names['data']}, {names['model']}, {optimizer}, batch {recipe.get('batch_size')}"
    total, last = head.get("plan", {}).get("total_steps"), record.last_metrics
    done = f"step {last.get('step', 0)} of {total or '?'}"
    if "loss" in last:
        done += f", loss {last['loss']:.4g}, {last.get('images_per_second', 0):.0f} images/s"
    yield "progress", done
    processes = head.get("world_size", 1)
    hardware = head.get("hardware", {})
    device = next(iter(hardware.get("gpus") or []), None) or hardware.get("cpu") or head.get("device", "?")
    device = device.get("name", device) if isinstance(device, Mapping) else device
    yield "where", f"{device}, {processes} process{'es' if processes != 1 else ''}, {recipe.get('precision')}"
    code, packages = head.get("code", {}), head.get("packages", {})
    commit = f" ({str(code.get('commit'))[:9]}{', changed' if code.get('dirty') else ''})" if code.get("commit") else ""
    versions = f"ssl_bench {code.get('version', '?')}{commit}, torch {packages.get('torch', '?')}"
    yield "started", f"{head.get('started', '?')} by {versions}"
    yield "identity", record.identity


def _name(section: Any) -> str:
    if not isinstance(section, Mapping):
        return ""
    return str(section.get("target") or section.get("name") or "")


def _matters(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The keys whose values are not what the recipe's choices imply; nothing is imported that a record names."""
    from ssl_bench.recipe.compose import choices, compose
    from ssl_bench.recipe.identity import flatten

    flat = {key: value for key, value in flatten(recipe).items() if key not in ("track", "run_dir", "resume")}
    names = {group: _name(recipe.get(group)) for group in GROUPS}
    words = [f"{group}={name}" for group, name in names.items() if name in choices(group)]
    chosen = {group: name for group, name in names.items() if name and f"{group}={name}" in words}
    try:
        implied = flatten(compose(str(recipe.get("track")), words).to_dict())
    except ValueError:  # a record of another version, whose choices need more
        implied = {}
    own = {f"{group}.{end}" for group in chosen for end in ("target", "name")}
    differing = {key: value for key, value in flat.items() if key not in own and implied.get(key) != value}
    return {**chosen, **differing}


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ",".join(map(_shown, value)) + "]"
    return str(value)


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        inside = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
        yield path.name + ("/" if path.is_dir() else ""), sum(one.stat().st_size for one in inside)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def compare(texts: Sequence[str], output: str | None = None, runs: str = "runs", y: str = "loss") -> int:
    """Prints where the recipes of runs differ and their results side by side, and draws their curves in one figure.

    Args:
        texts: two runs or more, see `find_run`.
        output: the figure's file, PNG, SVG or PDF; None = no figure.
        runs: where names are looked up.
        y: the metric that is drawn.

    Raises:
        ValueError: one line; fewer than two, or no run logged the metric.
    """
    if len(texts) < 2:
        raise ValueError(f"compare: RUN must be given twice or more, got {len(texts)}")
    if output is not None and Path(output).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output must end in .png, .svg or .pdf, got {output!r}")
    records = [read_run(find_run(text, runs)) for text in texts]
    if len({record.folder.resolve() for record in records}) < len(records):
        raise ValueError(f"compare: RUN must be different runs, got {', '.join(texts)}")
    labels = [chr(ord("A") + number) if number < 26 else str(number) for number in range(len(records))]
    for label, record in zip(labels, records, strict=True):
        print(f"{label}  {record.folder}")
    _print_rows("recipe", labels, _differing([_flat(record) for record in records]))
    _print_rows("results", labels, _results(records))
    if output is not None:
        _draw(records, labels, Path(output), y)
        print(output)
    return 0


def _flat(record: RunRecord) -> dict[str, Any]:
    from ssl_bench.recipe.identity import relevant

    return relevant(record.recipe)


def _differing(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    absent = object()
    keys = sorted({key for recipe in recipes for key in recipe})
    values = {key: [recipe.get(key, absent) for recipe in recipes] for key in keys}
    return [
        (key, ["-" if one is absent else _shown(one) for one in found])
        for key, found in values.items()
        if any(one != found[0] for one in found)
    ]


def _results(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """The status, every measured number of the evaluations, and the last line of the metrics, by run."""
    rows = [("status", [record.status for record in records])]
    tables = []
    for record in records:
        found = {}
        for entry in (record.results or {}).get("evaluations", []):
            for name, value in entry["metrics"].items():
                if isinstance(value, float):
                    found[f"{entry['protocol']} {entry.get('model', 'trained')} {name}"] = f"{value:.4g}"
        last = record.last_metrics
        found |= {name: f"{last[name]:.4g}" for name in ("step", "loss", "seconds") if name in last}
        tables.append(found)
    names = dict.fromkeys(name for table in tables for name in table)
    return rows + [(name, [table.get(name, "-") for table in tables]) for name in names]


def _print_rows(title: str, labels: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    if not rows:
        print(f"\n{title}: no difference")
        return
    first = max(len(title), *(len(name) for name, _ in rows))
    widths = [max(len(label), *(len(cells[i]) for _, cells in rows)) for i, label in enumerate(labels)]
    print()
    for name, cells in [(title, labels), *rows]:
        print("  ".join([f"{name:<{first}}", *(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))]).rstrip())


def _draw(records: Sequence[RunRecord], labels: Sequence[str], path: Path, y: str) -> None:
    from matplotlib.figure import Figure

    from ssl_bench.report.curves import load_metrics
    from ssl_bench.report.figures.drawing import LINES, PALETTE, save, style

    with style():
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axis = figure.subplots()
        drawn = 0
        for number, (label, record) in enumerate(zip(labels, records, strict=True)):
            metrics = load_metrics(record.folder)
            if y not in metrics:
                continue
            kept = np.isfinite(metrics[y])
            line = LINES[number // len(PALETTE) % len(LINES)]
            color = PALETTE[number % len(PALETTE)]
            axis.plot(metrics["step"][kept], metrics[y][kept], line, color=color, label=f"{label}: {_title(record)}")
            drawn += 1
        if not drawn:
            known = sorted({name for record in records for name in load_metrics(record.folder)} - set(CLOCKS))
            raise ValueError(f"--y must be a metric that one of the runs logged ({', '.join(known)}), got {y!r}")
        axis.set_xlabel("step")
        axis.set_ylabel(y)
        axis.legend()
        save(figure, path)


def _title(record: RunRecord) -> str:
    optimizer = record.recipe.get("optimizer") or {}
    names = [_name(record.recipe.get(group)) for group in ("method", "data")]
    return ", ".join([*filter(None, names), f"{_name(optimizer)} lr {optimizer.get('lr')}"])
