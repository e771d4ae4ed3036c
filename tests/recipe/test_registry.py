"""Names become classes, and keyword values are checked against signatures."""

from typing import Literal

import pytest

from ssl_bench.recipe import registry


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


class Open:
    """Takes anything."""

    def __init__(self, params, **anything):
        self.values = (params, anything)


HERE = f"{__name__}:Example"


def test_options_come_from_signature_and_docstring():
    known = registry.options(Example)
    assert list(known) == ["lr", "delay_steps", "mode", "pair"]
    assert known["delay_steps"].help == "steps before anything happens; 0 = none."
    assert known["pair"].help == ""


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
