"""Micro-batch gradients as a run gives them to CLARS: fresh ones in classification, the chunks in pretraining."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from commands import TINY, TINY_PRETRAIN
from small_classifier import SmallClassifier, small_batches
from torch import nn

from ssl_bench import classify, pretrain
from ssl_bench.recipe.compose import compose
from ssl_bench.training import build
from ssl_bench.training.micro_gradients import MicroBatches
from ssl_bench.training.processes import Processes


@pytest.mark.parametrize("options", [{"micro_batch": 8, "micro_batches": 4}, {}])
def test_the_mean_over_micro_batches_and_nothing_else_changes(options):
    task = SmallClassifier()
    run = small_batches(seed=3, batch_size=32, chunk_size=16)
    micro = MicroBatches.of(options, task, run, Processes(Accelerator(cpu=True)))
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    weight = task.net[4].weight
    seen = []

    def read():
        seen.append(weight.grad.norm())
        return seen[-1]

    found = micro(5, read)
    expected, images = [], []
    for batch in micro.batches.batches(5, 6):
        for chunk in range(len(seen)):
            x, y = batch.views(chunk)
            images.append(x)
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(task.net(x), y), weight)
            expected.append(gradient.norm())
    assert [len(x) for x in images] == ([8] * 4 if options else [16] * 2)
    task.load_state_dict(before)
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected))
    torch.testing.assert_close(found, torch.stack(expected).mean())
    assert weight.grad is None
    again, other = micro(5, read), micro(6, read)
    assert again == found  # a function of the step
    assert other != found
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
    theirs = next(iter(run.batches(5, 6))).views(0)[0]
    assert torch.equal(theirs, images[0]) == (not options)  # fresh images, or the run's own chunks


def test_a_run_with_clars_trains_and_one_with_chunks_pretrains(tmp_path):
    words = (*TINY, "optimizer=clars", "optimizer.micro_batches=4", "optimizer.lr=1", f"run_dir={tmp_path / 'clf'}")
    assert classify.main([*words, "steps=3", "schedule=tiny_net:constant_schedule", "param_groups.lr_1d=0.1"]) == 0
    words = (*TINY_PRETRAIN, "optimizer=clars_chunks", "chunk_size=32", f"run_dir={tmp_path / 'bt'}", "eval=none")
    assert pretrain.main([*words, "steps=2"]) == 0
    for name in ("clf", "bt"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines]
        assert all(map(math.isfinite, losses))
        assert len(set(losses)) == len(losses) == (3 if name == "clf" else 2)
    assert json.loads((tmp_path / "bt" / "run.json").read_text())["recipe"]["optimizer"]["target"] == "clars_chunks"


def test_several_processes_are_refused_before_data_is_read(tmp_path, monkeypatch):
    where = Processes(Accelerator(cpu=True))
    where.world_size = 2
    monkeypatch.setattr(build, "processes", lambda _: where)
    recipe = compose("classify", ["optimizer=clars", f"run_dir={tmp_path}"])
    with pytest.raises(ValueError, match=r"optimizer=clars must run on one process, .*, got 2"):
        build.session(recipe)


@pytest.mark.parametrize(
    ("track", "words", "message"),
    [
        ("pretrain", ["optimizer=clars"], "optimizer must be clars_chunks in pretraining, got clars"),
        ("pretrain", ["optimizer=clars_chunks"], "chunk_size must be below batch_size with .*clars_chunks, .*got None"),
        ("classify", ["optimizer=clars", "precision=fp16"], "precision must be fp32 or bf16 with optimizer=clars"),
    ],
)
def test_what_it_cannot_have_is_refused_in_one_line(track, words, message):
    with pytest.raises(ValueError, match=message):
        compose(track, words)
