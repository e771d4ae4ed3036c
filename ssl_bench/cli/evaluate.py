"""Evaluates a saved run, or any backbone: ``ssl-bench evaluate RUN eval.protocols=[linear-aug-v1]``."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_bench.recipe.compose import build, compose, override
from ssl_bench.recipe.content import with_content
from ssl_bench.recipe.identity import flatten, relevant
from ssl_bench.recipe.schema import Recipe
from ssl_bench.recipe.trust import refuse_untrusted
from ssl_bench.records.reader import RUN, RecordError, RunRecord, read_run
from ssl_bench.records.storage import atomic_json, one_line
from ssl_bench.records.summary import summary
from ssl_bench.records.writer import BACKBONE, add_evaluations

if TYPE_CHECKING:
    from ssl_bench.training.processes import Processes

# Where the images are and what is measured; never which images, which network, or how it was trained.
MAY_CHANGE = ("eval", "data.path", "data.cache_dir", "data.resident", "data.workers", "device", "model.checkpoint")

# What an evaluation without a run depends on; the rest of a recipe is about training.
COUNTS = ("data", "model", "eval", "augment.stats", "device", "seed")


def evaluate_run(run_dir: str, overrides: Sequence[str] = (), *, trust: bool = False) -> list[dict[str, Any]]:
    """Evaluates the backbone of a run that has ended, beside the one it started from, and adds to the run's results.

    Prints them too.

    Args:
        run_dir: the run's folder.
        overrides: ``key=value`` for the keys in ``MAY_CHANGE``.
        trust: whether the record may name code to import and paths to read (see `ssl_bench.recipe.trust`).

    Returns:
        the evaluations, as `ssl_bench.training.evaluation` gives them.

    Raises:
        ValueError, OSError: no such run, no backbone in it, a key that would change what the run was, or code or a path
            that the record names.
    """
    from ssl_bench.training import build as training

    record = read_run(run_dir)
    weights = record.folder / BACKBONE
    if not weights.exists():
        raise RecordError(f"{run_dir} must hold {BACKBONE} to be evaluated, got a run that is {record.status}")
    if any(word.startswith("eval.data=") for word in overrides):  # what the record says of another set's place is void
        overrides = [*(f"eval.data_{key}=null" for key in ("path", "size", "content")), *overrides]
    unused = ("method", "optimizer", "schedule", "tracker")
    recipe = recorded(record, overrides, MAY_CHANGE, without=unused, trust=trust)
    recipe = with_content(recipe)
    where = training.processes(recipe)
    evaluation = training.evaluation(recipe, training.dataset(recipe, where), where)
    trained = training.trained_backbone(recipe, weights).to(where.device)
    untrained = (lambda: training.backbone(recipe)[0]) if recipe.eval.baseline else None
    results = evaluation.trained_and_untrained(evaluation.of_backbone, trained, untrained)
    if where.main:
        # Printed first: a folder that may only be read costs nobody the measurement.
        print("\n".join(summary({"status": "finished", "evaluations": results})), flush=True)
        add_evaluations(run_dir, results)
    return results


def recorded(
    record: RunRecord, overrides: Sequence[str], allowed: Sequence[str], *, without: Sequence[str], trust: bool
) -> Recipe:
    """The recipe of a record, with some keys set anew, to go on with the run or to measure what it left.

    Args:
        record: of a run that somebody else may have made.
        overrides: ``key=value``.
        allowed: the keys that may be set.
        without: the plug-ins that are not needed, and so not imported, and other top-level keys.
        trust: see `evaluate_run`.

    Raises:
        ValueError: one line; see `evaluate_run`.
    """
    source = str(record.folder / RUN)
    plain = override(record.recipe, overrides, allowed)
    plain = {key: value for key, value in plain.items() if key not in (*without, "run_dir")}
    if not trust:
        given = [key for key, _, _ in (text.partition("=") for text in overrides)]
        if "data.cache_dir" not in given and isinstance(plain.get("data"), dict):
            plain["data"] = {**plain["data"], "cache_dir": None}  # of no use elsewhere
        refuse_untrusted(source, flatten(plain), given)
    try:
        return build(record.recipe["track"], plain)
    except (TypeError, AttributeError, KeyError) as error:
        raise RecordError(f"{source}: damaged: the recipe cannot be read ({one_line(error)})") from error


def evaluate_backbone(overrides: Sequence[str], output: str) -> list[dict[str, Any]]:
    """Evaluates a backbone that no run has trained, and leaves a record: recipe, versions and results in one JSON file.

    With weights (``model.checkpoint``, ``model.pretrained``) they are the "trained" model, beside the same network with
    random ones if ``eval.baseline``; without, the network is "untrained".

    Args:
        overrides: ``key=value`` and ``group=choice`` of the sections in ``COUNTS``.
        output: the folder for the file.

    Returns:
        the evaluations.

    Raises:
        ValueError, OSError: in one line; a key that does not count here, or as `compose` and `build.backbone`.
    """
    for override_ in overrides:
        name = override_.partition("=")[0]
        if not any(name == key or name.startswith(f"{key}.") for key in COUNTS):
            raise ValueError(f"{name} has no effect on an evaluation (what has: {', '.join(COUNTS)})")
    recipe = compose("pretrain", overrides)
    if not recipe.eval.protocols:
        raise ValueError("eval.protocols must name at least one evaluator, got none")

    from ssl_bench.training import build as training

    recipe = with_content(recipe)
    where = training.processes(recipe)
    training.check_images(recipe, recipe.data.size)
    backbone, _ = training.backbone(recipe)
    evaluation = training.evaluation(recipe, training.dataset(recipe, where), where)
    has_weights = bool(recipe.model.checkpoint or recipe.model.pretrained)
    fresh = (lambda: training.backbone(recipe, fresh=True)[0]) if has_weights and recipe.eval.baseline else None
    results = evaluation.trained_and_untrained(evaluation.of_backbone, backbone.to(where.device), fresh)
    if not has_weights:
        results = [{**result, "model": "untrained"} for result in results]
    if where.main:
        path = _write(recipe, where, results, Path(output))
        print("\n".join([*summary({"status": "finished", "evaluations": results}), f"  {path}"]))
    return results


def _write(recipe: Recipe, where: "Processes", results: list[dict[str, Any]], folder: Path) -> Path:
    """The record of an evaluation: one file, whose name tells it from those of other backbones and data."""
    from ssl_bench.records.provenance import collect_provenance

    sections = {name.partition(".")[0] for name in COUNTS}
    plain = {key: value for key, value in recipe.to_dict().items() if key in sections}
    plain["augment"] = {"stats": recipe.augment.stats}
    identity = hashlib.sha256(json.dumps(relevant(plain), sort_keys=True).encode()).hexdigest()[:16]
    about = collect_provenance(
        track="evaluate",
        seeds={"run": recipe.seed, "probes": recipe.eval.seed},
        world_size=where.world_size,
        param_groups=[],
        device=where.device,
    )
    data, model = (name.split(":")[-1] for name in (recipe.data.name, recipe.model.name))
    path = folder / f"{data}-{model}-{identity}.json".lower()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_json(path, {"identity": identity, "recipe": plain, **about, "evaluations": results})
    return path
