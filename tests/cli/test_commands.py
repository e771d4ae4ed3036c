"""The commands as a user meets them: what they print, refuse and leave behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from commands import TINY_CLASSIFY, TINY_PRETRAIN, metrics, results, run, script
from safetensors.torch import load_file
from typer.testing import CliRunner

from ssl_bench import classify, cli, pretrain


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capsys, main, words) -> str:
    """The one line of a command that must refuse its words."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, captured.err
    assert "Traceback" not in captured.err
    return errors[0]


def test_pretrain_leaves_a_complete_record(here):
    assert (
        pretrain.main([*TINY_PRETRAIN, "steps=4", "run_dir=r", "eval.baseline=true", "eval.online_every_epochs=0.1"])
        == 0
    )
    head = json.loads((here / "r/run.json").read_text())
    assert head["recipe"]["optimizer"]["lr"] == 5.0
    assert head["plan"]["total_steps"] == 4
    assert {group["lr"] for group in head["param_groups"]} == {5.0, 1e-3}
    assert sum(group["elements"] for group in head["param_groups"]) > 0
    assert [row["step"] for row in metrics(here / "r")] == [1, 2, 3, 4]
    assert "online_top1" in metrics(here / "r")[-1]
    assert not (here / "r/checkpoints").exists()
    ended = results(here / "r")
    assert ended["status"] == "finished"
    assert [(e["protocol"], e["model"], e["n_test"]) for e in ended["evaluations"]] == [
        ("knn-v1", "trained", 355),
        ("knn-v1", "untrained", 355),
    ]
    table = pq.read_table(here / "r/telemetry.parquet")
    assert set(table["step"].to_pylist()) == {1, 2, 3, 4}


def test_classify_measures_the_test_set_as_it_goes(here):
    words = [
        *TINY_CLASSIFY,
        "steps=6",
        "run_dir=r",
        "eval.test_every_epochs=0.1",
        "eval.baseline=true",
        "chunk_size=48",
    ]
    assert classify.main(words) == 0
    rows = metrics(here / "r")
    assert [row["step"] for row in rows if "test_top1" in row] == [2, 4, 6]
    (trained, untrained) = results(here / "r")["evaluations"]
    assert (trained["protocol"], trained["n_test"], untrained["model"]) == ("test-v1", 355, "untrained")
    assert trained["metrics"]["top1"] == rows[-1]["test_top1"]
    assert trained["metrics"]["top1"] <= trained["metrics"]["top5"] <= 100


def test_backbone_loads_into_timm(here):
    words = ["data=digits", "steps=1", "batch_size=8", "model.stem=imagenet", "method.projector=[16,16]", "run_dir=r"]
    assert pretrain.main([*words, "eval=none", "device=cpu"]) == 0
    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(here / "r/backbone.safetensors"))
    saved = load_file(here / "r/backbone.safetensors")
    assert (model.conv1.weight == saved["conv1.weight"]).all()


def test_chunks_give_the_same_run_without_batch_norm_and_say_so_with_it(here):
    plain = ["model.name=tiny_plain", "method.projector=[64]", "steps=5"]  # one linear layer, no batch norm
    for name, more in (("whole", plain), ("parts", [*plain, "chunk_size=32"]), ("norm", ["chunk_size=32", "steps=1"])):
        assert pretrain.main([*TINY_PRETRAIN, f"run_dir={name}", "eval=none", *more]) == 0
    for one, other in zip(metrics(here / "whole"), metrics(here / "parts"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    notes = [json.loads((here / f"{name}/run.json").read_text())["batch_norm"] for name in ("parts", "norm")]
    assert notes == ["none", "batch norm over 32 of 96 images"]


def test_a_tracker_gets_every_line(here):
    assert pretrain.main([*TINY_PRETRAIN, "steps=2", "run_dir=r", "eval=none", "tracker=tensorboard"]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (path.parent for path in (here / "r/ssl_bench").glob("events*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([row["loss"] for row in metrics(here / "r")])


def test_one_process_runs_recipes_of_different_precision(here):
    for precision in ("fp32", "bf16"):
        words = [*TINY_PRETRAIN, "steps=1", f"run_dir={precision}", "eval=none", f"precision={precision}"]
        assert pretrain.main(words) == 0
    assert metrics(here / "bf16")[0]["loss"] != metrics(here / "fp32")[0]["loss"]


def test_evaluate_adds_to_the_record(here):
    assert pretrain.main([*TINY_PRETRAIN, "steps=1", "run_dir=r", "eval.baseline=true"]) == 0
    before = results(here / "r")["evaluations"]
    done = CliRunner().invoke(cli.app, ["evaluate", "r", "device=cpu"])
    assert done.exit_code == 0, done.output
    after = results(here / "r")["evaluations"]  # replaced, by the same numbers
    assert [(e["model"], e["metrics"]) for e in after] == [(e["model"], e["metrics"]) for e in before]
    done = CliRunner().invoke(cli.app, ["evaluate", "r", "eval.protocols=[linear-cached-v1]", "eval.baseline=false"])
    assert done.exit_code == 0, done.output
    protocols = [entry["protocol"] for entry in results(here / "r")["evaluations"]]
    assert protocols == ["knn-v1", "knn-v1", "linear-cached-v1"]
    refused = CliRunner().invoke(cli.app, ["evaluate", "r", "batch_size=4"])
    assert refused.exit_code == 2
    assert "batch_size is fixed by the run's record" in refused.output


def test_evaluate_takes_a_backbone_that_no_run_has_trained(here):
    """Barlow Twins' layout of a checkpoint; the weights are those of a run, so the numbers are known."""
    words = ["data=digits", "steps=1", "batch_size=8", "model.stem=imagenet", "method.projector=[16,16]", "run_dir=r"]
    assert pretrain.main([*words, "eval.protocols=[knn-v1]", "eval.baseline=false", "device=cpu"]) == 0
    state = {f"module.backbone.{name}": tensor for name, tensor in load_file(here / "r/backbone.safetensors").items()}
    torch.save({"epoch": 1, "model": state, "optimizer": {"param_groups": [{"lr": 0.1}]}}, "bt.pth")
    given = ["evaluate", "data=digits", "model.stem=imagenet", "device=cpu", "eval.protocols=[knn-v1]"]
    done = CliRunner().invoke(cli.app, [*given, "model.checkpoint=bt.pth", "-o", "out"])
    assert done.exit_code == 0, done.output
    assert "checkpoint bt.pth: 100 of 100 tensors loaded (named model.module.backbone.*)" in done.stderr
    (path,) = (here / "out").iterdir()
    record = json.loads(path.read_text())
    assert [entry["model"] for entry in record["evaluations"]] == ["trained", "untrained"]
    assert record["evaluations"][0]["metrics"] == results(here / "r")["evaluations"][0]["metrics"]
    assert record["recipe"]["model"]["checkpoint_sha256"]
    assert set(record["recipe"]) == {"data", "model", "eval", "augment", "device", "seed"}
    assert record["packages"]["timm"] == timm.__version__
    for words, message in {
        (
            "model.name=resnet34",
            "model.checkpoint=bt.pth",
        ): "must fit the backbone in at least 90% of the tensors, got 55%",
        ("optimizer.lr=1",): "optimizer.lr has no effect on an evaluation (what has: data, model, eval, ",
        ("eval.protocols=[]",): "eval.protocols must name at least one evaluator, got none",
        ("model.name=resnet81",): "unknown model 'resnet81'",
    }.items():
        refused = CliRunner().invoke(cli.app, [*given, *words])
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert not (here / "evaluations").exists()


def test_pretraining_starts_from_a_checkpoint_and_knows_it_again(here, capsys):
    words = [
        "data=digits",
        "batch_size=8",
        "model.stem=imagenet",
        "method.projector=[16,16]",
        "device=cpu",
        "eval=none",
    ]
    assert pretrain.main([*words, "steps=1", "run_dir=a"]) == 0
    start = ["steps=1", "model.checkpoint=a", "optimizer.lr=0", "param_groups.lr_1d=0", "run_dir=b"]
    assert pretrain.main([*words, *start]) == 0
    assert "checkpoint a/backbone.safetensors: 100 of 100 tensors loaded" in capsys.readouterr().err
    one, other = (load_file(here / f"{run}/backbone.safetensors") for run in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one if "running" not in name and "num_" not in name)
    # The same path with other weights is another experiment, and said so before anything runs.
    (here / "a/backbone.safetensors").write_bytes((here / "b/backbone.safetensors").read_bytes())
    error = fails(capsys, pretrain.main, [*words, *start, "resume=auto"])
    assert "it holds a run of another recipe: model.checkpoint_sha256: the run has" in error
    refused = CliRunner().invoke(cli.app, ["evaluate", "b", "eval.protocols=[knn-v1]", "eval.baseline=true"])
    assert refused.exit_code == 2
    assert "model.checkpoint must be the file that the run started from, SHA-256" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.name=vit_tiny_patch16_224"],
            "takes images of 224 x 224 pixels, got 32 x 32: data.size=224, or model.",
        ),
        (["model.name=resnet81"], "unknown model 'resnet81'; did you mean"),
        (["model.name=resnet18", "model.img_size=32"], "resnet18 cannot be made with model.img_size=32"),
    ],
)
def test_a_model_that_does_not_fit_leaves_no_folder(here, capsys, words, message):
    error = fails(
        capsys, pretrain.main, ["data=digits", "model.stem=imagenet", "model.init=timm", *words, "run_dir=new/r"]
    )
    assert message in error
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("track", "model", "layer"),
    [
        ("pretrain", "vit_tiny", "blocks.11.attn.qkv"),
        ("classify", "convnext_atto", "stages.3.blocks.1.mlp.fc2"),
        pytest.param("classify", "vit_tiny", "blocks.0.attn.proj", marks=pytest.mark.slow),
        pytest.param("pretrain", "convnext_atto", "stages.0.blocks.0.conv_dw", marks=pytest.mark.slow),
    ],
)
def test_layers_of_any_model_are_named_in_the_telemetry(here, track, model, layer):
    """One row for each trainable tensor, by its module's name."""
    main = {"pretrain": pretrain.main, "classify": classify.main}[track]
    words = ["data=digits", f"model={model}", "steps=1", "batch_size=4", "telemetry.every=1", "run_dir=r", "device=cpu"]
    assert (
        main([*words, *(["method.projector=[8,8]", "eval=none"] if track == "pretrain" else ["eval.baseline=false"])])
        == 0
    )
    table = pq.read_table(here / "r/telemetry.parquet").to_pylist()
    head = json.loads((here / "r/run.json").read_text())
    assert sorted(row["layer"] for row in table) == sorted(
        name for group in head["param_groups"] for name in group["param_names"]
    )
    (row,) = (row for row in table if row["layer"] == f"backbone.{layer}.weight")
    assert row["weight_norm"] > 0
    assert row["grad_norm"] > 0
    assert row["ratio"] > 0


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(here, capsys, monkeypatch):
    import tiny_net

    monkeypatch.setattr(tiny_net.BrokenTwins, "calls", 0)
    words = [*TINY_PRETRAIN, "method=tiny_net:BrokenTwins", "steps=40", "run_dir=r", "log_every=10"]
    assert pretrain.main(words) == 0
    ended = results(here / "r")
    assert (ended["status"], ended["step"], ended["layer"], ended["evaluations"]) == (
        "diverged",
        3,
        "backbone.0.weight",
        [],
    )
    assert metrics(here / "r")[-1]["step"] == 10
    assert "not finite from step 3 on (first in backbone.0.weight)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense=1"], "unknown key 'nonsense'"),
        (["optimizer=larss"], "unknown optimizer 'larss'; did you mean 'lars'?"),
        (["model.name=resnet17"], "resnet1"),
        (
            ["batch_size=1443", "chunk_size=null"],
            "batch_size must be at most the 1442 images of the train set, got 1443",
        ),
        (["data=cifar10", "data.path=missing"], "missing"),
        (["method=tiny_net:TinyTwins", "method.projector=[0]"], "projector"),
        (["tracker=nope"], "unknown tracker 'nope'"),
        (["tracker=aim"], "tracker must be installed, got 'aim': pip install aim"),
        (["precision=fp16"], "precision must be fp32 or bf16 on the CPU, got fp16, which needs a GPU"),
        (["device=cuda"], "device must be auto or cpu, got cuda: torch sees no GPU"),
        (["cuda_graphs=true"], "cuda_graphs must be null or false, got true: the device is cpu"),
        (["optimizer.lr=-1"], "lr"),
        (["schedule=warmup_cosine", "schedule.warmup_steps=9"], "warmup"),
    ],
)
def test_bad_input_is_one_line_before_any_training(here, capsys, words, message):
    line = fails(capsys, pretrain.main, [*TINY_PRETRAIN, "steps=4", "run_dir=r", *words])
    assert message in line
    assert not (here / "r/metrics.jsonl").exists()


def test_a_damaged_data_file_is_named_and_leaves_nothing_cached(here, capsys):
    (here / "set").mkdir()
    images = [{"bytes": b"no image", "path": None}] * 3
    table = pa.table({"img": images, "label": [0, 1, 0]})
    for split in ("train", "test"):
        pq.write_table(table, here / f"set/{split}-00000-of-00001.parquet")
    words = [*TINY_PRETRAIN, "data=hf", "data.path=set", "data.cache_dir=cache", "steps=1", "run_dir=r"]
    assert "train-00000-of-00001.parquet" in fails(capsys, pretrain.main, words)
    assert not [path for path in (here / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    (here / "set/train-00000-of-00001.parquet").write_bytes(b"PAR1 cut short")
    assert "train-00000-of-00001.parquet" in fails(capsys, pretrain.main, words)


def test_a_run_directory_is_used_once(here, capsys):
    words = [*TINY_PRETRAIN, "steps=1", "run_dir=r", "eval=none"]
    assert pretrain.main(words) == 0
    assert "resume=auto" in fails(capsys, pretrain.main, words)
    assert pretrain.main([*words, "resume=auto"]) == 0
    assert "has ended already: finished" in capsys.readouterr().err
    (here / "other").mkdir()
    (here / "other/thesis.tex").write_text("precious")
    assert "thesis.tex" in fails(capsys, pretrain.main, [*words, "run_dir=other"])


def test_debug_shows_the_traceback(capsys):
    assert pretrain.main(["nonsense=1", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path):
    done = run(script("pretrain", (*TINY_PRETRAIN, "batch_size=97", "steps=1", "run_dir=r"), 2), tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(": batch_size must be a multiple of the 2 processes, got 97") == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("main", [pretrain.main, classify.main])
def test_help_names_every_key_of_the_track(main, capsys):
    from ssl_bench.recipe.compose import known_keys

    assert main(["--help", "optimizer=tvlars"]) == 0
    text = capsys.readouterr().out
    other = {
        "pretrain": ("augment.pad", "augment.rotation", "eval.test_every"),
        "classify": ("augment.", "eval.", "method"),
    }
    skipped = other["pretrain" if main is pretrain.main else "classify"]
    for name in known_keys():
        if not name.startswith(skipped):
            assert name in text
    assert "optimizer.gamma_min" in text


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


def test_the_console_script_lists_its_commands():
    installed = shutil.which("ssl-bench", path=str(Path(sys.executable).parent))
    assert installed, "the package is not installed"
    done = subprocess.run([installed, "--help"], capture_output=True, text=True, check=True)
    for command in ("pretrain", "classify", "evaluate", "demo"):
        assert command in done.stdout
