"""README and manual name only what exists; their commands are accepted, and run or marked with what they need."""

import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import typer.main
from commands import environment, results, run, script
from pages import PAGES, ROOT, Block, blocks
from PIL import Image
from typer.testing import CliRunner

from ssl_bench import cli
from ssl_bench.recipe.compose import compose

BLOCKS = [block for page in PAGES for block in blocks(page) if block.language in ("bash", "python")]
TRACKS = {"ssl_bench/pretrain.py": "pretrain", "ssl_bench.pretrain": "pretrain", "ssl_bench/classify.py": "classify"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    links = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in links if not (page.parent / target).exists()]
    folders = "tests|benchmarks|configs|docs|docker|examples|results|ssl_bench"
    named = re.findall(rf"`((?:{folders})/[\w./*-]*[\w*])/?`", text)
    missing += [path for path in named if not [*ROOT.glob(path), *page.parent.glob(path)]]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_run_or_marked(page):
    """A block is run by the page's test below, by a test that it names, or says what the test machine lacks."""
    for block in (block for block in BLOCKS if block.page == page):
        if block.mark == "run by":
            assert (ROOT / block.about).is_file()
        elif block.mark == "not run":
            assert block.about
            tests = [word.rstrip(".,;") for word in block.about.split() if word.startswith("tests/")]
            assert all((ROOT / path).exists() for path in tests), block.about
        else:
            assert page in RUN, f"neither run nor marked:\n{block.text}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_is_accepted(page, tmp_path, monkeypatch):
    """Also of the blocks that are not run: the subcommand, its options, and the recipe's keys exist."""
    monkeypatch.chdir(tmp_path)
    for block in (block for block in BLOCKS if block.page == page and block.language == "bash"):
        for words in block.commands():
            if words[0] == "ssl-bench":
                accepted(words[1:], fails=block.mark == "fails")
            for script_name in TRACKS.keys() & set(words):
                composed(TRACKS[script_name], words[words.index(script_name) + 1 :])


def accepted(words: list[str], fails: bool = False) -> None:
    command = typer.main.get_command(cli.app)
    if words[0] in ("pretrain", "classify"):
        if not fails:
            composed(words[0], words[1:])
        return
    context = click.Context(command)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        first, *rest = words if words[0] in command.commands else ["run", *words]  # study NAME = study run NAME
        command, words = command.commands[first], rest
        context = click.Context(command, parent=context)
    command.make_parser(context).parse_args(list(words))


def composed(track: str, words: list[str]) -> None:
    """The words without what stands for something of the reader's."""
    yours = (
        "my_pkg",
        "FILE",
        "FOLDER",
        "PHOTOS",
        "SHARDS",
        "...",
        "align_uniform",
        "bt_hsic",
        "signum",
        "ridge-v1",
        "shapes",
    )
    words = words[: words.index("||")] if "||" in words else words
    out = [word for word in words if any(each in word for each in yours) or word == "data=folder"]
    groups = {word.split("=")[0] for word in out}
    kept = [word for word in words if "=" in word and word not in out and re.split(r"[.=]", word)[0] not in groups]
    compose(track, [*([] if any(word.startswith("data=") for word in kept) else ["data=digits"]), *kept])


# Pages whose blocks are run, in order, in one folder; each training run with one step of few images.
RUN = {ROOT / "docs/quickstart.md", ROOT / "docs/elsewhere.md", ROOT / "docs/tutorial.md"}
SMALL = (("steps=", "1"), ("batch_size=", "32"))


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.stem == "tutorial" else ()) for page in sorted(RUN)],
    ids=name,
)
def test_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    namespace: dict[str, object] = {}
    ran = 0
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(re.sub(r"(steps|batch_size): \d+", r"\1: 16", block.text))
        elif block.language in ("bash", "python") and block.mark in ("", "fails"):
            run_block(block, namespace)
            ran += 1
    assert ran


def run_block(block: Block, namespace: dict[str, object]) -> None:
    if block.language == "python":
        exec(compile(block.text, str(block.page), "exec"), namespace)
        return
    for words in block.commands():
        if words[0] == "python":
            done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            continue
        if words[1] in ("pretrain", "classify"):
            for key, value in SMALL:
                words = [key + value if word.startswith(key) else word for word in words]
            words += [] if block.mark else ["method.projector=[16,16]"]
        done = CliRunner().invoke(cli.app, words[1:])
        assert done.exit_code == (2 if block.mark else 0), f"{words}: {done.output}"
        assert (block.about or "") in done.output


def test_the_readmes_method_trains(tmp_path):
    (example,) = [block.text for block in blocks(ROOT / "README.md") if "class MyMethod" in block.text]
    (tmp_path / "my_file.py").write_text(example)
    method = ("method=my_file:MyMethod", "method.alpha=2", "method.projector=[16,32]")
    rest = ("data=digits", "model.stem=imagenet", "batch_size=32", "steps=2", "eval=none", "device=cpu", "run_dir=r")
    done = run(script("pretrain", (*method, *rest)), tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_manuals_data_set_and_evaluator_serve_a_run(tmp_path):
    def example(page: str, content: str) -> str:
        (found,) = [block.text for block in blocks(ROOT / "docs" / page) if content in block.text]
        return found

    source = example("data.md", "def locate") + example("protocols.md", "class NearestMean")
    (tmp_path / "my_file.py").write_text(source.replace("-100", "-20"))
    draw = np.random.default_rng(0)
    for index in range(60):
        file = tmp_path / "scans" / ("sick" if index % 2 else "healthy") / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    words = ("data=my_file:locate", "data.path=scans", "eval.protocols=[my_file:NearestMean]", "optimizer.lr=0.1")
    rest = ("model.stem=imagenet", "method.projector=[16,16]", "batch_size=16", "steps=1", "device=cpu", "run_dir=r")
    done = run(script("pretrain", (*words, *rest)), tmp_path)
    assert done.returncode == 0, done.stderr
    (trained, _) = results(tmp_path / "r")["evaluations"]
    assert (trained["protocol"], trained["n_test"]) == ("nearest-mean-v1", 20)
