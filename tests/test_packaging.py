"""The lists in pyproject.toml against the folders: an install must not lack what a checkout has."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_listed_and_every_top_level_one_is_mapped():
    inside = (path.parent for path in (ROOT / "ssl_bench").rglob("__init__.py"))  # which follows no links
    folders = {".".join(path.relative_to(ROOT).parts) for path in inside}
    linked = {path.name for path in (ROOT / "ssl_bench").iterdir() if path.is_symlink()}
    below = {path.parent.relative_to(ROOT) for name in linked for path in (ROOT / name).rglob("__init__.py")}
    mapped = {f"ssl_bench.{'.'.join(path.parts)}": path.as_posix() for path in below}
    assert mapped.keys() == {f"ssl_bench.{name}" for name in linked} | {"ssl_bench.methods.parts"}
    assert set(SETUPTOOLS["packages"]) == folders | mapped.keys()
    assert SETUPTOOLS["package-dir"] == mapped


def test_every_data_file_is_packaged():
    where = SETUPTOOLS["package-dir"]
    packages = {ROOT.joinpath(where.get(name, name.replace(".", "/"))): name for name in SETUPTOOLS["packages"]}
    for folder, name in packages.items():
        listed = {path for pattern in SETUPTOOLS["package-data"].get(name, []) for path in folder.glob(pattern)}
        files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
        own = {path for path in files if next(parent for parent in path.parents if parent in packages) == folder}
        assert own <= listed, f"{name}: {sorted(path.name for path in own - listed)}"
