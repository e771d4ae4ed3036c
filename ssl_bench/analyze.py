"""Sharpness and gradient noise at a run's snapshots: ``ssl-bench analyze RUN``, into the run's ``analysis.json``.

Everything is measured in float32 by one process, on images of the train set with the run's own augmentation. Sample
and augmentation come from the settings' seed alone, so that all runs of one data set are measured on the same batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_bench.compose import build, override
from ssl_bench.reading import read_run
from ssl_bench.recipe import Recipe
from ssl_bench.sampling import ANALYSIS, derive_seed
from ssl_bench.snapshots import Snapshots
from ssl_bench.storage import atomic_json

ANALYSIS_FILE = "analysis.json"

# Where the images lie and where they are worked on; not which images or which network.
MAY_CHANGE = ("data.path", "data.cache_dir", "data.resident", "data.workers", "device")


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
            raise ValueError(f"analyze: batch_norm: got {self.batch_norm!r}, allowed: train or eval")
        for name, least in (("images", 2), ("iterations", 1), ("samples", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"analyze: {name}: got {getattr(self, name)}, allowed: at least {least}")
        if not self.rho > 0:
            raise ValueError(f"analyze: rho: got {self.rho}, allowed: a length above 0")
        for size in self.noise_batch_sizes:
            if not 2 <= size <= self.noise_images // 2:
                raise ValueError(
                    f"analyze: noise_batch_sizes: got {size}, allowed: 2 to {self.noise_images // 2}, "
                    f"so that noise_images={self.noise_images} make two batches"
                )


def main(run_dir: str, settings: Settings, words: Sequence[str] = ()) -> int:
    """Measures every snapshot of a run and writes ``analysis.json``, in place of an earlier one.

    Args:
        run_dir: the run's folder; it was run with ``checkpoint.snapshots``.
        settings: see there.
        words: ``key=value`` for the keys in ``MAY_CHANGE``.

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
            f"{run_dir}: no snapshots to analyze; run it with checkpoint.snapshots=[0,0.5,1], say (start, middle, end)"
        )
    # The run's precision is training's; a second derivative needs float32.
    recipe = dataclasses.replace(
        build(record.recipe["track"], override(record.recipe, words, MAY_CHANGE)), precision="fp32", tracker=None
    )

    import torch

    from ssl_bench.provenance import code_version, hardware, now, package_versions
    from ssl_bench.workplace import Workplace

    place = Workplace(recipe)
    if place.world_size > 1:
        raise ValueError(f"analyze: got {place.world_size} processes, allowed: one")
    task, losses = _task(place, recipe, settings)
    found: dict[str, list[dict[str, float]]] = {"sharpness": [], "gradient_noise": []}
    for step in steps:
        snapshots.load(step, task)
        if not all(torch.isfinite(parameter).all() for parameter in task.parameters()):
            place.say(f"step {step}: left out, the weights are not finite")
            continue
        found["sharpness"].append({"step": step, **_sharpness(task, losses, settings)})
        found["gradient_noise"] += [
            {"step": step, **_noise(task, losses, size, settings)} for size in settings.noise_batch_sizes
        ]
        place.say(_line(found, step))
    about = {
        "settings": dataclasses.asdict(settings),
        "measured": now(),
        "device": str(place.device),
        "code": code_version(),
        "packages": package_versions(),
        "hardware": hardware(),
    }
    atomic_json(Path(run_dir) / ANALYSIS_FILE, {**about, **found})
    place.say(f"{Path(run_dir) / ANALYSIS_FILE}: {len(found['sharpness'])} snapshots")
    return 0


Losses = Callable[[int, int], Iterator[Callable[[], Any]]]  # (batch size, batches) -> closures of the loss


def _task(place: Any, recipe: Recipe, settings: Settings) -> tuple[Any, Losses]:
    """The run's network, and the losses of disjoint batches of the train set."""
    import torch

    from ssl_bench import classify, pretrain, sampling, views
    from ssl_bench.pipeline import Pipeline

    dataset = place.dataset()
    needed = max(settings.images, settings.noise_images if settings.noise_batch_sizes else 0)
    if needed > len(dataset.train):
        raise ValueError(
            f"analyze: images, noise_images: got {needed}, allowed: at most the {len(dataset.train)} of the train set"
        )
    if recipe.track == "pretrain":
        task = pretrain.build(recipe)[2]
        augmentations = views.pretraining_views(recipe, dataset)
        streams = [sampling.VIEW1, sampling.VIEW2]
    else:
        task = classify.build(recipe, len(dataset.classes))
        augmentations, streams = [views.classification_view(recipe, dataset)], [sampling.VIEW1]
    task = task.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def losses(batch_size: int, batches: int) -> Iterator[Callable[[], Any]]:
        pipeline = Pipeline(
            dataset.train,
            augmentations,
            streams,
            seed=derive_seed(settings.seed, ANALYSIS),
            batch_size=batch_size,
            chunk_size=None,
            rank=0,
            world_size=1,
            device=place.device,
            with_labels=recipe.track == "classify",
        )
        for batch in pipeline.batches(0, batches):
            inputs = batch.views(0)
            yield lambda inputs=inputs: task(*inputs)["loss"]  # type: ignore[misc]

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


def _line(found: dict[str, list[dict[str, float]]], step: int) -> str:
    """What was measured at a step, for the terminal."""
    sharp = found["sharpness"][-1]
    noise = [
        f"{row['squared_error']:.3g} at B = {row['batch_size']}"
        for row in found["gradient_noise"]
        if row["step"] == step
    ]
    return (
        f"step {step}: loss {sharp['loss']:.4g}, top eigenvalue {sharp['top_eigenvalue']:.4g} "
        f"(residual {sharp['top_eigenvalue_residual']:.2g}), trace {sharp['trace']:.4g} "
        f"+- {sharp['trace_standard_error']:.2g}, SAM {sharp['sam']:.3g}"
        + (f"; E|g_B - Eg_B|^2 {', '.join(noise)}" if noise else "")
    )
