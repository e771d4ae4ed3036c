"""Study files that somebody else wrote: nothing in them is imported, used as a path or expanded without end."""

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssl_bench.study.grid import load_study
from ssl_bench.study.run import status_main


def tiny(**block: Any) -> dict[str, Any]:
    """A study of two cells on digits."""
    axes = [{"optimizer.lr": [1, 2]}]
    return {"base": {"data": "digits"}, "blocks": [{"track": "classify", "axes": axes, **block}]}


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    "values",
    [
        {"method": "evil:Method"}, {"optimizer": "evil:make"}, {"optimizer.target": "evil:make"}, {"data": "evil:find"},
        {"data.name": "evil:find"}, {"model.name": "evil:net"}, {"schedule": "evil:make"},
        {"eval.protocols": ["knn-v1", "evil:Probe"]}, {"data.path": "data"}, {"data.cache_dir": "cache"},
        {"eval.data": "evil:find"}, {"eval.data_path": "data"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["base", "set", "axes"])
def test_a_study_names_code_and_paths_only_with_trust(
    values: dict[str, Any], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    Path("evil.py").write_text("open('ran', 'w').close()")
    content = tiny(**({"axes": [[values]]} if place == "axes" else {"set": values} if place == "set" else {}))
    content["blocks"][0]["track"] = "pretrain"
    if place == "base":
        content["base"] |= values
    path = write(tmp_path, content)
    key = next(iter(values))
    with pytest.raises(ValueError, match=rf"^{key} must be .* from study tiny: block 1: --trust \w+ it$"):
        load_study(path)
    assert not Path("ran").exists()
    with contextlib.suppress(ValueError):  # it has no such classes; but now it is imported
        load_study(path, trust=True)
    assert Path("ran").exists() == (key not in ("data.path", "data.cache_dir", "eval.data_path"))


def test_the_users_own_words_are_trusted(tmp_path: Path) -> None:
    path = write(tmp_path, tiny(set={"data.path": "theirs"}))
    assert load_study(path, overrides=["data.path=mine"]).cells[0].recipe.data.path == "mine"
    assert load_study(path, data_paths={"digits": "mine"}).cells[0].recipe.data.path == "mine"
    included = write(tmp_path, {"include": ["../other.yaml"]})
    with pytest.raises(ValueError, match=r"include must be names of studies, got .*other\.yaml': --trust reads a path"):
        load_study(included)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "study bomb: YAML must have at most 100000 values, got 101232 or more"),
        ("a: &a [*a]", "study bomb: YAML must have at most 50 levels, got more"),
        ("blocks: " + "[" * 5000 + "]" * 5000, "study bomb: YAML must have at most 50 levels, got more"),
        ("\n".join(" " * n + "a:" for n in range(300)), "study bomb: YAML must have at most 50 levels, got more"),
        ("a: 1\n" * 20_000, "study bomb must have at most 65536 bytes, got 100000"),
        ("base: {data: digits, steps: 1}\nblocks:\n- track: classify\n  axes:\n"
         + "".join(f"  - {{a{n}: [1,2,3,4,5,6,7,8,9,0]}}\n" for n in range(12)),
         "study bomb: block 1: a study must have at most 20000 cells, got 1000000000000 or more"),
    ],
)  # fmt: skip
def test_a_file_that_means_too_much_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_study(tmp_path / "bomb.yaml")


def test_looking_at_a_study_writes_nothing(tmp_path: Path) -> None:
    assert status_main(write(tmp_path, tiny()), runs=tmp_path / "runs") == 1
    assert not (tmp_path / "runs").exists()
