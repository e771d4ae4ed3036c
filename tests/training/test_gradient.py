"""A step's gradient, whole and in chunks, in one process (over several: tests/methods/test_invariance.py)."""

import copy
import json
import re
import runpy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ssl_bench.methods import METHODS, Classifier, Method
from ssl_bench.training.gradient import compute_gradient, global_loss, unreached_parameters

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
@pytest.mark.parametrize("name", ["barlow_twins", "simclr", "vicreg"])  # all: tests/methods/test_invariance.py
def test_chunks_without_batch_norm_are_the_whole_batch(name, n_chunks):
    model, x = network(name), images()
    terms = compute_gradient(model, chunks(x, 1), 1, Tensor.backward)
    expected = gradients(model)
    model.zero_grad()
    chunked = compute_gradient(model, chunks(x, n_chunks), n_chunks, Tensor.backward)
    assert_close(chunked, terms, rtol=1e-13)
    assert_close(gradients(model), expected, rtol=1e-12)
    assert not any(term.requires_grad for term in (*terms.values(), *chunked.values()))


def test_one_chunk_with_batch_norm_and_dropout_is_the_full_batch_to_the_last_statistic():
    """Two passes, yet the same random numbers, one update of the running statistics, the same generator afterwards."""
    plain = network(norm=nn.BatchNorm2d, dropout=0.5)
    cached, x = copy.deepcopy(plain), images()
    torch.manual_seed(1)
    compute_gradient(plain, chunks(x, 1), 1, Tensor.backward)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    compute_gradient(cached, chunks(x, 1), 1, Tensor.backward)
    assert torch.equal(torch.get_rng_state(), after)
    assert_close(gradients(cached), gradients(plain), rtol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(cached.buffers(), plain.buffers(), strict=True))
    assert cached.projector[1].num_batches_tracked == 2  # one for each view


def test_both_passes_see_the_same_embeddings():
    model = network("vicreg", norm=nn.BatchNorm2d, dropout=0.3)
    recorder = Recorder()
    model.projector.append(recorder)
    compute_gradient(model, chunks(images(), 4), 4, Tensor.backward)
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
        compute_gradient(model, views, 2, Tensor.backward)
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_a_scaled_backward_scales_the_gradient_once():
    model, x = network(), images()
    compute_gradient(model, chunks(x, 1), 1, Tensor.backward)
    expected = {name: 1024 * grad for name, grad in gradients(model).items()}
    for n_chunks in (1, 4):
        model.zero_grad()
        compute_gradient(model, chunks(x, n_chunks), n_chunks, lambda loss: (1024 * loss).backward())
        assert_close(gradients(model), expected, rtol=1e-12)


def test_gradients_are_added():
    model, x = network(), images()
    compute_gradient(model, chunks(x, 4), 4, Tensor.backward)
    once = {name: grad.clone() for name, grad in gradients(model).items()}
    compute_gradient(model, chunks(x, 4), 4, Tensor.backward)
    assert_close(gradients(model), {name: 2 * grad for name, grad in once.items()}, rtol=1e-12)


def test_under_autocast_the_two_ways_agree_to_bfloat16():
    model, x = network().float(), images(torch.float32)

    def autocast(_chunk):
        return torch.autocast("cpu", torch.bfloat16)

    compute_gradient(model, chunks(x, 1), 1, Tensor.backward, autocast)
    expected = gradients(model)
    model.zero_grad()
    compute_gradient(model, chunks(x, 4), 4, Tensor.backward, autocast)
    assert_close(gradients(model), expected, rtol=2e-2)
    model.zero_grad()
    compute_gradient(model, chunks(x, 4), 4, Tensor.backward)
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


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(nn.Flatten(1), 48, 3).double()


def labelled(n_chunks: int):
    x, y = images()[0].chunk(n_chunks), (torch.arange(N) % 3).chunk(n_chunks)
    return lambda chunk: (x[chunk], y[chunk])


def test_gradients_are_reduced_once_a_step():
    wrapped = FakeParallel(network())
    compute_gradient(wrapped, chunks(images(), 4), 4, Tensor.backward)
    assert wrapped.calls == ["held"] * 7 + ["reduced"]
    wrapped = FakeParallel(classifier())
    compute_gradient(wrapped, labelled(4), 4, Tensor.backward)
    assert wrapped.calls == ["held"] * 3 + ["reduced"]


@pytest.mark.parametrize("n_chunks", [1, 4])
def test_accumulation_of_a_mean_loss_is_exact(n_chunks):
    model = classifier()
    terms = compute_gradient(model, labelled(1), 1, Tensor.backward)
    expected = gradients(model)
    model.zero_grad()
    assert_close(compute_gradient(model, labelled(n_chunks), n_chunks, Tensor.backward), terms, rtol=1e-13)
    assert_close(gradients(model), expected, rtol=1e-13)


def test_plain_accumulation_of_a_self_supervised_loss_is_another_objective():
    """The control that shows that the tests above could see a wrong gradient: what `per_sample` would do."""
    model, x = network(), images()
    compute_gradient(model, chunks(x, 1), 1, Tensor.backward)
    expected = gradients(model)
    model.zero_grad()
    model.per_sample = True
    compute_gradient(model, chunks(x, 4), 4, Tensor.backward)
    with pytest.raises(AssertionError):
        assert_close(gradients(model), expected, rtol=0.05)


def test_a_compiled_wrapper_is_looked_through():
    model, x = network(), images()
    compute_gradient(model, chunks(x, 4), 4, Tensor.backward)
    expected = gradients(model)
    model.zero_grad()
    compute_gradient(torch.compile(model, backend="eager"), chunks(x, 4), 4, Tensor.backward)
    assert_close(gradients(model), expected, rtol=1e-12)


def test_the_loss_is_float32_under_autocast_and_float64_stays():
    seen = []

    class Probe(type(network())):
        def loss(self, z1, z2):
            seen.append((z1.dtype, (z1 @ z2.T).dtype))
            return super().loss(z1, z2)

    model = network()
    model.__class__ = Probe
    compute_gradient(model, chunks(images(), 1), 1, Tensor.backward)
    model.float()
    views = chunks(images(torch.float32), 1)
    compute_gradient(model, views, 1, Tensor.backward, lambda _: torch.autocast("cpu", torch.bfloat16))
    assert seen == [(torch.float64,) * 2, (torch.float32,) * 2]


def test_z_std_tells_a_spread_from_a_collapse():
    method = network()
    spread = torch.cat([torch.eye(10), -torch.eye(10)])
    terms = global_loss(method, {"z1": spread, "z2": spread})
    torch.testing.assert_close(terms["z_std"], torch.tensor(10.0).rsqrt(), rtol=0.1, atol=0)  # unbiased
    assert global_loss(method, {"z1": torch.ones(8, 10), "z2": torch.ones(8, 10)})["z_std"] == 0


class Broken(Method):
    """Breaks the contract in one of its ways."""

    def __init__(self, how: str) -> None:
        super().__init__(nn.Flatten(1), 48, nn.Linear(48, 4))
        self.how, self.scale, self.calls = how, nn.Parameter(torch.ones(())), 0
        self.double()

    def forward(self, x1, x2):
        self.calls += 1
        z1, z2 = self.embed(x1), self.embed(x2)
        if self.how == "scalar":
            return z1.mean()
        if self.how == "rows":
            return {"z1": z1, "z2": torch.cat([z2, z2])}
        if self.how == "mean":
            return {"z1": z1.mean(), "z2": z2}
        if self.how == "names":
            return {"z1": z1, "z2": z2} if self.calls == 1 else {"z1": z1}
        return {"z1": z1, "z2": z2}

    def loss(self, z1, z2):
        if self.how == "no loss":
            return {"total": z1.sum()}
        if self.how == "constant":
            return {"loss": torch.ones((), requires_grad=True) * 1}
        return {"loss": (z1 - z2).square().mean() * (self.scale if self.how == "parameter" else 1)}


@pytest.mark.parametrize(
    ("how", "n_chunks", "message"),
    [
        ("parameter", 1, "Broken: loss must use no trainable parameter, got scale: move it into forward"),
        ("parameter", 4, "Broken: loss must use no trainable parameter, got scale: move it into forward"),
        ("scalar", 1, "Broken: forward must return a dict of tensors, got shape ()"),
        ("rows", 1, "Broken: output 'z2' must have one row for each of the 16 images, got shape (32, 4)"),
        ("mean", 1, "Broken: output 'z1' must have one row for each of the 16 images, got shape ()"),
        ("names", 4, "Broken: outputs must be alike in all chunks, got {'z1': (4,), 'z2': (4,)} in 0 and"),
        ("no loss", 1, "Broken: loss must return a dict with the scalar 'loss', got dict"),
        ("constant", 1, "Broken: the loss must depend on an output, got none of z1, z2"),
    ],
)
def test_a_method_that_breaks_the_contract_is_refused_in_one_line(how, n_chunks, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        compute_gradient(Broken(how), chunks(images(), n_chunks), n_chunks, Tensor.backward)
    assert "\n" not in str(caught.value)


def test_the_parameters_that_no_output_depends_on_are_found_and_nothing_changes():
    model = network(norm=nn.BatchNorm2d, dropout=0.5)
    model.spare, model.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    before, drawn = [buffer.clone() for buffer in model.buffers()], torch.get_rng_state()
    assert unreached_parameters(model, images()[:, :4].unbind()) == ["spare.weight", "spare.bias"]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not gradients(model)


def test_a_batch_of_one_image_and_what_is_no_method_are_refused():
    with pytest.raises(ValueError, match="BarlowTwins: the global batch must have >= 2 images, got 1"):
        compute_gradient(network(), lambda _: tuple(images()[:, :1]), 1, Tensor.backward)
    with pytest.raises(ValueError, match="model must be a Method, wrapped or not, got Linear"):
        compute_gradient(nn.Linear(2, 2), chunks(images(), 2), 2, Tensor.backward)


def test_the_chunking_benchmark_runs(tmp_path, monkeypatch, capsys):
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "chunking.py"
    monkeypatch.setattr("sys.argv", [str(path), "--quick", "--json", str(tmp_path / "result.json")])
    runpy.run_path(str(path), run_name="__main__")
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(case["batch"], case["chunk"]) for case in result["memory"]] == [(16, 16), (16, 8), (32, 8), (16, 16)]
    assert all(result["time"]["wall"][kind]["ratio"] > 0 for kind in ("chunked", "recomputed"))
    assert "chunked / plain" in capsys.readouterr().out
