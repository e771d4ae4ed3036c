"""What every method must pass beside its own formula: steps in chunks, replayed, resumed or reordered are the same.

In float64, on a small smooth network without batch norm (which sees a chunk, not the batch).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tape import TapeRecorder
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_bench.methods import Labels, Method
from ssl_bench.training.gradient import compute_gradient
from ssl_bench.training.graphs import GraphedGradient

N = 12
STEPS = 7  # more than a replay needs to be recorded, checked and used

Build = Callable[[], Method]
Result = dict[str, Tensor]


def network() -> nn.Module:
    """(n, 3, 6, 6) -> (n, 16) features, the same ones each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Softplus(), nn.Flatten(1))


def build(cls: type[Method], **options: Any) -> Method:
    """A method of few dimensions, in float64 and without batch norm."""
    return _without_norm(cls(network(), 16, **options).double())  # type: ignore[return-value]


def _without_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, nn.Identity() if isinstance(child, _BatchNorm) else _without_norm(child))
    return module


def rows(*names: str, n: int = 6, d: int = 5, seed: int = 0) -> list[Tensor]:
    """Correlated (n, d) outputs in float64 whose gradients are asked for, one for each name."""
    generator = torch.Generator().manual_seed(seed)
    common, *own = torch.randn(1 + len(names), n, d, dtype=torch.float64, generator=generator)
    return [(common + 0.7 * noise).requires_grad_() for noise in own]


def assert_same_loss(actual: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
    """Equal values, and equal gradients with respect to each input (None where neither reaches it)."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    found, wanted = (torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (actual, expected))
    for gradient, reference in zip(found, wanted, strict=True):
        assert (gradient is None) == (reference is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-10 * float(reference.abs().max()))


def _batch(method: Method, step: int, order: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(N, 3, 6, 6, dtype=torch.float64, generator=generator)
    return tuple(
        torch.randint(3, (N,), generator=generator)[order]
        if isinstance(view, Labels)
        else (image + 0.5 * torch.randn(image.shape, dtype=image.dtype, generator=generator))[order]
        for view in method.views
    )


def train(
    make: Build,
    n_chunks: int = 1,
    *,
    shuffled: bool = False,
    recorder: TapeRecorder | None = None,
    resumed_at: int | None = None,
) -> list[Result]:
    """Each step's terms, gradients and buffers, over some steps of SGD."""
    method = make()
    gradient: Callable[..., dict[str, Tensor]] = compute_gradient
    if recorder is not None:
        gradient = GraphedGradient(compute_gradient, method, _refuse, recorder)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1, momentum=0.9)
    results = []
    for step in range(STEPS):
        if step == resumed_at:
            method, before, momenta = make(), method.state_dict(), optimizer.state_dict()
            method.load_state_dict(before)
            optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1, momentum=0.9)
            optimizer.load_state_dict(momenta)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(step)) if shuffled else torch.arange(N)
        inputs = [x.chunk(n_chunks) for x in _batch(method, step, order)]
        with torch.no_grad():
            method.begin_step(step / STEPS)
        views = [tuple(x[chunk] for x in inputs) for chunk in range(n_chunks)]
        terms = gradient(method, lambda chunk, views=views: views[chunk], n_chunks, Tensor.backward)
        gradients = {f"grad {name}": p.grad for name, p in method.named_parameters() if p.requires_grad}
        assert all(g is not None and g.isfinite().all() and g.any() for g in gradients.values())
        results.append({name: t.detach().clone() for name, t in (terms | gradients | method.state_dict()).items()})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return results


def _refuse(reason: str) -> None:
    raise AssertionError(reason)


def assert_contract(make: Build) -> None:
    """Training in 2 and 3 chunks, with the rows in another order, replayed, and resumed, is training whole."""
    whole = train(make)
    for other in (train(make, 2), train(make, 3), train(make, shuffled=True)):
        for step, (result, expected) in enumerate(zip(other, whole, strict=True)):
            for name, value in expected.items():
                largest = float(value.abs().max()) if value.numel() else 0.0
                torch.testing.assert_close(
                    result[name], value, rtol=1e-9, atol=max(1e-9 * largest, 1e-12), msg=f"{name} at step {step}"
                )
    recorder = TapeRecorder()
    for other in (train(make, recorder=recorder), train(make, resumed_at=4)):
        for result, expected in zip(other, whole, strict=True):
            for name, value in expected.items():
                assert torch.equal(result[name], value), name
    assert recorder.replays > 1


def assert_follows(method: Method, momentum: Callable[[float], float]) -> None:
    """The teacher is a copy at first, gets no gradient, and goes to momentum teacher + (1 - momentum) student."""
    teacher: Any = method.teacher
    pairs = list(
        zip(teacher.parameters(), [*method.backbone.parameters(), *method.projector.parameters()], strict=True)
    )
    assert pairs
    for old, new in pairs:
        assert torch.equal(old, new)
        assert not old.requires_grad
    generator = torch.Generator().manual_seed(1)
    for progress in (0.0, 0.3, 0.9):
        with torch.no_grad():
            for _, new in pairs:
                new.add_(torch.randn(new.shape, dtype=new.dtype, generator=generator))
            m = momentum(progress)
            expected = [m * old + (1 - m) * new for old, new in pairs]
            method.begin_step(progress)
        for (old, _), value in zip(pairs, expected, strict=True):
            torch.testing.assert_close(old.detach(), value.detach(), rtol=1e-12, atol=1e-12)
