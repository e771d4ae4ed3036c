"""Names become classes, and keyword values are checked against signatures."""

from importlib.metadata import EntryPoint
from typing import Literal

import pytest

from ssl_bench.recipe import registry
from ssl_bench.recipe.compose import compose


class Example:
    """An optimizer of a test.

    Args:
        params: what to optimise.
        lr: learning rate, > 0.
        delay_steps: steps before anything happens;
            0 = none.
        mode: one of two.
    """

    def __init__(
        self, params, *, lr: float, delay_steps: int = 0, mode: Literal["a", "b"] = "a", pair: tuple[int, int] = (1, 2)
    ):
        self.values = (params, lr, delay_steps, mode, pair)

    def step(self):
        """Moves nothing."""


class Open:
    """Takes anything."""

    def __init__(self, params, **anything):
        self.values = (params, anything)


class Accuracy:
    """An evaluator of a test."""

    name = "accuracy-v1"

    def __call__(self):
        return {}


def locate(path):
    """A data set of a test."""


HERE = f"{__name__}:Example"


def test_options_come_from_signature_and_docstring():
    known = registry.options(Example)
    assert list(known) == ["lr", "delay_steps", "mode", "pair"]
    assert known["delay_steps"].help == "steps before anything happens; 0 = none."
    assert known["pair"].help == ""


def test_a_docstring_of_another_style_or_none_is_no_obstacle():
    def numpy_style(params, *, lr: float):
        """Steps.

        Parameters
        ----------
        lr : float
            Learning rate.
        """

    def broken(params, *, lr: float):
        """Steps.

        Args:
        """

    assert registry.options(numpy_style)["lr"].help == "Learning rate."
    assert registry.options(broken)["lr"].help == ""


def test_check_converts_and_fills_in_defaults():
    values = registry.check("optimizer", HERE, {"lr": "0.5", "pair": [3, 4]})
    assert values == {"lr": 0.5, "delay_steps": 0, "mode": "a", "pair": (3, 4)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs optimizer.lr"),
        ({"lr": "x"}, "optimizer.lr must be a valid number, got 'x'"),
        ({"lr": 1, "mode": "c"}, "optimizer.mode must be 'a' or 'b', got 'c'"),
        (
            {"lr": 1, "delay_steps": 1.5},
            "optimizer.delay_steps must be a valid integer, got 1.5",
        ),
        ({"lr": 1, "delay": 1}, "unknown key 'optimizer.delay'; did you mean 'delay_"),
        (
            {"lr": 1, "delay_steps": 1, "delay_epochs": 1},
            "give only one of optimizer.delay_steps, optimizer.delay_epochs",
        ),
        ({"lr": 1, "pair": [1]}, "optimizer.pair"),
    ],
)
def test_check_refuses_in_one_line(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        registry.check("optimizer", HERE, values)
    assert "\n" not in str(caught.value)


def test_durations_become_steps_once():
    for given, steps in (({"delay_epochs": 10}, 977), ({"delay_fraction": 0.25}, 50), ({"delay_steps": 3}, 3)):
        values = registry.check("optimizer", HERE, {"lr": 1, **given})
        assert registry.in_steps(Example, values, 97.65625, 200)["delay_steps"] == steps


def test_a_plugin_with_open_keywords_gets_them_as_they_are():
    assert registry.check("optimizer", f"{__name__}:Open", {"lr": 1, "z": [1]}) == {"lr": 1, "z": [1]}


@pytest.mark.parametrize("kind", ["method", "optimizer", "schedule"])
def test_every_builtin_documents_every_keyword(kind):
    for name, factory in registry.builtin(kind).items():
        for option in registry.options(factory).values():
            assert option.help, f"{kind} {name} does not document {option.name}"


@pytest.fixture
def offered(monkeypatch):
    """Entry points as an installed package has them, one of each kind."""
    objects = {"evaluator": "Accuracy", "dataset": "locate", "backbone": "locate", "optimizer": "Example"}
    points = {
        kind: {"mine": EntryPoint("mine", f"{__name__}:{name}", f"ssl_bench.{kind}s")} for kind, name in objects.items()
    }
    monkeypatch.setattr(registry, "installed", lambda kind: points.get(kind, {}))


@pytest.mark.parametrize("name", ["mine", f"{__name__}:{{}}"])
@pytest.mark.usefixtures("offered")
def test_every_kind_comes_from_outside_by_entry_point_or_module(name):
    evaluator = registry.resolve("evaluator", name.format("Accuracy"))
    assert isinstance(evaluator, Accuracy)  # made where the name is a class's
    assert registry.resolve("dataset", name.format("locate")) is locate
    assert registry.resolve("backbone", name.format("locate")) is locate
    data, model, optimizer, protocol = map(name.format, ("locate", "locate", "Example", "Accuracy"))
    recipe = compose(
        "pretrain",
        [
            f"data={data}",
            f"model={model}",
            f"optimizer={optimizer}",
            "optimizer.lr=1",
            f"eval.protocols=['{protocol}']",
        ],
    )
    assert (recipe.data.name, recipe.model.name, recipe.optimizer.target) == (data, model, optimizer)
    assert recipe.eval.protocols == [protocol]
    readable = f"{data.split(':')[-1]}-barlow_twins-{model.split(':')[-1]}-{optimizer.split(':')[-1]}-b512-lr1-e100-s0-"
    assert recipe.name().startswith(readable.lower())


def test_builtin_data_sets_and_backbones_are_known_to_their_folders_by_name():
    assert registry.resolve("dataset", "cifar10") == "cifar10"
    assert registry.resolve("backbone", "resnet18") == "resnet18"
    assert registry.resolve("evaluator", "knn-v1").name == "knn-v1"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.name=cifar"], r"unknown dataset 'cifar'; did you mean 'cifar10'\?"),
        (["data=no.such:thing"], "dataset 'no.such:thing' cannot be imported: No module named 'no'"),
        (["model.name=json:dumpz"], "backbone 'json:dumpz' cannot be imported: .* no attribute 'dumpz'"),
        (
            ["eval.protocols=['json:decoder']"],
            "evaluator 'json:decoder' must be an object with a name that can be called, got <module",
        ),
        ([f"eval.protocols=[{__name__}:locate]"], "must be an object with a name that can be called"),
        ([f"eval.protocols=[{__name__}:Example]"], "cannot be imported: .*missing"),
        (["method=json:decoder"], "method 'json:decoder' must be a class or function, got <module"),
        (["eval.protocols=[no.such:thing]"], "evaluator 'no.such:thing' cannot be imported"),
    ],
)
def test_code_from_outside_is_refused_before_data_is_read(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        compose("pretrain", overrides)
    assert "\n" not in str(caught.value)


def test_the_path_of_a_data_set_from_outside_is_part_of_the_identity():
    one, two = (compose("pretrain", [f"data={__name__}:locate", f"data.path={path}"]) for path in "ab")
    assert one.identity() != two.identity()
