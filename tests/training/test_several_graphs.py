"""Replayed steps of several processes are those of DistributedDataParallel; all of them replay, or none does."""

from typing import Any

import pytest
import torch
from tape import TapeRecorder
from tiny_net import TinyNet
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrun import torchrun

from ssl_bench.methods import METHODS, Classifier
from ssl_bench.optim import LARS
from ssl_bench.runtime import distributed
from ssl_bench.runtime.cuda_graph import WARM_UP
from ssl_bench.runtime.distributed import average, everywhere, rank, synchronize_batch_norm, world_size
from ssl_bench.training import gradient as passes
from ssl_bench.training.gradient import compute_gradient
from ssl_bench.training.graphs import GraphedGradient, averaged

STEPS = WARM_UP + 4
METHODS_TRIED = ("barlow_twins", "simclr", "byol", "classifier")  # shared and gathered losses, a teacher, local rows


class Broken(TapeRecorder):
    """Cannot record on one of the processes."""

    def record(self, work: Any) -> Any:
        taped = super().record(work)  # in full on both: unlike a graph, a tape waits for the other in its collectives
        if rank() == 1:
            raise RuntimeError("no room for a tape")
        return taped


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name == "classifier":
        return Classifier(TinyNet(), 32, 5)
    return METHODS[name](TinyNet(), 32, projector=(16, 24))


def train(name: str, recorder: TapeRecorder | None) -> dict[str, Any]:
    """A run of this process; behind DistributedDataParallel if nothing records."""
    task, reasons = build(name), []
    synchronize_batch_norm(task)
    optimizer = LARS(task.parameters(), lr=0.5, weight_decay=1e-3, momentum=0.9)
    model: nn.Module = task
    gradient: Any = compute_gradient
    if recorder is None:
        model = DistributedDataParallel(task)
    else:
        gradient = GraphedGradient(averaged(compute_gradient, task), task, reasons.append, recorder)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + rank())
        views = [torch.randn(6, 3, 16, 16, generator=generator) for _ in range(2)]
        if name == "classifier":
            views[1] = torch.randint(5, (6,), generator=generator)
        task.begin_step(step / STEPS)
        losses.append(gradient(model, lambda _: tuple(views), 1, Tensor.backward)["loss"].clone())  # noqa: B023
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    replays = recorder.replays if recorder is not None else 0
    return {"state": task.state_dict(), "losses": torch.stack(losses), "reasons": reasons, "replays": replays}


def worker() -> dict[str, Any]:
    # On a GPU shapes are compared at their first use; on the CPU the host would read them in every step.
    distributed.refuse_uneven = passes.refuse_uneven = lambda _x: None
    holding = [everywhere(True, torch.device("cpu")), everywhere(rank() == 0, torch.device("cpu"))]
    own = [torch.full((2, 3), rank() + 1.0).T, torch.tensor(float(10 * rank()))]
    average(own)
    runs = {name: {"plain": train(name, None), "replayed": train(name, TapeRecorder())} for name in METHODS_TRIED}
    return {"runs": runs, "broken": train("simclr", Broken()), "everywhere": holding, "average": own}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return torchrun(worker, 2, tmp_path_factory.mktemp("ranks"), timeout=120)


@pytest.mark.parametrize("name", METHODS_TRIED)
def test_replayed_steps_are_those_of_distributed_data_parallel(ranks: list[dict[str, Any]], name: str) -> None:
    for result in ranks:
        plain, replayed = (result["runs"][name][how] for how in ("plain", "replayed"))
        assert replayed["reasons"] == []
        assert replayed["replays"] == STEPS - WARM_UP
        assert torch.equal(plain["losses"], replayed["losses"])
        for key, value in plain["state"].items():
            assert torch.equal(value, replayed["state"][key]), key


def test_all_train_plainly_where_one_cannot_record(ranks: list[dict[str, Any]]) -> None:
    reasons = [result["broken"]["reasons"] for result in ranks]
    assert reasons == [
        ["another process cannot replay its step"],
        ["a step could not be recorded: no room for a tape"],
    ]
    for result in ranks:
        assert result["broken"]["replays"] == 0
        assert torch.equal(result["broken"]["losses"], result["runs"]["simclr"]["plain"]["losses"])


def test_means_and_agreement_over_processes(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["everywhere"] == [True, False]
        assert torch.equal(result["average"][0], torch.full((3, 2), 1.5))
        assert result["average"][1] == 5
    assert world_size() == 1  # here it costs nothing
    alone = torch.ones(2)
    average([alone])
    assert torch.equal(alone, torch.ones(2))
    assert not everywhere(False, torch.device("cpu"))
