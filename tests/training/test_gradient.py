"""The three ways to a step's gradient, in one process (over several: tests/methods/test_invariance.py)."""

import copy
import json
import runpy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_bench.methods import METHODS, Method
from ssl_bench.recipe.compose import compose
from ssl_bench.training.build import step_gradient
from ssl_bench.training.gradient import accumulate, full_batch, grad_cache

N = 16


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, N, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))


def network(name: str = "barlow_twins", norm: type[nn.Module] = nn.Identity, dropout: float = 0.0) -> Method:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(1)]
    model = METHODS[name](nn.Sequential(*layers), 24, projector=(12, 10))
    if norm is nn.Identity:
        model.projector = nn.Sequential(*[m for m in model.projector if not isinstance(m, nn.BatchNorm1d)])
    return model.double()


def chunks(x: Tensor, n_chunks: int):
    rows = len(x[0]) // n_chunks
    return lambda chunk: tuple(x[:, chunk * rows : (chunk + 1) * rows])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=rtol * float(value.abs().max()), msg=name)


class Recorder(nn.Module):
    """Passes its input through and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return x


@pytest.mark.parametrize("n_chunks", [1, 2, 4, 16])
@pytest.mark.parametrize("name", METHODS)
def test_grad_cache_without_batch_norm_is_the_full_batch(name, n_chunks):
    model, x = network(name), images()
    terms = full_batch(model, chunks(x, 1), 1, Tensor.backward)
    expected = gradients(model)
    model.zero_grad()
    chunked = grad_cache(model, chunks(x, n_chunks), n_chunks, Tensor.backward)
    assert_close(chunked, terms, rtol=1e-13)
    assert_close(gradients(model), expected, rtol=1e-12)
    assert not any(term.requires_grad for term in (*terms.values(), *chunked.values()))


def test_one_chunk_with_batch_norm_and_dropout_is_the_full_batch_to_the_last_statistic():
    """Two passes, yet the same random numbers, one update of the running statistics, the same generator afterwards."""
    plain = network(norm=nn.BatchNorm2d, dropout=0.5)
    cached, x = copy.deepcopy(plain), images()
    torch.manual_seed(1)
    full_batch(plain, chunks(x, 1), 1, Tensor.backward)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    grad_cache(cached, chunks(x, 1), 1, Tensor.backward)
    assert torch.equal(torch.get_rng_state(), after)
    assert_close(gradients(cached), gradients(plain), rtol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(cached.buffers(), plain.buffers(), strict=True))
    assert cached.projector[1].num_batches_tracked == 2  # one for each view


def test_both_passes_see_the_same_embeddings():
    model = network("vicreg", norm=nn.BatchNorm2d, dropout=0.3)
    recorder = Recorder()
    model.projector.append(recorder)
    grad_cache(model, chunks(images(), 4), 4, Tensor.backward)
    first, second = recorder.seen[:8], recorder.seen[8:]
    assert len(second) == 8
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_running_statistics_are_tracked_again_after_an_error_and_evaluation_mode_is_left_alone():
    model = network(norm=nn.BatchNorm2d)
    model.projector.eval()

    def views(chunk: int) -> tuple[Tensor, ...]:
        if chunk == 1:
            raise KeyboardInterrupt
        return chunks(images(), 2)(chunk)

    before = [b.clone() for b in model.buffers()]
    with pytest.raises(KeyboardInterrupt):
        grad_cache(model, views, 2, Tensor.backward)
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_a_scaled_backward_scales_the_gradient_once():
    model, x = network(), images()
    full_batch(model, chunks(x, 1), 1, Tensor.backward)
    expected = {name: 1024 * grad for name, grad in gradients(model).items()}
    for step, n_chunks in ((full_batch, 1), (grad_cache, 4)):
        model.zero_grad()
        step(model, chunks(x, n_chunks), n_chunks, lambda loss: (1024 * loss).backward())
        assert_close(gradients(model), expected, rtol=1e-12)


@pytest.mark.parametrize(("track", "n_chunks"), [("pretrain", 1), ("pretrain", 4), ("classify", 1), ("classify", 4)])
def test_loss_scale_scales_the_gradient_and_no_number_that_is_recorded(track, n_chunks):
    words = [f"batch_size={N}", f"chunk_size={N // n_chunks}"]
    model = network() if track == "pretrain" else Classifier()
    views = chunks(images(), n_chunks) if track == "pretrain" else labelled(n_chunks)
    accelerator = SimpleNamespace(autocast=nullcontext)
    found = {}
    for scale in (1, 0.25, 3):
        model.zero_grad()
        step = step_gradient(compose(track, [*words, f"loss_scale={scale}"]), accelerator)
        terms = step(model, views, n_chunks, Tensor.backward)
        found[scale] = {name: value.clone() for name, value in gradients(model).items()}
        if scale == 1:
            expected = terms
        assert all(torch.equal(terms[name], value) for name, value in expected.items())
    assert_close(found[0.25], {name: value / 4 for name, value in found[1].items()}, rtol=1e-13)
    assert_close(found[3], {name: value * 3 for name, value in found[1].items()}, rtol=1e-13)


def test_gradients_are_added():
    model, x = network(), images()
    grad_cache(model, chunks(x, 4), 4, Tensor.backward)
    once = {name: grad.clone() for name, grad in gradients(model).items()}
    grad_cache(model, chunks(x, 4), 4, Tensor.backward)
    assert_close(gradients(model), {name: 2 * grad for name, grad in once.items()}, rtol=1e-12)


def test_under_autocast_the_two_ways_agree_to_bfloat16():
    model, x = network().float(), images(torch.float32)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    full_batch(model, chunks(x, 1), 1, Tensor.backward, autocast)
    expected = gradients(model)
    model.zero_grad()
    grad_cache(model, chunks(x, 4), 4, Tensor.backward, autocast)
    assert_close(gradients(model), expected, rtol=2e-2)
    model.zero_grad()
    grad_cache(model, chunks(x, 4), 4, Tensor.backward)
    with pytest.raises(AssertionError):  # the control: autocast did something
        assert_close(gradients(model), expected, rtol=1e-5)


class FakeParallel(nn.Module):
    """Counts as DistributedDataParallel does: calls of forward outside and inside ``no_sync``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.held, self.calls = module, False, []

    def no_sync(self):
        parallel = self

        class Hold(nullcontext):
            def __enter__(self) -> None:
                parallel.held = True

            def __exit__(self, *_: object) -> None:
                parallel.held = False

        return Hold()

    def forward(self, *inputs: Tensor, **options: bool):
        self.calls.append("held" if self.held else "reduced")
        return self.module(*inputs, **options)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 3).double()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.head(x.flatten(1))
        return {"loss": F.cross_entropy(logits, y), "top1": (logits.argmax(1) == y).double().mean()}


def labelled(n_chunks: int):
    x, y = images()[0].chunk(n_chunks), (torch.arange(N) % 3).chunk(n_chunks)
    return lambda chunk: (x[chunk], y[chunk])


def test_gradients_are_reduced_once_a_step():
    wrapped = FakeParallel(network())
    grad_cache(wrapped, chunks(images(), 4), 4, Tensor.backward)
    assert wrapped.calls == ["held"] * 7 + ["reduced"]
    wrapped = FakeParallel(Classifier())
    accumulate(wrapped, labelled(4), 4, Tensor.backward)
    assert wrapped.calls == ["held"] * 3 + ["reduced"]


@pytest.mark.parametrize("n_chunks", [1, 4])
def test_accumulation_of_a_mean_loss_is_exact(n_chunks):
    model = Classifier()
    terms = full_batch(model, labelled(1), 1, Tensor.backward)
    expected = gradients(model)
    model.zero_grad()
    assert_close(accumulate(model, labelled(n_chunks), n_chunks, Tensor.backward), terms, rtol=1e-13)
    assert_close(gradients(model), expected, rtol=1e-13)


def test_plain_accumulation_of_a_self_supervised_loss_is_another_objective():
    """Why it is not offered: the control that shows that the tests above could see a wrong gradient."""
    model, x = network(), images()
    full_batch(model, chunks(x, 1), 1, Tensor.backward)
    expected = gradients(model)
    model.zero_grad()
    accumulate(model, chunks(x, 4), 4, Tensor.backward)
    with pytest.raises(AssertionError):
        assert_close(gradients(model), expected, rtol=0.05)


def test_a_compiled_wrapper_is_looked_through():
    model, x = network(), images()
    grad_cache(model, chunks(x, 4), 4, Tensor.backward)
    expected = gradients(model)
    model.zero_grad()
    grad_cache(torch.compile(model, backend="eager"), chunks(x, 4), 4, Tensor.backward)
    assert_close(gradients(model), expected, rtol=1e-12)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="full_batch: n_chunks must be 1, got 2"):
        full_batch(network(), chunks(images(), 2), 2, Tensor.backward)
    with pytest.raises(ValueError, match="grad_cache: model must be a Method, wrapped or not, got Linear"):
        grad_cache(nn.Linear(2, 2), chunks(images(), 2), 2, Tensor.backward)


def test_the_chunking_benchmark_runs(tmp_path, monkeypatch, capsys):
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "chunking.py"
    monkeypatch.setattr("sys.argv", [str(path), "--quick", "--json", str(tmp_path / "result.json")])
    runpy.run_path(str(path), run_name="__main__")
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(case["batch"], case["chunk"]) for case in result["memory"]] == [(16, 16), (16, 8), (32, 8)]
    assert result["time"]["wall"]["ratio"] > 0
    assert "chunked / plain" in capsys.readouterr().out
