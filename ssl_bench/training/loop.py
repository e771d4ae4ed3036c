"""THE training loop, shared by both tracks. It knows no method, data set, optimizer or metric by name."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from ssl_bench.data.pipeline import Batch, Pipeline
from ssl_bench.methods.base import Method
from ssl_bench.optim.telemetry import Telemetry
from ssl_bench.runtime import seeds
from ssl_bench.runtime.distributed import assert_equal_parameters
from ssl_bench.training.gradient import unwrap
from ssl_bench.training.graphs import GraphedUpdate
from ssl_bench.training.monitor import Arriving, FiniteGuard, Meter, Moment
from ssl_bench.training.plan import Rhythm
from ssl_bench.training.sample_random import SampleRandom

Scalars = dict[str, float]

# Steps that are started on a GPU before a line of the metrics is waited for, so that it does not stand still meanwhile.
LAG = 4


@dataclass
class Hook:
    """Something measured every so often: ``measure(step)`` returns scalars for that step's line of the metrics."""

    every: int  # steps; 0 = never
    measure: Callable[[int], Scalars]


@dataclass
class Outcome:
    """How the loop ended: "finished", "diverged" (with step and layer in ``details``) or "interrupted"."""

    status: str
    step: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Line:
    """A line of the metrics at its step, some of it still on its way, with what is looked at beside it."""

    step: int
    row: Scalars
    reached: Moment  # by the device
    host_bound: bool  # whether the device had done the step's passes when the optimizer's step had been started
    means: Arriving
    found: Arriving
    layers: tuple[dict[str, Any], Arriving]


class RunIO(Protocol):
    """What the loop needs of the world around it: a run's directory, its signals and its terminal."""

    def log(self, row: Scalars) -> None:
        """Takes one line of the metrics."""

    def log_telemetry(self, columns: dict[str, Any]) -> None:
        """Takes one block of layer statistics."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint."""

    def snapshot(self, step: int, module: nn.Module) -> None:
        """Keeps the weights of a step."""

    def should_stop(self, step: int) -> bool:
        """Whether a signal asked to stop; the same answer on every process."""

    def progress(self, step: int, row: Scalars | None) -> None:
        """Called after every step, with the line that was logged since the last time, if any."""


@dataclass
class Trainer:
    """Everything one run's loop works with.

    Attributes:
        model: a method, possibly wrapped for several processes.
        optimizer: may be Accelerate's wrapper; every group carries ``initial_lr``.
        schedule: optimizer step -> multiplier of every group's ``initial_lr``; pure.
        gradient: runs forward and backward of one batch and returns its scalars, "loss" among them.
        accelerator: Accelerate's; backward, reduction, autocast and the gradient scaler.
        loss_scale: factor on the loss for the backward pass, not on the recorded one.
        evaluation_point: step -> the context in which the network is measured and kept.
        graphed_update: replays the optimizer's step; None where it runs plainly.
        unused: the names of trainable parameters that are known to get no gradient; sought with several processes only.
        host_bound: told once, if the device waits for the host: the milliseconds that the host takes to start a step.
    """

    model: nn.Module
    optimizer: Any
    schedule: Callable[[int], float]
    gradient: Callable[..., dict[str, Tensor]]
    pipeline: Pipeline
    rhythm: Rhythm
    accelerator: Accelerator
    telemetry: Telemetry
    io: RunIO
    hooks: Sequence[Hook] = ()
    loss_scale: float = 1.0
    evaluation_point: Callable[[int], AbstractContextManager] = nullcontext
    graphed_update: GraphedUpdate | None = None
    unused: Sequence[str] = ()
    host_bound: Callable[[float], None] | None = None

    def __post_init__(self) -> None:
        self.module: Method = unwrap(self.model)
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        self.device: torch.device = self.accelerator.device
        self.random = SampleRandom(self.device)
        if self.accelerator.scaler is None and isinstance(self.optimizer, AcceleratedOptimizer):
            self.optimizer = self.optimizer.optimizer  # the wrapper would only look for packages, at every step
        self.guard = FiniteGuard([name for name, _ in named], self.device, gradients=self.accelerator.scaler is None)
        self.meter = Meter()
        self.step = 0  # batches consumed
        self.clock = 0  # optimizer steps taken: fewer than `step` where the gradient scaler skipped some
        self.seconds = 0.0
        self.lag = LAG if self.device.type == "cuda" else 0
        self._line: Line | None = None  # begun and not ended
        self._row: Scalars | None = None  # of the last ended, until it is shown
        self._passed = Moment(self.device)  # the last step's forward and backward pass
        self._mark, self._marked_step, self._first_step = Moment(self.device), 0, 0  # up to where `seconds` is whole

    def run(self) -> Outcome:
        """Trains from ``self.step`` to the end, to a divergence or to an interruption."""
        try:
            return self._run()
        except BaseException:
            with suppress(Exception):  # the device may be lost
                self._end_line()
            raise

    def _run(self) -> Outcome:
        rhythm, io = self.rhythm, self.io
        if self.step == 0 and 0 in rhythm.snapshots:
            io.snapshot(0, self.module)
        self._first_step = self.step
        self._note_time(self.step)
        for batch in self.pipeline.batches(self.step, rhythm.total):
            self._begin_step()
            scalars = self.gradient_of(batch, self.pipeline.n_chunks)
            self._passed = Moment(self.device)
            self.random.end_step()
            # The schedule counts optimizer steps: a step that the gradient scaler skips must not advance it.
            multiplier = self.schedule(self.clock)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
            self._take_step(scalars["loss"])
            self.optimizer.zero_grad(set_to_none=True)
            self.clock += not self.accelerator.optimizer_step_was_skipped
            self.meter.add(scalars)  # stays on the device; only a logged line waits for it
            self.step += 1

            last = self.step == rhythm.total
            due = [hook for hook in self.hooks if hook.every and (last or self.step % hook.every == 0)]
            logged = last or due or self.step % rhythm.log == 0
            if (logged or self._is_due()) and (bad := self._end_line()):
                return bad
            if logged:
                self._begin_line(multiplier)
                if (last or due or self._is_due()) and (bad := self._end_line(due)):
                    return bad
            io.progress(self.step, self._row)
            self._row = None
            if rhythm.check_equal and self.step % rhythm.check_equal == 0:
                assert_equal_parameters(self.module)
            stopping = not last and io.should_stop(self.step)
            saving = stopping or (rhythm.checkpoint and not last and self.step % rhythm.checkpoint == 0)
            if saving or self.step in rhythm.snapshots:
                if bad := self._end_line():
                    return bad
                self.seconds += Moment(self.device).since(self._mark)
                if self.step in rhythm.snapshots:
                    with self.evaluation_point(self.step):
                        io.snapshot(self.step, self.module)
                if saving:
                    self.checkpoint()
                self._note_time(self.step)
            if stopping:
                return Outcome("interrupted", self.step)
        return Outcome("finished", self.step)

    def gradient_of(self, batch: Batch, n_chunks: int) -> dict[str, Tensor]:
        """A step's forward and backward pass; returns its scalars."""
        return self.gradient(self.model, batch.views, n_chunks, self._backward, partial(self._around, batch))

    def _take_step(self, loss: Tensor) -> None:
        """Looks at the gradients and takes the optimizer's step; as a CUDA graph unless telemetry records it."""

        def work() -> Tensor:
            row = self.guard.look(loss, self.parameters)
            self.optimizer.step()
            return row

        self.telemetry.step = self.step
        if self.graphed_update is None:
            row = work()
        else:
            reads = [loss, *(parameter.grad for parameter in self.parameters)]
            row = self.graphed_update(work, reads, plainly=self.telemetry.due)
        self.guard.take(self.step, row)

    def _begin_step(self) -> None:
        """Lets the method follow the run, and makes whatever the network draws a function of (seed, step)."""
        with torch.no_grad():
            self.module.begin_step(self.step / self.rhythm.total)
        seed = seeds.derive_seed(self.pipeline.seed, seeds.LAYERS, self.step)
        self.random.begin_step(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed walks over every kind of device, each step
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _backward(self, loss: Tensor) -> None:
        # At 1 the loss itself, so that runs stay equal bit for bit to those of before there was a scale.
        self.accelerator.backward(loss if self.loss_scale == 1 else self.loss_scale * loss)

    def _around(self, batch: Batch, chunk: int) -> AbstractContextManager:
        """What surrounds the forward pass of a chunk: random numbers of its samples' own.

        (Autocast is in the forward that Accelerate has prepared.)
        """
        return self.random.rows(batch.positions(chunk))

    def _begin_line(self, multiplier: float) -> None:
        """Begins a line of the metrics: means since the last line. Waits for nothing."""
        reached = Moment(self.device)
        row = {
            "step": self.step,
            "samples": self.pipeline.samples(self.step),
            "epochs": self.step / self.pipeline.steps_per_epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "lr_multiplier": multiplier,
            "skipped_steps": self.step - self.clock,
        }
        means = self.meter.take(lambda mean: self.accelerator.reduce(mean, "mean"))
        where, layers = self.telemetry.take()
        found = Arriving(self.guard.found(self._maximum))
        # The share of the host's time in a step tells nothing: a busy device's queue is full, and the host waits in it.
        host_bound = self._passed.is_past()
        self._line = Line(self.step, row, reached, host_bound, Arriving(means), found, (where, Arriving(layers)))

    def _is_due(self) -> bool:
        """Whether enough steps have been started since the line that was begun, if one was."""
        return self._line is not None and self.step - self._line.step >= self.lag

    def _end_line(self, due: Sequence[Hook] = ()) -> Outcome | None:
        """Waits until the device has done the steps of the line that was begun, if one was, and logs it.

        Args:
            due: what is measured for it.

        Returns:
            How the run ends, if it has diverged.
        """
        line, self._line = self._line, None
        if line is None:
            return None
        row = line.row | self.meter.named(line.means.values())
        passed, steps = line.reached.since(self._mark), line.step - self._marked_step
        self.seconds += passed
        row["seconds"] = self.seconds
        seen = self.pipeline.samples(line.step) - self.pipeline.samples(self._marked_step)
        row["images_per_second"] = seen / passed
        # The first line's steps choose algorithms, and soon after a line was waited for the device is never far behind.
        if self._marked_step > self._first_step and steps > self.lag + 1:
            self._watch_host(line.host_bound, passed, steps)
        self._note_time(line.step, line.reached)
        found = self.guard.explain(line.found.values())
        if due and not found:
            with self.evaluation_point(line.step):
                for hook in due:
                    row |= hook.measure(line.step)
        self._row = row
        self.io.log(row)
        where, layers = line.layers
        self.io.log_telemetry(self.telemetry.named(where, layers.values()))
        if line.step == self.step:  # the device stood still
            self._note_time(self.step)
        return Outcome("diverged", found["step"], found) if found else None

    def _note_time(self, step: int, moment: Moment | None = None) -> None:
        """Notes up to what moment, and for how many steps, `seconds` is whole."""
        self._mark, self._marked_step = moment or Moment(self.device), step

    def _watch_host(self, host_bound: bool, seconds: float, steps: int) -> None:
        """Tells, once, that the device waits for the host, which started so many steps in so many seconds."""
        if self.host_bound is not None and host_bound:
            self.host_bound(1000 * seconds / steps)
            self.host_bound = None

    def _maximum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.gather(tensor.reshape(1, -1)).amax(0).reshape(tensor.shape)

    def checkpoint(self) -> None:
        """Saves everything that the rest of the run depends on."""
        self.io.log_telemetry(self.telemetry.columns())
        self.io.save(self.step, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The state after ``self.step`` batches; sampler and augmentation need no state but the step."""
        scaler = self.accelerator.scaler
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "meter": self.meter.state_dict(),
            "guard": self.guard.state_dict(),
            "step": self.step,
            "clock": self.clock,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken, on any number of processes."""
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"], self.device)
        self.guard.load_state_dict(state["guard"])
        self.step, self.clock, self.seconds = state["step"], state["clock"], state["seconds"]
