"""The same recipe on 1, 2 and 4 processes is the same experiment, from the real commands' records."""

import math

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from commands import TINY_CLASSIFY, TINY_PRETRAIN, metrics, results, run, script
from torchrun import torchrun

from ssl_bench.training.evaluation import share_statistics

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


def trained(folder, name, world_size, *words):
    """The metrics and the telemetry of 9 steps in batches of 200: seven, then the short one of 42, then another."""
    tail = ("batch_size=200", "steps=9", "eval.protocols=[]", f"run_dir={name}", *words)
    done = run(script("pretrain", (*TINY_PRETRAIN, *tail), world_size), folder)
    assert done.returncode == 0, done.stderr
    return metrics(folder / name), pq.read_table(folder / name / "telemetry.parquet").to_pylist()


def test_own_batch_norm_short_batches_and_the_losss_scale_over_processes(tmp_path):
    """Two processes that normalise their own halves are one process that works in two chunks."""
    words = ("last_batch=short", "loss_scale=0.25")
    apart, apart_norms = trained(tmp_path, "apart", 2, *words, "sync_batch_norm=false")
    chunks, chunk_norms = trained(tmp_path, "chunks", 1, *words, "chunk_size=100")
    assert [row["epochs"] for row in apart] == [step / 8 for step in range(1, 10)]  # 1442 images: 7.2 batches
    for one, other in zip(apart, chunks, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert apart[0]["loss"] == pytest.approx(chunks[0]["loss"], rel=1e-5)
    # The control: one batch norm over both halves, and the whole gradient, are something else.
    together, together_norms = trained(tmp_path, "together", 2, "last_batch=short", "steps=2")
    assert abs(together[0]["loss"] / apart[0]["loss"] - 1) > 1e-4
    scaled, scaled_norms = trained(tmp_path, "scaled", 2, *words, "steps=2")
    assert scaled[0]["loss"] == together[0]["loss"]
    for quarter, whole in zip(scaled_norms, together_norms, strict=True):
        if quarter["step"] == 1:
            assert quarter["grad_norm"] == pytest.approx(whole["grad_norm"] / 4, rel=1e-6)
    for one, other in zip(apart_norms, chunk_norms, strict=True):
        assert one["weight_norm"] == pytest.approx(other["weight_norm"], rel=1e-4, abs=1e-6)


def statistics():
    """Running statistics before and after they are shared, on processes that saw different images."""
    norm = torch.nn.BatchNorm1d(2)
    norm(torch.arange(8.0).view(4, 2) * (dist.get_rank() + 1))
    before = norm.running_mean.clone()
    share_statistics(norm)
    return {"before": before, "after": norm.running_mean, "batches": norm.num_batches_tracked}


def test_processes_that_normalise_for_themselves_evaluate_the_first_ones_model(tmp_path):
    first, second = torchrun(statistics, 2, tmp_path)
    assert not torch.equal(first["before"], second["before"])
    assert torch.equal(first["after"], first["before"])
    assert torch.equal(second["after"], first["before"])


def test_a_layer_that_nothing_uses_is_named_and_left_as_it_is(tmp_path):
    """And the other parameters, some of them in its group of DistributedDataParallel, train as on one process."""
    words = (*TINY_PRETRAIN, "method=tiny_net:SpareTwins", "eval.protocols=[]", "steps=4", "chunk_size=48")
    for world_size in (1, 2):
        done = run(
            script("pretrain", (*words, f"run_dir=w{world_size}", "checkpoint.final=true"), world_size), tmp_path
        )
        assert done.returncode == 0, done.stderr
    assert done.stderr.count("not trained, as no output depends on it: spare.weight, spare.bias") == 1
    for one, many in zip(metrics(tmp_path / "w1"), metrics(tmp_path / "w2"), strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
    rows = [pq.read_table(tmp_path / f"w{world_size}/telemetry.parquet").to_pylist() for world_size in (1, 2)]
    assert [(row["step"], row["layer"]) for row in rows[0]] == [(row["step"], row["layer"]) for row in rows[1]]
    assert not any(row["layer"].startswith("spare") for row in rows[0])
    for one, many in zip(*rows, strict=True):
        assert many["weight_norm"] == pytest.approx(one["weight_norm"], rel=1e-4, abs=1e-6)


def test_a_layer_whose_output_the_loss_leaves_out_is_refused_by_name(tmp_path):
    words = (*TINY_PRETRAIN, "method=tiny_net:IdleTwins", "eval.protocols=[]", "steps=4", "run_dir=r")
    done = run(script("pretrain", words, 2), tmp_path)
    assert done.returncode != 0
    assert (
        "every parameter must take part in the loss where there are several processes, got none of idle.weight, "
        "idle.bias" in done.stderr
    )
