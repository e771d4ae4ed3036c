"""Names become one safe component of a path."""

import pytest

from ssl_bench.recipe.compose import compose
from ssl_bench.runtime.paths import file_name
from ssl_bench.study.cells import CellStore
from ssl_bench.study.grid import Cell


@pytest.mark.parametrize("name", ["lars", "MyOptimizer", "b512", "cifar10-bt_x.y", "0b14d5e76b0984d8"])
def test_a_safe_name_stays(name):
    assert file_name(name) == name


HOSTILE = [
    "../../etc/passwd",
    "/root",
    "a/b",
    "..",
    ".",
    "",
    "-rf",
    ".hidden",
    "a\0b",
    "a\nb",
    "ü" * 50,
    "x" * 500,
    "a b",
]
HOSTILE += ["\\\\x\\y", "\udcff", "CON:", "~root", "$HOME", "a*?[b]"]


@pytest.mark.parametrize("name", HOSTILE)
def test_others_become_safe_ones(name, tmp_path):
    safe = file_name(name)
    assert safe.isascii()
    assert safe
    assert len(safe) <= 60
    assert not set(safe) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
    assert safe[0] not in ".-"
    assert (tmp_path / safe).parent == tmp_path
    (tmp_path / safe).mkdir()
    assert file_name(safe) == safe


def test_names_that_lose_much_stay_apart():
    names = ["x" * 100, "x" * 101, "äöü", "äöß", "", ".", ".."]
    assert len({file_name(name) for name in names}) == len(names)


def test_a_runs_and_a_studys_folder_stay_inside(tmp_path):
    recipe = compose("pretrain", ["optimizer=timm", "optimizer.name=lion", "optimizer.lr=1", "data=digits"])
    recipe.optimizer.options["name"] = "../../x/y"  # timm has no such name, which compose would say
    name = recipe.name()
    assert "/" not in name
    assert name.startswith("digits-barlow_twins-resnet18-x-y-")
    assert recipe.folder() == f"runs/{name}"
    cell = Cell("..", {}, {}, recipe)
    assert CellStore(tmp_path / "runs").folder(cell).parent.parent == tmp_path / "runs"
    assert CellStore(tmp_path / "runs").folder(cell).parent.name not in ("..", ".", "")
