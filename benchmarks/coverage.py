"""How often a nominal 95% interval of a mean over n seeds holds the true mean: Student's against the BCa bootstrap's.

    python benchmarks/coverage.py [--quick]

Writes ``benchmarks/results/coverage.json``. Populations: normal; lognormal (skewed); Student with 3 degrees of freedom
(outliers); and a tenth of the seeds lost (normal, but these lie 40 deviations lower, as a run at chance does). The
bootstrap is scipy's.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.stats

from ssl_bench.report.inference import CONFIDENCE, t_interval

SIZES = (2, 3, 5, 8, 10, 15, 20, 30)
LOST = 40.0  # deviations between a seed that trains and one that does not
SEED = 0

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
# (draws of a shape, true mean)
POPULATIONS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.standard_normal(shape), 0.0),
    "lognormal": (lambda rng, shape: rng.lognormal(0.0, 0.75, shape), float(np.exp(0.75**2 / 2))),
    "student, 3 degrees": (lambda rng, shape: rng.standard_t(3, shape), 0.0),
    "a tenth lost": (lambda rng, shape: rng.standard_normal(shape) - LOST * (rng.random(shape) < 0.1), -0.1 * LOST),
}


def coverage(draw: Draw, mean: float, n: int, samples: int, resamples: int) -> dict[str, float]:
    """Percent of samples of n whose interval holds the mean."""
    values = draw(np.random.default_rng([SEED, n]), (samples, n))
    ends = np.array([t_interval(row) for row in values.tolist()])
    found = {"student": ((ends[:, 0] <= mean) & (mean <= ends[:, 1])).mean()}
    inside = []
    for block in np.array_split(values, max(1, samples * resamples * n // 10_000_000)):  # what fits into memory
        with np.errstate(invalid="ignore", divide="ignore"):
            both = scipy.stats.bootstrap(
                (block,), np.mean, axis=-1, n_resamples=resamples, confidence_level=CONFIDENCE, method="BCa", rng=SEED
            ).confidence_interval
        inside += ((both.low <= mean) & (mean <= both.high)).tolist()
    found["bca"] = np.mean(inside)
    return {name: round(100 * float(share), 1) for name, share in found.items()}


def measure(samples: int, resamples: int, sizes: tuple[int, ...]) -> dict[str, object]:
    """Coverage by population and n."""
    found: dict[str, object] = {
        name: {str(n): coverage(draw, mean, n, samples, resamples) for n in sizes}
        for name, (draw, mean) in POPULATIONS.items()
    }
    return {
        "nominal": 100 * CONFIDENCE,
        "samples": samples,
        "resamples": resamples,
        "seed": SEED,
        "coverage_percent": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples: does it run?")
    default = Path(__file__).parent / "results" / "coverage.json"
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()
    record = measure(20, 100, (2, 3)) if arguments.quick else measure(10_000, 1_000, SIZES)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    for name, by_size in record["coverage_percent"].items():  # type: ignore[attr-defined]
        for n, both in by_size.items():
            print(f"{name:20} n = {n:>2}  Student {both['student']:5.1f}  BCa {both['bca']:5.1f}")


if __name__ == "__main__":
    main()
