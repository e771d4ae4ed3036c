"""Evaluates a saved run: ``ssl-bench evaluate RUN eval.protocols=[linear-aug-v1]``."""

from collections.abc import Sequence
from pathlib import Path

from ssl_bench.recipe.compose import build, override
from ssl_bench.records.reader import RecordError, read_run
from ssl_bench.records.writer import add_evaluations

# Where the images are and what is measured; never which images, which network, or how it was trained.
MAY_CHANGE = ("eval", "data.path", "data.cache_dir", "data.resident", "data.workers", "device")


def main(run_dir: str, overrides: Sequence[str] = ()) -> int:
    """Evaluates the backbone of a run that has ended, beside the one it started from, and adds to the run's results.

    Args:
        run_dir: the run's folder.
        overrides: ``key=value`` for the keys in ``MAY_CHANGE``.

    Raises:
        ValueError, OSError: no such run, no backbone in it, or a key that would change what the run was.
    """
    from ssl_bench.training import build as training
    from ssl_bench.training.session import summary

    record = read_run(run_dir)
    weights = Path(run_dir) / "backbone.safetensors"
    if not weights.exists():
        raise RecordError(
            f"{run_dir} must hold backbone.safetensors to be evaluated, got a run that is {record.status}"
        )
    recipe = build(record.recipe["track"], override(record.recipe, overrides, MAY_CHANGE))
    where = training.processes(recipe)
    evaluation = training.evaluation(recipe, training.dataset(recipe, where), where)
    trained = training.trained_backbone(recipe, weights).to(where.device)
    untrained = (lambda: training.backbone(recipe)[0]) if recipe.eval.baseline else None
    results = evaluation.trained_and_untrained(evaluation.of_backbone, trained, untrained)
    if where.main:
        add_evaluations(run_dir, results)
        print("\n".join(summary({"status": "finished", "evaluations": results})))
    return 0
