"""A method's loss, gradient and buffers do not depend on the number of processes, chunks or a replay (float64)."""

import pytest
import torch
import torch.distributed as dist
from tape import TapeRecorder
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrun import torchrun

from ssl_bench.data.sampler import local_positions
from ssl_bench.methods import METHODS, BarlowTwins, Classifier, Method
from ssl_bench.runtime.distributed import assert_equal_parameters, rank, synchronize_batch_norm, world_size
from ssl_bench.training.check_method import TOLERANCE, Case, State, distance, states, train
from ssl_bench.training.gradient import compute_gradient
from ssl_bench.training.graphs import GraphedGradient

# Numbers that a full-size method would have, made small.
OPTIONS = {
    "dino": {"prototypes": 32},
    "swav": {"prototypes": 24},
    "moco_v2": {"queue": 40},  # not a multiple of the batch
    "nnclr": {"queue": 40},
    "mae": {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2},  # the default takes 100 times as long
    "mmcr": {"crops": 3, "lmbda": 0.1},
}
QUEUE = {**OPTIONS["swav"], "queue": 72}  # which two steps do not fill
OUTSIDE = "tiny_net:DropoutTwins"  # whose random numbers belong to the images


def cases() -> dict[str, Case]:
    known = {name: Case(name, OPTIONS.get(name, {})) for name in METHODS}
    return known | {"swav with a queue": Case("swav", QUEUE), "dropout": Case(OUTSIDE)}


N = 24


class OfficialBarlowTwins(BarlowTwins):
    """The negative control: C is summed by an all-reduce that autograd does not see, as in the official code."""

    per_sample = True

    def loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """On this process's rows."""
        z1, z2 = self.standardise(z1), self.standardise(z2)
        c = z1.T @ z2 / (len(z1) * world_size())
        if world_size() > 1:
            dist.all_reduce(c.detach())  # the same memory
        on_diagonal = (c.diagonal() - 1).square().sum()
        off_diagonal = (c - torch.diag(c.diagonal())).square().sum()
        return {"loss": on_diagonal + self.lambd * off_diagonal}


def official_network(kind: type[BarlowTwins]) -> Method:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(1), nn.Linear(108, 40), nn.Tanh())
    model = kind(backbone, 40, projector=(16, 20)).double()
    model.standardise = nn.BatchNorm1d(20, affine=False).double()
    return model


def one_step(model: Method, images: Tensor, n_chunks: int = 1) -> State:
    mine = local_positions(N, N // n_chunks, rank(), world_size())
    synchronize_batch_norm(model)
    wrapped: nn.Module = DistributedDataParallel(model) if world_size() > 1 else model
    inputs = [tuple(part) for part in (images[:, rows] for rows in mine)]
    terms = compute_gradient(wrapped, lambda chunk: inputs[chunk], n_chunks, Tensor.backward)
    assert_equal_parameters(model)
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().clone() for name, value in (terms | grads).items()}


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shift = torch.arange(N, dtype=torch.float64).div(2, rounding_mode="floor").view(N, 1, 1, 1)
    return torch.randn(2, N, 3, 6, 6, dtype=torch.float64, generator=generator) * (1 + shift / 4) + shift - 5


def classify() -> State:
    torch.manual_seed(0)
    model = Classifier(nn.Sequential(nn.Flatten(1), nn.Linear(108, 7)), 7, 5).double()
    x, y = images()[0], torch.arange(N) % 5
    mine = local_positions(N, 12, rank(), world_size())
    wrapped: nn.Module = DistributedDataParallel(model) if world_size() > 1 else model
    terms = compute_gradient(wrapped, lambda chunk: (x[mine[chunk]], y[mine[chunk]]), 2, Tensor.backward)
    return terms | {f"grad {name}": p.grad for name, p in model.named_parameters()}


def worker() -> dict[str, dict[str, State]]:
    """Everything at this number of processes; in the test's own process it gives the single process's results."""
    results = {name: states(case) for name, case in cases().items()}
    kinds = {"official": OfficialBarlowTwins, "ours": BarlowTwins}
    return results | {
        "controls": {name: one_step(official_network(kind), images()) for name, kind in kinds.items()},
        "classify": {"classify": classify()},
    }


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, State]]:
    return worker()


@pytest.fixture(scope="module", params=[2, 3, pytest.param(4, marks=pytest.mark.slow)])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return torchrun(worker, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("how", ["whole", "chunked", "chunked, fixed statistics", "recomputed"])
def test_several_processes_are_one(single, several, name, how):
    for result in several:
        far, where = distance(single[name][how], result[name][how])
        assert far <= TOLERANCE, where


@pytest.mark.parametrize("name", cases())
def test_chunks_are_the_whole_batch_where_batch_norm_does_not_see_them(single, name):
    far, where = distance(single[name]["whole, fixed statistics"], single[name]["chunked, fixed statistics"])
    assert far <= TOLERANCE, where


@pytest.mark.parametrize("name", cases())
def test_blocks_that_are_computed_twice_change_nothing(single, several, name):
    for result in [single, *several]:
        assert distance(result[name]["whole"], result[name]["recomputed"])[0] == 0.0


def test_the_tests_could_see_it(single):
    """With batch norm over chunks the gradient is another one."""
    far, _ = distance(single["barlow_twins"]["whole"], single["barlow_twins"]["chunked"])
    assert far > 0.01


@pytest.mark.parametrize("name", cases())
def test_everything_that_trains_gets_a_gradient(single, name):
    trained = {f"gradient of {part}" for part, p in cases()[name].build().named_parameters() if p.requires_grad}
    state = single[name]["whole"]
    assert trained == {part for part in state if part.startswith("gradient")}
    assert all(state[part].isfinite().all() and state[part].any() for part in trained)


@pytest.mark.parametrize("name", cases())
def test_a_run_goes_on_from_its_state(name):
    method, resumed = cases()[name].build(), cases()[name].build()
    train(method)
    resumed.load_state_dict(method.state_dict())
    assert distance(train(method, steps=1), train(resumed, steps=1))[0] == 0.0


@pytest.mark.parametrize("name", cases())
def test_replayed_steps_are_the_plain_ones(name):
    recorders = []

    def graphed(task: Method) -> GraphedGradient:
        recorders.append(TapeRecorder())
        return GraphedGradient(compute_gradient, task, pytest.fail, recorders[-1])

    plain, replayed = (train(cases()[name].build(), steps=7, gradient=how) for how in (None, graphed))
    assert recorders[0].replays == 4
    assert distance(plain, replayed)[0] == 0.0


def test_the_official_all_reduce_gives_one_over_world_size_of_the_gradient(single, several):
    def gradients(results: dict) -> list[State]:
        found = [results["controls"][name] for name in ("official", "ours")]
        return [{k: v for k, v in state.items() if k.startswith("grad")} for state in found]

    official, ours = gradients(single)
    assert distance(official, ours)[0] < 1e-10
    for result in several:
        control, exact = gradients(result)
        assert distance(ours, exact)[0] < 1e-10
        assert distance(official, {k: v * len(several) for k, v in control.items()})[0] < 1e-10


def test_accumulation_of_a_mean_loss_is_that_of_one_process(single, several):
    outcomes = [result["classify"]["classify"] for result in several]
    expected = single["classify"]["classify"]
    for name, rtol in (("loss", 1e-12), ("top1", 1e-6), ("top5", 1e-6)):  # accuracies are in float32
        mean = sum(float(outcome[name]) for outcome in outcomes) / len(outcomes)
        assert mean == pytest.approx(float(expected[name]), rel=rtol)
    gradients = {name: value for name, value in expected.items() if name.startswith("grad")}
    for outcome in outcomes:
        assert distance(gradients, {name: outcome[name] for name in gradients})[0] < 1e-10
