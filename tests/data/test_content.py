"""A data set is known by what it holds, wherever it lies."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import TINY_PRETRAIN, results
from made_data import encode, pixels, write_images, write_parquet

from ssl_bench.cli.evaluate import evaluate_run as evaluate
from ssl_bench.data.content import content_digest
from ssl_bench.data.dataset import data_content, load_dataset
from ssl_bench.data.folders import scan
from ssl_bench.pretrain import main as pretrain
from ssl_bench.recipe.compose import compose
from ssl_bench.recipe.content import with_content
from ssl_bench.recipe.identity import differences
from ssl_bench.study.grid import Cell, load_study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat", "dog")):
        for split, count in (("train", 60), ("test", 6)):
            write_images(tmp_path / "set" / split / name, pixels(count, 16, seed=10 * number + count))
    return tmp_path / "set"


def recipe(folder: object, *more: str):
    return with_content(compose("pretrain", ["data=folder", f"data.path={folder}", *more]))


def test_moved_and_touched_data_is_the_same(folder, tmp_path, monkeypatch):
    one = recipe(folder)
    assert len(one.data.content) == 16
    shutil.copytree(folder, tmp_path / "else" / "where")
    for path in (tmp_path / "else").rglob("*.png"):
        os.utime(path, (1, 1))
    moved = recipe(tmp_path / "else" / "where")
    assert (moved.identity(), moved.name()) == (one.identity(), one.name())
    assert moved.data.path != one.data.path
    assert differences(one.to_dict(), moved.to_dict()) == []
    monkeypatch.chdir(tmp_path)
    assert recipe("set").identity() == recipe("./else/../set/").identity() == one.identity()
    load_dataset("folder", path=folder)  # now the labels come from the cache
    assert recipe(folder).identity() == one.identity()
    assert load_dataset("folder", path=folder).content == one.data.content


@pytest.mark.parametrize("change", ["size", "name", "label", "bytes", "removed", "added"])
def test_other_data_is_not(folder, change):
    before = recipe(folder)
    path = folder / "train" / "cat" / "0.png"
    if change == "size":
        path.write_bytes(encode(pixels(1, 17)[0]))
    elif change == "name":
        path.rename(path.with_name("zero.png"))
    elif change == "label":
        path.rename(folder / "train" / "dog" / "a.png")
    elif change == "bytes":  # of every file, as samples are what is looked at
        for each in folder.rglob("*.png"):
            each.write_bytes(each.read_bytes()[::-1])
    elif change == "removed":
        path.unlink()
    else:
        write_images(folder / "train" / "cat", pixels(1, seed=99), "new{}.png")
    after = recipe(folder)
    assert after.identity() != before.identity()
    (line,) = differences(before.to_dict(), after.to_dict())
    assert line == f'data.content: the run has "{before.data.content}", asked for "{after.data.content}"'


def test_label_counts_and_single_large_files_are_looked_into(tmp_path):
    big = tmp_path / "big.bin"
    big.write_bytes(np.random.default_rng(0).bytes(10**6))
    files = tuple(scan(tmp_path))
    one = content_digest(files, [np.array([0, 0, 1])])
    assert content_digest(files, [np.array([1, 0, 0])]) == one  # how many of each, as a rename would show
    assert content_digest(files, [np.array([0, 1, 1])]) != one
    data = bytearray(big.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = bytes(20_000)
    big.write_bytes(data)
    assert content_digest(tuple(scan(tmp_path)), [np.array([0, 0, 1])]) != one


def test_a_given_content_must_be_right(folder):
    content = data_content("folder", path=folder)
    assert recipe(folder, f"data.content={content}").data.content == content
    with pytest.raises(ValueError, match=rf"data\.content must be that of the files there, {content}, or null, got 00"):
        recipe(folder, "data.content=0011")
    with pytest.raises(ValueError, match=rf"data\.content must be 0011, as in the run's recipe, got {content} at"):
        load_dataset("folder", path=folder, content="0011")


def test_named_sets_stay_known_by_their_name():
    for name in ("cifar10", "digits"):
        plain = compose("pretrain", [f"data={name}"])
        assert with_content(plain).identity() == plain.identity()
    with pytest.raises(ValueError, match=r"data\.content must be null .*digits, says what it is\), got ab"):
        with_content(compose("pretrain", ["data=digits", "data.content=ab"]))


BASE = [word for word in TINY_PRETRAIN if not word.startswith(("data=", "batch_size="))]


def test_a_run_goes_on_with_moved_data_and_refuses_other_data(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*BASE, "data=folder", "batch_size=24", "steps=4", "run_dir=r", "resume=auto"]
    assert pretrain([*words, f"data.path={folder}"]) == 0
    folder.rename(tmp_path / "moved")
    assert pretrain([*words, "data.path=moved"]) == 0
    assert "r has ended already" in capsys.readouterr().err
    assert evaluate("r", ["eval.protocols=[knn-v1]", "data.path=moved"])
    write_images(tmp_path / "moved" / "train" / "cat", pixels(1, 16, seed=99), "new{}.png")
    assert pretrain([*words, "data.path=moved"]) == 2
    assert "it holds a run of another recipe: data.content: the run has" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"data\.content must be that of the files there"):
        evaluate("r", ["eval.protocols=[knn-v1]", "data.path=moved"])


def test_evaluation_on_another_data_set_has_a_name_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "flat", pixels(40, 16))
    for split, count in (("train", 20), ("test", 4)):
        images = [encode(image) for image in pixels(2 * count, 20, seed=count)]
        write_parquet(tmp_path / "other" / f"{split}.parquet", images, ["a", "b"] * count)
    words = [*BASE, "data=folder", "data.path=flat", "batch_size=16", "steps=2"]
    assert pretrain([*words, "run_dir=x"]) == 2
    assert "the train images must have labels for knn-v1 (no train/ folder" in capsys.readouterr().err
    assert pretrain([*words, "run_dir=none", "eval.protocols=[]"]) == 0
    assert pretrain([*words, "run_dir=r", "eval.data=hf", "eval.data_path=other"]) == 0
    (entry,) = results(tmp_path / "r")["evaluations"]
    own = f"knn-v1@hf-{data_content('hf', path='other', size=16)[:8]}"
    assert (entry["protocol"], entry["n_test"], entry["chance"]) == (own, 8, 50)
    assert evaluate("r", ["eval.data=digits"], trust=True)
    assert [each["protocol"] for each in results(tmp_path / "r")["evaluations"]] == [own, "knn-v1@digits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.data_path=x"], r"eval\.data_path must be null without eval\.data, got 'x'"),
        (["eval.data=cifar"], r"unknown dataset 'cifar'; did you mean 'cifar10'"),
        (["data=digits", "data.hf_config=x"], r"data\.hf_config must be null \(it is for data=hf\), got 'x'"),
    ],
)
def test_keys_without_effect_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        compose("pretrain", words)
    with pytest.raises(ValueError, match=r"eval\.data must be null on the track classify"):
        compose("classify", ["eval.data=digits"])


def test_a_studys_cells_are_known_by_what_lies_at_their_paths(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "train" / "cat" / "0.png").unlink()

    def study(*names: str) -> list[Cell]:
        paths = [str(tmp_path / name) for name in names]
        block = {"track": "pretrain", "set": {"data": "folder"}, "axes": [{"data.path": paths}]}
        (tmp_path / "two.yaml").write_text(json.dumps({"seeds": [0], "blocks": [block]}))
        return list(load_study(str(tmp_path / "two.yaml"), trust=True).cells)

    one, other = study("set", "other")
    assert (
        one.recipe.to_dict() == recipe(folder).to_dict()
    )  # what the run itself will find, so that its record is recognised
    assert one.identity != other.identity
    assert study("copy", "other")[0].identity == one.identity
    with pytest.raises(ValueError, match="two cells are the same experiment"):
        study("set", "copy")
    with pytest.raises(ValueError, match=r"folder: path must be a directory, got .*nowhere"):
        study("set", "nowhere")


def test_a_study_looks_at_each_data_set_once(folder, monkeypatch):
    looked = []

    def counted(name: str, **where: object) -> str | None:
        looked.append((name, where["path"]))
        return data_content(name, **where)

    monkeypatch.setattr("ssl_bench.data.dataset.data_content", counted)
    known: dict[str, str | None] = {}
    for size in (8, 16):  # one content at every size, and whether it is trained or evaluated on
        words = ["data=folder", f"data.path={folder}", f"data.size={size}", "eval.data=folder"]
        made = with_content(compose("pretrain", [*words, f"eval.data_path={folder}"]), known)
        assert made.data.content == made.eval.data_content
    assert looked == [("folder", str(folder))]
