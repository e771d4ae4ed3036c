"""The README and the manual name only what exists, and the README's example of a method trains."""

import re
from pathlib import Path

import pytest
from commands import run, script

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
