"""A run in its folder: what is noticed and said before it starts, when it goes on, and when it has ended."""

import json
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from commands import TINY_PRETRAIN, metrics, results
from tiny_disk import mounted
from torch import nn

from ssl_bench import pretrain
from ssl_bench.runtime.interrupt import Interrupt
from ssl_bench.training.rehearsal import every_parameter_used, rehearse_saving
from ssl_bench.training.session import Session

WORDS = [*TINY_PRETRAIN, "steps=12", "checkpoint.every_steps=4", "checkpoint.keep=3", "run_dir=r", "resume=auto"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A run that is asked to stop after some steps."""
    with monkeypatch.context() as patch:
        patch.setattr(Session, "should_stop", lambda _self, done: done == step)
        assert pretrain.main(WORDS) == 75


def test_the_first_line_names_the_folder_the_device_the_processes_the_precision_and_the_length(capsys):
    assert pretrain.main([*WORDS, "steps=1", "precision=bf16", "eval=none"]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("r: CPU (")
    assert first.endswith(", 1 process, bf16, 1 step")


def test_a_mistake_that_the_first_step_finds_leaves_no_folder(here, monkeypatch, capsys):
    from ssl_bench.methods import BarlowTwins

    def refuse(*_rows, **_named):
        raise ValueError("the batch must have more images")

    with monkeypatch.context() as patch:
        patch.setattr(BarlowTwins, "loss", refuse)
        assert pretrain.main([*WORDS, "steps=2", "run_dir=new/r"]) == 2
    assert "error: the batch must have more images" in capsys.readouterr().err
    assert not (here / "new").exists()
    assert pretrain.main([*WORDS, "steps=2", "eval=none"]) == 0
    kept = sorted(path.name for path in (here / "r").iterdir())
    assert pretrain.main([*WORDS, "steps=2", "eval=none"]) == 0  # one that has ended stays as it is
    assert sorted(path.name for path in (here / "r").iterdir()) == kept


def test_a_note_for_batch_scripts_lies_in_the_folder_until_the_run_goes_on(here, monkeypatch):
    interrupt(monkeypatch, 9)
    assert (here / "r/requeue").read_text().startswith("75: ")
    assert pretrain.main(WORDS) == 0
    assert not (here / "r/requeue").exists()
    assert [row["step"] for row in metrics(here / "r")] == list(range(1, 13))


def test_a_signal_while_it_evaluates_ends_at_once_and_the_run_goes_on_from_its_checkpoint(here, capfd):
    words = [*WORDS, "eval.protocols=[faults:SignalledProbe]"]
    assert pretrain.main(words) == 75
    assert "SIGTERM: exiting with code 75" in capfd.readouterr().err
    assert (here / "r/requeue").exists()
    assert not (here / "r/results.json").exists()
    assert (here / "r/checkpoints/step-00000012").is_dir()
    assert pretrain.main(words) == 0
    assert "continuing r from step 12" in capfd.readouterr().err
    assert results(here / "r")["evaluations"][0]["metrics"] == {"classes": 10.0}
    assert not (here / "r/requeue").exists()


def test_a_signal_while_data_is_read_ends_at_once(here):
    words = [*WORDS, "data=faults:signalled_data", "batch_size=32", "steps=1"]
    assert pretrain.main(words) == 75
    assert (here / "r/requeue").exists()
    assert not (here / "r/run.json").exists()
    assert pretrain.main(words) == 0
    assert results(here / "r")["step"] == 1


def test_a_signal_in_the_last_step_spares_the_evaluation(here, monkeypatch):
    real = Session.progress

    def signalled(self: Session, step: int, row: dict[str, float] | None) -> None:
        real(self, step, row)
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "progress", signalled)
        assert pretrain.main(WORDS) == 75
    assert (here / "r/checkpoints/step-00000012").is_dir()
    assert not (here / "r/results.json").exists()
    assert pretrain.main(WORDS) == 0


def test_a_signal_after_all_agreed_that_there_was_none_spares_the_evaluation_too(here, monkeypatch):
    real = Interrupt.agreed

    def signalled(self: Interrupt, *device: object) -> bool:
        answer = real(self, *device)
        os.kill(os.getpid(), signal.SIGTERM)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "agreed", signalled)
        assert pretrain.main(WORDS) == 75
    assert (here / "r/checkpoints/step-00000012").is_dir()
    assert not (here / "r/results.json").exists()
    assert pretrain.main(WORDS) == 0


@pytest.mark.parametrize(("left", "from_step"), [(6, 4), (8, 8), (2, None)])
def test_metrics_cut_short_make_the_run_go_on_from_where_they_reach(here, monkeypatch, capsys, left, from_step):
    interrupt(monkeypatch, 9)
    path = here / "r/metrics.jsonl"
    expected = metrics(here / "r")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:left]))
    assert pretrain.main(WORDS) == 0
    said = capsys.readouterr().err
    assert "it knows 9 rows of metrics.jsonl, the last of step 9, and" in said
    assert (f"continuing r from step {from_step}" in said) == (from_step is not None)
    assert [row["step"] for row in metrics(here / "r")] == list(range(1, 13))
    assert [row["loss"] for row in metrics(here / "r")[:9]] == [row["loss"] for row in expected]


def test_damaged_telemetry_does_not_stop_a_resume(here, monkeypatch, capsys):
    interrupt(monkeypatch, 9)
    for path in (here / "r/telemetry").iterdir():
        os.truncate(path, 0)
    assert pretrain.main(WORDS) == 0
    assert "set aside" in capsys.readouterr().err
    assert results(here / "r")["status"] == "finished"


def test_a_damaged_backbone_counts_as_not_ended(here, capsys):
    assert pretrain.main([*WORDS, "checkpoint.final=true"]) == 0
    path = here / "r/backbone.safetensors"
    whole = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    for damaged in (b"", whole[:-100]):
        path.write_bytes(damaged)
        capsys.readouterr()
        assert pretrain.main([*WORDS, "checkpoint.final=true"]) == 0
        said = capsys.readouterr().err
        assert "the run counts as not ended" in said
        assert "continuing r from step 12" in said
        assert path.read_bytes() == whole
    assert pretrain.main([*WORDS, "checkpoint.final=true"]) == 0
    assert "has ended already: finished" in capsys.readouterr().err


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_checkpoint_with_other_contents_is_one_line(here, monkeypatch, capsys):
    interrupt(monkeypatch, 9)
    head = json.loads((here / "r/run.json").read_text())
    words = [*WORDS, "method.projector=[32,32]"]
    monkeypatch.setattr("ssl_bench.recipe.schema.Recipe.identity", lambda _self: head["identity"])
    assert pretrain.main(words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: checkpoint r/checkpoints/step-00000009: its contents are not this run's: ")


def test_a_full_disk_in_the_backbones_save_is_one_line_and_the_checkpoint_stays(here, capsys):
    with mounted(here / "disk", "size=2m") as disk:
        words = [*WORDS, f"run_dir={disk / 'r'}", "checkpoint.every_steps=0"]
        real = Session.save_backbone

        def fill(self: Session, backbone: nn.Module) -> None:
            with pytest.raises(OSError, match="No space"):
                (disk / "filler").write_bytes(b"0" * (4 << 20))
            real(self, backbone)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "save_backbone", fill)
            assert pretrain.main(words) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert errors == [f"error: {disk / 'r/backbone.safetensors'}: writing: No space left on device"]
        (disk / "filler").unlink()
        assert not [path for path in (disk / "r").iterdir() if path.name.startswith(".tmp-")]
        assert pretrain.main(words) == 0
        assert "continuing" in capsys.readouterr().err


# Before step 0 --------------------------------------------------------------------------------------------------------


def test_tied_weights_are_trained_saved_and_loaded(here):
    words = ["model.name=tiny_tied", "eval.protocols=[knn-v1]", "eval.baseline=true"]
    assert pretrain.main([*WORDS, *words]) == 0
    found = results(here / "r")
    assert [one["model"] for one in found["evaluations"]] == ["trained", "untrained"]
    from ssl_bench.models.backbone import load_backbone

    loaded, _ = load_backbone(here / "r/backbone.safetensors")
    assert loaded.first is loaded.second


class Forgetful(nn.Linear):
    """A layer whose weights cannot be loaded."""

    def _load_from_state_dict(self, *_arguments: object, **_more: object) -> None:
        raise RuntimeError("no such thing")


class Mistaken(nn.Linear):
    """A layer that loads other weights than were saved."""

    def _load_from_state_dict(self, *arguments: object, **more: object) -> None:
        super()._load_from_state_dict(*arguments, **more)  # type: ignore[arg-type]
        nn.init.zeros_(self.weight)


def test_what_cannot_be_saved_or_loaded_is_refused_before_the_first_step():
    broken = nn.Sequential(Forgetful(2, 2))
    broken.ssl_bench = {"name": "x"}  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"model: its weights must be saved and loaded, which fails: no such thing"):
        rehearse_saving(broken, {})
    other = nn.Sequential(Mistaken(2, 2))
    other.ssl_bench = {"name": "x"}  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"model: 0\.weight must be loaded as it was saved, got other values"):
        rehearse_saving(other, {})
    sound = nn.Sequential(nn.Linear(2, 2))
    sound.ssl_bench = {"name": "x"}  # type: ignore[assignment]
    rehearse_saving(sound, {"optimizer": {"groups": [{"lr": 0.1, "dtype": torch.bfloat16}]}})
    with pytest.raises(ValueError, match=r"state\.optimizer\.groups\[0\]\.hook must be a tensor, .* got a builtins\."):
        rehearse_saving(sound, {"optimizer": {"groups": [{"hook": print}]}})


def test_a_parameter_without_gradient_is_named():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def gradient(_model: object) -> dict[str, torch.Tensor]:
        loss = net[0](torch.ones(1, 2)).sum()
        loss.backward()
        return {"loss": loss.detach()}

    with pytest.raises(ValueError, match=r"every parameter must take part in the loss .* got none of 1\.weight, 1\.b"):
        every_parameter_used(gradient, net)(None)
    assert every_parameter_used(gradient, net, spared=["1.weight", "1.bias"])(None)["loss"].ndim == 0
    net[1].requires_grad_(False)
    assert every_parameter_used(gradient, net)(None)["loss"].ndim == 0
