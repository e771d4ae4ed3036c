"""A small study of synthetic runs that several test files read, written once."""

from pathlib import Path

import pytest
from synthetic_runs import write_run

from ssl_bench.records.reader import find_runs
from ssl_bench.report.aggregate import Collection, gather

# Top-1 by (optimizer, learning rate) of the classification cells; three seeds add -0.5, 0 and 0.5.
CLASSIFICATION = {
    ("lars", 1.0): 74.0,
    ("lars", 2.0): 77.0,
    ("lars", 3.0): 80.0,
    ("lamb", 1.0): 58.0,
    ("lamb", 2.0): 65.0,
    ("lamb", 3.0): None,  # diverges
    ("tvlars", 1.0): 78.0,
    ("tvlars", 2.0): 77.4,
    ("tvlars", 3.0): 79.0,
}


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: a corner of Table 1, a Barlow Twins setting, and what must be skipped."""
    folder = tmp_path_factory.mktemp("study")
    for (optimizer, lr), top1 in CLASSIFICATION.items():
        for seed in range(3):
            write_run(
                folder / "clf" / f"{optimizer}-{lr:g}-{seed}",
                optimizer=optimizer,
                lr=lr,
                seed=seed,
                top1=(top1 or 0.0) + 0.5 * (seed - 1),
                status="finished" if top1 else "diverged",
                steps=30,
                telemetry=seed == 0 and optimizer != "lamb",
            )
    for optimizer, probes in (("lars", ((50.0, 52.0), (55.0, 56.0))), ("tvlars", ((70.0, 70.5), (68.0, 69.0)))):
        for seed, accuracies in enumerate(probes):
            name = folder / "bt" / f"{optimizer}-{seed}"
            write_run(
                name, track="pretrain", optimizer=optimizer, seed=seed, probe_top1=accuracies, steps=30, telemetry=False
            )
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.txt").write_text("no run")
    write_run(folder / "torn", lr=9.0, steps=30, telemetry=False)
    (folder / "torn" / "results.json").write_text("{")
    return folder


@pytest.fixture(scope="session")
def collection(study: Path) -> Collection:
    """The study's cells."""
    return gather(*find_runs(study))
