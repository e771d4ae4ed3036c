"""How sharp a minimum is: top Hessian eigenvalue, Hessian trace and SAM sharpness of a loss on a fixed batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_bench.eval.features import eval_mode

Loss = Callable[[], Tensor]  # the scalar loss on the fixed batch, a pure function of the parameters
BatchNormMode = Literal["train", "eval"]


class Eigenvalue(NamedTuple):
    """A Ritz value, and how far it can be from an eigenvalue."""

    value: float
    residual: float  # |H v - value v| of the unit Ritz vector v: an eigenvalue lies within it
    iterations: int


class Estimate(NamedTuple):
    """A mean of random samples and its standard error."""

    value: float
    standard_error: float


class Sharpness(NamedTuple):
    """All measures of one loss at one point, and the settings that they depend on."""

    loss: float
    gradient_norm: float
    top_eigenvalue: Eigenvalue
    trace: Estimate
    sam: float
    rho: float
    batch_norm: BatchNormMode


@contextmanager
def batch_norm_mode(model: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """Puts batch norm in a mode and all else in eval mode, and restores modes and buffers bit for bit afterwards.

    Dropout and the like are off in both modes, because a Hessian is one of a fixed function.

    Args:
        model: need not have any batch norm.
        mode: "train" normalises by the batch, which gives the loss that training minimises; "eval" by the running
            statistics, which gives the loss of the network as it is used.
    """
    if mode not in ("train", "eval"):
        raise ValueError(f"batch_norm must be train or eval, got {mode!r}")
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with eval_mode(model):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train(mode == "train")
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


class Hessian:
    """Products of a loss's Hessian with vectors; the gradient's graph is built once and kept.

    Args:
        loss: called once.
        params: the parameters to differentiate by, on one device.

    Raises:
        ValueError: if there is no parameter, or the loss is not a finite scalar.
    """

    def __init__(self, loss: Loss, params: Sequence[Tensor]) -> None:
        if not params:
            raise ValueError("sharpness: at least one parameter must require a gradient, got none")
        value = loss()
        if value.ndim != 0 or not math.isfinite(value.item()):
            got = f"shape {tuple(value.shape)}" if value.ndim else value.item()
            raise ValueError(f"sharpness: the loss must be a finite scalar, got {got}")
        self.params = list(params)
        self.loss = value.item()
        self.gradient = torch.autograd.grad(value, self.params, create_graph=True, materialize_grads=True)

    def __call__(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v, in the parameters' shapes; zero where the gradient is constant."""
        pairs = [(g, v) for g, v in zip(self.gradient, vector, strict=True) if g.requires_grad]
        if not pairs:
            return [torch.zeros_like(parameter) for parameter in self.params]
        outputs, directions = [g for g, _ in pairs], [v for _, v in pairs]
        products = torch.autograd.grad(
            outputs, self.params, directions, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return list(products)


def inner_product(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The inner product, summed in float64."""
    return float(torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum())


def top_eigenvalue(hessian: Hessian, *, iterations: int = 50, tolerance: float = 1e-3, seed: int = 0) -> Eigenvalue:
    """The algebraically largest eigenvalue, by Lanczos' three-term recurrence.

    It keeps three vectors of the parameters' size and does not reorthogonalise them: rounding then adds copies of Ritz
    values that have converged, but does not move the largest (Paige 1976).

    Args:
        hessian: of the loss.
        iterations: the most Hessian products, >= 1.
        tolerance: stop when the residual is below this share of the value.
        seed: of the starting vector, which has its own generator.

    Raises:
        ValueError: on iterations below 1, or a product that is not finite.
    """
    if iterations < 1:
        raise ValueError(f"sharpness: iterations must be >= 1, got {iterations}")
    generator = torch.Generator().manual_seed(seed)
    v = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in hessian.params]
    norm = math.sqrt(inner_product(v, v))
    v, previous = [x / norm for x in v], [torch.zeros_like(x) for x in v]
    alphas: list[float] = []
    betas: list[float] = []
    beta, best = 0.0, Eigenvalue(math.nan, math.inf, 0)
    for step in range(1, iterations + 1):
        w = hessian(v)
        alpha = inner_product(w, v)
        if not math.isfinite(alpha):
            raise ValueError("sharpness: products with the Hessian must be finite, got NaN or infinity")
        w = [x - alpha * y - beta * z for x, y, z in zip(w, v, previous, strict=True)]
        alphas.append(alpha)
        beta = math.sqrt(inner_product(w, w))
        diagonal, off = torch.tensor(alphas, dtype=torch.float64), torch.tensor(betas, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(diagonal.diag() + off.diag(1) + off.diag(-1))
        best = Eigenvalue(values[-1].item(), abs(beta * vectors[-1, -1].item()), step)
        if best.residual <= tolerance * abs(best.value) or beta == 0:
            break
        betas.append(beta)
        previous, v = v, [x / beta for x in w]
    return best


def trace(hessian: Hessian, *, samples: int = 30, seed: int = 0) -> Estimate:
    """The Hessian's trace by Hutchinson's estimator: the mean of v'Hv over random signs v; exact if H is diagonal.

    Args:
        hessian: of the loss.
        samples: Hessian products, >= 2.
        seed: of the signs, which have their own generator.

    Raises:
        ValueError: on samples below 2, which have no standard error.
    """
    if samples < 2:
        raise ValueError(f"sharpness: samples must be >= 2, got {samples} (one sample has no standard error)")
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(samples):
        v = [(2 * torch.randint(0, 2, p.shape, generator=generator) - 1).to(p) for p in hessian.params]
        draws.append(inner_product(v, hessian(v)))
    values = torch.tensor(draws, dtype=torch.float64)
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(samples))


def sam_sharpness(loss: Loss, params: Sequence[Tensor], gradient: Sequence[Tensor], rho: float = 0.05) -> float:
    """L(w + rho g / |g|) - L(w): how much the loss rises one step up its gradient (Foret et al. 2021, eq. 2).

    Args:
        loss: called twice.
        params: the point w; the same afterwards, bit for bit.
        gradient: of the loss by the parameters.
        rho: the step's length in the parameters' Euclidean norm, > 0.

    Raises:
        ValueError: on a rho that is not positive.
    """
    if rho <= 0:
        raise ValueError(f"sharpness: rho must be > 0, got {rho}")
    norm = math.sqrt(inner_product(gradient, gradient))
    if norm == 0:
        return 0.0
    saved = [parameter.detach().clone() for parameter in params]
    with torch.no_grad():
        before = loss().double()
        for parameter, g in zip(params, gradient, strict=True):
            parameter.add_(g, alpha=rho / norm)
        try:
            return (loss().double() - before).item()
        finally:
            for parameter, value in zip(params, saved, strict=True):
                parameter.copy_(value)


def measure_sharpness(
    model: nn.Module,
    loss: Loss,
    *,
    batch_norm: BatchNormMode = "train",
    iterations: int = 50,
    samples: int = 30,
    rho: float = 0.05,
    seed: int = 0,
) -> Sharpness:
    """All measures over every trainable parameter of a model, in float32 even inside autocast.

    The model's parameters, buffers, modes and gradients, and the global generators are the same afterwards. A
    reparametrisation that keeps the function changes these numbers (Dinh et al. 2017): compare them between runs of
    one architecture, and look at the weights' norms too.

    Args:
        model: the bare module that the loss runs; not a DistributedDataParallel wrapper.
        loss: the scalar loss on a fixed batch; it must not draw random numbers.
        batch_norm: see `batch_norm_mode`; repeated in the result.
        iterations: the most iterations of Lanczos.
        samples: of Hutchinson's estimator.
        rho: of SAM's step.
        seed: of the random vectors.

    Raises:
        ValueError: on a bad setting, no trainable parameter, or a loss that is not finite.
    """
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = params[0].device.type if params else "cpu"
    with batch_norm_mode(model, batch_norm), torch.autocast(kind, enabled=False), torch.enable_grad():
        hessian = Hessian(loss, params)
        gradient = [g.detach() for g in hessian.gradient]
        return Sharpness(
            loss=hessian.loss,
            gradient_norm=math.sqrt(inner_product(gradient, gradient)),
            top_eigenvalue=top_eigenvalue(hessian, iterations=iterations, seed=seed),
            trace=trace(hessian, samples=samples, seed=seed),
            sam=sam_sharpness(loss, params, gradient, rho),
            rho=rho,
            batch_norm=batch_norm,
        )
