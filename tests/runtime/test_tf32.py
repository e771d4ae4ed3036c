"""Where float32 may be TF32: the switches as they stand in each part of a run (they do nothing on a CPU)."""

import json

import pytest
import torch
from commands import TINY_PRETRAIN

from ssl_bench import pretrain
from ssl_bench.eval import features
from ssl_bench.methods import BarlowTwins
from ssl_bench.optim import LARS
from ssl_bench.runtime.tf32 import tf32_products


def switches() -> tuple[bool, bool]:
    """Of matrix products and convolutions."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture
def all_on():
    """A process in which all switches are on; afterwards as they were (monkeypatch cannot undo these)."""
    before = switches()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def seen(monkeypatch, all_on):  # noqa: ARG001 (for what it does)
    """The switches in a run's parts."""
    found: dict[str, set[tuple[bool, bool]]] = {}

    def spy(owner: object, name: str, part: str) -> None:
        original = getattr(owner, name)

        def spying(*args, **options):
            found.setdefault(part, set()).add(switches())
            return original(*args, **options)

        monkeypatch.setattr(owner, name, spying)

    loss = BarlowTwins.loss

    def with_backward(self, **outputs):
        terms = loss(self, **outputs)
        terms["loss"].register_hook(lambda _: found.setdefault("loss's backward", set()).add(switches()))
        return terms

    monkeypatch.setattr(BarlowTwins, "loss", with_backward)
    spy(BarlowTwins, "loss", "loss")
    spy(BarlowTwins, "embed", "network")
    spy(LARS, "step", "optimizer")
    spy(features, "embed", "evaluation")
    return found


@pytest.mark.parametrize(("precision", "in_loss"), [("fp32", False), ("bf16", True)])
@pytest.mark.parametrize("chunk_size", [64, 128])
def test_tf32_is_for_the_loss_of_a_run_that_is_not_fp32(tmp_path, seen, precision, in_loss, chunk_size):
    words = ["optimizer=lars", "batch_size=128", "steps=2", "eval.protocols=[knn-v1]", f"run_dir={tmp_path / 'r'}"]
    assert pretrain.main([*TINY_PRETRAIN, *words, f"precision={precision}", f"chunk_size={chunk_size}"]) == 0
    assert seen.pop("loss") == seen.pop("loss's backward") == {(in_loss, False)}
    assert seen == {"network": {(False, False)}, "optimizer": {(False, False)}, "evaluation": {(False, False)}}
    record = json.loads((tmp_path / "r/run.json").read_text())
    assert record["tf32"] == "nowhere"  # on this CPU; on a GPU: tests/runtime/test_null_gpu.py
    assert (record["torch"]["matmul_allow_tf32"], record["torch"]["cudnn_allow_tf32"]) == (False, False)


def test_the_switch_is_put_back_after_an_error_and_not_touched_where_nothing_is_allowed(all_on):  # noqa: ARG001
    for before in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = before
        with tf32_products(False):
            assert switches()[0] is before
        with pytest.raises(KeyError), tf32_products():
            raise KeyError(switches()[0])
        assert switches()[0] is before
