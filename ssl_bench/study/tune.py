"""``ssl-bench tune``: the same number of trials for every optimizer on held-out train images, then the test set once.

A trial trains on the train set less a tenth of each class (``data.holdout``) and is measured on that tenth. The best
trial of each optimizer is then trained on the whole train set, over several seeds, and measured on the test set after
its last step. All of it, the held-out indices too, is kept in ``RUNS/NAME/tune.json``.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssl_bench.recipe.compose import compose, merge
from ssl_bench.recipe.content import load, with_content
from ssl_bench.recipe.trust import refuse_untrusted
from ssl_bench.records.reader import FAILURES, read_results
from ssl_bench.records.storage import atomic_json
from ssl_bench.runtime.console import say
from ssl_bench.runtime.paths import file_name
from ssl_bench.study.cells import CellStore
from ssl_bench.study.grid import Cell, Overrides, Study, as_overrides, split_override
from ssl_bench.study.run import run_study
from ssl_bench.study.search import Arm, Range, Search, load_search, points

# Measured after the last epoch alone: a curve of the test set would be something to select from.
MEASURE_ONCE = {"classify": {"eval.test_every_epochs": "0"}, "pretrain": {"eval.online_every_epochs": "0"}}


@dataclass(frozen=True, eq=False)
class Trial:
    """One point of an arm's space, as a run."""

    arm: Arm
    point: Overrides
    cell: Cell


@dataclass(frozen=True)
class Outcome:
    """The result of a run: its status, and its top-1 in percent or NaN where it did not finish."""

    status: str
    top1: float


@dataclass(frozen=True)
class Tuned:
    """An arm's trials on held-out images, the best of them, and its test over the seeds."""

    trials: list[tuple[Trial, Outcome]]
    best: Trial | None  # None where no trial finished
    tests: list[tuple[Cell, Outcome]]


def tune_main(
    source: str | Path,
    *,
    runs: str | Path = "runs",
    overrides: Sequence[str] = (),
    data_paths: Mapping[str, str] | None = None,
    workers: int | None = None,
    per_gpu: int = 1,
    retry_failed: bool = False,
    trust: bool = False,
) -> int:
    """Runs what is missing of a search, selects, and tests what was selected.

    Args: those of ``ssl-bench tune --help``.

    Returns:
        the exit code: 0; 1 when runs failed, and then nothing is selected; `REQUEUE_EXIT_CODE` after a signal.

    Raises:
        ValueError: one line; the search or an override is wrong.
    """
    name, _, search = load_search(source)
    make = _Maker(name, search, dict(map(split_override, overrides)), dict(data_paths or {}), trust)
    trials = {arm.label: make.trials(arm) for arm in search.arms}
    if search.equal:
        _check_tensors(name, trials)
    store = CellStore(runs)

    def run(cells: Iterable[Cell]) -> int:
        # Small spaces of choices repeat points; equal ones are one run.
        study = Study(name, "", tuple({cell.identity: cell for cell in cells}.values()))
        return run_study(study, store, workers=workers, per_gpu=per_gpu, retry_failed=retry_failed)

    def outcome(cell: Cell) -> Outcome:
        return _outcome(cell, store, search.select)

    say(f"{name}: {search.trials} trials for each of {len(search.arms)} arms on held-out train images")
    if code := run(trial.cell for members in trials.values() for trial in members):
        return code
    scores = {label: [(trial, outcome(trial.cell)) for trial in members] for label, members in trials.items()}
    best = {label: _best(scored) for label, scored in scores.items()}
    finals = {label: make.finals(trial) if trial else [] for label, trial in best.items()}
    say(f"{name}: the best trial of each on all train images, seeds {', '.join(map(str, search.seeds))}")
    if code := run(cell for cells in finals.values() for cell in cells):
        return code
    tuned = {
        label: Tuned(scores[label], best[label], [(cell, outcome(cell)) for cell in finals[label]]) for label in trials
    }
    path = store.runs / file_name(name) / "tune.json"
    atomic_json(path, _record(name, search, tuned))
    _print(search, tuned)
    print(f"all trials and the held-out indices: {path}")
    return 0


class _Maker:
    """Makes a search's runs."""

    def __init__(self, name: str, search: Search, user: Overrides, data_paths: dict[str, str], trust: bool = False):
        self.name, self.search, self.user, self.data_paths, self.trust = name, search, user, data_paths, trust
        self.contents: dict[str, str | None] = {}
        for key in user:
            if key in ("data.holdout", "seed") or any(key in arm.space for arm in search.arms):
                raise ValueError(f"search {name}: {key} is chosen by the search and cannot be overridden")

    def trials(self, arm: Arm) -> list[Trial]:
        """The trials of one arm."""
        search = self.search
        held = {"data.holdout": f"{search.holdout:g}"}
        found = points(arm, search.trials, search.seed, self._whole_keys(arm))
        return [Trial(arm, point, self._cell(arm, point, held, search.seed)) for point in found]

    def _whole_keys(self, arm: Arm) -> set[str]:
        """The keys of whole numbers, which the recipe's own check tells: it refuses a fraction between the bounds."""
        start = {key: one.low if isinstance(one, Range) else one.choices[0] for key, one in arm.space.items()}
        found = set()
        for key, values in arm.space.items():
            if not isinstance(values, Range):
                continue
            between = values.low + (values.high - values.low) / math.pi
            try:
                self._cell(arm, as_overrides(arm.label, {**start, key: between}), {}, self.search.seed)
            except ValueError as error:
                if f"{key} must be a valid integer" in str(error):
                    found.add(key)
        return found

    def finals(self, trial: Trial) -> list[Cell]:
        """The runs of a selected point on the whole train set."""
        first = self._cell(trial.arm, trial.point, {}, self.search.seeds[0])
        return [
            replace(
                first,
                overrides={**first.overrides, "seed": str(seed)},
                varied={**first.varied, "seed": str(seed)},
                recipe=replace(first.recipe, seed=seed),
            )
            for seed in self.search.seeds
        ]

    def _cell(self, arm: Arm, point: Overrides, held: Overrides, seed: int) -> Cell:
        where = f"search {self.name}"
        chosen = as_overrides(where, arm.set) | point
        overrides = merge(merge(as_overrides(where, self.search.base), chosen), self.user)
        overrides |= MEASURE_ONCE[self.search.track] | held | {"seed": str(seed)}
        if not self.trust:
            refuse_untrusted(where, overrides, self.user)
        path = self.data_paths.get(overrides.get("data", "cifar10"))
        if path:
            overrides = {"data.path": path, **overrides}
        try:
            recipe = compose(self.search.track, [f"{key}={value}" for key, value in overrides.items()])
            recipe = with_content(recipe, self.contents)
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {arm.label}: {error}") from None
        return Cell(self.name, overrides, {**chosen, **held}, recipe)


def _check_tensors(name: str, trials: Mapping[str, Sequence[Trial]]) -> None:
    """Refuses arms that decay, adapt or leave out different tensors.

    Raises:
        ValueError: one line that names the arm and its groups.
    """
    treated = {
        label: {
            key: value
            for key, value in vars(members[0].cell.recipe.param_groups).items()
            if key in ("decay_1d", "adapt_1d", "exclude")
        }
        for label, members in trials.items()
    }
    first, wanted = next(iter(treated.items()))
    for label, got in treated.items():
        if got != wanted:
            raise ValueError(
                f"search {name}: {label}: param_groups must be those of {first}, {wanted}, got {got} "
                "(equal: false allows it)"
            )


def _outcome(cell: Cell, store: CellStore, protocol: str) -> Outcome:
    """The trained network's result by the protocol that selects.

    Raises:
        ValueError: the run was not measured by it.
    """
    results = read_results(store.folder(cell))
    assert results is not None  # the launcher reported that the run has ended
    if results["status"] != "finished":
        return Outcome(results["status"], math.nan)
    entries = [entry for entry in results["evaluations"] if entry.get("model", "trained") == "trained"]
    for entry in entries:
        if entry["protocol"] == protocol and "top1" in entry["metrics"]:
            return Outcome(results["status"], float(entry["metrics"]["top1"]))
    known = ", ".join(entry["protocol"] for entry in entries if "top1" in entry["metrics"]) or "none"
    raise ValueError(
        f"search {cell.study}: select must be a protocol with a top-1 of its runs ({known}), got {protocol!r}"
    )


def _best(scored: Sequence[tuple[Trial, Outcome]]) -> Trial | None:
    """The first trial with the highest top-1, or None where no trial finished."""
    finished = [(trial, outcome.top1) for trial, outcome in scored if not math.isnan(outcome.top1)]
    return max(finished, key=lambda pair: pair[1])[0] if finished else None


def _record(name: str, search: Search, tuned: Mapping[str, Tuned]) -> dict[str, Any]:
    """All that a reader needs to check the selection, the held-out indices themselves included."""
    from ssl_bench.data.dataset import holdout_indices

    arms = {
        label: {
            "trials": [{"point": one.point, "run": one.cell.name, **vars(outcome)} for one, outcome in arm.trials],
            "chosen": arm.best.point if arm.best else None,
            "test": [{"seed": cell.recipe.seed, "run": cell.name, **vars(outcome)} for cell, outcome in arm.tests],
        }
        for label, arm in tuned.items()
    }
    cell = next(iter(tuned.values())).trials[0][0].cell
    train = load(cell.recipe.data, test=False).train
    indices = holdout_indices(train.labels, cell.recipe.data.holdout)[1].tolist()
    holdout = {
        "fraction": search.holdout,
        "images": len(indices),
        "of": len(train.labels),
        "sha256": hashlib.sha256(json.dumps(indices).encode()).hexdigest(),
        "indices": indices,
    }
    return {"format": 1, "search": name, "select": search.select, "sampler": "optuna QMCSampler, scrambled Sobol",
            "seed": search.seed, "holdout": holdout, "arms": arms}  # fmt: skip


def _print(search: Search, tuned: Mapping[str, Tuned]) -> None:
    print(f"{search.select} top-1 in %; test: all train images, last step, seeds {', '.join(map(str, search.seeds))}")
    for label, arm in tuned.items():
        if arm.best is None:
            print(f"  {label}: {_summary(outcome for _, outcome in arm.trials)}")
            continue
        held_out = dict(arm.trials)[arm.best].top1
        point = " ".join(f"{key}={value}" for key, value in arm.best.point.items())
        print(f"  {label}: held out {held_out:.2f}, test {_summary(outcome for _, outcome in arm.tests)}; {point}")


def _summary(outcomes: Iterable[Outcome]) -> str:
    """Mean and standard deviation of what finished, and the number of runs that failed, by how."""
    outcomes = list(outcomes)
    values = [outcome.top1 for outcome in outcomes if outcome.status == "finished"]
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    parts = [f"{statistics.mean(values):.2f}{spread} (n = {len(values)})"] if values else []
    for status in FAILURES:
        number = sum(outcome.status == status for outcome in outcomes)
        parts += [f"{number} {status}"] if number else []
    return ", ".join(parts)
