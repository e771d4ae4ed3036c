"""What a user does wrong is one line, before any training."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import TINY_PRETRAIN, fails, run, script

from ssl_bench import pretrain


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
