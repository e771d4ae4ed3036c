"""A replayed step is the plain step: on the CPU with a tape in the graph's place, on a GPU with the graph itself."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tape import TapeRecorder
from tiny_net import DropoutTwins, TinyNet
from torch import Tensor, nn

from ssl_bench.augment.views import Augmentation, PadCropFlipRotate, SSLView, take
from ssl_bench.methods import METHODS
from ssl_bench.methods.barlow_twins import BarlowTwins
from ssl_bench.methods.classifier import Classifier
from ssl_bench.optim import LARS
from ssl_bench.runtime.cuda_graph import WARM_UP, GraphRecorder, Replayed
from ssl_bench.training.gradient import compute_gradient
from ssl_bench.training.graphs import GraphedGradient

N = 12
# All methods: tests/methods/test_invariance.py.
TASKS = ("barlow_twins", "simclr", "vicreg", "byol", "classifier", "dropout")
STATS: dict[str, Any] = {"mean": (0.5, 0.4, 0.6), "std": (0.2, 0.3, 0.25)}
Plain = Callable[..., dict[str, Tensor]]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "classifier":
        return Classifier(TinyNet(), 32, 5)
    return {**METHODS, "dropout": DropoutTwins, "stateful": Stateful}[name](TinyNet(), 32, projector=(16, 24))


class Stateful(BarlowTwins):
    """Its loss depends on a number that only Python knows: what must not be replayed."""

    calls = 0

    def loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        terms = super().loss(z1, z2)
        return terms | {"loss": terms["loss"] * self.calls}


def batch(step: int, name: str, device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    n = 8 if step == 7 else N  # a short one among them
    views = [torch.randn(n, 3, 16, 16, generator=generator).to(device) for _ in range(2)]
    return (views[0], torch.randint(5, (n,), generator=generator).to(device)) if name == "classifier" else tuple(views)


def train(name: str, wrap: Callable[[nn.Module], Plain], device: str = "cpu", steps: int = 10) -> dict[str, Any]:
    """A run's losses, gradients and last state."""
    task = build(name).to(device)
    optimizer = LARS(task.parameters(), lr=0.5, weight_decay=1e-3, momentum=0.9)
    gradient = wrap(task)
    losses, gradients = [], []
    for step in range(steps):
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 0.5 / (1 + step)
        inputs = batch(step, name, device)
        with torch.autocast(device, torch.bfloat16):
            terms = gradient(task, lambda _: inputs, 1, Tensor.backward)  # noqa: B023 - called at once
        losses.append({name: float(value) for name, value in terms.items()})
        gradients.append([None if p.grad is None else p.grad.clone() for p in task.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"losses": losses, "gradients": gradients, "state": task.state_dict()}


def refuse(reason: str) -> None:
    raise AssertionError(reason)


@pytest.mark.parametrize("name", TASKS)
def test_replayed_steps_are_the_plain_ones(name: str) -> None:
    recorder, made = TapeRecorder(), []

    def wrap(task: nn.Module) -> Plain:
        made.append(GraphedGradient(compute_gradient, task, refuse, recorder))
        return made[0]

    plain = train(name, lambda _task: compute_gradient)
    replayed = train(name, wrap)
    assert made[0].used == "replayed"
    assert recorder.replays == 10 - WARM_UP - 1  # one batch is short; one replay is the check
    assert plain["losses"] == replayed["losses"]
    for ours, theirs in zip(replayed["gradients"], plain["gradients"], strict=True):
        assert all(a is b if b is None else torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for key, value in plain["state"].items():
        assert torch.equal(replayed["state"][key], value), key


def test_a_step_that_python_decides_is_found_out_and_trained_plainly() -> None:
    recorder, reasons = TapeRecorder(), []
    plain = train("stateful", lambda _task: compute_gradient)

    made = []

    def wrap(task: nn.Module) -> Plain:
        made.append(GraphedGradient(compute_gradient, task, reasons.append, recorder))
        return made[0]

    replayed = train("stateful", wrap)
    assert len(reasons) == 1
    assert made[0].used == f"given up: {reasons[0]}"
    assert reasons[0].startswith("a replayed step differs from the plain one: ")
    assert recorder.replays == 1
    # Taping called the loss once more, and so this method's count is off by one from then on.
    seen = [[row["on_diagonal"] for row in run["losses"]] for run in (replayed, plain)]
    assert seen[0][:4] == seen[1][:4]


@pytest.mark.parametrize("how", ["waits in the step", "cannot be taped"])
def test_what_cannot_be_recorded_is_trained_plainly(how: str) -> None:
    recorder, reasons = TapeRecorder(), []
    recorder.waited = how == "waits in the step"

    def reads(*arguments: Any) -> dict[str, Tensor]:
        terms = compute_gradient(*arguments)
        terms["loss"].item()
        return terms

    plain = train("barlow_twins", lambda _task: compute_gradient)
    replayed = train("barlow_twins", lambda task: GraphedGradient(reads, task, reasons.append, recorder))
    if recorder.waited:
        assert reasons == ["a step waits for the device, so it cannot be recorded"]
    else:
        assert reasons == ["a step could not be recorded: operation not permitted while taping"]
    assert recorder.replays == 0
    assert plain["losses"] == replayed["losses"]
    assert all(torch.equal(replayed["state"][key], value) for key, value in plain["state"].items())


def test_a_diverged_step_says_nothing_and_the_next_one_is_compared() -> None:
    recorder = TapeRecorder()
    task = build("barlow_twins")
    gradient = GraphedGradient(compute_gradient, task, refuse, recorder)
    for step in range(WARM_UP):
        gradient(task, lambda _, step=step: batch(step, ""), 1, Tensor.backward)
    broken = [view * math.nan for view in batch(4, "")]
    before = {key: value.clone() for key, value in task.state_dict().items()}
    assert not gradient(task, lambda _: broken, 1, Tensor.backward)["loss"].isfinite()
    task.load_state_dict(before)
    for step in (4, 5, 6):
        terms = gradient(task, lambda _, step=step: batch(step, ""), 1, Tensor.backward)
        assert terms["loss"].isfinite()
    assert recorder.replays == 4  # two of them comparisons


@pytest.mark.parametrize(("failing", "replays"), [(5, 0), (6, 4)], ids=["the compared step", "a short batch"])
def test_a_recording_that_leaves_no_memory_for_a_plain_step_is_given_up(failing: int, replays: int) -> None:
    """Three passes to warm up and the recording come before; where a step needs more than half of the memory."""
    plain = train("dropout", lambda _task: compute_gradient)
    recorder, reasons, passes = TapeRecorder(), [], iter(range(1, 100))

    def tight(*arguments: Any) -> dict[str, Tensor]:
        terms = compute_gradient(*arguments)
        if next(passes) == failing:
            raise torch.OutOfMemoryError("out of memory")
        return terms

    run = train("dropout", lambda task: GraphedGradient(tight, task, reasons.append, recorder))
    assert reasons == ["the recorded step leaves too little memory for a plain one"]
    assert recorder.replays == replays
    assert run["losses"] == plain["losses"]
    assert all(torch.equal(run["state"][key], value) for key, value in plain["state"].items())


VIEWS = [SSLView(16, blur_p=0.5, solarize_p=0.2, **STATS), PadCropFlipRotate(**STATS)]


def replayed_views(view: Augmentation, recorder: Any, device: str) -> list[tuple[Tensor, Tensor]]:
    """(replayed, plain) views of several batches, all of them kept to the end."""
    program = Replayed(view.program, recorder)
    pairs = []
    for step in range(WARM_UP + 4):
        n = 20 if step == 5 else 24
        images = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
        params = take(view.draw(n, torch.Generator().manual_seed(step)), slice(None))
        table = view.table(params, 16, 16)
        pairs.append((program(images.to(device), table.to(device)), view.program(images.to(device), table.to(device))))
    return pairs


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: type(view).__name__)
def test_replayed_views_are_the_plain_ones(view: Augmentation) -> None:
    recorder = TapeRecorder()
    for replayed, plain in replayed_views(view, recorder, "cpu"):
        assert torch.equal(replayed, plain)
        assert replayed.stride() == plain.stride()
    assert recorder.replays == 3


@pytest.mark.parametrize(("what", "reason"), [("drawn", "its replay differs by"), ("read", "operation not permitted")])
def test_a_function_that_cannot_be_replayed_is_called_plainly(what: str, reason: str) -> None:
    recorder, factors = TapeRecorder(), iter(range(1, 100))

    def function(x: Tensor) -> Tensor:
        return x * (next(factors) if what == "drawn" else float(x.sum()))

    replayed = Replayed(function, recorder)
    with pytest.warns(RuntimeWarning, match=f"function runs without a CUDA graph: {reason}"):
        results = [replayed(torch.full((3,), 2.0)) for _ in range(WARM_UP + 4)]
    # The recording itself has used up one factor.
    expected = [2, 4, 6, 10, 12, 14, 16] if what == "drawn" else [12] * 7
    assert [result.tolist() for result in results] == [[value] * 3 for value in expected]
    assert recorder.replays == (what == "drawn")


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_gpu_replayed_steps_are_the_plain_ones(name: str) -> None:
    plain = train(name, lambda _task: compute_gradient, "cuda")
    replayed = train(name, lambda task: GraphedGradient(compute_gradient, task, refuse), "cuda")
    # As far as plain runs agree with each other: some kernels add in an order of their own.
    for ours, theirs in zip(replayed["losses"], plain["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)
    for key, value in plain["state"].items():
        torch.testing.assert_close(replayed["state"][key], value, rtol=0.02, atol=0.02, msg=key)


@pytest.mark.gpu
def test_gpu_a_step_that_waits_is_found_out_before_the_recording() -> None:
    reasons: list[str] = []

    def reads(*arguments: Any) -> dict[str, Tensor]:
        terms = compute_gradient(*arguments)
        terms["loss"].item()
        return terms

    train("barlow_twins", lambda task: GraphedGradient(reads, task, reasons.append), "cuda")
    assert reasons == ["a step waits for the device, so it cannot be recorded"]


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: type(view).__name__)
def test_gpu_replayed_views_are_the_plain_ones(view: Augmentation) -> None:
    for replayed, plain in replayed_views(view, GraphRecorder(), "cuda"):
        torch.testing.assert_close(replayed, plain, rtol=0, atol=1e-5)
