"""One of Accelerate's trackers (TensorBoard, Weights & Biases, trackio, MLflow, ...) beside a run's own record.

What it gets: the run's name, its study as the group, the recipe, every line of the metrics, medians of the layer
statistics, the results, and a picture of the curves. A run that goes on after an interruption goes on in the same
tracker run, whose name is kept in ``tracker.json``. Everything is written below the run's folder, unless the tracker's
own environment variable says where (`WANDB_MODE=online`, `MLFLOW_TRACKING_URI`, `TRACKIO_DIR`, ...).
"""

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssl_bench.records.reader import metric_rows
from ssl_bench.records.storage import atomic_file
from ssl_bench.runtime.console import say

PROJECT = "ssl_bench"
STUDY = "SSL_BENCH_STUDY"  # environment variable: the study that started this run
KEPT = "tracker.json"
# Where each would write outside the run's folder, and what stands there instead, unless the environment says it.
PLACES = {
    "wandb": {"WANDB_CACHE_DIR": "wandb/cache", "WANDB_DATA_DIR": "wandb/data", "WANDB_CONFIG_DIR": "wandb/config"},
    "trackio": {"TRACKIO_DIR": "trackio"},
}
MLFLOW_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"  # where MLflow's database store has its default experiment
_set_here: dict[str, str] = {}  # of those, what an earlier run of this process has set


@dataclass
class Tracker:
    """The tracker of one run; only the main process writes.

    Args:
        kind: Accelerate's name of it.
        folder: the run's directory.
        name: of the run.
        config: the recipe by dotted keys.
    """

    kind: str
    folder: Path
    name: str
    config: Mapping[str, Any]
    _accelerator: Any = field(default=None, init=False)
    _step: int = field(default=0, init=False)
    _failed: bool = field(default=False, init=False)

    def start(self, accelerator: Any, step: int) -> None:
        """Opens the tracker; all processes must call it.

        Args:
            accelerator: Accelerate's, made with ``log_with``.
            step: at which the run goes on; 0 for a new one.

        Raises:
            ValueError: in one line; the tracker cannot be started.
        """
        self._accelerator, self._step = accelerator, step
        kept = self._kept()
        run_id = kept.get("id") or (secrets.token_hex(4) if self.kind == "wandb" else None)
        if accelerator.is_main_process:
            self._claim_places()
        try:
            accelerator.init_trackers(PROJECT, init_kwargs={self.kind: self._arguments(run_id, bool(kept))})
            if accelerator.is_main_process and not kept:
                self._configure()
                self._keep(run_id)
        except Exception as error:  # of many libraries, each with its own
            self._failed = True
            raise ValueError(f"tracker={self.kind} must start, got {_line(error)}") from error
        finally:
            os.environ.pop(MLFLOW_ROOT, None)

    def log(self, row: Mapping[str, Any]) -> None:
        """One line of the metrics."""
        self._step = max(self._step, int(row["step"]))
        self._send({key: value for key, value in row.items() if key != "step"})

    def log_telemetry(self, columns: Mapping[str, Any]) -> None:
        """The medians over the layers of a block of statistics, at the last step that was logged."""
        if not columns["step"]:
            return
        self._step = max(self._step, *(int(step) + 1 for step in columns["step"]))
        summary = {}
        for name, column in columns.items():
            if name not in ("step", "layer"):
                values = np.asarray(column, dtype=np.float64)
                values = values[np.isfinite(values)]
                if len(values):
                    summary[f"telemetry/{name}"] = float(np.median(values))
        self._send(summary)

    def finish(self, results: Mapping[str, Any]) -> None:
        """The results as ``PROTOCOL/trained/top1`` and so on, and the picture."""
        final = {
            re.sub(r"[^\w./ -]", "_", f"{entry['protocol']}/{entry['model']}/{name}"): float(value)  # MLflow's letters
            for entry in results.get("evaluations", [])
            for name, value in entry["metrics"].items()
        }
        self._send({**final, "status": results["status"]} if self.kind != "mlflow" else final)
        self._try(lambda: self._plot(results))

    def _send(self, values: Mapping[str, Any]) -> None:
        self._try(lambda: self._accelerator.log(values, step=self._step))

    def _try(self, action: Callable[[], None]) -> None:
        """A tracker that fails (its server gone, the disk full) is left out from there on: the run has its record."""
        if self._failed or not self._accelerator.is_main_process:
            return
        try:
            action()
        except Exception as error:  # of many libraries, each with its own
            self._failed = True
            say(f"tracker={self.kind} gets nothing from step {self._step} on: {_line(error)}")

    def close(self) -> None:
        """Ends the tracker's run, if it was started."""
        for tracker in () if self._accelerator is None else self._accelerator.trackers:
            self._try(tracker.finish)  # Accelerate's end_training would also destroy the process group

    # What differs between them ---------------------------------------------------------------------------------------

    def _arguments(self, run_id: str | None, goes_on: bool) -> dict[str, Any]:
        group = os.environ.get(STUDY)
        if self.kind == "tensorboard":
            return {"purge_step": self._step + 1} if goes_on else {}  # what a killed run had logged beyond that
        if self.kind == "wandb":
            # Offline unless asked: a node without a network, or without a login, must not stop a run.
            mode = os.environ.get("WANDB_MODE", "offline")
            about = {"name": self.name, "group": group, "dir": str(self.folder)}
            return {**about, "id": run_id, "resume": "allow", "mode": mode}
        if self.kind == "trackio":
            about = {"name": self.name, "group": group, "resume": "allow"}
            return {**about, "embed": False, "config": self._plain()}  # without the recipe a session would remove it
        if self.kind == "mlflow":
            tags = {"group": group} if group else None
            return {"run_id": run_id, "run_name": self.name, "tags": tags, "logging_dir": self._artifacts()}
        return {}

    def _artifacts(self) -> str | None:
        return (self.folder / "mlflow/artifacts").resolve().as_uri() if _is_ours("MLFLOW_TRACKING_URI") else None

    def _claim_places(self) -> None:
        for variable, place in PLACES.get(self.kind, {}).items():
            ours = str((self.folder / place).resolve())
            if _is_ours(variable):
                if self.kind == "trackio" and "trackio" in sys.modules and _set_here.get(variable) != ours:
                    raise ValueError(
                        "tracker=trackio must be one run's of a process, as it keeps its folder, got a second run: set "
                        "TRACKIO_DIR to share one"
                    )
                _set_here[variable] = os.environ[variable] = ours
                Path(ours).mkdir(parents=True, exist_ok=True)
        if self.kind == "mlflow" and _is_ours("MLFLOW_TRACKING_URI"):
            import mlflow

            (self.folder / "mlflow").mkdir(parents=True, exist_ok=True)
            _set_here["MLFLOW_TRACKING_URI"] = f"sqlite:///{(self.folder / 'mlflow/mlflow.db').resolve()}"
            mlflow.set_tracking_uri(_set_here["MLFLOW_TRACKING_URI"])  # which sets the variable too
            # Or opening the database makes a folder mlruns/ in the current one.
            os.environ[MLFLOW_ROOT] = str(self._artifacts())

    def _configure(self) -> None:
        plain = self._plain()
        tracker = self._accelerator.get_tracker(self.kind)
        if self.kind == "tensorboard":
            from torch.utils.tensorboard.summary import hparams

            # Into the run's own file: Accelerate's would make a run of its own of them, named after the time, and a
            # second file beside it would be the one that TensorBoard follows.
            for summary in hparams(plain, {}):
                tracker.writer.file_writer.add_summary(summary)
            tracker.writer.add_text("name", self.name)
            if STUDY in os.environ:
                tracker.writer.add_text("study", os.environ[STUDY])
        elif self.kind != "trackio":
            tracker.store_init_configuration(plain)

    def _plain(self) -> dict[str, Any]:
        """The recipe as trackers' tables of hyper-parameters hold it: numbers and text."""
        return {key: v if isinstance(v, int | float | str) else str(v) for key, v in self.config.items()}

    # The run's name in the tracker -----------------------------------------------------------------------------------

    def _kept(self) -> dict[str, Any]:
        """What an earlier session of this run has kept of this tracker."""
        try:
            found = json.loads((self.folder / KEPT).read_text())
        except (OSError, ValueError):
            return {}
        return dict(found) if isinstance(found, dict) and found.get("kind") == self.kind else {}

    def _keep(self, run_id: str | None) -> None:
        if self.kind == "mlflow":
            run_id = self._accelerator.get_tracker("mlflow", unwrap=True).info.run_id
        with atomic_file(self.folder / KEPT) as file:
            file.write(json.dumps({"kind": self.kind, "name": self.name, "id": run_id}).encode())

    # The picture -----------------------------------------------------------------------------------------------------

    def _plot(self, results: Mapping[str, Any]) -> None:
        from matplotlib.figure import Figure

        rows = [row for _, row in metric_rows(self.folder)]
        figure = Figure(figsize=(8, 3), layout="constrained")
        for axes, name in zip(figure.subplots(1, 2), ("loss", "lr"), strict=True):
            points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
            axes.plot(*zip(*points, strict=True) if points else ([], []))
            axes.set(xlabel="step", ylabel=name)
        figure.suptitle(f"{self.name}: {results['status']}", fontsize=8)
        tracker = self._accelerator.get_tracker(self.kind)
        if self.kind == "mlflow":
            tracker.log_figure(figure, "curves.png")
            return
        pixels = _pixels(figure)
        if self.kind == "trackio":
            import trackio

            tracker.log({"curves": trackio.Image(pixels)}, step=self._step)
        elif self.kind == "tensorboard":
            tracker.writer.add_image("curves", pixels, global_step=self._step, dataformats="HWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"curves": [pixels]}, step=self._step)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _is_ours(variable: str) -> bool:
    """Whether an environment variable is not set, or set by an earlier run of this process."""
    return os.environ.get(variable, "") in ("", _set_here.get(variable))


def _pixels(figure: Any) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # (H, W, 3) uint8
