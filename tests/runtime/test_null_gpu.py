"""A developers' check of the code for GPUs without one: a CUDA runtime whose kernels do nothing (benchmarks/null_gpu).

It shows that the path through torch's CUDA build is legal, that no step waits for the device, and how many kernels the
host has to start. Every value is zero, so the runs end as diverged (the monitor reads "diverged in step 0", where -1
would mean in none), and nothing about results can be tested. Skipped, with the reason in pytest's summary, where the
null GPU cannot be built.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The environment of a process with a null GPU."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    build = importlib.import_module("null_gpu.build")
    sys.path.pop(0)
    if reason := build.obstacle():
        pytest.skip(f"the null GPU cannot be built: {reason}")
    try:
        environment = build.build(tmp_path_factory.mktemp("null_gpu"))
    except subprocess.CalledProcessError as error:  # headers of a release that the stand-in does not know
        pytest.skip(f"the null GPU cannot be built: {next(iter(error.stderr.decode().splitlines()), error)}")
    seen = run(environment, "-c", "import torch; print(torch.cuda.get_device_name())")
    if seen.stdout.strip() != "null GPU":
        pytest.skip(f"torch does not load the null GPU: {next(reversed(seen.stderr.strip().splitlines()), 'no error')}")
    return environment


def run(environment, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, cwd=cwd, capture_output=True, text=True, timeout=300
    )


def test_no_step_waits_and_graphs_spare_the_host_the_kernels(gpu, tmp_path):
    ended = run(gpu, ROOT / "benchmarks/host_time.py", "--quick", "--child", tmp_path / "rows.json")
    assert ended.returncode == 0, ended.stderr
    rows = {(row["track"], row["what"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert len(rows) == 10
    assert all(row["waits"] == row["refused_in_capture"] == 0 for row in rows.values())
    for track, views in (("pretrain", 2), ("classify", 1)):
        plain, graphs = rows[track, "plain steps"], rows[track, "CUDA graphs"]
        assert plain["replays"] == rows[track, "bare"]["replays"] == rows[track, "4 chunks, plain"]["replays"] == 0
        assert graphs["replays"] == views + 1.9  # the passes, and the update of nine steps of ten: telemetry has one
        assert graphs["kernels"] < 100 < rows[track, "bare"]["kernels"] < plain["kernels"]
        assert rows[track, "4 chunks, graphed views"]["replays"] >= 4 * views


TINY = ["data=digits", "batch_size=64", "steps=14", "log_every=14", "run_dir=r", "precision=bf16"]


@pytest.mark.parametrize(
    ("track", "overrides", "passes", "update"),  # what became of the graphs; "" where steps are plain by the recipe
    [
        ("pretrain", ["checkpoint.every_steps=4", "checkpoint.snapshots=[0]"], "replayed", "replayed"),
        ("pretrain", ["method=simclr", "optimizer=lamb", "deterministic=true"], "replayed", "replayed"),
        ("pretrain", ["method=vicreg", "optimizer=tvlars", "chunk_size=16"], "", ""),
        ("pretrain", ["recompute=blocks"], "", ""),
        ("pretrain", ["eval.online_every_epochs=0.1"], "no step was replayed", "no step was replayed"),  # ends at once
        (
            "classify",
            ["optimizer=tvlars", "optimizer.variant=paper", "optimizer.delay_steps=11"],
            "replayed",
            "replayed",
        ),
        ("classify", ["optimizer=sgd", "eval.test_every_epochs=0.7"], "replayed", "replayed"),
        ("classify", ["optimizer=adamw"], "replayed", "not recorded"),
        ("classify", ["averaging.kind=ema"], "replayed", "not recorded"),
        ("classify", ["precision=fp16", "optimizer=sgd"], "", ""),
        ("classify", ["cuda_graphs=false", "data.resident=false"], "", ""),
    ],
)
def test_the_commands_take_the_gpu(gpu, tmp_path, track, overrides, passes, update):
    ended = run(gpu, ROOT / f"ssl_bench/{track}.py", *TINY, *overrides, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "diverged" in ended.stderr
    assert "CUDA graph" not in ended.stderr  # nobody warns that something could not be recorded
    assert "null GPU" in (tmp_path / "r/sessions.jsonl").read_text()
    record = json.loads((tmp_path / "r/run.json").read_text())
    assert record["cuda_graphs"] is bool(passes)
    became = json.loads((tmp_path / "r/results.json").read_text()).get("cuda_graphs", {})
    assert became == ({"passes": passes, "optimizer": update} if passes else {})
    assert record["tf32"] == "the loss's matrix products"


def test_what_cannot_be_a_graph_is_refused_in_one_line(gpu, tmp_path):
    for overrides, why in (
        (["precision=fp16"], "fp16's gradient scaler waits for the device"),
        (["chunk_size=16"], "chunk_size splits the batch"),
        (["recompute=blocks"], "recompute=blocks keeps track of random numbers on the host"),
    ):
        ended = run(gpu, ROOT / "ssl_bench/pretrain.py", *TINY, "cuda_graphs=true", *overrides, cwd=tmp_path)
        assert ended.returncode == 2
        assert ended.stderr.strip() == f"error: cuda_graphs must be null or false, got true: {why}"


SYNCHRONISED = """
import ctypes, os, sys, torch, torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from ssl_bench.runtime.distributed import synchronize_batch_norm

dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())  # collectives do nothing either
norms = nn.BatchNorm2d(8), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)
model = nn.Sequential(nn.Conv2d(3, 8, 3), norms[0], nn.Flatten(), nn.Linear(288, 4), *norms[1:])
model = synchronize_batch_norm(model).cuda().to(memory_format=torch.channels_last)
x = torch.zeros(5, 3, 8, 8, device="cuda")
counts = (ctypes.c_long * 6)()
for step in range(3):
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(x).sum()
    loss.backward()
    ctypes.CDLL(None).null_gpu_counts(counts)
    print(counts[0], counts[1], [tuple(p.grad.shape) for p in model[1].parameters()], flush=True)
os._exit(0)  # an ordinary exit with a process group aborts now and then
"""


def test_synchronised_batch_norm_never_waits(gpu):
    ended = run(gpu, "-W", "ignore", "-c", SYNCHRONISED)
    assert ended.returncode == 0, ended.stderr
    first, *_, last = [line.split(" ", 2) for line in ended.stdout.splitlines()]
    assert int(last[0]) > int(first[0]) > 0
    assert last[1] == first[1]  # torch's own waits in every layer
    assert last[2] == "[(8,), (8,)]"


RECORDED_BY_EIGHT = """
import ctypes, os, torch, torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from ssl_bench.methods import METHODS
from ssl_bench.runtime.distributed import synchronize_batch_norm
from ssl_bench.training.gradient import compute_gradient
from ssl_bench.training.graphs import GraphedGradient, averaged

dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
counts = (ctypes.c_long * 6)()

def counted():
    ctypes.CDLL(None).null_gpu_counts(counts)
    return list(counts)

for name in ("barlow_twins", "vicreg", "simclr", "supcon", "simsiam"):
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    method = METHODS[name](backbone, 8, projector=(32, 16), **({"predictor": (16,)} if name == "simsiam" else {}))
    synchronize_batch_norm(method)
    method.cuda()
    views = [torch.zeros(6, 3, 8, 8, device="cuda") for _ in range(2)]
    if name == "supcon":
        views.append(torch.zeros(6, dtype=torch.int64, device="cuda"))
    gradient = GraphedGradient(averaged(compute_gradient, method), method, print)
    for step in range(6):
        before = counted()
        gradient(method, lambda _: tuple(views), 1, torch.Tensor.backward)
    kernels, waits, _, replays, _, refused = (b - a for a, b in zip(before, counted()))
    print(name, gradient.used, kernels, waits, replays, refused, flush=True)
os._exit(0)  # an ordinary exit with a process group aborts now and then
"""


def test_the_passes_of_one_of_eight_processes_can_be_recorded(gpu):
    """Synchronised batch norm, the shared and the gathered losses, the gradients' mean; the collectives do nothing."""
    ended = run(gpu, "-W", "ignore", "-c", RECORDED_BY_EIGHT)
    assert ended.returncode == 0, ended.stderr
    names = ("barlow_twins", "vicreg", "simclr", "supcon", "simsiam")
    assert ended.stdout.splitlines() == [f"{name} replayed 0 0 1 0" for name in names]


REFUSED = """
import torch, warnings
from ssl_bench.runtime.cuda_graph import Replayed

torch.cuda.set_stream(torch.cuda.Stream())
stream = torch.cuda.current_stream()
calls = []

def function(x):
    calls.append(1)
    if len(calls) == 4:  # the recording's, after three to warm up
        x.sum().item()
    return x * 2

program = Replayed(function)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    shapes = [tuple(program(torch.zeros(2, 3, device="cuda")).shape) for _ in range(6)]
print([str(warning.message) for warning in caught])
print(shapes == [(2, 3)] * 6, torch.cuda.current_stream() == stream, torch.cuda.is_current_stream_capturing())
torch.manual_seed(1)
torch.rand(3, device="cuda")
"""


def test_after_a_capture_that_fails_everything_goes_on(gpu):
    ended = run(gpu, "-c", REFUSED)
    assert ended.returncode == 0, ended.stderr
    warned, rest = ended.stdout.splitlines()
    assert "without a CUDA graph" in warned
    assert "capturing" in warned
    assert rest == "True True False"
