"""Tries whether a method keeps its contract: ``ssl-bench check-method package.module:Name``, `check_method` in pytest.

Everything is computed in float64 on a small, smooth network, where another order of summation moves results by 1e-14
and a mistake by percents: a method that passes trains the same on any number of processes and in chunks.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ssl_bench.data.sampler import local_positions
from ssl_bench.methods.base import Method
from ssl_bench.methods.views import Crop, Labels, Noise, PaddedCrop
from ssl_bench.models.backbone import seeded
from ssl_bench.recipe import registry
from ssl_bench.runtime.distributed import rank, synchronize_batch_norm, world_size
from ssl_bench.training.gradient import compute_gradient, unwrap
from ssl_bench.training.memory.recompute import recompute_blocks
from ssl_bench.training.sample_random import SampleRandom

N = 24  # images of the global batch: divisible by 1, 2, 3 and 4 processes, and so is a chunk
CHUNK = 12
SIDE = 16  # pixels
STEPS = 2  # so that teachers, queues and centres have moved
TOLERANCE = 1e-9  # relative to the largest entry of each tensor
SMALL = (16, 12)  # widths of every keyword that is a tuple of whole numbers (projector, predictor), if not given

State = dict[str, Tensor]
Gradient = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A method as it is checked.

    Attributes:
        target: a known name, an entry point, or package.module:Name.
        options: its keywords; widths that are not given are small.
    """

    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def checked(self) -> dict[str, Any]:
        """All keywords, with the small widths.

        Raises:
            ValueError: an unknown method or keyword, in one line.
        """
        known = registry.options(registry.resolve("method", self.target))
        small = {name: SMALL for name, option in known.items() if get_args(option.annotation) == (int, ...)}
        return registry.check("method", self.target, {**small, **self.options})

    def build(self, *, batch_norm: bool = True) -> Method:
        """The method on a small network, float64; without ``batch_norm`` those layers use fixed statistics."""
        make, options = registry.resolve("method", self.target), self.checked()
        with seeded(0):
            try:
                method = make(*_convolutions(), **options)
            except ValueError as error:
                if "vit" not in str(error).lower():
                    raise
                method = make(*_transformer(), **options)
        method.double().train()
        if not batch_norm:
            for module in method.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return method


def _convolutions() -> tuple[nn.Module, int]:
    """Two convolutions with batch norm; smooth, so that rounding is not amplified. Takes crops of any size."""
    layers = (
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.Tanh(),
        nn.Conv2d(8, 10, 3, bias=False), nn.BatchNorm2d(10), nn.Tanh(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(1),
    )  # fmt: skip
    return nn.Sequential(*layers), 40


def _transformer() -> tuple[nn.Module, int]:
    """A small vision transformer, for methods that need its tokens."""
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(
        img_size=SIDE, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True
    )
    return network, 32


def inputs(method: Method) -> tuple[Tensor, ...]:
    """Random views of ``N`` images, as the method declares them; every image has another mean and scale.

    Raises:
        ValueError: a view of an unknown kind.
    """
    generator = torch.Generator().manual_seed(1)
    shift = torch.arange(N, dtype=torch.float64).div(2, rounding_mode="floor").view(N, 1, 1, 1)
    image = torch.randn(N, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)
    made = []
    for number, view in enumerate(method.views):
        if isinstance(view, Crop | PaddedCrop):
            size = getattr(view, "size", None) or SIDE
            size = round(size * SIDE) if size < 1 else min(int(size), SIDE)
            noise = torch.randn(N, 3, size, size, dtype=torch.float64, generator=generator)
            made.append((image[:, :, :size, :size] + 0.5 * noise) * (1 + shift / 8) + shift / 4)
        elif isinstance(view, Noise):
            made.append(torch.rand(N, view.width, generator=generator))
        elif isinstance(view, Labels):
            made.append(torch.arange(N) % 3)
        else:
            raise ValueError(f"views[{number}] must be a Crop, PaddedCrop, Noise or Labels, got {view!r}")
    return tuple(made)


def train(
    method: Method,
    chunk_size: int = N,
    order: Tensor | None = None,
    *,
    steps: int = STEPS,
    gradient: Any = None,
    recompute: bool = False,
) -> State:
    """Trains some steps on the fixed views, on this process's share of them.

    Args:
        method: in float64.
        chunk_size: images of the global batch in one pass.
        order: (N,) the images' order in the batch; None = as they are.
        steps: at least 1.
        gradient: given the method, makes what stands in for `compute_gradient` (a replay).
        recompute: compute the blocks again in the backward pass.

    Returns:
        the last step's scalars and gradients, and parameters and buffers after it, by name.
    """
    views = inputs(method) if order is None else tuple(view[order] for view in inputs(method))
    places = torch.arange(N) if order is None else order  # an image keeps its random numbers wherever it stands
    positions = [torch.arange(N)[part] for part in local_positions(N, chunk_size, rank(), world_size())]
    synchronize_batch_norm(method)
    if recompute:
        recompute_blocks(method)
    model: nn.Module = DistributedDataParallel(method, gradient_as_bucket_view=True) if world_size() > 1 else method
    random = SampleRandom(torch.device("cpu"))
    compute: Gradient = compute_gradient if gradient is None else gradient(method)
    trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.02, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        with torch.no_grad():
            method.begin_step(step / STEPS)
        random.begin_step(step)
        terms = compute(
            model,
            lambda chunk: tuple(view[positions[chunk]] for view in views),
            len(positions),
            Tensor.backward,
            lambda chunk: random.rows(places[positions[chunk]]),
        )
        random.end_step()
        optimizer.step()
    if method.per_sample and world_size() > 1:  # each process has the mean over its own rows
        for term in terms.values():
            dist.all_reduce(term)
            term /= world_size()
    gradients = {f"gradient of {name}": p.grad for name, p in trainable.items() if p.grad is not None}
    after = {f"{name} after it": value for name, value in unwrap(model).state_dict().items()}
    return {name: value.detach().clone() for name, value in (terms | gradients | after).items()}


def states(case: Case) -> dict[str, State]:
    """The state after training at this number of processes: whole, in chunks, by blocks, without batch norm."""
    return {
        "whole": train(case.build()),
        "chunked": train(case.build(), CHUNK),
        "recomputed": train(case.build(), recompute=True),
        "whole, fixed statistics": train(case.build(batch_norm=False)),
        "chunked, fixed statistics": train(case.build(batch_norm=False), CHUNK),
    }


def distance(expected: State, actual: State) -> tuple[float, str]:
    """The largest difference between two states, relative to each tensor's largest entry, and where it is."""
    if expected.keys() != actual.keys():
        return float("inf"), f"names: {', '.join(sorted(expected.keys() ^ actual.keys()))}"
    # The gradient of a bias in front of a batch norm is 0 but for rounding, and that is of the size of the others'.
    steepest = max((float(v.abs().max()) for name, v in expected.items() if name.startswith("gradient")), default=0.0)
    worst = (0.0, "")
    for name, value in expected.items():
        if value.numel() == 0:
            continue
        difference = float((value.double() - actual[name].double()).abs().max())
        floor = max(1e-3, 0.1 * steepest) if name.startswith("gradient") else 1e-3
        scale = max(float(value.double().abs().max()), floor)
        worst = max(worst, (difference / scale if difference == difference else float("inf"), name))
    return worst


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    good: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.good else 'FAIL'} {self.check}: {self.detail}"


def findings(case: Case) -> Iterator[Finding]:
    """Checks a method, one finding after the other; ends with the first that makes the others senseless.

    Raises:
        ValueError: an unknown method or keyword.
    """
    case.checked()
    shape, usable = _step(case)
    yield from shape
    if not usable:
        return
    whole = train(case.build())
    yield _equal("the order of the images does not matter", *_permuted(case))
    frozen = train(case.build(batch_norm=False))
    yield _equal(f"{N // CHUNK} chunks = the whole batch", frozen, train(case.build(batch_norm=False), CHUNK))
    yield _equal("blocks computed twice = once", whole, train(case.build(), recompute=True))
    yield _resumed(case)
    apart = _two_processes(case)
    if isinstance(apart, Finding):
        yield apart
        return
    for result in apart:
        found = _equal("two processes = one", whole, result["whole"])
        if not found.good:
            break
    yield found
    yield _equal("two processes = one, in chunks", train(case.build(), CHUNK), apart[0]["chunked"])


def check_method(method: str | type[Method], **options: Any) -> list[Finding]:
    """For a test of a method from outside: raises unless every check passes.

    Args:
        method: the class, which can be imported by its module's name, or a name as in a recipe.
        options: its keywords.

    Raises:
        AssertionError: with a line for each failed check.
        ValueError: an unknown method or keyword.
    """
    target = method if isinstance(method, str) else f"{method.__module__}:{method.__qualname__}"
    found = list(findings(Case(target, options)))
    failed = [str(one) for one in found if not one.good]
    if failed:
        raise AssertionError("\n".join(failed))
    return found


def _step(case: Case) -> tuple[list[Finding], bool]:
    """The first step: outputs, loss, gradients."""
    try:
        method = case.build()
        state = train(method, steps=1)
    except (ValueError, RuntimeError, TypeError) as error:
        return [Finding("a step", False, " ".join(str(error).split()))], False
    gradients = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    missing = [name for name, grad in gradients.items() if grad is None]
    broken = [name for name, grad in gradients.items() if grad is not None and not grad.isfinite().all()]
    with torch.no_grad():
        outputs = method(*inputs(method))
    shown = ", ".join(f"{name} {tuple(value.shape)}" for name, value in outputs.items())
    found = [
        Finding("outputs have one row an image", True, shown),
        Finding("the loss uses no trainable parameter", True, f"loss {float(state['loss']):.6g}"),
        Finding("gradients are finite at the start", not broken, ", ".join(broken) or f"{len(gradients)} tensors"),
        Finding("every trainable parameter gets a gradient", not missing, ", ".join(missing) or "all of them"),
    ]
    return found, not broken and not missing


def _permuted(case: Case) -> tuple[State, State]:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))

    def one(order: Tensor | None) -> State:
        state = train(case.build(), order=order, steps=1)
        # A queue keeps the order of the images; loss and gradients must not.
        return {name: value for name, value in state.items() if not name.endswith("after it")}

    return one(None), one(order)


def _resumed(case: Case) -> Finding:
    first, whole = case.build(), case.build()
    train(first)
    train(whole)
    again = case.build()
    again.load_state_dict(first.state_dict())
    far, where = distance(train(whole, steps=1), train(again, steps=1))
    detail = f"{where} differs by {far:.1e}" if far else "bitwise"
    return Finding("a state that is saved and loaded goes on alike", far == 0, detail)


def _equal(check: str, expected: State, actual: State) -> Finding:
    far, where = distance(expected, actual)
    return Finding(check, far <= TOLERANCE, f"{far:.1e}" + (f" ({where})" if far > TOLERANCE else ""))


def _two_processes(case: Case) -> "list[dict[str, State]] | Finding":
    """`states` of two processes, or what they failed with."""
    with tempfile.TemporaryDirectory() as folder:
        spec = {"target": case.target, "options": dict(case.options), "folder": folder, "world_size": 2}
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))
        running = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps({**spec, "rank": number})],
                env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for number in range(2)
        ]  # fmt: skip
        errors = [process.communicate()[1] for process in running]
        for process, error in zip(running, errors, strict=True):
            if process.returncode:
                return Finding("two processes = one", False, (error.strip().splitlines() or ["no reason given"])[-1])
        return [torch.load(Path(folder) / f"{number}.pt", weights_only=True) for number in range(2)]


def _worker(spec: Mapping[str, Any]) -> None:
    """One of several processes, started by `_two_processes`."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(spec["folder"]) / "store"), spec["world_size"])
    dist.init_process_group("gloo", store=store, rank=spec["rank"], world_size=spec["world_size"])
    torch.save(states(Case(spec["target"], spec["options"])), Path(spec["folder"]) / f"{spec['rank']}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _worker(json.loads(sys.argv[1]))
    os._exit(0)  # an ordinary exit after gloo aborts now and then in the interpreter's clean-up
