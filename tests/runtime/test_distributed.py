"""The collectives and the synchronised batch norm, in three processes and in one."""

from typing import Any

import batch_norm_kernels
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrun import torchrun

from ssl_bench.runtime.distributed import (
    assert_equal_parameters,
    broadcast_object,
    gather,
    rank,
    synchronize_batch_norm,
    world_size,
)
from ssl_bench.runtime.sync_batchnorm import SyncBatchNorm

WORLD = 3
ROWS = [5, 2, 4]  # each process's samples for batch norm: it takes uneven shards


def caught(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def batch(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """(11, 6, ...) float64; the first samples have another mean and scale, and the mean is large."""
    x = torch.randn(sum(ROWS), 6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[:5] = 3 * x[:5] - 2
    return x + 100


NORMS = {
    "1d": (lambda: nn.BatchNorm1d(6), ()),
    "1d over length": (lambda: nn.BatchNorm1d(6), (7,)),
    "2d": (lambda: nn.BatchNorm2d(6), (4, 3)),
    "2d channels_last": (lambda: nn.BatchNorm2d(6), (4, 3)),
    "3d": (lambda: nn.BatchNorm3d(6), (2, 2, 3)),
    "without affine": (lambda: nn.BatchNorm1d(6, affine=False), ()),
    "cumulative": (lambda: nn.BatchNorm1d(6, momentum=None), ()),
    "without statistics": (lambda: nn.BatchNorm1d(6, track_running_stats=False), ()),
    "frozen bias": (lambda: nn.BatchNorm1d(6, eps=1e-3, momentum=0.3), ()),
    "timm": (lambda: BatchNormAct2d(6), (4, 3)),
}


def normalise(case: str, rows: slice, *, by_kernels: bool = False) -> dict[str, Any]:
    """Two training passes and an evaluation pass of one layer over some rows of the batch, and the gradients.

    ``by_kernels``: the way of a GPU, with formulas in the kernels' place.
    """
    build, shape = NORMS[case]
    layer = build().double()
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, 6))
            layer.bias.copy_(torch.linspace(-1, 1, 6)).requires_grad_(case != "frozen bias")
    layer = synchronize_batch_norm(layer)
    if by_kernels:
        layer._by_operations = layer._by_kernels
    results: dict[str, Any] = {}
    for step in range(2):
        x = batch(shape, step)[rows]
        x = x.contiguous(memory_format=torch.channels_last) if case.endswith("channels_last") else x
        x.requires_grad_()
        out = layer(x)
        results |= {f"strides {step}": list(out.stride()), f"out {step}": out.detach()}
        out.backward(batch(shape, 9)[rows].sin())
        results[f"grad {step}"] = x.grad
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            results[name] = parameter.grad
    results |= {f"buffer {name}": value.clone() for name, value in layer.named_buffers()}
    if layer.track_running_stats:  # without statistics torch normalises an evaluation batch by itself
        results["evaluated"] = layer.eval()(batch(shape)[rows]).detach()
    return results


def half_precision(rows: slice) -> dict[str, Any]:
    layer = synchronize_batch_norm(nn.BatchNorm2d(6))
    x = batch((4, 3))[rows].bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.sum().backward()
    dtypes = [str(t.dtype) for t in (out, x.grad, layer.running_mean, layer.weight.grad)]
    return {"out": out.detach(), "running_var": layer.running_var, "dtypes": dtypes}


class Collectives(TorchDispatchMode):
    """The names of the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def collectives_of_a_layer(*, by_kernels: bool) -> list[str]:
    layer, x = synchronize_batch_norm(nn.BatchNorm2d(6)), torch.randn(4, 6, 2, 2).requires_grad_()
    if by_kernels:
        layer._by_operations = layer._by_kernels
    with Collectives() as forward:
        out = layer(x)
    with Collectives() as backward:
        out.sum().backward()
    return [*forward.seen, *backward.seen]


def gathering() -> dict[str, Any]:
    me = rank()
    x = torch.arange(6.0).view(2, 3).add(10 * me).requires_grad_()
    whole = gather(x)
    (whole * torch.arange(18.0).view(6, 3)).sum().backward()
    return {
        "whole": whole.detach(),
        "grad": x.grad,
        "uneven": caught(gather, torch.zeros(2 + me, 3)),
        "uneven dimensions": caught(gather, torch.zeros(2, 3) if me else torch.zeros(2, 3, 1)),
        "object": broadcast_object({"from": me}, source=2),
    }


def checking() -> list[str]:
    """The messages for equal parameters, for one bit, a swapped sign and a NaN on one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).to(torch.bfloat16))
    messages = [caught(assert_equal_parameters, model)]
    for name, change in (("1.weight", 1.0000001), ("2.bias", -1.0), ("0.weight", torch.nan)):
        parameter = model.get_parameter(name)
        kept = parameter.detach().clone()
        if rank() == 1:
            with torch.no_grad():
                parameter.view(-1)[1:2].mul_(change)
        messages.append(caught(assert_equal_parameters, model))
        with torch.no_grad():
            parameter.copy_(kept)
    return messages


def worker() -> dict[str, Any]:
    rows = slice(0, sum(ROWS))
    if world_size() > 1:
        rows = slice(sum(ROWS[: rank()]), sum(ROWS[: rank() + 1]))
    results = {case: normalise(case, rows) for case in NORMS}
    results["half"] = half_precision(rows)
    if world_size() > 1:
        with batch_norm_kernels.on_the_cpu():
            results |= {f"{case} by kernels": normalise(case, rows, by_kernels=True) for case in NORMS}
            results["collectives"] = [collectives_of_a_layer(by_kernels=kernels) for kernels in (False, True)]
        results |= {"gathering": gathering(), "checking": checking(), "place": [rank(), world_size()]}
    return results


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return worker()


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return torchrun(worker, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("way", ["", " by kernels"])
@pytest.mark.parametrize("case", NORMS)
def test_batch_norm_is_that_of_the_whole_batch(single, several, case, way):
    assert several[0][case + way].keys() == single[case].keys()
    for key, expected in single[case].items():
        parts = [result[case + way][key] for result in several]
        if key.startswith("buffer"):  # the same on every process
            for part in parts:
                torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-12, msg=key)
        elif key in ("weight", "bias"):  # each process has its samples' share
            torch.testing.assert_close(sum(parts), expected, rtol=1e-10, atol=1e-12, msg=key)
        elif key.startswith("strides"):
            assert all(part[1:] == expected[1:] for part in parts)
        else:
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-10, atol=1e-12, msg=key)


def test_batch_norm_keeps_half_precision_and_takes_statistics_in_float32(single, several):
    out = torch.cat([result["half"]["out"] for result in several])
    torch.testing.assert_close(out, single["half"]["out"], rtol=2**-7, atol=1e-2)
    for result in several:
        torch.testing.assert_close(result["half"]["running_var"], single["half"]["running_var"], rtol=1e-5, atol=0)
        assert result["half"]["dtypes"] == ["torch.bfloat16", "torch.bfloat16", "torch.float32", "torch.float32"]


def test_a_batch_norm_takes_one_collective_in_each_direction_and_copies_nothing_after_it(several):
    for result in several:
        assert result["collectives"] == [["_allgather_base_", "allreduce_"]] * 2  # not allgather_, into a list


def test_the_converted_layer_shares_parameters_buffers_and_names(monkeypatch):
    monkeypatch.setattr("ssl_bench.runtime.distributed.world_size", lambda: 2)
    inner = nn.Sequential(nn.BatchNorm2d(4, affine=False))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), inner, BatchNormAct2d(4))
    model[2].eval()
    before, weight = {k: v.data_ptr() for k, v in model.state_dict().items()}, model[1].weight
    model = synchronize_batch_norm(model)
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == before
    assert model[1].weight is weight
    assert type(model[1]) is type(model[2][0]) is SyncBatchNorm
    assert [model[1].training, model[2][0].training] == [True, False]
    assert isinstance(model[3].act, nn.ReLU)


def test_nothing_changes_in_a_single_process():
    layer, x = nn.BatchNorm1d(4), torch.randn(3, 4)
    assert (rank(), world_size()) == (0, 1)
    assert synchronize_batch_norm(layer) is layer
    assert gather(x) is x
    assert broadcast_object("it") == "it"
    assert_equal_parameters(layer)


def test_gather_concatenates_by_rank_and_its_gradient_is_world_size_times_the_local_slice(several):
    whole = torch.cat([torch.arange(6.0).view(2, 3) + 10 * r for r in range(WORLD)])
    for r, result in enumerate(several):
        assert result["place"] == [r, WORLD]
        assert torch.equal(result["gathering"]["whole"], whole)
        assert torch.equal(result["gathering"]["grad"], WORLD * torch.arange(18.0).view(6, 3)[2 * r : 2 * r + 2])


def test_gather_refuses_uneven_rows_on_every_process(several):
    for result in several:
        assert "shapes [(2, 3), (3, 3), (4, 3)] on ranks 0, 1" in result["gathering"]["uneven"]
        assert "shapes [(2, 3, 1), (2, 3), (2, 3)]" in result["gathering"]["uneven dimensions"]


def test_broadcast_object_gives_the_sources_object(several):
    assert [result["gathering"]["object"] for result in several] == [{"from": 2}] * WORLD


def test_a_parameter_that_differs_by_one_bit_is_named_on_every_process(several):
    for result in several:
        equal, *messages = result["checking"]
        assert equal == ""
        names = ["1.weight", "2.bias", "0.weight"]
        expected = [f"RuntimeError: parameter {n} differs between processes: ranks [1] from rank 0" for n in names]
        assert messages == expected


def against_torchs() -> dict[str, Any]:
    """The same two training passes by ours on both devices and by torch's on the GPU, which these processes share."""
    rows = slice(sum(ROWS[: rank()]), sum(ROWS[: rank() + 1]))
    sides = {
        "ours on the CPU": SyncBatchNorm.of(nn.BatchNorm2d(6)).double(),
        "ours": SyncBatchNorm.of(nn.BatchNorm2d(6)).double().cuda(),
        "torch's": nn.SyncBatchNorm(6).double().cuda(),
    }
    results: dict[str, Any] = {}
    for side, layer in sides.items():
        device = layer.weight.device
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, 6))
            layer.bias.copy_(torch.linspace(-1, 1, 6))
        for step in range(2):
            x = batch((4, 3), step)[rows].to(device, memory_format=torch.channels_last).requires_grad_()
            out = layer(x)
            out.backward(batch((4, 3), 9)[rows].sin().to(device))
        found = {"out": out.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
        found |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
        results[side] = {name: value.cpu() for name, value in found.items()}
    return results


@pytest.mark.gpu
def test_ours_equals_torchs_synchronised_batch_norm_on_the_gpu(tmp_path):
    for result in torchrun(against_torchs, WORLD, tmp_path, gpu=True):
        for name, expected in result.pop("torch's").items():
            for ours in result.values():
                torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-9, msg=name)
