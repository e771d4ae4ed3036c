"""Running out of memory is one line with what to do."""

from types import SimpleNamespace

import pytest
import torch
from commands import TINY_PRETRAIN
from tiny_net import TinyNet, TinyTwins

from ssl_bench import pretrain
from ssl_bench.eval.knn import KNN
from ssl_bench.training.loop import Trainer
from ssl_bench.training.memory import out_of_memory
from ssl_bench.training.memory.out_of_memory import _two_peaks, advice, largest_chunk, largest_divisor
from ssl_bench.training.memory.recompute import recompute_blocks, recomputed


def test_the_largest_chunk_is_read_off_a_line_through_two_peaks():
    # 1000 bytes whatever the size, and 10 bytes an image: (0.9 * 50,000 - 1000) / 10 = 4,400 images.
    assert largest_chunk((32, 64), (1320, 1640), 50_000, batch=16_384) == 4096
    assert largest_chunk((32, 64), (1320, 1640), 50_000, batch=3 * 1100) == 3300
    assert largest_chunk((32, 64), (1320, 1640), 1_000, batch=16_384) is None
    assert largest_divisor(96, 50, 4) == 48
    assert largest_divisor(96, 7, 4) is None  # one image for each process has no variance


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_it_is_one_line_and_the_run_can_go_on(tmp_path, monkeypatch, capsys, where):
    monkeypatch.chdir(tmp_path)
    words = [*TINY_PRETRAIN, "steps=6", "checkpoint.every_steps=2", "run_dir=r", "resume=auto"]

    def exhausted(*_arguments, **_more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    with monkeypatch.context() as patch:
        if where == "evaluation":
            patch.setattr(KNN, "__call__", exhausted)
        else:
            line = Trainer._begin_line
            patch.setattr(
                Trainer, "_begin_line", lambda self, rate: exhausted() if self.step == 5 else line(self, rate)
            )
        assert pretrain.main(words) == 2
    errors = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    if where == "evaluation":
        assert errors == ["error: eval.batch_size must be smaller for this memory, got 1000: CUDA out of memory"]
    else:
        assert errors == [
            "error: recompute must be blocks, or chunk_size smaller, for this memory, got none and 96 images: try "
            "recompute=blocks (the same result) or chunk_size=48 (half of what did not fit); resume=auto continues "
            "from the last checkpoint (CUDA out of memory)"
        ]
    assert pretrain.main(words) == 0
    assert f"continuing r from step {6 if where == 'evaluation' else 4}" in capsys.readouterr().err


def test_nothing_smaller_is_said_too():
    trainer = SimpleNamespace(
        pipeline=SimpleNamespace(batch_size=6, n_chunks=3), accelerator=SimpleNamespace(num_processes=1),
        device=torch.device("cpu"), module=TinyTwins(TinyNet(), 32, projector=(8, 8)),
    )  # fmt: skip
    way = "recompute=blocks (the same result); resume=auto continues from the last checkpoint (no)"
    assert advice(MemoryError("no"), trainer).endswith(f"got none and 2 images: try {way}")
    recompute_blocks(trainer.module)
    assert (
        advice(MemoryError("no"), trainer)
        == "chunk_size=2 does not fit into this memory, nor is there a smaller one: no"
    )


@pytest.mark.parametrize(
    ("free", "ways"),
    [  # a plain step needs 1000 bytes an image, one with blocks computed twice 100; 0.9 of what is free counts
        (12_000, "recompute=blocks (the same result, by the measured peak of smaller ones it fits) or chunk_size=8 ("),
        (6_000, "recompute=blocks chunk_size=48 (by the measured peak of smaller ones) or chunk_size=4 ("),
    ],
)
def test_both_ways_are_measured(monkeypatch, free, ways):
    trainer = SimpleNamespace(
        pipeline=SimpleNamespace(batch_size=96, n_chunks=1), accelerator=SimpleNamespace(num_processes=1),
        device=torch.device("cuda"), module=TinyTwins(TinyNet(), 32, projector=(8, 8)),
    )  # fmt: skip

    def peaks(trainer, _tried):
        image = 100 if recomputed(trainer.module) else 1000
        return (2, 4), (2 * image, 4 * image), free

    monkeypatch.setattr(out_of_memory, "_two_peaks", peaks)
    assert f"got none and 96 images: try {ways}by the measured peak" in advice(MemoryError("no"), trainer)


def test_the_measured_steps_are_computed_as_the_runs_are(tmp_path, monkeypatch):
    """In the run's precision: a float32 step needs about twice the memory of the bf16 one that is to fit."""
    monkeypatch.chdir(tmp_path)
    seen, forward, line = [], TinyTwins.forward, Trainer._begin_line

    def watched(self, *views):
        seen.append((len(views[0]), torch.is_autocast_enabled("cpu")))
        return forward(self, *views)

    def measured(self, rate):
        with monkeypatch.context() as patch:
            for name in ("empty_cache", "memory_allocated", "memory_reserved", "max_memory_allocated"):
                patch.setattr(torch.cuda, name, lambda *_: 0)
            patch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
            patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
            assert _two_peaks(self, 96) == ((3, 6), (0, 0), 0)
        return line(self, rate)

    monkeypatch.setattr(TinyTwins, "forward", watched)
    monkeypatch.setattr(Trainer, "_begin_line", measured)
    assert pretrain.main([*TINY_PRETRAIN, "steps=1", "run_dir=r", "eval=none", "precision=bf16"]) == 0
    assert seen[:3] == [(96, True), (3, True), (6, True)]
