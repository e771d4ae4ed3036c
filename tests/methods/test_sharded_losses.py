"""A loss that several processes compute together is that of the whole batch: terms and gradients, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrun import torchrun

from ssl_bench.methods import METHODS, BarlowTwins, Method, SimCLR, SupCon, VICReg
from ssl_bench.methods.parts import nt_xent
from ssl_bench.methods.parts.off_diagonal import gram_is_cheaper
from ssl_bench.runtime.distributed import rank, world_size
from ssl_bench.training.gradient import global_loss, shards

N = 12
FORMS = {"gram": 20, "cross product": 6}  # the embedding's D
BLOCKS = {"one block": 1 << 24, "blocks of one anchor": 1, "uneven blocks": 5 * 2 * N}
CASES: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "barlow_twins": (BarlowTwins, {}),
    "barlow_twins, divisor": (BarlowTwins, {"divisor": 32}),
    "vicreg": (VICReg, {}),
    "simclr": (SimCLR, {}),
    "supcon": (SupCon, {}),
}


def method(name: str) -> Method:
    cls, options = CASES[name]
    return cls(nn.Identity(), 4, projector=(4,), **options)


def outputs(name: str, d: int) -> dict[str, Tensor]:
    """The global batch's, correlated between views, with another mean and scale in each dimension."""
    generator = torch.Generator().manual_seed(d)
    common, noise1, noise2 = torch.randn(3, N, d, dtype=torch.float64, generator=generator)
    scale, shift = torch.linspace(0.1, 2, d, dtype=torch.float64), torch.linspace(-3, 3, d, dtype=torch.float64)
    made = {"z1": (common + 0.5 * noise1) * scale + shift, "z2": (common + 0.5 * noise2) * scale + shift}
    return made | ({"labels": torch.tensor([0, 0, 1, 2, 1, 0, 2, 1, 0, 1, 2, 2])} if name == "supcon" else {})


def computed(name: str, d: int, block: int) -> dict[str, Tensor]:
    """The terms, and what this process's rows get: 1 / world_size of it is the gradient of the loss."""
    nt_xent.BLOCK = block
    mine = slice(rank() * N // world_size(), (rank() + 1) * N // world_size())
    rows = {key: value[mine].clone() for key, value in outputs(name, d).items()}
    leaves = [z.requires_grad_() for key, z in rows.items() if key != "labels"]
    terms = global_loss(method(name), rows)
    gradients = torch.autograd.grad(3 * terms["loss"], leaves)  # 3: as under a gradient scaler
    whole = {f"gradient of z{number}": grad / world_size() for number, grad in enumerate(gradients, 1)}
    return {key: value.detach() for key, value in (terms | whole).items()}


def worker() -> dict[str, Any]:
    before = nt_xent.BLOCK
    try:
        found: dict[str, Any] = {
            f"{name}, {form}, {blocks}": computed(name, d, block)
            for name in CASES
            for form, d in FORMS.items()
            for blocks, block in BLOCKS.items()
        }
    finally:
        nt_xent.BLOCK = before
    return {"shared": found, "own loss": own_loss(), "second derivative": second_derivative()}


@pytest.fixture(scope="module", params=[2, 3])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return torchrun(worker, request.param, tmp_path_factory.mktemp("shards"))


def test_terms_and_gradients_are_those_of_the_whole_batch(several):
    alone = worker()["shared"]
    for number, result in enumerate(several):
        mine = slice(number * N // len(several), (number + 1) * N // len(several))
        for case, expected in alone.items():
            actual = result["shared"][case]
            assert actual.keys() == expected.keys()
            for name, value in expected.items():
                wanted = value[mine] if name.startswith("gradient") else value
                size = float(value.abs().max())
                torch.testing.assert_close(actual[name], wanted, rtol=0, atol=1e-10 * size, msg=f"{case} {name}")


def test_both_forms_are_tried():
    assert [gram_is_cheaper(N, d) for d in FORMS.values()] == [True, False]


class OwnLoss(BarlowTwins):
    """A plug-in's author who knows nothing of shards."""

    def loss(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Twice that of Barlow Twins."""
        return {"loss": 2 * super().loss(z1, z2)["loss"], "images": z1.new_tensor(float(len(z1)))}


class OwnLossInShards(OwnLoss):
    """And one who knows."""

    sharded_loss = BarlowTwins.sharded_loss


def own_loss() -> dict[str, Tensor]:
    """What the engine computes then."""
    rows = {key: value[rank() :: world_size()] for key, value in outputs("vicreg", 6).items()}
    return global_loss(OwnLoss(nn.Identity(), 4, projector=(4,)), rows)


def test_a_subclass_with_a_loss_of_its_own_gets_all_rows(several):
    alone = own_loss()
    for result in several:
        assert result["own loss"]["images"] == N
        torch.testing.assert_close(result["own loss"]["loss"], alone["loss"], rtol=1e-10, atol=0)


def test_which_methods_are_computed_in_shards():
    built = {cls: cls(nn.Identity(), 4, projector=(4,)) for cls in (BarlowTwins, VICReg, SimCLR, SupCon)}
    assert all(map(shards, built.values()))
    assert not shards(OwnLoss(nn.Identity(), 4, projector=(4,)))
    assert shards(OwnLossInShards(nn.Identity(), 4, projector=(4,)))
    assert not shards(METHODS["simsiam"](nn.Identity(), 4, projector=(4,), predictor=(4,)))
    patched = built[SimCLR]
    patched.loss = lambda **_: {}
    assert not shards(patched)


def second_derivative() -> str:
    """Of an attempt, the error."""
    rows = {key: value[:4].requires_grad_() for key, value in outputs("simclr", 6).items()}
    loss = global_loss(method("simclr"), rows)["loss"]
    try:
        torch.autograd.grad(loss, list(rows.values()), create_graph=True)
    except NotImplementedError as error:
        return str(error)
    return "computed"


def test_a_second_derivative_of_shards_is_refused(several):
    assert second_derivative() == "computed"
    for result in several:
        assert result["second derivative"] == "a loss that several processes share has a first derivative only"
