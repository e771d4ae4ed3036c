"""`ssl-bench export RUN --to DIR`: timm and the hub's layout load it, with this run's images, bitwise equal."""

import base64
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
from commands import TINY_PRETRAIN
from safetensors.torch import load_file
from typer.testing import CliRunner

from ssl_bench import cli, pretrain
from ssl_bench.models.backbone import load_backbone, save_backbone
from ssl_bench.recipe.compose import compose
from ssl_bench.training import build

WORDS = (
    *("data=digits", "device=cpu", "steps=1", "batch_size=8", "model.stem=imagenet", "method.projector=[8,8]"),
    *("eval.protocols=[rankme-v1]", "eval.baseline=false"),
)


def export(*words: str):
    return CliRunner().invoke(cli.app, ["export", *words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and two made of it: the same record with another backbone."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert pretrain.main([*WORDS, "run_dir=imagenet"]) == 0
    for name, model in {"cifar": "model.stem=cifar", "vit": "model=vit_tiny"}.items():
        (folder / name).mkdir()
        recipe = compose("pretrain", ["data=digits", model])
        head = json.loads((folder / "imagenet/run.json").read_text()) | {"recipe": recipe.to_dict()}
        (folder / name / "run.json").write_text(json.dumps(head))
        (folder / name / "results.json").write_text('{"format": 1, "status": "finished", "evaluations": []}')
        backbone, _ = build.backbone(recipe)
        backbone(torch.randn(4, 3, 32, 32))  # running statistics that differ from the initial ones
        save_backbone(backbone, folder / name / "backbone.safetensors")
    return folder


@pytest.mark.parametrize(
    ("run", "architecture"),
    [("imagenet", "resnet18"), ("cifar", "resnet18_cifar"), ("vit", "vit_tiny_patch16_224")],
)
def test_timm_loads_the_folder_bitwise_equal(runs, tmp_path, run, architecture):
    umask = os.umask(0o027)
    try:
        done = export(str(runs / run), "--to", str(tmp_path / "out"))
    finally:
        os.umask(umask)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    ours, feature_dim = load_backbone(runs / run / "backbone.safetensors")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        if run == "vit":
            assert torch.equal(theirs.eval()(images), ours.eval()(images))
        else:  # whose convolutions over small maps round otherwise here
            torch.testing.assert_close(theirs.eval()(images), ours.eval()(images), rtol=1e-4, atol=1e-5)
            large = torch.randn(2, 3, 96, 96)
            assert torch.equal(theirs(large), ours(large))
    assert theirs(images).shape == (2, feature_dim)
    state = ours.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    head = json.loads((runs / run / "run.json").read_text())
    data = timm.data.resolve_model_data_config(theirs)
    assert data["mean"] == pytest.approx(tuple(head["images"]["mean"]))
    assert data["std"] == pytest.approx(tuple(head["images"]["std"]))
    assert tuple(data["input_size"]) == (3, 32, 32)
    assert (data["interpolation"], data["crop_pct"]) == ("bilinear", 1.0)
    assert json.loads((tmp_path / "out/config.json").read_text())["architecture"] == architecture


def test_the_hubs_layout(runs, tmp_path, monkeypatch):
    """As huggingface_hub's cache holds a repository."""
    folder = tmp_path / "models--me--mine"
    assert export(str(runs / "imagenet"), "--to", str(folder / "snapshots/abc")).exit_code == 0
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = timm.create_model("hf-hub:me/mine", pretrained=True)
    state = load_file(runs / "imagenet/backbone.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_card_says_how_and_how_well(runs, tmp_path):
    export(str(runs / "imagenet"), "--to", str(tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    for words in (
        "# resnet18, barlow_twins on digits",
        "batch size 8, 1 steps, seed 0",
        "| rankme-v1 | trained | rankme ",
        "## Limits",
        '"lr"',
        "normalised by mean (0.",
    ):
        assert words in card
    assert "import ssl_bench" not in card
    assert str(runs) not in card
    export(str(runs / "cifar"), "--to", str(tmp_path / "cifar"))
    card = (tmp_path / "cifar/README.md").read_text()
    assert "import ssl_bench.models.backbone" in card
    assert "Not evaluated." in card


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the hub: what huggingface_hub asks of it to make a repository and to commit small files."""

    requests: ClassVar[list[tuple[str, object]]] = []
    files: ClassVar[dict[str, bytes]] = {}
    allowed = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requests.append((self.path, self.headers.get("Authorization", "")))
        if not self.allowed:
            self.answer(403, {"error": "no right to write here"})
        elif self.path == "/api/repos/create":
            self.requests.append(("made", json.loads(body).get("visibility") or json.loads(body)["private"]))
            self.answer(200, {"url": f"{self.base}/me/mine", "name": "me/mine", "id": "1"})
        elif self.path == "/api/validate-yaml":  # of the card's head
            assert "library_name: timm" in json.loads(body)["content"]
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/models/me/mine/preupload/main":
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            self.answer(200, {"files": [one | {"shouldIgnore": False} for one in files]})
        elif self.path.startswith("/api/models/me/mine/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(200, {"commitUrl": f"{self.base}/me/mine/commit/abc", "commitOid": "abc", "hookOutput": ""})
        else:
            self.answer(404, {"error": f"not known here: {self.path}"})

    def do_GET(self) -> None:
        self.answer(200, {"_id": "1", "id": "me/mine", "sha": "0" * 40, "siblings": [], "private": True})

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, code: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.requests.clear()
    Hub.files.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", base)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", base)
    monkeypatch.setenv("HF_TOKEN", "hf_a_token_of_the_test")
    yield base
    server.shutdown()
    server.server_close()


def test_push_uploads_the_three_files(runs, tmp_path, hub):
    done = export(str(runs / "imagenet"), "--to", str(tmp_path / "out"), "--push", "me/mine")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == f"{hub}/me/mine/commit/abc"
    assert Hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(Hub.files) == 3
    assert 'timm.create_model("hf-hub:me/mine", pretrained=True)' in Hub.files["README.md"].decode()
    assert ("made", "private") in Hub.requests or ("made", True) in Hub.requests
    assert all(token == "Bearer hf_a_token_of_the_test" for path, token in Hub.requests if path != "made")


@pytest.mark.usefixtures("hub")
def test_a_push_that_fails_is_one_line_and_keeps_the_files(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "allowed", False)
    done = export(str(runs / "imagenet"), "--to", str(tmp_path / "out"), "--push", "me/mine")
    assert done.exit_code == 2
    assert f"error: export: me/mine: the upload failed; {tmp_path / 'out'} has the files: " in done.stderr
    assert "no right to write here" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (tmp_path / "out/model.safetensors").is_file()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = export(str(runs / "imagenet"), "--to", str(tmp_path / "out"), "--push", "me/mine")
    assert done.exit_code == 2


def test_a_record_of_before_reads_the_data_once_more(runs, tmp_path):
    run = tmp_path / "old"
    run.mkdir()
    for name in ("run.json", "results.json", "backbone.safetensors"):
        (run / name).write_bytes((runs / "imagenet" / name).read_bytes())
    head = json.loads((run / "run.json").read_text())
    images = head.pop("images")
    (run / "run.json").write_text(json.dumps(head))
    assert export(str(run), "--to", str(tmp_path / "out")).exit_code == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == images["mean"]


def test_what_cannot_be_exported(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pretrain.main([*TINY_PRETRAIN, "steps=1", "run_dir=tiny", "eval=none"]) == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    (tmp_path / "tiny/backbone.safetensors").unlink()
    run = str(runs / "imagenet")
    for words, message in {
        (run,): "give one of --output (records) and --to (a backbone)",
        (run, "--to", "x", "-o", "y"): "give one of --output (records) and --to (a backbone)",
        ("none", "--to", "x"): "none: not a run directory",
        ("tiny", "--to", "x"): "tiny must hold backbone.safetensors, got a run that is finished",
        (run, "-o", "y", "--push", "me/mine"): "--push needs --to, the folder to upload",
        (run, "--to", "x", "--push", "mine"): "--push must be OWNER/NAME as on the hub, got 'mine'",
        (run, "--to", "x", "--push", "me/ mine"): "--push must be OWNER/NAME as on the hub, got 'me/ mine'",
        (run, "--to", "full"): "full must be empty, new or an earlier export, got 'thesis.tex' in it",
    }.items():
        done = export(*words)
        assert done.exit_code == 2
        assert message in done.stderr
        assert not (tmp_path / "x").exists()
