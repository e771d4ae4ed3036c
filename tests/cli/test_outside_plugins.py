"""Plug-ins from outside: a package with entry points, or package.module:Name."""

import sys

import pytest
from commands import fails, metrics, results, run
from typer.testing import CliRunner

from ssl_bench import cli, pretrain


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_method_and_an_optimizer_from_an_installed_package(tmp_path):
    """An outside package with entry points, found by name; and by package.module:Class without them."""
    package = tmp_path / "site"
    package.mkdir()
    (package / "outside.py").write_text(
        "import torch\n"
        "from ssl_bench.methods import BarlowTwins\n"
        "class Twice(BarlowTwins):\n"
        "    '''Barlow Twins, twice.\n\n    Args:\n        factor: what the loss is multiplied by.\n    '''\n"
        "    def __init__(self, backbone, feature_dim, *, projector: tuple[int, ...] = (8, 8), factor: float = 2.0):\n"
        "        super().__init__(backbone, feature_dim, projector=projector)\n"
        "        self.factor = factor\n"
        "    def loss(self, z1, z2):\n"
        "        terms = super().loss(z1, z2)\n"
        "        return terms | {'loss': terms['loss'] * self.factor}\n"
        "def plain(params, *, lr: float):\n"
        "    '''SGD.\n\n    Args:\n        lr: learning rate.\n    '''\n"
        "    return torch.optim.SGD(params, lr=lr)\n"
    )
    info = package / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ssl_bench.methods]\ntwice = outside:Twice\n[ssl_bench.optimizers]\nplain = outside:plain\n"
    )
    common = (
        "data=digits",
        "model.stem=imagenet",
        "batch_size=8",
        "steps=1",
        "eval=none",
        "device=cpu",
        "optimizer.lr=0.1",
    )
    named = (*common, "method=twice", "method.factor=3", "optimizer=plain", "run_dir=named")
    pathed = (*common, "method=outside:Twice", "method.factor=3", "optimizer=outside:plain", "run_dir=pathed")
    code = "import sys; from ssl_bench.pretrain import main; sys.exit(main(sys.argv[1:]))"
    for words in (named, pathed):
        done = run([sys.executable, "-c", code, *words], tmp_path, PYTHONPATH=str(package))
        assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "named")[0]["loss"] == metrics(tmp_path / "pathed")[0]["loss"]
    wrong = run([sys.executable, "-c", code, *named, "method.faktor=3"], tmp_path, PYTHONPATH=str(package))
    assert wrong.returncode == 2
    assert "unknown key 'method.faktor'; did you mean 'factor'?" in wrong.stderr
    listed = run([sys.executable, "-c", code, *common, "method=twicee"], tmp_path, PYTHONPATH=str(package))
    assert "did you mean 'twice'?" in listed.stderr


def test_a_data_set_a_backbone_and_an_evaluator_from_outside_serve_a_run(here, capsys):
    words = (
        "data=foreign:locate", "eval.protocols=[foreign:Spread,knn-v1]", "method=tiny_net:TinyTwins",
        "method.projector=[8,8]", "model=foreign:backbone", "model.stem=imagenet", "batch_size=32", "steps=2",
        "optimizer.lr=0.1", "run_dir=r", "device=cpu", "eval.baseline=false",
    )  # fmt: skip
    assert pretrain.main([*words]) == 0
    spread, knn = results(here / "r")["evaluations"]
    assert (spread["protocol"], spread["n_test"], spread["chance"]) == ("spread-v1", 32, 50.0)
    assert spread["metrics"]["spread"] > 0
    assert "top1" not in spread["metrics"]
    assert knn["metrics"]["top1"] > 90  # dark against light
    assert "spread-v1" in capsys.readouterr().err
    again = CliRunner().invoke(cli.app, ["evaluate", "r", "eval.protocols=[foreign:Spread]", "--trust"])
    assert again.exit_code == 0, again.output
    assert results(here / "r")["evaluations"][0]["metrics"] == spread["metrics"]
    assert "no_such" in fails(capsys, pretrain.main, [*words[1:], "data=foreign:no_such"])
