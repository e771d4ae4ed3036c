"""``ssl-bench resume RUN``: goes on with a run by the recipe in its folder, or with a longer one."""

import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssl_bench.cli.evaluate import recorded
from ssl_bench.cli.runs import find_run
from ssl_bench.recipe.schema import Recipe
from ssl_bench.records.reader import METRICS, RUN, SESSIONS, RecordError, RunRecord, read_run

LENGTH = ("steps", "epochs")
# The length, and what cannot change a result.
MAY_CHANGE = (
    *LENGTH, "data.path", "data.cache_dir", "data.workers", "data.resident", "eval.data_path", "device", "log_every",
    "tracker", "checkpoint.every_steps", "checkpoint.every_epochs", "checkpoint.keep", "checkpoint.final",
    "model.checkpoint",
)  # fmt: skip


def main(
    text: str, overrides: Sequence[str] = (), *, processes: int = 1, runs: str = "runs", trust: bool = False
) -> int:
    """Continues a run from its last checkpoint.

    Args:
        text: see `ssl_bench.cli.runs.find_run`.
        overrides: ``key=value`` for the keys in ``MAY_CHANGE``; ``steps`` or ``epochs`` makes a longer run of it, in a
            folder of its own beside this one, which stays as it is.
        processes: how many to start on this machine.
        runs: where names are looked up.
        trust: whether the record may name code to import and paths to read (see `ssl_bench.recipe.trust`).

    Returns:
        the run's exit code.

    Raises:
        ValueError, OSError: in one line; among others, the longer run would not be this one at first.
    """
    record = read_run(find_run(text, runs), metrics=False)
    longer = [word for word in overrides if word.partition("=")[0] in LENGTH]
    rest = [word for word in overrides if word not in longer]
    if longer and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"resume: {longer[0]} must be given to one process: ssl-bench resume RUN --processes N")
    if len(longer) > 1:
        raise ValueError(f"give steps or epochs, not both, got {' '.join(longer)}")
    recipe = recorded(record, [*rest, *_only(longer)], MAY_CHANGE, without=(), trust=trust)
    folder = _longer(record, recipe) if longer else record.folder
    if processes > 1:
        from ssl_bench.runtime.launcher import launch

        words = [sys.executable, "-m", "ssl_bench", "resume", str(folder), *rest, *(["--trust"] if trust else [])]
        return launch(words, processes)
    from ssl_bench.recipe.command import run_recipe

    recipe = replace(recipe, run_dir=str(folder), resume="auto")
    return run_recipe(recipe, importlib.import_module(f"ssl_bench.{recipe.track}").run)[1]


def _only(longer: Sequence[str]) -> list[str]:
    """The new length in its unit, and none in the other."""
    return [word for given in longer for word in (f"{LENGTH[given.startswith('steps=')]}=null", given)]


def _longer(record: RunRecord, recipe: Recipe) -> Path:
    """The folder of the longer run, made from the shorter one's last checkpoint if it is not there yet.

    Raises:
        ValueError: one line; it would not be the run that a start with the new length gives, or has no checkpoint.
    """
    folder = record.folder.parent / replace(recipe, run_dir=None).name()
    if folder.resolve() == record.folder.resolve() or recipe.identity() == record.identity:
        return record.folder
    if (folder / RUN).is_file():
        return folder
    plan = record.provenance.get("plan", {})
    if "steps_per_epoch" not in plan:
        raise RecordError(f"{record.folder / RUN} must say its plan to be extended, which an early version's does not")
    from ssl_bench.records.checkpoint import Checkpoints
    from ssl_bench.training import build

    old = build.plan_at(_as_long_as(recipe, record), plan["steps_per_epoch"])
    new = build.plan_at(recipe, plan["steps_per_epoch"])
    found = Checkpoints(record.folder / "checkpoints").load_latest()
    if found is None:
        raise RecordError(
            f"{record.folder} must have a checkpoint to go on from, got none: a run that ends keeps its last one with "
            "checkpoint.final=true"
        )
    step = found[0]
    if new.total <= step:
        raise ValueError(f"steps must be more than the {step} that the run has done, got {new.total}")
    if reason := _not_the_same(recipe, old, new, step):
        raise ValueError(f"steps cannot be changed from {old.total} to {new.total}: {reason}")
    _copy(record, recipe, new, step, folder)
    print(f"{folder}: {new.total} steps, from step {step} of {record.folder}")
    return folder


def _as_long_as(recipe: Recipe, record: RunRecord) -> Recipe:
    """The recipe with the length that the record has."""
    return replace(recipe, steps=record.recipe.get("steps"), epochs=record.recipe.get("epochs"))


def _not_the_same(recipe: Recipe, old: Any, new: Any, step: int) -> str:
    """Why a run of the new length would not have begun as this one did; "" where it would, bit for bit."""
    from ssl_bench.methods.base import Method
    from ssl_bench.recipe import registry
    from ssl_bench.training import build

    name = recipe.schedule.target
    before, after = build.schedule(recipe, old), build.schedule(recipe, new)
    for at in range(step):
        if before(at) != after(at):
            return (
                f"schedule={name} depends on the length (in step {at + 1} its multiplier is {before(at):.4g} and would "
                f"be {after(at):.4g}); one that is constant after its warm-up does not"
            )
    if old.optimizer != new.optimizer:
        keys = sorted(key for key in new.optimizer if new.optimizer[key] != old.optimizer.get(key))
        return f"optimizer.{keys[0]} is given as a fraction of the run"
    if recipe.averaging.start_fraction:
        return "averaging.start_fraction is a fraction of the run"
    if recipe.checkpoint.snapshots:
        return "checkpoint.snapshots are fractions of the run"
    if recipe.track == "pretrain":
        method = registry.resolve("method", recipe.method.target)
        if method.begin_step is not Method.begin_step:
            return f"method={recipe.method.target} follows the progress of the run (begin_step)"
    return ""


def _copy(record: RunRecord, recipe: Recipe, plan: Any, step: int, folder: Path) -> None:
    """The longer run's folder as it would be at that step; it gets its name when it is whole."""
    from ssl_bench.records.storage import TEMPORARY, atomic_json

    staging = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        for name in (METRICS, SESSIONS, "telemetry.parquet"):
            if (record.folder / name).exists():
                shutil.copy2(record.folder / name, staging / name)
        checkpoint = f"checkpoints/step-{step:08d}"
        for name in ("telemetry", checkpoint):
            if (record.folder / name).is_dir():
                shutil.copytree(record.folder / name, staging / name)
        durations = {"total_steps": plan.total, "optimizer": plan.optimizer, "schedule": plan.schedule}
        head = {
            **record.provenance,
            "identity": recipe.identity(),
            "recipe": replace(recipe, run_dir=None).to_dict(),
            "plan": {**record.provenance["plan"], **durations},
            "continued_from": {"identity": record.identity, "step": step},
        }
        atomic_json(staging / RUN, head)
        os.rename(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
