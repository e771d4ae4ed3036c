"""The house rules that a reader relies on: which folder may import which, no cycles, and no crowded folder."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import requires
from pathlib import Path

import pytest

from ssl_bench.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ssl_bench"
OUTSIDE = ("methods", "optim", "eval")  # top-level folders, imported as ssl_bench.methods and so on

ALLOWED = {
    "runtime": set(),
    "optim": set(),
    "eval": set(),
    "methods": set(),
    "models": {"runtime"},
    "augment": {"runtime"},
    "records": {"runtime"},
    "data": {"augment", "eval", "runtime"},  # eval: the held-out split is that of linear-cached-v1
    "recipe": {"data", "eval", "methods", "optim", "runtime"},  # to check names
    "training": {"augment", "data", "eval", "methods", "models", "optim", "recipe", "records", "runtime"},
    "study": {"data", "recipe", "records", "runtime"},
    "report": {"recipe", "records", "runtime", "study"},
    "pretrain": {"training", "recipe", "runtime"},
    "classify": {"training", "recipe", "runtime"},
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *(path for name in OUTSIDE for path in (ROOT / name).rglob("*.py"))]:
        parts = ["ssl_bench", *path.relative_to(ROOT).with_suffix("").parts]
        parts = parts[1:] if parts[1] == "ssl_bench" else parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The package's modules that one imports, anywhere in its file."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ssl_bench":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ssl_bench")


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_folder_imports_only_what_it_may(name):
    members = [module for module in MODULES if room(module) == name]
    assert members
    found = {room(target) for module in members for target in imports(module)} - {name, ""}
    assert found <= ALLOWED[name], f"{name} imports {sorted(found - ALLOWED[name])}"


def test_every_folder_has_a_rule():
    assert {room(module) for module in MODULES} - {"", "cli", "__main__"} == set(ALLOWED)  # these two may import all


def test_there_are_no_cycles():
    # A package's face imports its members, which is no cycle as long as they do not import it back.
    graph = {module: set(imports(module)) - {module} for module in MODULES}
    graph["ssl_bench"] = set()  # which names the API's functions for type checkers, and imports them when they are used
    folders: dict[str, set[str]] = {}
    for module, targets in graph.items():
        folders.setdefault(room(module), set()).update({room(target) for target in targets} - {room(module), ""})
    for kind in (graph, folders):
        try:
            TopologicalSorter(kind).prepare()
        except CycleError as error:
            pytest.fail(f"a cycle: {' -> '.join(error.args[1])}")


def test_no_folder_is_crowded():
    def names(folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")

    own = [path for path in names(PACKAGE) if not (PACKAGE / path).is_symlink()]
    crowded = [folder for folder in [*PACKAGE.iterdir(), *map(ROOT.joinpath, OUTSIDE)] if folder.is_dir()]
    assert len([name for name in own if not name.startswith("__") and name != "py.typed"]) <= 12, own
    offered = {f"{name}.py" for name in METHODS}  # one file a method: that list may grow
    for folder in crowded:
        others = [name for name in names(folder) if name not in offered]
        assert len(others) <= 18, f"{folder.name}: {others}"


def test_no_name_hides_a_module_that_others_import():
    """Under script launch ssl_bench/ is sys.path[0], so its names come before every installed package's."""
    installed = {line.split(";")[0].split("[")[0].split(">")[0].split("=")[0].strip() for line in requires("ssl-bench")}
    taken = set(sys.stdlib_module_names) | {name.replace("-", "_").lower() for name in installed}
    assert not {path.stem for path in PACKAGE.iterdir()} & taken
