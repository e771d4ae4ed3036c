"""``ssl-bench estimate``: time and memory from steps that are measured by the command."""

import re
import sys

import pytest
from commands import TINY_PRETRAIN, run
from typer.testing import CliRunner

from ssl_bench import cli
from ssl_bench.cli import estimate
from ssl_bench.study.estimate import Speed


def test_a_recipe_is_measured_in_a_process_of_its_own(tmp_path):
    words = [sys.executable, "-m", "ssl_bench", "estimate", "pretrain", *TINY_PRETRAIN, "epochs=20", "batch_size=64"]
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert found["steps"] == "451 of 64 images (20.02 epochs)"  # of 1442 digits
    speed = re.fullmatch(r"(\d+) images/s on the CPU, measured with 64 images a step", found["speed"])
    assert speed, found
    assert int(speed[1]) > 0
    assert re.match(r"[\d.]+ (s|min|h) of training on one process", found["time"])
    memory = re.match(
        r"([\d.]+) GiB of [\d.]+ GiB that are free \(measured with 64 images at a time\)", found["memory"]
    )
    assert memory, found
    assert 0.1 < float(memory[1]) < 4
    assert not list(tmp_path.iterdir())


def test_a_large_batch_is_extrapolated_and_a_smaller_chunk_named(monkeypatch, capsys):
    sizes = []

    def measured(_track, _words, _recipe, size):
        sizes.append(size)
        return Speed(1000.0, 50_000.0, peak=(1 << 30) + size * (10 << 20), device="the CPU")

    monkeypatch.setattr(estimate, "measured", measured)
    monkeypatch.setattr(estimate, "available_memory", lambda: 8 << 30)
    assert estimate.main("pretrain", ["batch_size=4096", "epochs=10"]) == 1
    assert sizes == [128, 256, 128, 256]  # and with recompute=blocks
    text = capsys.readouterr().out
    assert "time    8 min of training" in text  # 500,000 images at 1000 a second
    assert "memory  41.00 GiB of 8.00 GiB that are free (4096 images at a time, by a line through 128 and 256)" in text
    assert "chunk_size=512 would fit" in text  # 1 GiB + 512 * 10 MiB = 6 of 7.2 GiB, and 1024 are 11
    assert estimate.main("pretrain", ["batch_size=4096", "epochs=10", "chunk_size=512"]) == 0


def test_blocks_that_are_computed_again_are_named_before_a_chunk(monkeypatch, capsys):
    def measured(_track, words, _recipe, size):
        image = (1 if words.get("recompute") == "blocks" else 10) << 20
        return Speed(1000.0, 50_000.0, peak=(1 << 30) + size * image, device="the CPU")

    monkeypatch.setattr(estimate, "measured", measured)
    monkeypatch.setattr(estimate, "available_memory", lambda: 8 << 30)
    assert estimate.main("pretrain", ["batch_size=4096", "epochs=10"]) == 1
    text = capsys.readouterr().out
    assert "-> recompute=blocks would fit: 5.00 GiB, the same result" in text
    assert "chunk_size" not in text
    assert estimate.main("pretrain", ["batch_size=16384", "epochs=10"]) == 1  # 17 GiB even so
    assert "-> chunk_size=512 would fit" in capsys.readouterr().out


def test_a_mistake_is_one_line(monkeypatch):
    for words, line in (
        (["train"], "error: estimate: TRACK must be pretrain or classify, got 'train'\n"),
        (["pretrain", "batch_size=0"], "error: batch_size must be greater than 0, got 0\n"),
    ):
        done = CliRunner().invoke(cli.app, ["estimate", *words])
        assert (done.exit_code, done.stderr) == (2, line)
    monkeypatch.setattr(estimate, "measured", lambda *_: "no memory")
    with pytest.raises(ValueError, match="5 steps of 128 images must run to be measured: no memory"):
        estimate.main("pretrain", ["batch_size=512"])
