"""Recipes that were composed before are known, as long as nothing that they depend on has changed."""

import json
import os
import subprocess
import sys

import pytest

from ssl_bench.recipe.compose import compose
from ssl_bench.study import known
from ssl_bench.study.grid import load_study
from ssl_bench.study.known import KnownRecipes

WORDS = ["data=digits", "steps=3", "method=vicreg", "method.projector=[8,8]", "optimizer=tvlars", "optimizer.decay=0.1"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("SSL_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def composed(monkeypatch):
    """The command lines that were composed, not known."""
    words = []
    monkeypatch.setattr(known, "compose", lambda track, given: (words.append(list(given)), compose(track, given))[1])
    return words


def ask(*commands, track="pretrain"):
    recipes = KnownRecipes()
    found = [recipes(track, list(words)) for words in commands]
    recipes.save()
    return found


@pytest.mark.parametrize(
    ("track", "words"), [("pretrain", WORDS), ("classify", ["data=digits", "epochs=1", "optimizer=lamb"])]
)
def test_a_known_recipe_is_the_composed_one(composed, track, words):
    first, again = ask(words, track=track) + ask(words, track=track)
    assert composed == [words]
    assert first == again
    assert again.to_dict() == compose(track, words).to_dict()
    assert again.identity() == compose(track, words).identity()
    assert again.name() == compose(track, words).name()


def test_one_that_depends_on_more_than_the_suites_files_is_composed_each_time(composed, tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    outside = [
        ["data=digits", "steps=1", "schedule=tiny_net:constant_schedule"],
        ["data=folder", f"data.path={tmp_path}", "steps=1"],
        ["data=digits", "steps=1", "model.name=tiny_net:TinyNet", "model.stem=imagenet"],
    ]
    for words in outside:
        ask(words)
        ask(words)
    assert composed == [words for words in outside for _ in range(2)]


@pytest.mark.parametrize("damage", ["changed", "cut", "empty", "other"])
def test_what_changed_or_is_damaged_is_composed_again(composed, folder, monkeypatch, damage):
    (expected,) = ask(WORDS)
    file = folder / "recipes.json"
    content = json.loads(file.read_text())
    (key,) = content["recipes"]
    if damage == "changed":
        monkeypatch.setattr(known, "_fingerprint", lambda: "of other files")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    else:
        content["recipes"][key] = {} if damage == "empty" else {**content["recipes"][key], "batch_size": "many"}
        file.write_text(json.dumps(content))
    assert ask(WORDS) == [expected]
    assert composed == [WORDS, WORDS]
    assert ask(WORDS) == [expected]
    assert len(composed) == 2


def test_an_error_is_the_same_each_time():
    for _ in range(2):
        with pytest.raises(ValueError, match=r"optimizer\.lr must be"):
            ask(["data=digits", "steps=3", "optimizer.lr=-"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_done_without(folder):
    folder.mkdir()
    folder.chmod(0o500)
    assert ask(WORDS) == ask(WORDS)


def test_the_file_does_not_grow_without_end(folder, monkeypatch):
    monkeypatch.setattr(known, "MOST", 3)
    for seed in range(5):
        ask([*WORDS, f"seed={seed}"])
    kept = json.loads((folder / "recipes.json").read_text())["recipes"]
    assert [json.loads(key)[-1] for key in kept] == ["seed=2", "seed=3", "seed=4"]


def test_a_study_is_expanded_alike_the_second_time(composed):
    first, second = (load_study("table1_clf_cifar10") for _ in range(2))
    assert len(composed) > 0
    count = len(composed)
    assert [(cell.name, cell.overrides, cell.recipe) for cell in first.cells] == [
        (cell.name, cell.overrides, cell.recipe) for cell in second.cells
    ]
    assert len(composed) == count


LIGHT = [
    ["--help"], ["--version"], ["list", "studies"], ["list", "models"], ["leaderboard", "."],
    ["study", "status", "table1_clf_cifar10"],
]  # fmt: skip


def test_commands_that_only_read_import_no_torch(tmp_path):
    """A study's status needs it the first time, to check the recipes against the plug-ins' signatures."""
    code = (
        "import sys\n"
        "from ssl_bench.cli.app import app\n"
        "for words in {}:\n"
        "    try:\n"
        "        app(words, standalone_mode=False)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    load_study("table1_clf_cifar10")
    done = subprocess.run(
        [sys.executable, "-c", code.format(LIGHT)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
