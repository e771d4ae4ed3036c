"""Run directories with invented numbers, written through the real recorder so that their format is a run's."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ssl_bench.optim.telemetry import VALUES
from ssl_bench.recipe.schema import DataOptions, ModelOptions, Plugin, Recipe
from ssl_bench.records.writer import Run

LAYERS = tuple(
    f"backbone.{name}.weight"
    for name in ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.downsample.0", "layer4.1.conv2")
)
TRAIN_SIZE = {"cifar10": 50_000, "tiny_imagenet": 100_000, "digits": 1_500}
CHANCE = {"cifar10": 10.0, "tiny_imagenet": 0.5, "digits": 10.0}


def recipe_of(
    *,
    track: str = "classify",
    data: str = "cifar10",
    method: str = "barlow_twins",
    optimizer: str = "lars",
    lr: float = 1.0,
    batch_size: int = 512,
    seed: int = 0,
    steps: int = 60,
    schedule: dict[str, Any] | None = None,
    **options: Any,
) -> Recipe:
    """A recipe; ``options`` are the optimizer's."""
    default = {"target": "constant"} if optimizer == "tvlars" else {"target": "warmup_cosine", "warmup_fraction": 0.25}
    chosen = dict(schedule or default)
    keys = {
        "lr": lr,
        "weight_decay": 5e-4,
        **({} if optimizer == "lamb" else {"momentum": 0.9, "eta": 1e-3}),
        **options,
    }
    return Recipe(
        track=track,  # type: ignore[arg-type]
        data=DataOptions(name=data),
        model=ModelOptions(),
        method=Plugin(method) if track == "pretrain" else Plugin(),
        optimizer=Plugin(optimizer, keys),
        schedule=Plugin(chosen.pop("target"), chosen),
        batch_size=batch_size,
        steps=steps,
        seed=seed,
    )


def multiplier(recipe: Recipe, step: int, total: int) -> float:
    """The schedule's value at a step, for the schedules that the tests use."""
    name, options = recipe.schedule.target, recipe.schedule.options
    if name == "constant":
        return 1.0
    if name == "polynomial":
        return (1 - step / total) ** options.get("power", 1.0)
    warm = options.get("warmup_fraction", 0.0) * total
    return step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def write_run(
    folder: Path,
    *,
    top1: float = 70.0,
    status: str | None = "finished",
    probe_top1: tuple[float, ...] = (),
    evaluations: list[dict[str, Any]] | None = None,
    telemetry: bool = True,
    gradient: float = 0.05,
    analysis: dict[str, Any] | None = None,
    recipe: Recipe | None = None,
    **settings: Any,
) -> Recipe:
    """Writes one run directory.

    Args:
        folder: the run's directory.
        top1: percent, of the headline protocol.
        status: of results.json; None = the run has not ended.
        probe_top1: percent; one accuracy for each probe seed, beside the mean.
        evaluations: in place of the ones made from ``top1``.
        telemetry: whether the layers' norms are recorded.
        gradient: norm of every layer's gradient at the end, relative to its start.
        analysis: contents of analysis.json.
        recipe: of the run; None = made from ``settings``.
        settings: of ``recipe_of``.
    """
    recipe = recipe or recipe_of(**settings)
    total = recipe.steps or 60
    rng = np.random.default_rng([recipe.seed, recipe.batch_size, int(10 * recipe.optimizer.options["lr"])])
    per_epoch = TRAIN_SIZE[recipe.data.name] / recipe.batch_size
    with Run.open(folder, recipe.to_dict(), recipe.identity(), resume="never", main_process=True) as run:
        run.write_provenance(provenance(recipe, total, per_epoch))
        stop = total // 2 if status == "diverged" else total
        for step in range(5, stop + 1, 5):
            row = metrics_row(recipe, step, total, per_epoch, top1, rng)
            if status == "diverged" and step + 5 > stop:
                row["loss"] = math.nan
            run.log(row)
        if telemetry:
            run.log_telemetry(layer_columns(recipe, range(stop), total, gradient, rng))
        if status is not None:
            run.finish(results(recipe, status, stop, top1, probe_top1, evaluations))
    if analysis is not None:
        (folder / "analysis.json").write_text(json.dumps(analysis))
    return recipe


def analysis_of(
    *ends: tuple[float, float], noise: dict[int, float] | None = None, residual: float = 0.5, **settings: Any
) -> dict[str, Any]:
    """Contents of an analysis.json, shaped like ``ssl-bench analyze`` writes it.

    Args:
        ends: (top eigenvalue, weight norm) at steps 0, 10, 20, ...
        noise: squared error of the gradient by batch size, at every step.
        residual: of the eigenvalues.
        settings: that differ from the command's defaults.
    """
    steps = range(0, 10 * len(ends), 10)
    sharpness = [
        {
            "step": step, "loss": 2.0, "gradient_norm": 1.5, "weight_norm": norm, "top_eigenvalue": top,
            "top_eigenvalue_residual": residual, "iterations": 20, "trace": 9 * top, "trace_standard_error": top / 8,
            "sam": 0.01 * top,
        }
        for step, (top, norm) in zip(steps, ends, strict=True)
    ]  # fmt: skip
    rows = [
        {"step": step, "batch_size": size, "squared_error": error, "gradient_squared": 0.5, "batches": 4096 // size}
        for step in steps
        for size, error in (noise or {}).items()
    ]
    defaults = {
        "images": 512, "batch_norm": "train", "iterations": 20, "samples": 10, "rho": 0.05,
        "noise_batch_sizes": [64, 256, 1024], "noise_images": 4096, "seed": 0,
    }  # fmt: skip
    about = {"measured": "2026-01-31T13:00:00+00:00", "device": "cpu", "packages": {"torch": "2.14.1"}}
    return {"settings": defaults | settings, **about, "sharpness": sharpness, "gradient_noise": rows}


def provenance(recipe: Recipe, total: int, per_epoch: float) -> dict[str, Any]:
    """What run.json says besides the recipe."""
    return {
        "track": recipe.track,
        "started": "2026-01-31T12:00:00+00:00",
        "seeds": {"run": recipe.seed, "probes": 0},
        "world_size": 1,
        "code": {"version": "0.1.0", "commit": "0123abc", "dirty": False},
        "packages": {"python": "3.12", "torch": "2.14.1"},
        "hardware": {"cpu": "an imaginary one", "cores": 2, "gpus": []},
        "plan": {"total_steps": total, "steps_per_epoch": per_epoch, "optimizer": {}, "schedule": {}},
        "param_groups": [
            {"lr": recipe.optimizer.options["lr"], "weight_decay": 5e-4, "adapt": True, "tensors": len(LAYERS)}
        ],
    }


def metrics_row(
    recipe: Recipe, step: int, total: int, per_epoch: float, top1: float, rng: np.random.Generator
) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    done = 1 - math.exp(-4 * step / total)
    value = multiplier(recipe, step - 1, total)
    row: dict[str, Any] = {
        "step": step,
        "samples": step * recipe.batch_size,
        "epochs": step / per_epoch,
        "seconds": 0.2 * step,
        "lr": recipe.optimizer.options["lr"] * value,
        "lr_multiplier": value,
        "loss": 2.4 - 1.8 * done + 0.02 * rng.standard_normal(),
        "images_per_second": recipe.batch_size / 0.2,
    }
    if recipe.track == "classify" and step % 10 == 0:
        row |= {"test_top1": top1 * done, "test_top5": min(100.0, 1.2 * top1) * done, "test_loss": 2.5 - 1.5 * done}
    return row


def layer_columns(
    recipe: Recipe, steps: range, total: int, gradient: float, rng: np.random.Generator
) -> dict[str, Any]:
    """A block of telemetry: norms that fall, ratios that follow LARS's formula."""
    columns: dict[str, list[Any]] = {name: [] for name in ("step", "layer", *VALUES)}
    options = recipe.optimizer.options
    eta, decay = options.get("eta", 1.0), options["weight_decay"]
    for step in steps:
        for depth, layer in enumerate(LAYERS):
            w = (8 + 2 * depth) * math.exp(-0.5 * step / total)
            g = 0.8 * gradient ** (step / total) * (1 + 0.05 * abs(rng.standard_normal()))
            phi = math.nan
            if recipe.optimizer.target == "tvlars":
                phi = 1 / (1 + math.exp(options.get("decay", 1e-4) * (step - 20)))
            update = g + decay * w
            applied = eta * (1 if math.isnan(phi) else phi) * w / update
            lr = options["lr"] * multiplier(recipe, step, total) * applied
            values = (step + 1, layer, w, g, update, w / update, applied, phi, lr, lr * update / w, 0)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    return columns


def results(
    recipe: Recipe,
    status: str,
    step: int,
    top1: float,
    probe_top1: tuple[float, ...],
    evaluations: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """What results.json holds."""
    if status == "diverged":
        return {"status": status, "step": step, "layer": LAYERS[0], "layers": 1, "of": len(LAYERS), "seconds": 9.0}
    chance = CHANCE[recipe.data.name]
    top1 = chance if status == "collapsed" else top1
    made = [
        evaluation(protocol, model, top1 + shift if model == "trained" else chance + 12, chance, probe_top1)
        for protocol, shift in (
            [("test-v1", 0.0)] if recipe.track == "classify" else [("linear-cached-v1", 0.0), ("knn-v1", -3.0)]
        )
        for model in ("trained", "untrained")
    ]
    chosen = made if evaluations is None else evaluations
    return {"status": status, "step": step, "evaluations": chosen, "seconds": 12.0}


def evaluation(protocol: str, model: str, top1: float, chance: float, probe_top1: tuple[float, ...]) -> dict[str, Any]:
    """One entry of results.json's evaluations."""
    metrics: dict[str, Any] = {"top1": top1, "top5": min(100.0, top1 * 1.2), "loss": 1.0}
    if probe_top1 and model == "trained" and protocol == "linear-cached-v1":
        metrics |= {f"top1_seed{number}": value for number, value in enumerate(probe_top1)}
        metrics["top1"] = float(np.mean(probe_top1))
    seed = None if protocol == "test-v1" else 0
    return {"protocol": protocol, "model": model, "metrics": metrics, "n_test": 10_000, "seed": seed, "chance": chance}
