"""The README and the manual name only what exists, and the README's example of a method trains."""

import re
from pathlib import Path

import numpy as np
import pytest
from commands import results, run, script
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "results/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    links = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in links if not (page.parent / target).exists()]
    named = re.findall(r"`((?:tests|benchmarks|configs|docs|results|ssl_bench)/[\w./*-]*[\w*])/?`", text)
    missing += [path for path in named if not [*ROOT.glob(path), *page.parent.glob(path)]]
    assert not missing


def test_the_readmes_method_trains(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "class MyMethod" in block]
    (tmp_path / "my_file.py").write_text(example)
    method = ("method=my_file:MyMethod", "method.alpha=2", "method.projector=[16,32]")
    rest = ("data=digits", "model.stem=imagenet", "batch_size=32", "steps=2", "eval=none", "device=cpu", "run_dir=r")
    done = run(script("pretrain", (*method, *rest)), tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_manuals_data_set_and_evaluator_serve_a_run(tmp_path):
    def example(page: str, name: str) -> str:
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
        (found,) = [block for block in blocks if name in block]
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
