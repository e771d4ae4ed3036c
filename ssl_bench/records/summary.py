"""A run's results as lines of text, for the terminal."""

from collections.abc import Mapping
from typing import Any


def summary(results: Mapping[str, Any]) -> list[str]:
    """The results as lines of text."""
    if results["status"] == "diverged":
        where = f" (first in {results['layer']})" if results["layer"] else ""
        return [f"  loss or gradient not finite from step {results['step']} on{where}; not evaluated"]
    entries = results.get("evaluations", [])
    width = max([18, *(len(entry["protocol"]) for entry in entries)])
    return [
        f"  {entry['protocol']:<{width}} {entry['model']:<10} {score(entry)} of {images_looked_at(entry)}"
        for entry in entries
    ]


def score(evaluation: Mapping[str, Any]) -> str:
    """The score of an evaluation's entry in words: its accuracy, or all its metrics where it has none."""
    metrics = evaluation["metrics"]
    if "top1" in metrics:
        return f"top-1 {metrics['top1']:.2f}%"
    return ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key not in ("n_test", "n_images"))


def images_looked_at(evaluation: Mapping[str, Any]) -> int:
    """Over how many images that score is: of the test set, or of the train set where no test image was looked at."""
    return evaluation["metrics"].get("n_images", evaluation.get("n_test"))
