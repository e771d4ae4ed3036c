"""A run in its directory: the processes it runs on, its record and checkpoints, signals and the terminal."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ssl_bench.eval.collapse import collapsed
from ssl_bench.models.backbone import backbone_bytes
from ssl_bench.records.checkpoint import Checkpoints
from ssl_bench.records.snapshots import Snapshots
from ssl_bench.records.storage import atomic_file, one_line, remove_atomically
from ssl_bench.records.summary import summary
from ssl_bench.records.tracker import Tracker
from ssl_bench.records.writer import BACKBONE, Resume, Run
from ssl_bench.runtime.console import Progress
from ssl_bench.runtime.distributed import broadcast_object
from ssl_bench.runtime.interrupt import REQUEUE_EXIT_CODE, Agreement, Interrupt, leave_note, stop_if_requested
from ssl_bench.runtime.peers import Watch
from ssl_bench.training.graphs import GraphedGradient
from ssl_bench.training.loop import Outcome, Scalars, Trainer
from ssl_bench.training.memory import out_of_memory
from ssl_bench.training.processes import Processes
from ssl_bench.training.rehearsal import every_parameter_used, rehearse_saving

# Standard errors of a guesser's accuracy: a result no more than this above chance is no sign of learning.
CHANCE_MARGIN = 3.0


class Session:
    """One run in its directory, used as a context; it is the loop's `ssl_bench.training.loop.RunIO`.

    Args:
        processes: where the run takes place.
        folder: the run's directory.
        recipe: the resolved recipe as nested plain values, for the record.
        identity: the hash of what in the recipe can change the result.
        length: "40 steps" or "100 epochs", for the first line.
        precision: of the forward pass, likewise.
        resume: "auto" continues the run in the directory from its last checkpoint; "never" refuses one that has a run.
        differences: lists what tells two recipes apart, for the error of a directory that holds another run.
        keep: how many checkpoints stay on disk.
        keep_last: whether the last one stays after the run has ended.
        tracker: what gets the metrics too; None = nothing.

    Raises:
        ValueError, OSError: on entering, in one line; the directory cannot be used for this run.
    """

    def __init__(
        self,
        processes: Processes,
        *,
        folder: str | Path,
        recipe: Mapping[str, Any],
        identity: str,
        length: str,
        precision: str,
        resume: Resume,
        differences: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]],
        keep: int,
        keep_last: bool,
        tracker: Tracker | None,
    ) -> None:
        self.processes, self.folder, self.length, self.precision = processes, Path(folder), length, precision
        self._recipe, self._identity, self._resume, self._differences = recipe, identity, resume, differences
        self._keep_last, self._tracker = keep_last, tracker
        self._checkpoints = Checkpoints(self.folder / "checkpoints", keep=keep, warn=processes.say)
        self._interrupt = Interrupt(at_once=True)
        self._agreement = Agreement(self._interrupt, processes.device)
        self._watch = Watch(lambda: self._interrupt.is_saving, self._leave_note)
        self._progress: Progress | None = None
        self._graphs: dict[str, str] = {}
        self._first_step = True
        self.results: dict[str, Any] | None = None  # what the run in this directory ended with; None if it has not

    def __enter__(self) -> Self:
        self._watch.__enter__()
        self._run = Run.open(
            self.folder,
            self._recipe,
            self._identity,
            resume=self._resume,
            main_process=self.processes.main,
            differences=self._differences,
        )
        self.processes.say(f"{self.folder}: {self.processes.describe(self.precision, self.length)}")
        # As the main process sees it: another one's view of a network disk may be older.
        self.results = broadcast_object(self._sound_results() if self.processes.main else None)
        self._interrupt.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if self._tracker is not None:
            self._tracker.close()
        if kind is not None and issubclass(kind, ValueError) and self._first_step:
            self._run.forget()
        self._run.close()
        self._watch.__exit__(kind, *error)
        self._interrupt.__exit__(kind, *error)

    def _leave_note(self, code: int = REQUEUE_EXIT_CODE) -> None:
        """For a batch script that does not see the exit code (see `ssl_bench.runtime.interrupt`)."""
        if self.processes.main and code == REQUEUE_EXIT_CODE:
            leave_note(self.folder)

    def _sound_results(self) -> dict[str, Any] | None:
        """The results on disk; None, with a line, where the backbone beside them is no whole file."""
        path = self.folder / BACKBONE
        if self._run.results is not None and path.exists():  # an exported record has none on purpose
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                self.processes.say(f"{path}: damaged ({one_line(error)}): the run counts as not ended")
                return None
        return self._run.results

    def already_ended(self) -> int:
        """Says that there is nothing left to do; returns the exit code."""
        assert self.results is not None
        self._run.tidy()
        self.processes.say(f"{self.folder} has ended already: {self.results['status']}")
        return 0

    def train(self, trainer: Trainer, provenance: Mapping[str, Any]) -> Outcome:
        """Restores the last checkpoint if there is one, records what is about to run, and trains.

        Args:
            trainer: whose ``io`` is this session.
            provenance: for run.json; see `ssl_bench.records.provenance`.

        Raises:
            ValueError: one line; the model cannot be saved, a step does not fit into the memory, or a parameter gets
                no gradient where there are several processes.
        """
        if self.processes.main:
            rehearse_saving(trainer.module.get_submodule(trainer.module.evaluated), trainer.state_dict())
        step = self._restore(trainer)
        self._run.write_provenance(provenance, step=step)
        if self._tracker is not None:
            self._tracker.start(self.processes.accelerator, step)
        graphed = trainer.gradient
        if self.processes.world_size > 1:
            trainer.gradient = every_parameter_used(trainer.gradient, trainer.module, trainer.unused)
        # Elsewhere a signal ends the process at once: there is nothing to save, or a checkpoint has it all.
        with self._interrupt.finishing():
            outcome = self._steps(trainer)
            if isinstance(graphed, GraphedGradient):
                self._graphs = {"passes": graphed.used, "optimizer": "not recorded"}
                graphed.release()  # the evaluations need the recordings' memory
                if trainer.graphed_update is not None:
                    self._graphs["optimizer"] = trainer.graphed_update.used
                    trainer.graphed_update.release()
            if outcome.status == "finished":
                trainer.checkpoint()  # so that a run killed during its evaluation does not train again
                if self._interrupt.agreed(self.processes.device):
                    return Outcome("interrupted", outcome.step)
        if outcome.status == "finished":
            stop_if_requested("evaluation")  # a signal that came after all had agreed that there was none
            trainer.evaluation_point(outcome.step).__enter__()  # and there it stays, to be evaluated and saved
        return outcome

    def _steps(self, trainer: Trainer) -> Outcome:
        progress = Progress(trainer.rhythm.total, enabled=self.processes.main)
        try:
            with progress as self._progress, _one_host_thread(self.processes.device):
                return trainer.run()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            reason = error.with_traceback(None)  # which would hold the step's tensors
        raise ValueError(out_of_memory.advice(reason, trainer)) from None

    def _restore(self, trainer: Trainer) -> int:
        """Loads the last good checkpoint, if any, and drops what was recorded after it; returns its step."""
        # Only the main process looks: on a flaky disk each process might find another one good.
        look = self._resume == "auto" and self.processes.main
        latest = self._checkpoints.load_latest(self._lacks_metrics) if look else None
        step = broadcast_object(None if latest is None else latest[0])
        if step is None:
            self._run.truncate_to(None)
            return 0
        state = latest[1] if latest is not None else self._checkpoints.load(step)[0]
        try:
            trainer.load_state_dict(state)
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            where = f"{self._checkpoints.folder}/step-{step:08d}"
            raise ValueError(f"checkpoint {where}: its contents are not this run's: {one_line(error)}") from error
        self._run.truncate_to(step)
        self.processes.say(f"continuing {self.folder} from step {step}")
        return step

    def _lacks_metrics(self, meta: Mapping[str, Any]) -> str:
        """Why the run cannot go on from a checkpoint: the metrics no longer have all the rows that it knows of."""
        there = self._run.rows_until(meta["step"])
        if "metrics_rows" not in meta or all(there[key] == meta[key] for key in there):  # an older version's had none
            return ""
        return (
            f"it knows {meta['metrics_rows']} rows of metrics.jsonl, the last of step {meta['metrics_step']}, and "
            f"{there['metrics_rows']} are left: the run goes on from where they reach, to leave no gap"
        )

    def interrupted(self, outcome: Outcome) -> int:
        """Says how to continue a run that a signal stopped; returns the exit code that asks for a requeue."""
        self._leave_note()
        self.processes.say(
            f"stopped at step {outcome.step}; start again with resume=auto run_dir={self.folder} to continue"
        )
        return REQUEUE_EXIT_CODE

    def save_backbone(self, backbone: nn.Module) -> None:
        """Writes ``backbone.safetensors``, and waits for the disk: the checkpoints are deleted after it."""
        if self.processes.main:
            with atomic_file(self.folder / BACKBONE) as file:
                file.write(backbone_bytes(backbone))

    def finish(
        self, outcome: Outcome, evaluations: list[dict[str, Any]], embeddings: dict[str, float] | None = None
    ) -> int:
        """Writes the results, with which the run has ended; returns the exit code.

        Args:
            outcome: of the loop, "finished" or "diverged".
            evaluations: of the trained and the untrained model; none after a divergence.
            embeddings: how those of the trained model are spread, by which it has collapsed or not; None where it was
                not measured.
        """
        results: dict[str, Any] = {"status": outcome.status, "step": outcome.step, **outcome.details}
        if self._graphs:
            results["cuda_graphs"] = self._graphs  # what ran; run.json has what was asked for
        if outcome.status == "finished":
            results["evaluations"] = evaluations
            if embeddings:
                results["embeddings"] = embeddings
            if embeddings and collapsed(embeddings):
                results["status"] = "collapsed"
            elif _at_chance(evaluations):
                results["status"] = "at chance"
        with self._interrupt.saving():
            self._run.finish(results)
        if self._tracker is not None:
            self._tracker.finish(results)
        if self.processes.main and not self._keep_last and self._checkpoints.folder.exists():
            remove_atomically(self._checkpoints.folder)
        self.processes.say("\n".join([f"{results['status']}: {self.folder}", *summary(results)]))
        self.processes.accelerator.wait_for_everyone()
        return 0

    # What the loop calls ---------------------------------------------------------------------------------------------

    def log(self, row: Scalars) -> None:
        """Writes one line of the metrics, to the record and to the tracker."""
        self._run.log(row)
        if self._tracker is not None:
            self._tracker.log(row)

    def log_telemetry(self, columns: Mapping[str, Any]) -> None:
        """Writes a block of layer statistics; in the record a step is the number of steps completed."""
        if self._tracker is not None:
            self._tracker.log_telemetry(columns)
        if columns["step"]:
            self._run.log_telemetry({**columns, "step": [step + 1 for step in columns["step"]]})

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint; returns on every process when it is there."""
        if self.processes.main:
            with self._interrupt.saving():
                self._run.sync()
                about = {"identity": self._identity, "world_size": self.processes.world_size, **self._run.position}
                self._checkpoints.save(step, state, about)
        self.processes.accelerator.wait_for_everyone()

    def snapshot(self, step: int, module: nn.Module) -> None:
        """Keeps the weights for measurements after the run."""
        if self.processes.main:
            with self._interrupt.saving():
                Snapshots(self.folder).save(step, module)

    def should_stop(self, step: int) -> bool:
        """Whether a signal asked to stop: the same answer on every process."""
        if self.processes.world_size == 1:
            return self._interrupt.requested
        return self._agreement.reached(step)

    def progress(self, step: int, row: Scalars | None) -> None:
        """Shows how far the run has come."""
        self._first_step = False
        if self._progress is not None:
            self._progress(step, row)


@contextmanager
def _one_host_thread(device: torch.device) -> Iterator[None]:
    """Beside a GPU the host only draws small tables; waking a second thread takes longer than one needs for them."""
    before = torch.get_num_threads()
    if device.type == "cuda":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _at_chance(evaluations: list[dict[str, Any]]) -> bool:
    """Whether every result of the trained model is no better than guessing among the classes."""
    trained = [
        entry
        for entry in evaluations
        if entry["model"] == "trained" and "chance" in entry and "top1" in entry["metrics"]  # not every evaluator's
    ]
    return bool(trained) and all(
        entry["metrics"]["top1"]
        <= entry["chance"] + CHANCE_MARGIN * (entry["chance"] * (100 - entry["chance"]) / entry["n_test"]) ** 0.5
        for entry in trained
    )
