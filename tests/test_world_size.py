"""The same recipe on 1, 2 and 4 processes is the same experiment, from the real commands' records."""

import math

import pyarrow.parquet as pq
import pytest
from commands import TINY_CLASSIFY, TINY_PRETRAIN, metrics, results, run, script

TRACKS = {"pretrain": TINY_PRETRAIN, "classify": TINY_CLASSIFY}


@pytest.fixture(scope="module", params=TRACKS)
def runs(request, tmp_path_factory):
    """The same 20 steps on 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp(request.param)
    for world_size in (1, 2, 4):
        words = (*TRACKS[request.param], "steps=20", f"run_dir=w{world_size}", "check_every_epochs=0.25")
        done = run(script(request.param, words, world_size), folder)
        assert done.returncode == 0, done.stderr
    return [folder / f"w{world_size}" for world_size in (1, 2, 4)]


def test_losses_agree_at_every_step(runs):
    alone = metrics(runs[0])
    assert len(alone) == 20
    assert abs(alone[-1]["loss"] - alone[0]["loss"]) > 0.01 * alone[0]["loss"]  # it did train
    for folder in runs[1:]:
        for one, many in zip(alone, metrics(folder), strict=True):
            assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert (many["step"], many["samples"], many["lr"]) == (one["step"], one["samples"], one["lr"])


def test_every_layers_norms_agree_at_every_step(runs):
    tables = [pq.read_table(folder / "telemetry.parquet").to_pylist() for folder in runs]
    assert {row["layer"] for row in tables[0]} >= {"backbone.0.weight", "backbone.1.bias"}  # 1-d parameters included
    for table in tables[1:]:
        for one, many in zip(tables[0], table, strict=True):
            assert (one["step"], one["layer"]) == (many["step"], many["layer"])
            assert many["weight_norm"] == pytest.approx(one["weight_norm"], rel=1e-4, abs=1e-6)
            # The projector's ReLUs amplify rounding, and a bias in front of a batch norm has no gradient but that.
            assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2, abs=1e-3)


def test_evaluation_counts_every_test_image_once_with_the_same_result(runs):
    for folder in runs:
        (entry,) = results(folder)["evaluations"]
        assert entry["n_test"] == 355
        # One image more or less may fall on the other side of a tie broken by rounding.
        expected = results(runs[0])["evaluations"][0]["metrics"]["top1"]
        assert math.isclose(entry["metrics"]["top1"], expected, abs_tol=100.1 / 355)
