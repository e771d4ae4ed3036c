"""Groups runs into cells: runs whose recipes differ only in the seed form one cell, with a mean and a deviation."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, StrictStr, ValidationError

from ssl_bench.recipe.identity import is_its_path
from ssl_bench.records.reader import FAILURES, RunRecord, Skipped
from ssl_bench.report.inference import Summary, summarize, t_interval, test_set_error
from ssl_bench.report.protocols import MONITORS, among_ours, ordered
from ssl_bench.report.recipes import cell_key, lookup, variants
from ssl_bench.report.tables import Value, is_number, on_one_line, one_line

# What readers call the suite's optimizers, in the order in which tables have them: by the name in the registry, and a
# setting that makes it another one.
OPTIMIZER_NAMES = {
    ("lars", None): "LARS", ("lars", "clip"): "LARC", ("lamb", None): "LAMB", ("lambc", None): "LAMBC",
    ("tvlars", None): "TVLARS", ("clars", None): "CLARS", ("sgd", None): "SGD", ("sgd", "nesterov"): "Nesterov SGD",
    ("adamw", None): "AdamW", ("timm", "muon"): "Muon",
}  # fmt: skip

# What "lost" means, for readers. A lost run has no accuracy of its own and counts as chance, or an optimizer that loses
# seeds would rank by those that it did not lose.
LOST = "diverged, collapsed or stayed at chance"


class Setting(NamedTuple):
    """Problem, data set and batch size: optimizers are compared within one setting."""

    problem: str
    dataset: str
    batch_size: int

    @property
    def cells(self) -> tuple[str, str, str]:
        """Printed, for a table's first three columns (``tables.SETTING``)."""
        return self.problem, self.dataset, str(self.batch_size)

    @property
    def record(self) -> dict[str, Value]:
        """For a CSV file."""
        return dict(self._asdict())

    def __str__(self) -> str:
        return f"{self.problem}, {self.dataset}, batch size {self.batch_size}"


@dataclass(frozen=True)
class Score:
    """The accuracy of one model by one evaluation protocol.

    Attributes:
        top1: percent.
        chance: percent; None where it is not recorded.
        probes: percent; top-1 of each probe seed, empty where the protocol has one number.
        images: evaluated; None where it is not recorded.
    """

    top1: float
    chance: float | None
    probes: tuple[float, ...]
    images: int | None


@dataclass(frozen=True, eq=False)
class Result:
    """One run: its seed, how it ended, and its scores by protocol; hashed by identity, so that it can key a cache."""

    record: RunRecord
    seed: int
    scores: dict[str, Score]
    untrained: dict[str, Score]

    @property
    def status(self) -> str:
        """finished, diverged, collapsed, at chance, running or interrupted."""
        return self.record.status

    @property
    def lost(self) -> bool:
        """Whether it diverged, collapsed or stayed at chance: its model is worth a guess, and counts as one."""
        return self.status in FAILURES

    def clock(self, name: str) -> float | None:
        """The last logged value of a clock ("epochs", "seconds"); None where it logged none."""
        value = self.record.last_metrics.get(name)
        return float(value) if is_number(value) and math.isfinite(value) else None


@dataclass(frozen=True)
class Cell:
    """All runs of one recipe, whatever their seed.

    Attributes:
        key: 16 hex digits, a hash of the recipe without its seed.
        problem: "classification" or the method's name.
        dataset: name.
        batch_size: images.
        lr: the recipe's, before the schedule and any batch scaling; NaN where the optimizer has none.
        optimizer: as tables print it.
        variant: what distinguishes this cell from others of the same problem, data set, batch size and optimizer,
            besides the learning rate; empty where nothing does.
        results: by ascending seed.
        chance: a guesser's accuracy on the data set, percent; 0 where no run of the data set recorded it.
    """

    key: str
    problem: str
    dataset: str
    batch_size: int
    lr: float
    optimizer: str
    variant: str
    results: tuple[Result, ...]
    chance: float = 0.0

    @property
    def recipe(self) -> dict[str, Any]:
        """The first run's."""
        return self.results[0].record.recipe

    @property
    def arm(self) -> str:
        """The optimizer with its variant: what a comparison compares."""
        return f"{self.optimizer} ({self.variant})" if self.variant else self.optimizer

    @property
    def setting(self) -> Setting:
        """Where the cell is compared with others."""
        return Setting(self.problem, self.dataset, self.batch_size)

    @property
    def record(self) -> dict[str, Value]:
        """What identifies the cell, for a CSV file."""
        return self.setting.record | {"lr": self.lr, "optimizer": self.optimizer, "variant": self.variant}

    @cached_property
    def statuses(self) -> Counter[str]:
        """How many runs ended in which way."""
        return Counter(result.status for result in self.results)

    @property
    def failed(self) -> bool:
        """Whether every run was lost."""
        return all(result.lost for result in self.results)

    def finished(self, protocol: str) -> dict[int, float]:
        """Percent by seed, of the finished runs alone."""
        ended = [result for result in self.results if result.status == "finished" and protocol in result.scores]
        return {result.seed: result.scores[protocol].top1 for result in ended}

    def top1(self, protocol: str) -> dict[int, float]:
        """Percent by seed, of the runs that ended, those lost at chance."""
        lost = {result.seed: self.chance for result in self.results if result.lost}
        return dict(sorted((self.finished(protocol) | lost).items()))

    def summary(self, protocol: str) -> Summary:
        """Mean and deviation over the runs that ended, those lost at chance."""
        return summarize(list(self.top1(protocol).values()))

    def interval(self, protocol: str) -> tuple[float, float] | None:
        """Student's 95% interval of that mean, within 0 and 100: what other seeds could give; None below two seeds."""
        ends = t_interval(list(self.top1(protocol).values()))
        return None if ends is None else (max(0.0, ends[0]), min(100.0, ends[1]))

    def test_error(self, protocol: str) -> float | None:
        """Half the 95% interval over other test images, in points; None where nothing finished or none are counted."""
        scores = [r.scores[protocol] for r in self.results if r.status == "finished" and protocol in r.scores]
        images = [score.images for score in scores if score.images]
        return test_set_error(sum(self.finished(protocol).values()) / len(scores), min(images)) if images else None

    def untrained(self, protocol: str) -> Summary:
        """The same protocol on the models before their first step."""
        return summarize([r.untrained[protocol].top1 for r in self.results if protocol in r.untrained])

    def text(self, protocol: str) -> str:
        """Mean +- sd and n for a table; the lost runs in it are named, so that no bare number hides them."""
        summary, finished = self.summary(protocol), self.finished(protocol)
        if summary.mean is not None and finished:
            spread = f" ± {summary.sd:.2f}" if summary.sd is not None else ""
            lost = [f"{self.statuses[word]} {word}" for word in FAILURES if self.statuses[word]]
            return f"{summary.mean:.2f}{spread} ({'; '.join([f'n = {summary.n}', *lost])})"
        words = [word for word in (*FAILURES, "interrupted", "running") if self.statuses[word]]
        if len(words) == 1:
            return f"{words[0]} (n = {self.statuses[words[0]]})"
        return ", ".join(f"{self.statuses[word]} {word}" for word in words) or f"not measured by {protocol}"


@dataclass(frozen=True)
class Collection:
    """All the runs of a report.

    Attributes:
        cells: sorted by problem, data set, batch size, optimizer, variant and learning rate.
        skipped: folders that could not be used, each with the reason.
    """

    cells: tuple[Cell, ...]
    skipped: tuple[Skipped, ...]

    @property
    def results(self) -> list[Result]:
        """All runs."""
        return [result for cell in self.cells for result in cell.results]

    @property
    def problems(self) -> list[str]:
        """In the order of the cells."""
        return list(dict.fromkeys(cell.problem for cell in self.cells))

    def protocols(self, problem: str) -> list[str]:
        """The protocols that any run of a problem has; first the one for comparisons, which covers the most runs."""
        return self._protocols.get(problem, [])

    @cached_property
    def _protocols(self) -> dict[str, list[str]]:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for cell in self.cells:
            counts[cell.problem].update(name for result in cell.results for name in result.scores)
        return {problem: ordered(count) for problem, count in counts.items()}

    def headline(self, problem: str) -> str:
        """The protocol by which a problem's runs are compared with each other."""
        return among_ours(problem, self.protocols(problem))


def gather(records: Iterable[RunRecord], skipped: Iterable[Skipped] = ()) -> Collection:
    """Sorts runs into cells. A record without a usable recipe, or of a run seen before, is skipped with its reason.

    So are a search's trials where their setting has runs evaluated on the test set, which are compared with each other.
    """
    left_out = list(skipped)
    groups: dict[str, dict[int, Result]] = defaultdict(dict)
    for record in sorted(records, key=lambda record: record.results is None):  # of two copies keep the one that ended
        try:
            _Recipe.model_validate(record.recipe)
            result = _result(record)
            key = _cell(cell_key(record.recipe), [result]).key
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            why = f"recipe.{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}" if first else repr(error)
            reason = f"{record.folder}: its record is not a benchmark run's: {why}"
            left_out.append(Skipped(record.folder, on_one_line(reason)))
            continue
        runs = groups[key]
        if result.seed in runs:
            reason = f"{record.folder}: the same run as {runs[result.seed].record.folder}, which counts once"
            left_out.append(Skipped(record.folder, reason))
        else:
            runs[result.seed] = result
    cells = [_cell(key, [runs[seed] for seed in sorted(runs)]) for key, runs in groups.items()]
    tested = {cell.setting for cell in cells if not _held_out(cell)}
    trials = [cell for cell in cells if _held_out(cell) and cell.setting in tested]
    places = Counter(result.record.folder.parent for cell in trials for result in cell.results)
    for place, count in places.items():
        reason = f"{place}: trials that were evaluated on held-out train images and not on the test set: {count}"
        left_out.append(Skipped(place, reason))
    cells = [cell for cell in cells if not (_held_out(cell) and cell.setting in tested)]
    chance: dict[str, float] = {}
    for cell in cells:
        scores = (s for result in cell.results for s in (result.scores | result.untrained).values())
        for score in scores:
            if score.chance is not None:
                chance.setdefault(cell.dataset, score.chance)
    cells = [replace(cell, chance=chance.get(cell.dataset, 0.0)) for cell in cells]
    left_out.sort(key=lambda entry: entry.folder)
    return Collection(tuple(sorted(_with_variants(cells), key=_order)), tuple(left_out))


def _held_out(cell: Cell) -> bool:
    """Whether the cell's runs were evaluated on train images that they were not trained on."""
    return bool(cell.results[0].record.recipe["data"].get("holdout"))


class _Named(BaseModel):
    name: StrictStr


class _Target(BaseModel):
    target: StrictStr | None = None


class _Optimizer(BaseModel):
    target: StrictStr


class _Recipe(BaseModel):
    """What the report needs of a recipe; the other keys are kept as they are."""

    seed: int
    track: StrictStr
    batch_size: int = Field(ge=1)
    data: _Named
    optimizer: _Optimizer
    method: _Target | None = None
    schedule: _Target | None = None


def _result(record: RunRecord) -> Result:
    """A run's scores; several evaluations by one protocol, under several probe seeds, become one: their mean."""
    found: dict[str, dict[str, list[Score]]] = {"trained": defaultdict(list), "untrained": defaultdict(list)}
    for entry in (record.results or {}).get("evaluations", []):
        model, protocol, metrics = entry.get("model", "trained"), one_line(entry["protocol"]), entry["metrics"]
        top1 = metrics.get("top1")  # evaluators from outside may measure something else
        if model in found and protocol not in MONITORS and is_number(top1) and 0 <= top1 <= 100:
            numbered = ((name.removeprefix("top1_seed"), value) for name, value in metrics.items())
            probes = sorted((int(seed), value) for seed, value in numbered if seed.isdecimal() and is_number(value))
            values, chance = tuple(float(value) for _, value in probes), entry.get("chance")
            known = float(chance) if is_number(chance) and 0 <= chance <= 100 else None
            found[model][protocol].append(Score(float(top1), known, values, entry.get("n_test")))

    def joined(scores: Sequence[Score]) -> Score:
        if len(scores) == 1:
            return scores[0]
        probes = tuple(value for score in scores for value in (score.probes or (score.top1,)))
        return replace(scores[0], top1=sum(score.top1 for score in scores) / len(scores), probes=probes)

    by_model = [{name: joined(scores) for name, scores in each.items()} for each in found.values()]
    return Result(record, int(record.recipe["seed"]), *by_model)


def _cell(key: str, results: list[Result]) -> Cell:
    recipe = results[0].record.recipe
    data = str(recipe["data"]["name"])
    if is_its_path(data):
        data = f"{data}:{str(recipe['data'].get('path')).rstrip('/').rsplit('/', 1)[-1]}"
    problem = "classification" if recipe["track"] == "classify" else str(lookup(recipe, "method.target")).split(":")[-1]
    lr, batch_size = lookup(recipe, "optimizer.lr"), recipe["batch_size"]
    return Cell(
        key=key,
        problem=one_line(problem),
        dataset=one_line(data),
        batch_size=int(batch_size),
        lr=float(lr) if is_number(lr) and math.isfinite(lr) else math.nan,
        optimizer=one_line(_optimizer(recipe)),
        variant="",
        results=tuple(results),
    )


def _optimizer(recipe: Mapping[str, Any]) -> str:
    """What readers call a recipe's optimizer; one from outside, or of timm's, by its own name."""
    target = str(lookup(recipe, "optimizer.target"))
    if ":" in target:
        return target.split(":")[-1]
    if target == "timm":
        name = str(lookup(recipe, "optimizer.name", target))
        return OPTIMIZER_NAMES.get((target, name), name)
    switches = (switch for known, switch in OPTIMIZER_NAMES if known == target and switch)
    on = next((switch for switch in switches if lookup(recipe, f"optimizer.{switch}", False) is True), None)
    return OPTIMIZER_NAMES.get((target, on), target)


def _with_variants(cells: Sequence[Cell]) -> list[Cell]:
    """Names what distinguishes cells of one optimizer that share problem, data set and batch size."""
    families: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        families[cell.problem, cell.dataset, cell.optimizer].append(cell)
    named = []
    for family in families.values():
        names = variants([cell.recipe for cell in family])
        named += [replace(cell, variant=name) for cell, name in zip(family, names, strict=True)]
    # Texts that are cut for readers may agree where the values do not.
    seen = Counter((cell.setting, cell.optimizer, cell.variant, cell.lr) for cell in named)
    return [
        cell
        if seen[cell.setting, cell.optimizer, cell.variant, cell.lr] == 1
        else replace(cell, variant=f"{cell.variant} #{cell.key[:6]}")
        for cell in named
    ]


def _order(cell: Cell) -> tuple[Any, ...]:
    ranks = list(OPTIMIZER_NAMES.values())
    rank = ranks.index(cell.optimizer) if cell.optimizer in ranks else len(ranks)
    kind = (cell.problem != "classification", *cell.setting)
    return (*kind, rank, cell.optimizer, cell.variant, cell.lr, cell.key)
