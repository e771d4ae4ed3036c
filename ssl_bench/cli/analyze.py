"""Sharpness and gradient noise at a run's snapshots: ``ssl-bench analyze RUN``, into the run's ``analysis.json``.

Everything is measured in float32 (no TF32) by one process, on images of the train set with the run's own augmentation
and normalisation. Which images, and the augmentation's draws, come from the settings' seed alone: runs of one data set,
holdout and augmentation are measured on the same batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_bench.cli.evaluate import recorded
from ssl_bench.recipe.schema import Recipe
from ssl_bench.records.reader import RunRecord, read_run
from ssl_bench.records.snapshots import Snapshots
from ssl_bench.records.storage import atomic_json
from ssl_bench.runtime.seeds import ANALYSIS, derive_seed

if TYPE_CHECKING:
    from ssl_bench.training.processes import Processes

ANALYSIS_FILE = "analysis.json"

# Where the images are and where they are processed; never which images or which network.
MAY_CHANGE = ("data.path", "data.cache_dir", "data.resident", "data.workers", "device")
UNUSED = ("optimizer", "schedule", "tracker")


@dataclass(frozen=True)
class Settings:
    """What is measured, and how finely; written beside the numbers, which depend on all of it.

    Attributes:
        images: of the fixed augmented batch whose loss the sharpness is of.
        batch_norm: "train" = by the batch's statistics, "eval" = by the running ones.
        iterations: of Lanczos, at most.
        samples: of Hutchinson's estimator of the trace; 2 or more.
        rho: length of SAM's step in the parameters' norm.
        noise_batch_sizes: the B of E|g_B - E g_B|^2; () = leave the gradient's noise out.
        noise_images: for each B, split into batches of B.
        seed: of the images, their augmentation and the random vectors.
    """

    images: int = 512
    batch_norm: str = "train"
    iterations: int = 20
    samples: int = 10
    rho: float = 0.05
    noise_batch_sizes: tuple[int, ...] = (64, 256, 1024)
    noise_images: int = 4096
    seed: int = 0

    def check(self) -> None:
        """Refuses what cannot be measured, before data is read.

        Raises:
            ValueError: one line that names the option, what was given and what is allowed.
        """
        if self.batch_norm not in ("train", "eval"):
            raise ValueError(f"batch_norm must be train or eval, got {self.batch_norm!r}")
        for name, least in (("images", 2), ("iterations", 1), ("samples", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.rho > 0:
            raise ValueError(f"rho must be > 0, got {self.rho}")
        for size in self.noise_batch_sizes:
            if not 2 <= size <= self.noise_images // 2:
                raise ValueError(
                    f"noise_batch_sizes must be 2 to {self.noise_images // 2}, got {size} (noise_images="
                    f"{self.noise_images} must make two batches; '' leaves the noise out)"
                )


def main(run_dir: str, settings: Settings, overrides: Sequence[str] = (), *, trust: bool = False) -> int:
    """Measures every snapshot of a run and writes ``analysis.json``, in place of an earlier one, after each.

    A snapshot that has no finite loss or curvature is named and left out, as is one that the run should have kept.

    Args:
        run_dir: the run's folder; it was run with ``checkpoint.snapshots``.
        settings: see there.
        overrides: ``key=value`` for the keys in ``MAY_CHANGE``.
        trust: as for `ssl_bench.cli.evaluate.evaluate_run`.

    Raises:
        ValueError, OSError: one line; no such run, no snapshots, settings out of range, or a key that would change
            what the run was.
    """
    settings.check()
    record = read_run(run_dir)
    snapshots = Snapshots(run_dir)
    steps = snapshots.steps()
    if not steps:
        raise ValueError(
            f"{run_dir} must hold snapshots to analyze, got none: run it with checkpoint.snapshots=[0,0.5,1] (start, "
            "middle, end)"
        )
    recipe = _measured_recipe(recorded(record, overrides, MAY_CHANGE, without=UNUSED, trust=trust))

    from ssl_bench.records.provenance import code_version, hardware, now, package_versions, torch_settings
    from ssl_bench.training import build as training

    place = training.processes(recipe)
    if place.world_size > 1:
        raise ValueError(f"analyze must run on one process, got {place.world_size} processes")
    for step in sorted(_planned(record) - set(steps)):
        place.say(f"step {step}: left out, the run kept no weights there")
    task, losses = _task(place, recipe, settings)
    found: dict[str, list[dict[str, float]]] = {"sharpness": [], "gradient_noise": []}
    about = {
        "settings": dataclasses.asdict(settings),
        "measured": now(),
        "device": str(place.device),
        "code": code_version(),
        "packages": package_versions(),
        "hardware": hardware(),
        "torch": torch_settings(),
    }
    for step in steps:
        try:
            snapshots.load(step, task)
            sharp = {"step": step, **_sharpness(task, losses, settings)}
            noise = [{"step": step, **_noise(task, losses, size, settings)} for size in settings.noise_batch_sizes]
        except ValueError as error:
            place.say(f"step {step}: left out, {error}")
            continue
        found["sharpness"].append(sharp)
        found["gradient_noise"] += noise
        atomic_json(Path(run_dir) / ANALYSIS_FILE, {**about, **found})  # a snapshot can take minutes
        place.say(_line(sharp, noise))
    if not found["sharpness"]:
        raise ValueError(f"{run_dir}: no snapshot could be measured")
    place.say(f"{Path(run_dir) / ANALYSIS_FILE}: {len(found['sharpness'])} snapshots")
    return 0


def _measured_recipe(recipe: Recipe) -> Recipe:
    """The run's recipe in float32: second derivatives need more than training's precision, and no compiled program."""
    method = recipe.method
    # The released Barlow Twins divides by the recipe's batch size; a batch of another size is divided by its own.
    if method.options.get("divisor") == recipe.batch_size:
        method = dataclasses.replace(method, options={**method.options, "divisor": None})
    return dataclasses.replace(recipe, precision="fp32", tracker=None, compile=False, cuda_graphs=False, method=method)


def _planned(record: RunRecord) -> set[int]:
    """The steps at which the run should have kept its weights by now."""
    total = record.provenance.get("plan", {}).get("total_steps", 0)
    shares = record.recipe.get("checkpoint", {}).get("snapshots", [])
    last = record.metrics[-1]["step"] if record.metrics else 0
    return {step for step in (round(share * total) for share in shares) if step <= last}


Losses = Callable[[int, int], Iterator[Callable[[], Any]]]  # (batch size, batches) -> closures of the loss


def _task(place: "Processes", recipe: Recipe, settings: Settings) -> tuple[Any, Losses]:
    """The run's network, and the losses of disjoint batches of the train set."""
    import torch

    from ssl_bench.training import build as training
    from ssl_bench.training.gradient import global_loss

    dataset = training.dataset(recipe, place)
    for name in ("images", "noise_images") if settings.noise_batch_sizes else ("images",):
        if (wanted := getattr(settings, name)) > len(dataset.train):
            raise ValueError(
                f"{name} must be at most the {len(dataset.train)} images of the train set, got {wanted} "
                "(batch sizes for the noise: at most half of noise_images)"
            )
    if recipe.track == "pretrain":
        task: Any = training.method(recipe)
    else:
        task = training.classifier(recipe, len(dataset.classes))
    views = training.views(recipe, dataset, task.views, place)
    task = task.to(place.device, memory_format=torch.channels_last)

    def losses(batch_size: int, batches: int) -> Iterator[Callable[[], Any]]:
        seed = derive_seed(settings.seed, ANALYSIS)
        pipeline = training.pipeline(
            recipe, dataset, views, place, seed=seed, batch_size=batch_size, chunk_size=None, last_batch="carry"
        )
        for batch in pipeline.batches(0, batches):
            inputs = batch.views(0)
            yield lambda inputs=inputs: global_loss(task, task(*inputs))["loss"]  # type: ignore[misc]

    return task, losses


def _sharpness(task: Any, losses: Losses, settings: Settings) -> dict[str, float]:
    from ssl_bench.eval.sharpness import measure_sharpness

    measured = measure_sharpness(
        task,
        next(losses(settings.images, 1)),
        batch_norm=settings.batch_norm,  # type: ignore[arg-type]
        iterations=settings.iterations,
        samples=settings.samples,
        rho=settings.rho,
        seed=settings.seed,
    )
    squares = sum(parameter.detach().double().square().sum() for parameter in task.parameters())
    return {
        "loss": measured.loss,
        "gradient_norm": measured.gradient_norm,
        "weight_norm": float(squares) ** 0.5,
        "top_eigenvalue": measured.top_eigenvalue.value,
        "top_eigenvalue_residual": measured.top_eigenvalue.residual,
        "iterations": measured.top_eigenvalue.iterations,
        "trace": measured.trace.value,
        "trace_standard_error": measured.trace.standard_error,
        "sam": measured.sam,
    }


def _noise(task: Any, losses: Losses, size: int, settings: Settings) -> dict[str, float]:
    from ssl_bench.eval.gradient_noise import measure_gradient_noise

    noise = measure_gradient_noise(
        task,
        losses(size, settings.noise_images // size),
        batch_norm=settings.batch_norm,  # type: ignore[arg-type]
    )
    return {"batch_size": size, **noise._asdict()}


def _line(sharp: dict[str, float], rows: list[dict[str, float]]) -> str:
    """What was measured at a step, for the terminal."""
    noise = [f"{row['squared_error']:.3g} at B = {row['batch_size']}" for row in rows]
    return (
        f"step {sharp['step']}: loss {sharp['loss']:.4g}, top eigenvalue {sharp['top_eigenvalue']:.4g} "
        f"(residual {sharp['top_eigenvalue_residual']:.2g}), trace {sharp['trace']:.4g} "
        f"+- {sharp['trace_standard_error']:.2g}, SAM {sharp['sam']:.3g}"
        + (f"; E|g_B - Eg_B|^2 {', '.join(noise)}" if noise else "")
    )
