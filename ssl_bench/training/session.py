"""One run's surroundings: processes, device, precision, the run directory, and the way from a recipe to its trainer."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from ssl_bench.augment.views import Augmentation
from ssl_bench.data.dataset import Dataset
from ssl_bench.data.pipeline import Pipeline
from ssl_bench.models.backbone import save_backbone
from ssl_bench.optim.telemetry import Telemetry
from ssl_bench.recipe.schema import IRRELEVANT, Recipe, flatten
from ssl_bench.records.checkpoint import Checkpoints
from ssl_bench.records.provenance import collect_provenance
from ssl_bench.records.snapshots import Snapshots
from ssl_bench.records.storage import remove_atomically
from ssl_bench.records.writer import Run
from ssl_bench.runtime.console import Progress
from ssl_bench.runtime.distributed import broadcast_object, synchronize_batch_norm
from ssl_bench.runtime.interrupt import REQUEUE_EXIT_CODE, Interrupt
from ssl_bench.training import gradient
from ssl_bench.training.graphs import GraphedGradient
from ssl_bench.training.loop import Hook, Outcome, Trainer
from ssl_bench.training.plan import Plan, build_optimizer, make_rhythm
from ssl_bench.training.workplace import Workplace

# Several processes agree on a signal by a collective call, which waits for the device; one step in so many.
AGREE_EVERY = 10

# An accuracy this many standard errors of a guesser's above chance, or less, is no sign of learning.
CHANCE_MARGIN = 3.0


class Session(Workplace):
    """Opens a run: `with Session(recipe) as session`.

    Raises:
        ValueError, OSError: one line; the recipe does not fit these processes, this device or this run directory.
    """

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.folder = Path(recipe.folder())
        self._refuse_indivisible()
        if recipe.cuda_graphs and self.graph_obstacle:
            raise ValueError(f"cuda_graphs: got true, allowed: null or false, because {self.graph_obstacle}")
        self._set_determinism()
        self.interrupt = Interrupt()

    def __enter__(self) -> Self:
        self.run = Run.open(
            self.folder,
            self.recipe.to_dict(),
            self.recipe.identity(),
            resume=self.recipe.resume,
            main_process=self.main,
            ignore=IRRELEVANT,
        )
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=self.recipe.checkpoint.keep, warn=self.say)
        self.interrupt.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.interrupt.__exit__(*error)
        if self.accelerator.trackers:
            self.accelerator.end_training()
        self.run.close()

    def _refuse_indivisible(self) -> None:
        for name in ("batch_size", "chunk_size"):
            value = getattr(self.recipe, name)
            if value is not None and value % self.world_size:
                raise ValueError(f"{name}: got {value}, allowed: a multiple of the {self.world_size} processes")

    def _set_determinism(self) -> None:
        if self.recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        else:
            torch.backends.cudnn.benchmark = self.device.type == "cuda"

    def pipeline(
        self,
        dataset: Dataset,
        augmentations: Sequence[Augmentation],
        streams: Sequence[int],
        *,
        with_labels: bool = False,
    ) -> Pipeline:
        """The run's batches."""
        recipe = self.recipe
        return Pipeline(
            dataset.train,
            augmentations,
            streams,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            chunk_size=recipe.chunk_size,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            last_batch=recipe.last_batch,
            with_labels=with_labels,
        )

    def train(
        self,
        task: nn.Module,
        pipeline: Pipeline,
        plan: Plan,
        step_gradient: Callable[..., dict[str, Tensor]],
        hooks: Sequence[Hook] = (),
    ) -> Outcome:
        """Builds the optimizer, records what will run, continues from a checkpoint if there is one, and trains."""
        recipe = self.recipe
        task = task.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.world_size > 1 and recipe.sync_batch_norm:
            task = synchronize_batch_norm(task)
        optimizer, schedule = build_optimizer(recipe, task, plan)
        if self.graphs_steps:
            step_gradient = GraphedGradient(step_gradient, task, self._refuse_graph)
        if recipe.compile:
            for part in task.children():
                part.compile()
        with warnings.catch_warnings():
            # Accelerate knows DistributedDataParallel's broadcast_buffers by the name that torch is about to drop.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            model, wrapped = self.accelerator.prepare(task, optimizer)
        progress = Progress(plan.total, recipe.name(), enabled=self.main)
        trainer = Trainer(
            model=model,
            optimizer=wrapped,
            schedule=schedule,
            gradient=step_gradient,
            pipeline=pipeline,
            rhythm=make_rhythm(recipe, plan, several=self.world_size > 1),
            accelerator=self.accelerator,
            record=self,
            telemetry=Telemetry(optimizer, every=recipe.telemetry.every),
            save=self._save,
            interrupted=self._interrupted,
            progress=progress,
            hooks=[replace(hook, measure=partial(self._measure, task, hook.measure)) for hook in hooks],
            snapshot=self._snapshot,
        )
        self._trainer = trainer
        self._write_provenance(task, optimizer, plan, self._continue(trainer))
        if recipe.tracker:
            config = flatten(recipe.to_dict())
            # Trackers' tables of hyper-parameters hold numbers and text only.
            plain = {key: v if isinstance(v, int | float | str) else str(v) for key, v in config.items()}
            self.accelerator.init_trackers("ssl_bench", config=plain)
        with progress, self._host_threads():
            outcome = trainer.run()
        if isinstance(step_gradient, GraphedGradient):
            step_gradient.release()  # evaluations want the memory
        if outcome.status == "finished":
            trainer.checkpoint()  # a run killed while it is evaluated goes on with the evaluation
        self._share_statistics(task)
        return outcome

    def _refuse_graph(self, reason: str) -> None:
        if self.recipe.cuda_graphs:
            raise ValueError(f"cuda_graphs: got true, allowed: null or false, because {reason}")
        self.say(f"without CUDA graphs: {reason}")

    @contextmanager
    def _host_threads(self) -> Iterator[None]:
        """Beside a GPU the host draws small tables, for which other threads take longer to wake than one to compute."""
        before = torch.get_num_threads()
        if self.device.type == "cuda":
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _share_statistics(self, task: nn.Module) -> None:
        """Gives every process the first one's running statistics; those of unsynchronised batch norms differ."""
        if self.world_size > 1 and not self.recipe.sync_batch_norm:
            for buffer in task.buffers():
                dist.broadcast(buffer, 0)

    def _measure(self, task: nn.Module, measure: Callable[[int], dict[str, float]], step: int) -> dict[str, float]:
        """A hook's measurement, of one model: each process measures its share of the images."""
        self._share_statistics(task)
        return measure(step)

    def _write_provenance(self, task: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, step: int) -> None:
        recipe = self.recipe
        seen = (recipe.chunk_size or recipe.batch_size) // (1 if recipe.sync_batch_norm else self.world_size)
        has_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in task.modules())
        self.run.write_provenance(
            {
                **collect_provenance(
                    track=recipe.track,
                    seeds={"run": recipe.seed, "probes": recipe.eval.seed},
                    world_size=self.world_size,
                    param_groups=optimizer.param_groups,
                    device=self.device,
                ),
                "plan": {
                    "total_steps": plan.total,
                    "steps_per_epoch": plan.steps_per_epoch,
                    "optimizer": plan.optimizer,
                    "schedule": plan.schedule,
                },
                "cuda_graphs": self.graphs_steps,
                "batch_norm": f"batch norm over {seen} of {recipe.batch_size} images" if has_norm else "none",
            },
            step=step,
        )

    def _continue(self, trainer: Trainer) -> int:
        """Loads the last good checkpoint, if the run has one, and drops what was recorded after it."""
        # The first process looks for the last good one: on a flaky disk each might find another.
        latest = self.checkpoints.load_latest() if self.recipe.resume == "auto" and self.main else None
        step = broadcast_object(None if latest is None else latest[0])
        if step is None:
            self.run.truncate_to(None)
            return 0
        trainer.load_state_dict(latest[1] if latest is not None else self.checkpoints.load(step)[0])
        self.run.truncate_to(step)
        self.say(f"continuing {self.folder} from step {step}")
        return step

    # The end ---------------------------------------------------------------------------------------------------------

    def already_finished(self) -> int:
        """Nothing to do: the run of this directory has ended. Returns the exit code."""
        self.say(f"{self.folder} has ended already: {self.run.results['status']}")  # type: ignore[index]
        return 0

    def finish(
        self,
        outcome: Outcome,
        backbone: nn.Module,
        evaluate: Callable[[nn.Module], list[dict[str, Any]]],
        *,
        trained: nn.Module,
        untrained: Callable[[], nn.Module],
    ) -> int:
        """Evaluates what was trained, beside what it started from, and writes the results; returns the exit code.

        Args:
            outcome: of the loop; only a finished run is evaluated.
            backbone: saved as ``backbone.safetensors``.
            evaluate: a model's results, the same call on every process.
            trained: the model to evaluate.
            untrained: builds the model as it was before the first step.
        """
        if outcome.status == "interrupted":
            self.say(f"stopped at step {outcome.step}; start again with resume=auto run_dir={self.folder} to go on")
            return REQUEUE_EXIT_CODE
        results: dict[str, Any] = {"status": outcome.status, "step": outcome.step, **outcome.details}
        if outcome.status == "finished":
            if self.main:
                save_backbone(backbone, self.folder / "backbone.safetensors")
            results["evaluations"] = [{"model": "trained", **result} for result in evaluate(trained)]
            if self.recipe.eval.baseline:
                start = untrained().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
                results["evaluations"] += [{"model": "untrained", **result} for result in evaluate(start)]
            if _at_chance(results["evaluations"]):
                results["status"] = "collapsed"
        self.run.finish(results)
        if self.main and not self.recipe.checkpoint.final and (self.folder / "checkpoints").exists():
            remove_atomically(self.folder / "checkpoints")
        self.say(f"{results['status']}: {self.folder}")
        for line in summary(results):
            self.say(line)
        self.accelerator.wait_for_everyone()
        return 0

    # What the trainer calls ------------------------------------------------------------------------------------------

    def log(self, row: dict[str, float]) -> None:
        """One line of the metrics, for the record and for the tracker."""
        self.run.log(row)
        if self.accelerator.trackers:
            self.accelerator.log(row, step=int(row["step"]))

    def log_telemetry(self, columns: Any) -> None:
        """A block of the layers' norms and ratios; in the record a step is the number of steps completed."""
        if columns["step"]:
            self.run.log_telemetry({**columns, "step": [step + 1 for step in columns["step"]]})

    def _save(self, step: int, state: dict[str, Any]) -> None:
        if self.main:
            with self.interrupt.saving():
                self.run.sync()
                self.checkpoints.save(step, state, {"identity": self.recipe.identity(), "world_size": self.world_size})
        self.accelerator.wait_for_everyone()

    def _snapshot(self, step: int, module: nn.Module) -> None:
        if self.main:
            with self.interrupt.saving():
                Snapshots(self.folder).save(step, module)

    def _interrupted(self) -> bool:
        if self.world_size > 1 and self._trainer.step % AGREE_EVERY:
            return False
        return self.interrupt.agreed(self.device)


def step_gradient(recipe: Recipe, accelerator: Accelerator) -> Callable[..., dict[str, Tensor]]:
    """How a step's gradient is computed: at once, or chunk by chunk, exactly in both cases; times ``loss_scale``."""
    chunked = recipe.chunk_size is not None and recipe.chunk_size < recipe.batch_size
    if not chunked:
        function = gradient.full_batch
    else:
        function = gradient.grad_cache if recipe.track == "pretrain" else gradient.accumulate

    def call(model: nn.Module, views: Any, n_chunks: int, backward: Any) -> dict[str, Tensor]:
        def scaled(loss: Tensor) -> None:
            backward(recipe.loss_scale * loss)

        # At 1 the loss itself, so that runs stay equal bit for bit to those of before there was a scale.
        used = backward if recipe.loss_scale == 1 else scaled
        return function(model, views, n_chunks, used, autocast=accelerator.autocast)

    return call


def _at_chance(evaluations: Sequence[dict[str, Any]]) -> bool:
    """Whether every trained result is no better than guessing among the classes."""
    trained = [entry for entry in evaluations if entry["model"] == "trained" and "chance" in entry]
    return bool(trained) and all(
        entry["metrics"]["top1"]
        <= entry["chance"] + CHANCE_MARGIN * (entry["chance"] * (100 - entry["chance"]) / entry["n_test"]) ** 0.5
        for entry in trained
    )


def summary(results: dict[str, Any]) -> list[str]:
    """The results as lines of text."""
    if results["status"] == "diverged":
        where = f" (first in {results['layer']})" if results["layer"] else ""
        return [f"  loss or gradient not finite from step {results['step']} on{where}; not evaluated"]
    return [
        f"  {entry['protocol']:<18} {entry['model']:<10} top-1 {entry['metrics']['top1']:.2f}% of {entry['n_test']}"
        for entry in results.get("evaluations", [])
    ]
