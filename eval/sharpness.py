"""How sharp a minimum is: top Hessian eigenvalue, Hessian trace and SAM sharpness of a loss on a fixed batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Loss = Callable[[], Tensor]  # the scalar loss on the fixed batch, a pure function of the parameters
BatchNormMode = Literal["train", "eval"]


class Eigenvalue(NamedTuple):
    """A Ritz value, and how far from an eigenvalue it can be."""

    value: float
    residual: float  # |H v - value v| of the unit Ritz vector v: an eigenvalue lies within it
    iterations: int


class Estimate(NamedTuple):
    """A mean of random samples and its standard error."""

    value: float
    standard_error: float


class Sharpness(NamedTuple):
    """Every measure of one loss at one point, and the settings that they depend on."""

    loss: float
    gradient_norm: float
    top_eigenvalue: Eigenvalue
    trace: Estimate
    sam: float
    rho: float
    batch_norm: BatchNormMode


@contextmanager
def batch_norm_mode(model: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """Puts batch norm in a mode and all else in eval mode, then gives modes and buffers back, bit for bit.

    Dropout and its like are off in both modes, for a Hessian is one of a fixed function.

    Args:
        model: may hold no batch norm at all.
        mode: "train" normalises by the batch, which is the loss that training descends; "eval" by the running
            statistics, which is the loss of the network that is used.
    """
    if mode not in ("train", "eval"):
        raise ValueError(f"sharpness: batch_norm must be train or eval, got {mode!r}")
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(mode == "train")
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


class Hessian:
    """Products of a loss's Hessian with vectors; the gradient's graph is built once and kept.

    Args:
        loss: the closure; called once.
        params: the parameters that the Hessian is taken in, of one device.

    Raises:
        ValueError: if there is no parameter, or the loss is not a finite scalar.
    """

    def __init__(self, loss: Loss, params: Sequence[Tensor]) -> None:
        if not params:
            raise ValueError("sharpness: no parameter that requires a gradient was given")
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

    Three vectors of the parameters' size are kept. Without reorthogonalisation rounding makes copies of Ritz values
    that have converged, which leaves the largest where it is (Paige 1976).

    Args:
        hessian: of the loss.
        iterations: Hessian products at most, >= 1.
        tolerance: stop once the residual is below this share of the value.
        seed: of the starting vector, from a generator of its own.

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
            raise ValueError("sharpness: a product with the Hessian is not finite")
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
    """The Hessian's trace by Hutchinson's estimator: the mean of v'Hv over random signs v; exact for a diagonal one.

    Args:
        hessian: of the loss.
        samples: Hessian products, >= 2.
        seed: of the signs, from a generator of their own.

    Raises:
        ValueError: on samples below 2, of which there is no standard error.
    """
    if samples < 2:
        raise ValueError(f"sharpness: samples must be >= 2 for a standard error, got {samples}")
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
        loss: the closure.
        params: where it is taken; the same afterwards, bit for bit.
        gradient: of the loss in the parameters.
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
    """All measures in every trainable parameter of a model, in float32 whatever autocast surrounds the call.

    The model's parameters, buffers, modes and gradients, and the global generators are the same afterwards. A
    reparametrisation that leaves the function alone changes these numbers (Dinh et al. 2017): compare them between
    runs of one architecture, with the weights' norms beside them.

    Args:
        model: the bare module that the loss runs; not a DistributedDataParallel wrapper.
        loss: the scalar loss on a fixed batch; it must draw nothing at random.
        batch_norm: see `batch_norm_mode`; stated in the result.
        iterations: of Lanczos, at most.
        samples: of Hutchinson's estimator.
        rho: of SAM's step.
        seed: of the random vectors.

    Raises:
        ValueError: as the parts do.
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
