"""The benchmarks of whole steps run, at sizes that measure nothing, so that they cannot rot; no time is asserted."""

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark by its file's name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def imported(name: str) -> ModuleType:
        module = importlib.import_module(name)
        assert Path(module.__file__).parent == BENCHMARKS
        return module

    return imported


def test_every_contestant_runs_and_is_recorded(load, tmp_path, capsys):
    pytest.importorskip("lightly")
    rows = load("throughput").main(["--quick", "--json", str(tmp_path / "new" / "out.json")])
    assert len(rows) == 12
    assert {row["track"] for row in rows} == {"pretrain", "classify"}
    assert all(row["images_per_second"] > 0 for row in rows)
    assert [row["time_over_bare"] for row in rows if row["what"] == "bare compute, bf16"] == [1.0, 1.0]
    record = json.loads((tmp_path / "new" / "out.json").read_text())
    assert record["rows"] == rows
    assert record["packages"]["torch"]
    assert "lightly end to end" in capsys.readouterr().out


def test_a_sweep_times_bare_and_ours_at_each_size(load):
    rows = load("throughput").main(
        ["--quick", "--sweep", "projector", "--values", "8", "24", "--batch", "4", "--tracks", "pretrain", "classify"]
    )
    assert [(row["projector"], row["what"].split(",")[0]) for row in rows] == [
        (8, "bare compute"), (8, "ssl_bench end to end"), (24, "bare compute"), (24, "ssl_bench end to end"),
    ]  # fmt: skip


def test_a_sweep_over_methods_times_each_beside_its_own_passes(load):
    words = ["--quick", "--sweep", "method", "--values", "byol", "swav", "--batch", "8"]
    rows = load("throughput").main(words)
    assert [(row["method"], row["track"]) for row in rows] == [
        (m, "pretrain") for m in ("byol", "byol", "swav", "swav")
    ]


def test_the_swept_size_is_the_one_that_is_built(load, monkeypatch):
    throughput = load("throughput")
    built = []

    def contestants(_track, sizes, *, peers):
        built.append((sizes.batch, sizes.pixels, sizes.projector, sizes.steps, peers))
        return {"a": lambda _steps: None, "b": lambda _steps: None}

    monkeypatch.setattr(throughput, "contestants", contestants)
    sizes = throughput.Sizes(batch=512, steps=4, turns=1)
    for name, values in (("batch", (1024, 4096)), ("pixels", (96,)), ("projector", (1024,))):
        list(throughput.sweep("pretrain", sizes, name, values))
    paper = (2048, 2048, 4096)
    assert built == [
        (1024, 32, paper, 2, False), (4096, 32, paper, 1, False), (512, 96, paper, 4, False),
        (512, 32, (1024, 1024, 1024), 4, False),
    ]  # fmt: skip
    assert list(throughput.sweep("classify", sizes, "projector", (1024,))) == []


def test_the_bare_step_trains_and_ours_sees_new_views(load):
    throughput = load("throughput")
    for track in ("pretrain", "classify"):
        trainer = throughput.build_trainer(track, throughput.QUICK)
        before = [p.detach().clone() for p in trainer.module.parameters()]
        throughput.bare(trainer)(1)
        after = [p.detach().clone() for p in trainer.module.parameters()]
        assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        throughput.end_to_end(trainer)(2)
        throughput.end_to_end(trainer)(1)
        assert trainer.step == 3


def test_the_profile_books_every_part(load, tmp_path, capsys):
    results = load("profile_step").main(["--quick", "--json", str(tmp_path / "new" / "out.json")])
    for result in results:
        shares = {name: row["share"] for name, row in result["parts"].items()}
        assert sum(shares.values()) == pytest.approx(1)
        # A classifier's loss is part of its forward.
        booked = set(shares) - ({"loss"} if result["track"] == "classify" else set())
        assert all(shares[name] > 0 for name in booked)
        assert len(result["operations"]) == 12
    assert json.loads((tmp_path / "new" / "out.json").read_text())["results"] == results
    assert "augmentation" in capsys.readouterr().out


@pytest.fixture
def run_part(load, tmp_path):
    """Runs a line of Python as a part of the GPU benchmark and returns its entry."""
    gpu = load("gpu")

    def run(code: str, *, budget: float = 60, left: float = 60, result=lambda: "read"):
        part = gpu.Part(budget, [sys.executable, "-c", code], result)
        return gpu.run_part(part, left, tmp_path / "log", lambda text: text.replace(sys.executable, "python"))

    return run


def test_a_part_that_ends_leaves_its_result(run_part):
    entry = run_part("print('done')")
    assert (entry["status"], entry["result"], entry["command"]) == ("done", "read", "python -c print('done')")
    assert "log" not in entry


def test_a_part_that_fails_says_why_and_keeps_what_it_had(run_part):
    entry = run_part("raise SystemExit('no kernel for this card')")
    assert entry["status"] == "failed with exit code 1"
    assert "no kernel for this card" in entry["log"]
    assert entry["result"] == "read"


def test_a_part_that_hangs_is_killed_with_its_children(run_part, tmp_path):
    child = tmp_path / "child"
    code = f"import os, time; pid = os.fork(); pid and open({str(child)!r}, 'w').write(str(pid)); time.sleep(60)"
    entry = run_part(code, budget=3, result=lambda: {}["nothing yet"])
    assert entry["status"] == "out of time"
    assert entry["result"] == "KeyError: 'nothing yet'"
    for _ in range(100):
        if not running(child.read_text()):
            break
        time.sleep(0.1)
    assert not running(child.read_text())


def running(pid: str) -> bool:
    """Whether a process exists and is no zombie that waits for its new parent to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_without_time_is_skipped(run_part, tmp_path):
    entry = run_part(f"open({str(tmp_path / 'ran')!r}, 'w')", left=1)
    assert entry["status"] == "skipped: no time left"
    assert not (tmp_path / "ran").exists()


def test_rounding_is_told_from_a_fault(load, tmp_path):
    rows = load("rounding").main(["--quick", "--json", str(tmp_path / "out.json")])
    changes = {(row["activation"], row["dtype"]): row["relative_change"] for row in rows}
    assert set(changes) == {(a, d) for a in ("relu", "softplus") for d in ("float32", "float64")}
    for activation in ("relu", "softplus"):
        assert 0 < changes[activation, "float64"] < 1e-10 < changes[activation, "float32"] < 0.1
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows


def test_the_gpu_benchmark_runs_whole_on_the_cpu(load, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lightly")  # without it, and without the other, the optimizers' part says so and fails
    pytest.importorskip("pytorch_optimizer")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    load("gpu").main(["--tiny", "--json", str(tmp_path / "out.json")])
    record = json.loads((tmp_path / "out.json").read_text())
    assert {name: part["status"] for name, part in record["parts"].items()} == dict.fromkeys(
        ("classify", "pretrain", "throughput", "ablation", "memory", "views", "optimizers"), "done"
    )
    results = {name: part["result"] for name, part in record["parts"].items()}
    assert results["classify"]["steps"] == results["pretrain"]["steps"] == 2
    assert results["classify"]["evaluations"][0]["n_test"] == 355
    assert results["pretrain"]["status"] == "finished"
    assert len(results["throughput"]["rows"]) == 6
    assert {row["status"] for row in results["ablation"]} == {"measured"}
    assert [row["what"] for row in results["ablation"]] == 2 * [
        "bare", "end to end, plain steps", "bare, compiled", "end to end, plain steps, compile=true",
    ]  # fmt: skip
    # 8 pairs of 32 x 32 images through ResNet-18's 37 MMAC, forward and twice that backward (less the first layer's).
    assert results["ablation"][0]["gflop_per_step"] == pytest.approx(3 * 2 * 16 * 0.0366, rel=0.05)
    assert [row["chunk"] for row in results["memory"]] == [4, None]
    assert [(row["track"], row["own_kernels"]) for row in results["views"]] == [
        (track, own) for track in ("pretrain", "classify") for own in (True, False)
    ]
    assert all(row["ms_per_step"] > 0 and row["launches_per_step"] > 0 for row in results["views"])
    assert results["optimizers"]["steps"]["ours LARS"]["ms"] > 0
    assert str(BENCHMARKS.parent) not in (tmp_path / "out.json").read_text()
    assert "memory: done" in capsys.readouterr().out


def test_every_shared_loss_is_timed_in_both_forms(load):
    rows = load("invariance").loss_times(shrink=64, turns=1)
    assert [(row["method"], row["n"], row["d"]) for row in rows] == [
        ("simclr", 16, 16), ("supcon", 32, 2), ("barlow_twins", 32, 16), ("barlow_twins", 8, 32), ("vicreg", 32, 16),
        ("vicreg", 8, 32),
    ]  # fmt: skip
    assert all(row["shared_over_whole"] > 0 for row in rows)


def test_the_loader_is_timed_beside_torchvisions(load, tmp_path):
    loading = load("loading")
    loading.main(["--quick", "--json", str(tmp_path / "new" / "out.json")])
    record = json.loads((tmp_path / "new" / "out.json").read_text())
    found = {(row["case"], row["what"]) for row in record["rows"]}
    ours = {("decode", "ssl_bench, folder"), ("decode", "ssl_bench, shards"), ("epoch", "ssl_bench, rows alone")}
    assert found >= ours | {("decode", "torchvision"), ("epoch", "torchvision"), ("decoders", "Pillow")}
    assert all(row["images_per_second"] > 0 and len(row["seconds"]) == 1 for row in record["rows"])
    assert record["images"]["count"] == 8
    assert record["verdict"].startswith("PyTurboJPEG: ")


@pytest.mark.parametrize(("ratios", "words"), [((1.2, 1.1), "worth a dependency"), ((1.2, 1.09), "not used")])
def test_another_decoder_must_be_a_tenth_faster_on_any_number_of_threads(load, ratios, words):
    rows = [{"what": "PyTurboJPEG", "threads": n, "times_torchvision": ratio} for n, ratio in enumerate(ratios, 1)]
    assert words in load("loading").verdict(rows)
