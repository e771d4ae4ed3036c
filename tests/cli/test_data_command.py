"""``ssl-bench data``: what is there, made ready, checked and removed."""

from pathlib import Path

import pytest
from made_data import parquet_set
from typer.testing import CliRunner

from ssl_bench.cli.app import app
from ssl_bench.data.dataset import DATASETS, SOURCES


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSL_BENCH_CACHE", str(tmp_path / "cache"))
    parquet_set(tmp_path / "set")
    return tmp_path / "cache"


def data(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["data", *words])
    return done.exit_code, done.stdout, done.stderr


def prepare(cache: Path, *words: str) -> str:
    code, out, err = data("prepare", "cifar10", f"data.path={cache.parent / 'set'}", *words)
    assert code == 0, err
    return out


def test_every_data_set_says_where_it_comes_from():
    assert list(SOURCES) == list(DATASETS) or set(SOURCES) == set(DATASETS)


def test_prepared_sets_are_listed_verified_and_removed(cache):
    out = prepare(cache)
    assert "cifar10: 20 train and 10 test images of 8 pixels, 10 classes, digest " in out
    assert prepare(cache) == out
    prepare(cache, "data.size=4")
    code, out, _ = data("list")
    assert code == 0
    assert "digits           1,442 and 355 handwritten digits" in out
    assert f"{cache}: 2 decoded" in out
    assert "20 train, 10 test, 8x8" in out
    assert "20 train, 10 test, 4x4" in out

    code, out, _ = data("verify")
    assert (code, out.count(": whole (")) == (0, 2)
    copies = sorted(path for path in cache.iterdir() if path.is_dir())
    with open(copies[0] / "test.images", "r+b") as file:
        file.seek(100)
        file.write(bytes([255 - file.read(1)[0]]))
    code, out, _ = data("verify", "cifar10")
    assert code == 1
    assert f"{copies[0] / 'test.images'}: block 0 of 1 is not what was written" in out
    assert out.count(": whole (") == 1

    assert data("clear", copies[0].name)[0] == 0
    assert [path for path in cache.iterdir() if path.is_dir()] == [copies[1]]
    code, out, _ = data("clear", "cifar10")
    assert (code, out.count("removed ")) == (0, 1)
    assert list(cache.iterdir()) == []


def test_only_what_is_a_decoded_set_is_removed(cache):
    prepare(cache)
    mine = cache / "mine-0123456789abcdef"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    old = cache / "digits-0123456789abcdef"  # a copy of an earlier version
    old.mkdir()
    (old / "meta.json").write_text('{"files": {}}')
    assert "not whole, or of an earlier version" in data("list")[1]
    assert data("clear", "--all")[0] == 0
    assert list(cache.iterdir()) == [mine]


def test_downloads_are_removed_if_asked(cache):
    prepare(cache)
    root = cache / "downloads"
    for name in ("cifar-10-batches-py", "FashionMNIST/raw", "cifar-10-batches-py.partial", "my own"):
        (root / name).mkdir(parents=True)
    code, _, err = data("clear", "stl10", "--downloads")
    assert (code, "no decoded copy of 'stl10'" in err) == (2, True)
    assert data("clear", "cifar10", "--downloads")[0] == 0
    assert sorted(path.name for path in root.iterdir()) == ["FashionMNIST", "my own"]
    assert data("clear", "--all", "--downloads")[0] == 0
    assert [path.name for path in root.iterdir()] == ["my own"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clear"], "error: data clear takes names or --all, got neither"),
        (["clear", "x", "--all"], "error: data clear takes names or --all, got both"),
        (["clear", "cifar"], "error: no decoded copy of 'cifar' in"),
        (["verify", "cifar"], "error: no decoded copy of 'cifar' in"),
        (["prepare", "cifar"], "error: unknown data 'cifar'; did you mean 'cifar10'"),
        (["prepare", "cifar10", "steps=3"], "error: data prepare takes keys of data only"),
        (["prepare", "folder"], "error: data folder: path must be given"),
    ],
)
def test_mistakes_get_one_line(cache, words, message):
    code, _, err = data(*words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not cache.exists()


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["evaluate", "~/r"], "r"),
        (["analyze", "~/r"], "r"),
        (["report", "~/r", "--output=~/o"], "r"),
        (["leaderboard", "~/r"], "r"),
        (["export", "~/r", "--output=~/o"], "r"),
        (["study", "status", "~/no.yaml", "--runs=~/r"], "no"),
        (["tune", "~/no.yaml"], "no"),
        (["demo", "--output=~/mine"], "mine"),
    ],
)
def test_a_home_directory_is_expanded_in_every_command(tmp_path, monkeypatch, words, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert f"{tmp_path}/{place}" in done.stderr
    assert "~" not in done.stderr
