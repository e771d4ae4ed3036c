"""What the loop watches: means over an interval, and the first non-finite value with its place."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_bench.training.monitor import FiniteGuard, Meter


def parameters(*gradients):
    result = []
    for gradient in gradients:
        parameter = torch.nn.Parameter(torch.zeros(3))
        parameter.grad = None if gradient is None else torch.full((3,), float(gradient))
        result.append(parameter)
    return result


def update(guard, step, loss, parameters):
    guard.take(step, guard.look(loss, parameters))


def found(guard):
    return guard.explain(guard.found(lambda tensor: tensor))


def test_meter_gives_means_and_starts_anew():
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value), "other": torch.tensor(-value)})
    assert meter.named(meter.take(lambda mean: mean)) == {"loss": 3.0, "other": -3.0}
    assert meter.named(meter.take(lambda mean: mean)) == {}


def test_meter_goes_on_from_its_state():
    meter, other = Meter(), Meter()
    meter.add({"loss": torch.tensor(1.0)})
    other.load_state_dict(meter.state_dict(), torch.device("cpu"))
    for one in (meter, other):
        one.add({"loss": torch.tensor(4.0)})
    assert meter.named(meter.take(lambda mean: mean)) == other.named(other.take(lambda mean: mean)) == {"loss": 2.5}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_guard_names_the_first_step_and_layer(bad):
    guard = FiniteGuard(["a", "b", "c"], torch.device("cpu"))
    fine = torch.tensor(1.0)
    update(guard, 4, fine, parameters(1, 1e30, None))
    assert found(guard) is None
    update(guard, 5, fine, parameters(1, bad, None))
    update(guard, 6, torch.tensor(bad), parameters(bad, bad, bad))
    assert found(guard) == {"step": 5, "layer": "b", "layers": 1, "of": 3}


def test_guard_sees_a_loss_alone_and_ignores_gradients_under_a_scaler():
    guard = FiniteGuard(["a"], torch.device("cpu"), gradients=False)
    update(guard, 0, torch.tensor(1.0), parameters(float("inf")))
    assert found(guard) is None
    update(guard, 1, torch.tensor(float("inf")), parameters(1))
    assert found(guard) == {"step": 1, "layer": None, "layers": 0, "of": 1}


def test_guard_goes_on_from_its_state_and_keeps_the_first_of_many_steps():
    guard, other = (FiniteGuard(["a", "b"], torch.device("cpu")) for _ in range(2))
    for step, gradient in enumerate((1, 1, float("nan"), float("inf"), 1)):
        update(guard, step, torch.tensor(1.0), parameters(1, gradient))
    update(other, 9, torch.tensor(1.0), parameters(1, 1))  # of a run that is given up for the checkpoint
    other.load_state_dict(guard.state_dict())
    for one in (guard, other):
        update(one, 5, torch.tensor(float("nan")), parameters(float("nan"), 1))
        assert found(one) == {"step": 2, "layer": "b", "layers": 1, "of": 2}


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_starts_one_pass_over_the_gradients_and_one_copy_for_the_guard():
    guard = FiniteGuard(["a", "b", "c"], torch.device("cpu"))
    with Operations() as operations:
        update(guard, 0, torch.tensor(1.0), parameters(1, 2, None))
    assert [name for name in operations.seen if name in ("sum", "stack", "cat")].count("sum") == 2
    assert not {"isfinite", "where", "any", "logical_not", "lt", "eq", "ne"} & set(operations.seen)


def test_no_line_of_the_metrics_waits_for_a_gpu_when_it_is_begun():
    """On tensors without values, whose first use by the host is an error."""
    with FakeTensorMode():
        device = torch.device("cuda:0")
        guard, meter = FiniteGuard(["a", "b"], device), Meter()
        for step in range(3):
            guard.take(step, torch.ones(3, device=device))
            meter.add({"loss": torch.ones((), device=device)})
        assert guard.found(lambda tensor: tensor).device == meter.take(lambda mean: mean).device == device
        with pytest.raises(DataDependentOutputException):
            guard.explain(guard.found(lambda tensor: tensor))
