"""How a step goes over memory: chunks of tensors, their norms and their update.

A rule (lars.py, lamb.py) turns norms into one factor per tensor and knows nothing of memory; the kernels know nothing
of ratios. `Kernels` says what they compute, in multi-tensor operations that run on every device and never wait for
it. Such a sequence streams every tensor from memory once per operation. On a GPU `Fused` leaves the update itself to
torch's fused SGD and Adam kernels: LARS goes over memory 12 times instead of 15, LAMB 14 times instead of 27.
On a CPU `Blocked` takes a block of `BLOCK` elements through everything while the block is in the cache: a step of LARS,
TVLARS or LAMB on ResNet-18 takes half the time (benchmarks/optimizers.py). They differ in rounding only.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor
Tensors = list[Tensor] | tuple[Tensor, ...]
LOW_PRECISION = (torch.bfloat16, torch.float16)
# One chunk's weights and gradients stay in a CPU's last cache level between the norms and the update.
CPU_CHUNK = 1 << 20  # elements
BLOCK = 1 << 19  # elements; four float32 blocks are 8 MiB
CANCELLED = 0.1  # part of |g|^2 + beta^2 |w|^2 below which |g + beta w|^2 has lost a digit to cancellation


class Bucket(NamedTuple):
    """Tensors of one parameter group; after `split_by_kind` of one device and dtype."""

    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]  # e.g. {"momentum_buffer": [...], "step": [...]}, parallel to `params`

    def take(self, chosen: Sequence[int]) -> "Bucket":
        """The tensors at the given positions."""
        params, grads = ([values[i] for i in chosen] for values in (self.params, self.grads))
        return Bucket(params, grads, {name: [values[i] for i in chosen] for name, values in self.state.items()})


class Momentum(NamedTuple):
    """Settings of momentum SGD."""

    lr: Scalar  # what the buffer is multiplied by
    momentum: float  # mu
    decay: float  # beta
    nesterov: bool


class Norms(NamedTuple):
    """Norms of K tensors, each (K,); those that were not wanted may be NaN."""

    w: Tensor  # |w|
    g: Tensor  # |g|
    d: Tensor  # |g + beta w|, for Adam |u|


def split_by_kind(bucket: Bucket) -> list[Bucket]:
    """The bucket's tensors by device and dtype; empty without tensors."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, p in enumerate(bucket.params):
        kinds.setdefault((p.device, p.dtype), []).append(i)
    return [bucket] if len(kinds) == 1 else [bucket.take(chosen) for chosen in kinds.values()]


def chunks(bucket: Bucket, foreach: bool) -> Iterator[Bucket]:
    """The tensors that go through one sequence of operations: all of them, on the CPU up to `CPU_CHUNK` elements.

    A larger tensor comes alone, and without `foreach` every tensor does.
    """
    if foreach and (bucket.params[0].device.type != "cpu" or torch.compiler.is_compiling()):
        yield bucket
        return
    limit = CPU_CHUNK if foreach else 0
    start, total = 0, 0
    for i, p in enumerate(bucket.params):
        if i > start and total + p.numel() > limit:
            yield bucket.take(range(start, i))
            start, total = i, 0
        total += p.numel()
    yield bucket.take(range(start, len(bucket.params)))


def norms(tensors: Tensors) -> Tensor:
    """Euclidean norm of each tensor, accumulated in at least float32: (K,) on the tensors' device."""
    dtype = torch.float32 if tensors[0].dtype in LOW_PRECISION else None
    return torch.stack(list(torch._foreach_norm(tensors, 2, dtype)))


def nan_like(reference: Tensor) -> Tensor:
    """NaN in the reference's shape: a statistic that does not exist here."""
    return torch.full_like(reference, math.nan)


class Kernels:
    """What a rule needs of the memory of K tensors of one device and dtype, by multi-tensor operations."""

    def __init__(self, chunk: Bucket, scratch: dict[torch.dtype, Tensor]) -> None:
        """Take a chunk, and the room for intermediate results that the optimizer keeps from step to step."""
        self.params, self.grads, self.state = chunk
        self.scratch = scratch
        self._sums: Tensors | None = None

    def scalar(self, value: Scalar) -> Scalar:
        """A learning rate in the form that this path multiplies by: a number or a 0-d tensor."""
        first = self.params[0]
        if isinstance(value, Tensor):
            return value.reshape(()).to(first.device)
        if torch.compiler.is_compiling():
            # A number is an input of the compiled graph only where it multiplies a tensor; as `alpha` it is a
            # constant of the graph, and every new learning rate would compile anew.
            return torch.ones((), dtype=first.dtype, device=first.device) * value
        return value

    def norms(self, decay: float, *, want_g: bool, want_d: bool) -> Norms:
        """|w|, |g| and |g + decay w|."""
        w = norms(self.params)
        g = norms(self.grads) if want_g or decay == 0 else nan_like(w)
        return Norms(w, g, g if decay == 0 else norms(self._decayed(decay)) if want_d else nan_like(w))

    def _decayed(self, decay: float) -> Tensors:
        """g + decay w, formed once for the norm and the update."""
        if decay == 0:
            return self.grads
        if self._sums is None:
            self._sums = torch._foreach_add(self.grads, self.params, alpha=decay)
        return self._sums

    def momentum_(self, sgd: Momentum, factor: Scalar | None, bare: Tensor | None, *, want_norm: bool) -> Tensor | None:
        """d = factor (g + beta w); b = mu b + d; w -= lr b (Nesterov: lr (d + mu b)).

        Args:
            sgd: lr, mu, beta and whether to look ahead.
            factor: of each tensor (K,), one for all (a number or 0-d), or None for 1.
            bare: bool (K,), tensors without decay because w = 0 or g = 0; None for no tensor.
            want_norm: whether the norm of each tensor's step is wanted.

        Returns:
            |w_new - w| (K,), or None.
        """
        params, dtype = self.params, self.params[0].dtype
        d = self._decayed(sgd.decay)
        if bare is not None and sgd.decay != 0:
            # Exact: with w = 0 or g = 0, g + beta w - beta w = g.
            off = bare.to(dtype) * -sgd.decay
            d = torch._foreach_add(d, torch._foreach_mul(params, off.unbind()))
        if factor is not None:
            scale = factor.to(dtype).unbind() if isinstance(factor, Tensor) and factor.ndim == 1 else factor
            if d is self.grads:  # which stay as they are
                d = torch._foreach_mul(d, scale)
            else:
                torch._foreach_mul_(d, scale)
        self._descend(sgd, d)
        if not want_norm:
            return None
        buffers = self.state["momentum_buffer"]
        return norms(torch._foreach_add(d, buffers, alpha=sgd.momentum) if sgd.nesterov else buffers) * sgd.lr

    def _descend(self, sgd: Momentum, d: Tensors) -> None:
        """b = mu b + d; w -= lr b (Nesterov: lr (d + mu b))."""
        params, buffers = self.params, self.state["momentum_buffer"]
        torch._foreach_mul_(buffers, sgd.momentum)
        torch._foreach_add_(buffers, d)
        update: Tensors = torch._foreach_add(d, buffers, alpha=sgd.momentum) if sgd.nesterov else buffers
        if isinstance(sgd.lr, Tensor):
            torch._foreach_sub_(params, torch._foreach_mul(update, sgd.lr))
        else:
            torch._foreach_add_(params, update, alpha=-sgd.lr)

    def adam_(self, group: dict[str, Any], *, want_norms: bool, want_g: bool) -> tuple[Norms, list[Tensor]]:
        """Advance Adam's moments m and v, and form u = m / (sqrt(v) + eps) + beta w.

        Args:
            group: its "betas", "eps", "weight_decay" and "bias_correction" count.
            want_norms: whether |w| and |u| are wanted.
            want_g: whether |g| is wanted.

        Returns:
            The norms, and u of each tensor, which lasts until the next call.
        """
        u = self._direction(group)
        if not want_norms:
            return Norms(*[nan_like(torch.stack(self.state["step"]).to(u[0].dtype))] * 3), u
        w = norms(self.params)
        return Norms(w, norms(self.grads) if want_g else nan_like(w), norms(u)), u

    def _direction(self, group: dict[str, Any]) -> list[Tensor]:
        """u, and the moments brought up to date."""
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        m, v = self.state["exp_avg"], self.state["exp_avg_sq"]
        t = torch.stack(self.state["step"]).to(self.params[0].dtype)

        def correction(beta: float) -> Tensor:
            # 1 - beta^t, without the cancellation that costs float32 four digits at beta = 0.999 and small t.
            return torch.ones_like(t) if beta == 0 else -torch.expm1(t * math.log(beta))

        torch._foreach_lerp_(m, self.grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, self.grads, self.grads, value=1 - beta2)
        bottom = torch._foreach_sqrt(v)
        if group["bias_correction"]:
            torch._foreach_div_(bottom, list(correction(beta2).sqrt().unbind()))
        torch._foreach_add_(bottom, group["eps"])
        u = torch._foreach_div(m, bottom)
        if group["bias_correction"]:
            torch._foreach_div_(u, list(correction(beta1).unbind()))
        if decay != 0:
            torch._foreach_add_(u, self.params, alpha=decay)
        return list(u)

    def add_(self, u: list[Tensor], factors: Tensor) -> None:
        """w += factor u, with `factors` (K,) and u from `adam_`."""
        torch._foreach_addcmul_(self.params, u, list(factors.to(self.params[0].dtype).unbind()))


class Fused(Kernels):
    """The same on a GPU, with torch's fused kernels for the update."""

    DEVICE = "cuda"

    @classmethod
    def serves(cls, bucket: Bucket) -> bool:
        """Whether every tensor is dense, in float32 or float64, on this device, laid out as its gradient and state."""
        first = bucket.params[0]
        if first.device.type != cls.DEVICE or first.dtype not in (torch.float32, torch.float64):
            return False
        moments = [values for name, values in bucket.state.items() if name != "step"]
        for p, g, *state in zip(bucket.params, bucket.grads, *moments, strict=True):
            if type(g) is not Tensor or g.dtype != p.dtype or not is_dense(p):
                return False
            if any(t.stride() != p.stride() for t in (g, *state)):
                return False
        return not torch.compiler.is_compiling()

    def _descend(self, sgd: Momentum, d: Tensors) -> None:
        if sgd.momentum == 0:  # the fused kernel takes no buffer then
            super()._descend(sgd, d)
            return
        torch._fused_sgd_(
            self.params, list(d), self.state["momentum_buffer"], weight_decay=0.0, momentum=sgd.momentum, lr=sgd.lr,
            dampening=0.0, nesterov=sgd.nesterov, maximize=False, is_first_step=False,
        )  # fmt: skip

    def _direction(self, group: dict[str, Any]) -> list[Tensor]:
        u = list(torch._foreach_mul(self.params, group["weight_decay"]))
        steps = self.state["step"]
        if not group["bias_correction"]:
            steps = [torch.full_like(steps[0], math.inf)] * len(steps)
        fused_adam(group, u, self.grads, self.state["exp_avg"], self.state["exp_avg_sq"], steps)
        return u


class Blocked(Fused):
    """The same, block by block on the CPU, where reading a scalar costs nothing: norms are float64, factors numbers."""

    DEVICE = "cpu"

    def scalar(self, value: Scalar) -> Scalar:
        return float(value)

    def norms(self, decay: float, *, want_g: bool, want_d: bool) -> Norms:  # noqa: ARG002 - they cost nothing here
        # |g + beta w|^2 = |g|^2 + 2 beta g.w + beta^2 |w|^2 takes one pass; where it cancels, the sum is formed.
        rows = []
        for param, grad in zip(self.params, self.grads, strict=True):
            ww = gg = gw = 0.0
            for w, g in blocks(param, grad):
                ww += dot(w, w)
                gg += dot(g, g)
                if decay != 0:
                    gw += dot(g, w)
            parts = gg + decay**2 * ww
            dd = parts + 2 * decay * gw
            if dd < CANCELLED * parts:
                dd = sum(dot(d, d) for d in (torch.add(g, w, alpha=decay) for w, g in blocks(param, grad)))
            rows.append((ww, gg, dd))
        return Norms(*torch.tensor(rows, dtype=torch.float64).sqrt_().unbind(1))

    def momentum_(self, sgd: Momentum, factor: Scalar | None, bare: Tensor | None, *, want_norm: bool) -> Tensor | None:
        count = len(self.params)
        factors = factor.tolist() if isinstance(factor, Tensor) else [1.0 if factor is None else factor] * count
        decays = [sgd.decay] * count if bare is None else [0.0 if hit else sgd.decay for hit in bare.tolist()]
        room = self._room(min(BLOCK, max(p.numel() for p in self.params)))
        # torch's fused kernel takes d without its decay, but Nesterov's norm and momentum 0 need the whole of d.
        whole = sgd.momentum == 0 or (sgd.nesterov and want_norm)
        lr = float(sgd.lr)
        squares = []
        tensors = zip(self.params, self.grads, self.state["momentum_buffer"], factors, decays, strict=True)
        for param, grad, buffer, a, beta in tensors:
            total = 0.0
            for w, g, b in blocks(param, grad, buffer):
                d = torch.mul(g, a, out=room[: w.numel()])
                if whole and beta != 0:
                    d.add_(w, alpha=a * beta)
                if sgd.momentum == 0:  # the fused kernel takes no buffer then
                    w.add_(b.copy_(d), alpha=-lr)
                else:
                    torch._fused_sgd_(
                        [w], [d], [b], weight_decay=0.0 if whole else a * beta, momentum=sgd.momentum, lr=lr,
                        dampening=0.0, nesterov=sgd.nesterov, maximize=False, is_first_step=False,
                    )  # fmt: skip
                if want_norm:
                    u = d.add_(b, alpha=sgd.momentum) if sgd.nesterov else b
                    total += dot(u, u)
            squares.append(total)
        return torch.tensor(squares, dtype=torch.float64).sqrt_().mul_(abs(lr)) if want_norm else None

    def adam_(
        self,
        group: dict[str, Any],
        *,
        want_norms: bool,  # noqa: ARG002 - |w| and |u| cost nothing here
        want_g: bool,
    ) -> tuple[Norms, list[Tensor]]:
        decay = group["weight_decay"]
        steps = self.state["step"] if group["bias_correction"] else [torch.tensor(math.inf)] * len(self.params)
        u_all = self._room(sum(p.numel() for p in self.params)).split([p.numel() for p in self.params])
        rows = []
        tensors = (self.params, self.grads, u_all, self.state["exp_avg"], self.state["exp_avg_sq"], steps)
        for param, grad, u_flat, m_all, v_all, step in zip(*tensors, strict=True):
            ww = uu = 0.0
            gg = 0.0 if want_g else math.nan
            for w, g, u, m, v in blocks(param, grad, u_flat, m_all, v_all):
                torch.mul(w, decay, out=u)
                fused_adam(group, [u], [g], [m], [v], [step])
                ww += dot(w, w)
                uu += dot(u, u)
                if want_g:
                    gg += dot(g, g)
            rows.append((ww, gg, uu))
        return Norms(*torch.tensor(rows, dtype=torch.float64).sqrt_().unbind(1)), list(u_all)

    def add_(self, u: list[Tensor], factors: Tensor) -> None:
        for param, direction, factor in zip(self.params, u, factors.tolist(), strict=True):
            # In the same blocks, so that each core finds the stretches that it wrote itself.
            for w, stretch in blocks(param, direction):
                w.add_(stretch, alpha=factor)

    def _room(self, size: int) -> Tensor:
        """Uninitialised elements, kept from step to step: fresh memory would cost a page fault every 4 KiB."""
        dtype = self.params[0].dtype
        if dtype not in self.scratch or self.scratch[dtype].numel() < size:
            self.scratch[dtype] = torch.empty(size, dtype=dtype)
        return self.scratch[dtype][:size]


def fused_adam(group: dict[str, Any], u: Tensors, g: Tensors, m: Tensors, v: Tensors, steps: Tensors) -> None:
    """u = beta w -> m / (sqrt(v) + eps) + beta w, with the moments brought up to date.

    torch's fused kernel with lr -1, given beta w in the place of the weights, adds the first term to it. An infinite
    step turns its bias correction off: 1 - beta ** inf = 1.
    """
    beta1, beta2 = group["betas"]
    torch._fused_adam_(
        u, g, m, v, [], steps, lr=-1.0, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=group["eps"],
        amsgrad=False, maximize=False,
    )  # fmt: skip


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching stretches of at most `BLOCK` elements of dense tensors of one layout, in the order of memory."""
    flat = tuple(t.as_strided((t.numel(),), (1,)) for t in tensors)
    if flat[0].numel() <= BLOCK:
        yield flat
    else:
        yield from zip(*(t.split(BLOCK) for t in flat), strict=True)


def dot(x: Tensor, y: Tensor) -> float:
    """Inner product of two vectors as a number."""
    return torch.dot(x, y).item()


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in whatever order of the axes."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
