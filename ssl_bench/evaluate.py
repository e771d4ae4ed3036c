"""Evaluators on a saved run: ``ssl-bench evaluate RUN eval.protocols=[linear-aug-v1]``."""

from collections.abc import Sequence
from pathlib import Path

from ssl_bench.compose import build, override
from ssl_bench.record import RecordError, add_evaluations, read_run

# Where the images lie and what is measured of them; not which images, which network, or how it was trained.
MAY_CHANGE = ("eval", "data.path", "data.cache_dir", "data.resident", "data.workers", "device")


def main(run_dir: str, words: Sequence[str] = ()) -> int:
    """Evaluates the backbone of a run that has ended, adds the results to its record and prints them.

    Args:
        run_dir: the run's folder.
        words: ``key=value`` for the keys in ``MAY_CHANGE``.

    Raises:
        ValueError, OSError: no such run, no backbone in it, or a key that would change what the run was.
    """
    from ssl_bench.backbone import load_backbone
    from ssl_bench.probes import evaluate_backbone
    from ssl_bench.session import Workplace, summary

    record = read_run(run_dir)
    weights = Path(run_dir) / "backbone.safetensors"
    if not weights.exists():
        raise RecordError(f"{run_dir}: no backbone.safetensors to evaluate (the run is {record.status})")
    recipe = build(record.recipe["track"], override(record.recipe, words, MAY_CHANGE))
    session = Workplace(recipe)
    dataset = session.dataset()
    backbone = load_backbone(weights)[0].to(session.device)
    results = [{"model": "trained", **result} for result in evaluate_backbone(session, dataset, backbone)]
    if session.main:
        add_evaluations(run_dir, results)
        print("\n".join(summary({"status": "finished", "evaluations": results})))
    return 0
