"""A method's loss and gradient do not depend on the number of processes (float64, gloo, DistributedDataParallel)."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchrun import torchrun

from ssl_bench.data.sampler import local_positions
from ssl_bench.methods import METHODS, BarlowTwins, Method
from ssl_bench.runtime.distributed import assert_equal_parameters, rank, synchronize_batch_norm, world_size
from ssl_bench.training.gradient import accumulate, full_batch, grad_cache

N = 24  # divisible by 1, 2, 3, 4, and so is half of it
CHUNK = 12


def images() -> Tensor:
    """(2, N, 3, 6, 6) two views; every two images have another mean and scale, so no two shards look alike."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, N, 3, 6, 6, dtype=torch.float64, generator=generator)
    x[1] = x[0] + 0.5 * x[1]
    shift = torch.arange(N, dtype=torch.float64).div(2, rounding_mode="floor").view(N, 1, 1, 1)
    return x * (1 + shift / 4) + shift - 5


def shuffled() -> Tensor:
    return torch.randperm(N, generator=torch.Generator().manual_seed(2))


def network(name: str, batch_norm: bool = True) -> Method:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(10)] if batch_norm else [nn.Identity(), nn.Identity()]
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), norms[0], nn.ReLU(), nn.Conv2d(8, 10, 3, bias=False), norms[1], nn.Flatten(1)
    )
    model = METHODS[name](backbone, 40, projector=(16, 20)).double()
    if not batch_norm:
        for index, layer in enumerate(model.projector):
            if isinstance(layer, nn.BatchNorm1d):
                model.projector[index] = nn.Identity()
    return model


class OfficialBarlowTwins(BarlowTwins):
    """The negative control: C is summed by an all-reduce that autograd does not see, as in the official code."""

    def global_loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        z1, z2 = self.standardise(z1), self.standardise(z2)
        c = z1.T @ z2 / (len(z1) * world_size())
        if world_size() > 1:
            dist.all_reduce(c.detach())  # the same memory
        on_diagonal = (c.diagonal() - 1).square().sum()
        off_diagonal = (c - torch.diag(c.diagonal())).square().sum()
        return {"loss": on_diagonal + self.lambd * off_diagonal}


def official_network() -> Method:
    model = network("barlow_twins")
    model.__class__ = OfficialBarlowTwins
    model.standardise = nn.BatchNorm1d(20, affine=False).double()
    return model


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(1), nn.Linear(108, 5)).double()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, y), "top1": (logits.argmax(1) == y).double().mean().detach()}


def wrapped(model: nn.Module) -> nn.Module:
    model = synchronize_batch_norm(model)
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size() > 1 else model


def state(model: nn.Module, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    gradients = {f"grad {name}": p.grad for name, p in inner.named_parameters() if p.grad is not None}
    buffers = {f"buffer {name}": b for name, b in inner.named_buffers() if b.is_floating_point()}
    return {k: v.detach().clone() for k, v in (terms | gradients | buffers).items()}


def one_step(model: nn.Module, order: Tensor, chunk_size: int = N) -> dict[str, Tensor]:
    """Loss, gradients and running statistics of one step."""
    x, model = images(), wrapped(model)
    mine = local_positions(N, chunk_size, rank(), world_size())
    step = full_batch if chunk_size == N else grad_cache
    terms = step(model, lambda chunk: tuple(x[:, order[mine[chunk]]]), len(mine), torch.Tensor.backward)
    return state(model, terms)


def three_steps(name: str) -> dict[str, Tensor]:
    """Losses and parameters after three optimizer steps with momentum and weight decay, on all parameters."""
    x, model = images(), wrapped(network(name))
    mine = local_positions(N, N, rank(), world_size())[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, 0.9, weight_decay=0.01)
    results = {}
    for step in range(3):
        optimizer.zero_grad()
        views = tuple(x[:, shuffled().roll(step)[mine]])
        results[f"loss {step}"] = full_batch(model, lambda _, views=views: views, 1, torch.Tensor.backward)["loss"]
        optimizer.step()
    assert_equal_parameters(model)
    return results | {f"parameter {i}": p.detach() for i, p in enumerate(model.parameters())}


def classify() -> dict[str, Tensor]:
    x, y = images()[0], torch.arange(N) % 5
    mine = local_positions(N, CHUNK, rank(), world_size())
    model = wrapped(Classifier())
    terms = accumulate(model, lambda chunk: (x[mine[chunk]], y[mine[chunk]]), len(mine), torch.Tensor.backward)
    return state(model, terms)


def worker() -> dict[str, dict[str, Tensor]]:
    """Everything at this number of processes; in the test's own process it gives the single process's results."""
    straight = torch.arange(N)
    results = {"official": one_step(official_network(), straight), "classify": classify()}
    for name in METHODS:
        results[f"{name} straight"] = one_step(network(name), straight)
        results[f"{name} shuffled"] = one_step(network(name), shuffled())
        results[f"{name} chunked"] = one_step(network(name), straight, CHUNK)
        results[f"{name} chunked without norm"] = one_step(network(name, batch_norm=False), straight, CHUNK)
        results[f"{name} three steps"] = three_steps(name)
    return results


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    """Equal keys, and values equal to rtol of each tensor's largest entry (a bias before batch norm has gradient 0)."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        largest = float(value.abs().max())
        torch.testing.assert_close(actual[key], value, rtol=rtol, atol=max(rtol * largest, 1e-12), msg=key)


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Tensor]]:
    return worker()


@pytest.fixture(scope="module", params=[2, 3, pytest.param(4, marks=pytest.mark.slow)])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return torchrun(worker, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", ["straight", "shuffled", "chunked", "chunked without norm"])
def test_loss_gradients_and_running_statistics_are_those_of_one_process(single, several, name, case):
    for result in several:
        assert_close(result[f"{name} {case}"], single[f"{name} {case}"])


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_the_samples_does_not_matter(single, name):
    assert_close(single[f"{name} shuffled"], single[f"{name} straight"])


@pytest.mark.parametrize("name", METHODS)
def test_three_optimizer_steps_are_those_of_one_process(single, several, name):
    for result in several:
        assert_close(result[f"{name} three steps"], single[f"{name} three steps"], rtol=1e-8)


def test_the_official_all_reduce_gives_one_over_world_size_of_the_gradient(single, several):
    expected = single["official"]
    assert_close(single["barlow_twins straight"] | expected, expected | single["barlow_twins straight"])
    for result in several:
        control = {k: v * len(several) if k.startswith("grad") else v for k, v in result["official"].items()}
        assert_close(control, expected)


def test_accumulation_of_a_mean_loss_is_that_of_one_process(single, several):
    mean = {k: sum(result["classify"][k] for result in several) / len(several) for k in ("loss", "top1")}
    for result in several:
        assert_close(result["classify"] | mean, single["classify"])
