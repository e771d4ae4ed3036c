"""Evaluators on a saved run: ``ssl-bench evaluate RUN eval.protocols=[linear-aug-v1]``."""

from collections.abc import Sequence
from pathlib import Path

from ssl_bench.recipe.compose import build, override
from ssl_bench.records.writer import RecordError, add_evaluations, read_run
from ssl_bench.runtime.seeds import INIT, derive_seed

# Where the images lie and what is measured of them; not which images, which network, or how it was trained.
MAY_CHANGE = ("eval", "data.path", "data.cache_dir", "data.resident", "data.workers", "device")


def main(run_dir: str, words: Sequence[str] = ()) -> int:
    """Evaluates the backbone of a run that has ended, beside the one it started from, and adds to the run's results.

    Args:
        run_dir: the run's folder.
        words: ``key=value`` for the keys in ``MAY_CHANGE``.

    Raises:
        ValueError, OSError: no such run, no backbone in it, or a key that would change what the run was.
    """
    from ssl_bench.models.backbone import create_backbone, load_backbone
    from ssl_bench.training.evaluation import evaluate_backbone
    from ssl_bench.training.session import summary
    from ssl_bench.training.workplace import Workplace

    record = read_run(run_dir)
    weights = Path(run_dir) / "backbone.safetensors"
    if not weights.exists():
        raise RecordError(f"{run_dir}: no backbone.safetensors to evaluate (the run is {record.status})")
    recipe = build(record.recipe["track"], override(record.recipe, words, MAY_CHANGE))
    session = Workplace(recipe)
    dataset = session.dataset()
    models = {"trained": load_backbone(weights)[0]}
    if recipe.eval.baseline:
        seed = derive_seed(recipe.seed, INIT)
        name, stem, init = recipe.model.name, recipe.model.stem, recipe.model.init
        models["untrained"] = create_backbone(name, stem=stem, init=init, seed=seed)[0]
    results = [
        {"model": which, **result}
        for which, model in models.items()
        for result in evaluate_backbone(session, dataset, model.to(session.device))
    ]
    if session.main:
        add_evaluations(run_dir, results)
        print("\n".join(summary({"status": "finished", "evaluations": results})))
    return 0
