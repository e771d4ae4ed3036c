"""An optimizer's replayed step is the plain step: on the CPU by a tape in the graph's place, on a GPU by the graph."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tape import TapeRecorder
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_bench.optim import CLARS, LAMB, LARS, TVLARS, WeightAverage, adamw, sgd, timm_optimizer
from ssl_bench.optim.groups import build_groups, hold_frozen
from ssl_bench.optim.lamb import LAMBC
from ssl_bench.optim.layerwise import is_replayable
from ssl_bench.runtime.cuda_graph import WARM_UP
from ssl_bench.training.graphs import GraphedUpdate

STEPS, ELSEWHERE, TELEMETRY = 16, (11, 13), 5  # steps whose gradients lie elsewhere, and those between plain ones
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "lars": lambda params: LARS(params, lr=0.5),
    "lars, Nesterov": lambda params: LARS(params, lr=0.5, nesterov=True),
    "lars, no momentum": lambda params: LARS(params, lr=0.5, momentum=0.0),
    "lamb": lambda params: LAMB(params, lr=0.01),
    "lambc": lambda params: LAMBC(params, lr=0.01, bias_correction=False),
    "tvlars": lambda params: TVLARS(params, lr=1.0, decay=0.3, delay_steps=6),
    "tvlars, 2023-08": lambda params: TVLARS(params, lr=1.0, decay=0.3, delay_steps=6, variant="2023-08"),
    "tvlars, released": lambda params: TVLARS(params, lr=1.0, decay=0.3, variant="released"),
}


class Counting(LARS):
    """Steps that depend on a number that only Python knows: what must not be replayed."""

    replayable = True
    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        for group in self.param_groups:
            group["weight_decay"] = 0.1 * self.calls
        return super().step(closure)


class Waiting(LARS):
    replayable = True

    def step(self, closure: Any = None) -> Any:
        float(self.param_groups[0]["params"][0].detach().sum())
        return super().step(closure)


def on_the_device(optimizer: Optimizer) -> Callable[..., Tensor]:
    """Plain steps whose learning rates are tensors."""

    def step(work: Callable[[], Tensor], reads: Sequence[Tensor | None], *, plainly: bool) -> Tensor:  # noqa: ARG001
        for group in optimizer.param_groups:
            group["lr"] = torch.full((), group["lr"], device=reads[0].device)  # type: ignore[union-attr]
        return work()

    return step


def train(
    make: Callable[[Any], Optimizer],
    wrap: Callable[[Optimizer], Callable[..., Tensor]],
    device: str = "cpu",
    broken: Sequence[int] = (),
) -> dict[str, Any]:
    """Steps on gradients that a replayed pass leaves where it left the last ones; some have none."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 7), nn.LayerNorm(7), nn.Linear(7, 5, bias=False)).to(device)
    optimizer = make(build_groups(net, lr=0.5, weight_decay=1e-2, lr_1d=0.1))
    initial = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if group["params"][0].device.type == "cpu" and "fused" in group and isinstance(optimizer, LARS | LAMB | TVLARS):
            group["fused"] = False  # by cache blocks the CPU reads every norm
    update = wrap(optimizer)
    kept = [torch.zeros_like(p) for p in net.parameters()]
    loss, rows, rates = torch.zeros((), device=device), [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for parameter, own in zip(net.parameters(), kept, strict=True):
            drawn = torch.randn(parameter.shape, generator=generator) * (math.nan if step in broken else 1)
            parameter.grad = torch.empty_like(own) if step in ELSEWHERE else own
            parameter.grad.copy_(drawn)
        loss.fill_(step)

        def work() -> Tensor:
            row = torch.stack([loss, *(p.grad.abs().max() for p in net.parameters())])  # type: ignore[union-attr]
            optimizer.step()
            return row

        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = rate / (1 + step)
        rates.append(optimizer.param_groups[0]["lr"])
        reads = [loss, *(p.grad for p in net.parameters())]
        rows.append(update(work, reads, plainly=step % TELEMETRY == 0))
        if wrap is not on_the_device:
            assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)
        optimizer.zero_grad(set_to_none=True)
    state = [value for one in optimizer.state.values() for value in one.values() if isinstance(value, Tensor)]
    return {"rows": torch.stack(rows), "written": [p.detach() for p in net.parameters()] + state}


def assert_equal(run: dict[str, Any], other: dict[str, Any]) -> None:
    assert torch.equal(run["rows"], other["rows"])
    for ours, theirs in zip(run["written"], other["written"], strict=True):
        assert torch.equal(ours, theirs)


def graphed(recorder: TapeRecorder, refuse: Callable[[str], Any], made: list[GraphedUpdate]) -> Any:
    """A wrapper whose passes are replayed from the third time on that it asks."""
    calls = iter(range(100))

    def wrap(optimizer: Optimizer) -> GraphedUpdate:
        assert is_replayable(optimizer)
        made.append(GraphedUpdate(optimizer, lambda: next(calls) >= 2, refuse, recorder))
        return made[0]

    return wrap


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replayed_steps_are_the_plain_ones(name: str) -> None:
    recorder, made = TapeRecorder(), []
    replayed = train(OPTIMIZERS[name], graphed(recorder, pytest.fail, made))
    assert made[0].used == "replayed"
    # Plain: 0, 5, 10, 15 for telemetry, 11 and 13 by their place; not ready: 1, 2 (0 does not ask); warm-up: 3, 4, 6.
    assert recorder.replays == len({7, 8, 9, 12, 14})  # one of them the comparison
    assert_equal(replayed, train(OPTIMIZERS[name], on_the_device))
    numbers = train(OPTIMIZERS[name], lambda _: lambda work, _reads, *, plainly: work())  # noqa: ARG005
    for ours, theirs in zip(replayed["written"], numbers["written"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "reason"), [(Counting, "a replayed step differs"), (Waiting, "operation not permitted")]
)
def test_a_step_that_needs_the_host_is_found_out_and_taken_plainly(make: Any, reason: str) -> None:
    recorder, reasons, made = TapeRecorder(), [], []
    run = train(lambda params: make(params, lr=0.5), graphed(recorder, reasons.append, made))
    assert len(reasons) == 1
    assert reasons[0].startswith(reason)
    assert made[0].used == f"given up: {reasons[0]}"
    assert recorder.replays == (make is Counting)
    if make is Waiting:  # taping counts a step, too
        assert_equal(run, train(lambda params: make(params, lr=0.5), on_the_device))


def test_a_step_that_waits_is_not_recorded() -> None:
    recorder, reasons, made = TapeRecorder(), [], []
    recorder.waited = True
    run = train(OPTIMIZERS["lamb"], graphed(recorder, reasons.append, made))
    assert reasons == ["it waits for the device"]
    assert recorder.replays == 0
    assert_equal(run, train(OPTIMIZERS["lamb"], on_the_device))


def test_a_diverged_step_says_nothing_and_the_next_one_is_compared() -> None:
    recorder, made = TapeRecorder(), []
    train(OPTIMIZERS["lars"], graphed(recorder, pytest.fail, made), broken=range(7, STEPS))
    assert made[0].used == "no step was replayed"
    assert recorder.replays == len({7, 8, 9, 12, 14})  # every one a comparison


def test_too_little_memory_for_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, reasons, made = TapeRecorder(), [], []
    record = recorder.record

    def full(work: Callable[[], Any]) -> Any:
        recorded = record(work)

        def clone(_tensor: Tensor) -> Tensor:
            monkeypatch.undo()
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(Tensor, "clone", clone)
        return recorded

    recorder.record = full  # type: ignore[method-assign]
    run = train(OPTIMIZERS["tvlars"], graphed(recorder, reasons.append, made))
    assert reasons == ["there is too little memory to compare a replayed step with a plain one"]
    assert recorder.replays == 0
    assert_equal(run, train(OPTIMIZERS["tvlars"], on_the_device))


def test_after_its_release_steps_are_plain() -> None:
    recorder, made = TapeRecorder(), []
    wrap = graphed(recorder, pytest.fail, made)

    def released(optimizer: Optimizer) -> GraphedUpdate:
        update = wrap(optimizer)
        update.release()
        return update

    assert_equal(train(OPTIMIZERS["lamb"], released), train(OPTIMIZERS["lamb"], on_the_device))
    assert recorder.replays == 0


def test_who_says_that_a_graph_can_hold_a_step() -> None:
    class Own(LARS):
        """A subclass, which may count steps."""

    def params() -> list[dict[str, Any]]:
        return [{"params": [nn.Parameter(torch.zeros(3, 2))], "lr": 0.1}]

    assert all(is_replayable(make(params())) for make in (*OPTIMIZERS.values(), lambda p: sgd(p, lr=0.1)))
    for plain in (
        Own(params(), lr=0.1),
        CLARS(params(), lr=0.1),
        adamw(params()),
        timm_optimizer(params(), "lars", 0.1),
    ):
        assert not is_replayable(plain)
    averaged, frozen = LARS(params(), lr=0.1), LARS([params()[0] | {"frozen_steps": 2}], lr=0.1)
    WeightAverage(averaged)
    hold_frozen(frozen)
    assert not is_replayable(averaged)
    assert not is_replayable(frozen)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*OPTIMIZERS, "sgd"])
def test_gpu_replayed_steps_are_the_plain_ones(name: str) -> None:
    make = (OPTIMIZERS | {"sgd": lambda params: sgd(params, lr=0.1)})[name]
    made: list[GraphedUpdate] = []
    replayed = train(make, graphed(None, pytest.fail, made), "cuda")  # type: ignore[arg-type]
    assert made[0].used == "replayed"
    assert_equal(replayed, train(make, on_the_device, "cuda"))


assert WARM_UP == 3  # which the counts of replays above follow from
