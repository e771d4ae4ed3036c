"""The check of a method's contract: what it passes, and what it finds."""

import re

import pytest
import torch
from torch import nn

from ssl_bench.cli.check_method import main
from ssl_bench.methods import BarlowTwins, Crop, Method
from ssl_bench.training.check_method import Case, check_method, findings


class Outside(BarlowTwins):
    """A method as a user writes it, with a predictor."""

    def __init__(
        self, backbone: nn.Module, feature_dim: int, *, projector: tuple[int, ...] = (64, 32), scale: float = 1
    ):
        super().__init__(backbone, feature_dim, projector=projector)
        self.predictor = nn.Linear(projector[-1], projector[-1])
        self.scale = scale

    def forward(self, x1, x2):
        """Predictions of the first views, embeddings of the second."""
        return {"z1": self.predictor(self.embed(x1)), "z2": self.scale * self.embed(x2)}


class Faulty(Method):
    """Breaks the contract in the way it is told."""

    def __init__(self, backbone: nn.Module, feature_dim: int, *, how: str = ""):
        super().__init__(backbone, feature_dim, nn.Linear(feature_dim, 4))
        self.how = how
        self.unused = nn.Linear(2, 2) if how == "unused" else None
        self.temperature = nn.Parameter(torch.ones(())) if how == "parameter" else 1.0
        self.register_buffer("seen", torch.zeros(4, dtype=torch.float64))
        self.count = 0

    views = (Crop(), Crop())

    def begin_step(self, progress):  # noqa: ARG002 (the contract's)
        self.count += 1

    def forward(self, x1, x2):
        z1, z2 = self.embed(x1), self.embed(x2)
        if self.how == "batch":  # an output that depends on the other images of this process
            z1 = z1 - z1.mean(dim=0)
        return {"z1": z1, "z2": z2}

    def loss(self, z1, z2):
        weights = torch.linspace(0.5, 1.5, len(z1), dtype=z1.dtype) if self.how == "order" else 1
        loss = ((z1 - z2).square().mean(1) * weights).mean() * self.temperature
        if self.how == "infinite":
            loss = loss / 0
        if self.how == "counts":  # a number that no checkpoint has
            loss = loss * self.count
        return {"loss": loss}


def test_a_method_from_outside_passes_and_says_so(capsys):
    assert main("test_check_method:Outside", ["method.scale=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in lines[:-1]] == ["ok   "] * 10
    assert lines[0] == "ok   outputs have one row an image: z1 (24, 12), z2 (24, 12)"
    assert lines[-1] == "test_check_method:Outside: keeps the contract"


def test_the_function_for_pytest_takes_a_class_and_its_keywords():
    assert len(check_method(Outside, scale=0.5)) == 10


@pytest.mark.parametrize(
    ("how", "line"),
    [
        (
            "parameter",
            "FAIL a step: Faulty: loss must use no trainable parameter, got temperature: move it into forward",
        ),
        ("unused", "FAIL every trainable parameter gets a gradient: unused.weight, unused.bias"),
        ("infinite", r"FAIL gradients are finite at the start: backbone\.0\.weight"),
        ("order", "FAIL the order of the images does not matter: "),
        ("batch", "FAIL 2 chunks = the whole batch: "),
        ("counts", "FAIL a state that is saved and loaded goes on alike: "),
    ],
)
def test_a_fault_is_named(how, line):
    found = []
    for finding in findings(Case("test_check_method:Faulty", {"how": how})):
        found.append(str(finding))
        if not finding.good:
            break
    assert re.match(line, found[-1]), found


def test_unknown_names_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"unknown method 'baylow_twins'; did you mean 'barlow_twins'"):
        main("baylow_twins")
    with pytest.raises(ValueError, match=r"unknown key 'method\.lamdb'"):
        main("barlow_twins", ["method.lamdb=1"])
    with pytest.raises(ValueError, match=r"overrides must be method\.key=value, got 'optimizer\.lr=1'"):
        main("barlow_twins", ["optimizer.lr=1"])
