"""The commands as Python functions, for scripts and notebooks.

    import ssl_bench

    result = ssl_bench.pretrain(data="digits", optimizer="tvlars", steps=40, **{"optimizer.lr": 2})
    result.metrics["loss"], result.results["evaluations"], result.backbone, result.run_dir

Every function takes the keys of the command of its name (``ssl-bench pretrain --help`` lists them), with Python values:
as keywords (``steps=40``, ``optimizer="tvlars"``), with dots (``**{"optimizer.lr": 2}``) or nested (``method={"lambd":
0.01}``; ``optimizer={"target": "tvlars", "lr": 2}`` chooses and sets). A plug-in may be a class or function itself,
``method=MyMethod``. What the commands print as one line is raised: ValueError or OSError; a Ctrl-C (a notebook's stop
button) saves a checkpoint and raises KeyboardInterrupt.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ssl_bench.records.reader import RecordError, RunRecord, read_run

if TYPE_CHECKING:
    from torch import nn

Keys = Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class Result:
    """A run, as its folder has it.

    Attributes:
        run_dir: the folder.
        trusted: whether code that the record names may be imported (see `load`).
    """

    run_dir: Path
    trusted: bool = field(default=False, kw_only=True)

    @property
    def record(self) -> RunRecord:
        """Everything that the folder's JSON files hold, read now."""
        return read_run(self.run_dir, metrics=False)

    @property
    def status(self) -> str:
        """How it ended: "finished", "diverged", "collapsed" or "at chance"; else "running" or "interrupted"."""
        return self.record.status

    @property
    def recipe(self) -> dict[str, Any]:
        """Every setting, nested."""
        return self.record.recipe

    @property
    def results(self) -> dict[str, Any]:
        """The end of the run: "status", "step", "evaluations" (a list of dicts); {} before the end."""
        return self.record.results or {}

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """The logged lines by name, as arrays of one length (so ``pandas.DataFrame(result.metrics)`` is a table).

        "step", "epochs", "samples" and "seconds" are the clocks; NaN where a line has no such value.
        """
        rows = self.record.metrics
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}

    @cached_property
    def backbone(self) -> "nn.Module":
        """The trained backbone on the CPU, in evaluation mode: images (n, 3, H, W), normalised, -> features (n, D).

        Raises:
            ValueError: the run left none (it has diverged, or not ended), or somebody else's record names its code.
        """
        from ssl_bench.models.backbone import load_backbone
        from ssl_bench.recipe import registry
        from ssl_bench.recipe.trust import refuse_untrusted
        from ssl_bench.records.writer import BACKBONE

        record, path = self.record, self.run_dir / BACKBONE
        if not path.exists():
            raise RecordError(f"{self.run_dir} must hold {BACKBONE}, got a run that is {record.status}")
        name = str(record.recipe["model"]["name"])
        if not self.trusted:
            refuse_untrusted(str(self.run_dir), {"model.name": name})
        return load_backbone(path, factory=registry.foreign("backbone", name))[0].eval()

    def __repr__(self) -> str:
        tops = [
            f"{entry['protocol']} {entry.get('model', 'trained')} {entry['metrics']['top1']:.2f}%"
            for entry in self.results.get("evaluations", [])
            if "top1" in entry["metrics"]
        ]
        return f"<Result {self.run_dir.name}: {', '.join([self.status, *tops])}>"


@dataclass(frozen=True)
class StudyResult:
    """What a study has left.

    Attributes:
        states: each cell's state by its label: "finished", "diverged", "failed", "missing", ...
        errors: the failed cells' errors in one line, by label.
        runs: the runs of those cells that have a record.
    """

    states: dict[str, str]
    errors: dict[str, str]
    runs: list[Result]


def pretrain(keys: Keys | None = None, /, **more: Any) -> Result:
    """Pretrains a backbone, then evaluates it: ``ssl-bench pretrain``, in this process.

    Args:
        keys: recipe keys as a dict, with dots or nested.
        more: further ones; they win.

    Returns:
        the run. ``resume="auto"`` goes on with the one in the folder, and returns it if it has ended.

    Raises:
        ValueError, OSError: in one line, before data is read; wrong keys or values, or a folder that is in use.
        KeyboardInterrupt: stopped by a signal, after saving a checkpoint where there was something to save.
    """
    return _run("pretrain", keys, more)


def classify(keys: Keys | None = None, /, **more: Any) -> Result:
    """Trains a classifier, and measures it on the whole test set: ``ssl-bench classify``; see `pretrain`."""
    return _run("classify", keys, more)


def load(run_dir: str | Path, *, trust: bool = False) -> Result:
    """A run of before.

    Args:
        run_dir: its folder.
        trust: whether its record may name code to import (package.module:Name), which is needed for the backbone then.

    Raises:
        ValueError: no run's folder, or a damaged one; one line.
    """
    read_run(run_dir, metrics=False)
    return Result(Path(run_dir).absolute(), trusted=trust)


def evaluate(
    run: Result | str | Path | None = None,
    keys: Keys | None = None,
    /,
    *,
    output: str = "evaluations",
    trust: bool = False,
    **more: Any,
) -> list[dict[str, Any]]:
    """Evaluates a run's backbone and adds to its record, or any backbone: ``ssl-bench evaluate``.

    Args:
        run: the run; None = the backbone of ``model.*``, whose record goes to ``output``.
        keys: recipe keys, e.g. ``{"eval.protocols": ["linear-aug-v1"]}``.
        output: folder for the record without a run.
        trust: as for `load`.
        more: further keys.

    Returns:
        for each protocol and model ("trained", "untrained") its "protocol", "model", "metrics" and more.
    """
    from ssl_bench.cli.evaluate import evaluate_backbone, evaluate_run

    given = words(keys or {}, more)
    if run is None:
        return evaluate_backbone(given, output)
    if isinstance(run, Result):
        return evaluate_run(str(run.run_dir), given, trust=trust or run.trusted)
    return evaluate_run(str(run), given, trust=trust)


def study(
    name: str | Path,
    keys: Keys | None = None,
    /,
    *,
    runs: str | Path = "runs",
    seeds: list[int] | None = None,
    data_paths: Mapping[str, str] | None = None,
    workers: int | None = None,
    per_gpu: int = 1,
    retry_failed: bool = False,
    trust: bool = False,
    **more: Any,
) -> StudyResult:
    """Runs what is missing of a study on this machine, each cell in a process of its own: ``ssl-bench study``.

    Args:
        name: a shipped study's name, or the path of a YAML file.
        keys: recipe keys for every cell.
        runs: folder of all runs.
        seeds: instead of the study's.
        data_paths: by data set, where to read it.
        workers: cells to run at a time; None = as many as fit.
        per_gpu: cells that may share a GPU.
        retry_failed: whether failed cells are run again.
        trust: whether the file may name code to import and paths to read.
        more: further keys.
    """
    from ssl_bench.records.reader import RUN
    from ssl_bench.runtime.interrupt import REQUEUE_EXIT_CODE
    from ssl_bench.study.cells import CellStore
    from ssl_bench.study.grid import load_study
    from ssl_bench.study.run import run_study

    given = words(keys or {}, more)
    grid = load_study(name, overrides=given, seeds=seeds, data_paths=data_paths, trust=trust)
    store = CellStore(runs)
    code = run_study(grid, store, workers=workers, per_gpu=per_gpu, retry_failed=retry_failed)
    if code == REQUEUE_EXIT_CODE:
        raise KeyboardInterrupt("stopped by a signal; the same call goes on from here")
    states = {cell.label: store.state(cell) for cell in grid.cells}
    folders = [store.folder(cell).absolute() for cell in grid.cells]
    return StudyResult(
        states={label: state.status for label, state in states.items()},
        errors={label: state.detail for label, state in states.items() if state.status == "failed"},
        runs=[Result(folder, trusted=trust) for folder in folders if (folder / RUN).is_file()],
    )


def report(
    runs: str | Path = "runs",
    output: str | Path = "report",
    *,
    study: str | None = None,
    figures: Literal["auto", "all", "none"] = "auto",
) -> Path:
    """Writes the report of a folder of runs: ``ssl-bench report``.

    Args:
        runs: folder of runs, at any depth.
        output: folder of the report.
        study: only the runs of this study.
        figures: which are drawn; auto = all of them, or of more than 200 runs the first six.

    Returns:
        the web page's path.
    """
    from ssl_bench.report.build import write_report

    return write_report(runs, output, study=study, figures=figures)


def _run(track: str, keys: Keys | None, more: Keys) -> Result:
    from ssl_bench.recipe.command import run_recipe
    from ssl_bench.recipe.compose import compose
    from ssl_bench.runtime.interrupt import REQUEUE_EXIT_CODE, Stopped

    recipe = compose(track, words(keys or {}, more))
    try:
        recipe, code = run_recipe(recipe, import_module(f"ssl_bench.{track}").run)
    except Stopped as stopped:
        raise KeyboardInterrupt(str(stopped) or "stopped by a signal") from None
    if code == REQUEUE_EXIT_CODE:
        raise KeyboardInterrupt(f"stopped by a signal, saved in {recipe.folder()}; resume='auto' goes on from there")
    return Result(Path(recipe.folder()).absolute(), trusted=True)


def words(*given: Keys) -> list[str]:
    """Keys with Python values as the words of a command line; of equal keys the last counts.

    Raises:
        ValueError: a value that no command line can hold.
    """
    from ssl_bench.recipe.compose import PLUGINS
    from ssl_bench.recipe.identity import flatten

    found: dict[str, Any] = {}
    for keys in given:
        for key, value in flatten(keys).items():
            section, _, last = key.partition(".")
            chooses = section in PLUGINS and last == "target"  # as a recorded recipe has it
            name = section if chooses else key
            found.pop(name, None)
            found[name] = value
    return [f"{name}={_text(name, value)}" for name, value in found.items()]


def _text(name: str, value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value)
    if callable(value):
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, list | tuple):
        value = [f"{one.__module__}:{one.__qualname__}" if callable(one) else one for one in value]
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be a number, text, true or false, None, or a list of them, got {value!r}"
        ) from error


def _plain(value: Any) -> Any:
    """What JSON does not know: paths, and the numbers and arrays of numpy and torch."""
    if isinstance(value, Path):
        return str(value)
    if not hasattr(value, "tolist"):
        raise TypeError(type(value).__name__)
    return value.tolist()
