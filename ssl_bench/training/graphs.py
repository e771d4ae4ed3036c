"""A step's forward and backward pass as one CUDA graph, and the optimizer's step as another."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import OutOfMemoryError, Tensor, clear_autocast_cache, nn
from torch.optim import Optimizer

from ssl_bench.runtime.cuda_graph import (
    TOLERANCE,
    WARM_UP,
    GraphRecorder,
    Recorder,
    Replay,
    copy_all,
    distance,
    first_line,
    signature,
)
from ssl_bench.runtime.distributed import average, everywhere, world_size
from ssl_bench.training.gradient import Backward, Context, Views, plain, random_state, set_random_state

Gradient = Callable[..., dict[str, Tensor]]


def averaged(gradient: Gradient, task: nn.Module) -> Gradient:
    """The same gradient, averaged over the processes in one collective: DistributedDataParallel can be in no recording.

    Args:
        gradient: `compute_gradient`, or another of its signature.
        task: the network, not wrapped; its parameters are equal on all processes.
    """
    parameters = [p for p in task.parameters() if p.requires_grad]

    def compute(*arguments: Any) -> dict[str, Tensor]:
        terms = gradient(*arguments)
        average([p.grad for p in parameters if p.grad is not None])
        return terms

    return compute


class GraphedGradient:
    """A whole batch's forward and backward pass, replayed; in place of `ssl_bench.training.gradient.compute_gradient`.

    The first steps run plainly, and so does every batch of another shape. The step after the recording runs both ways
    on its own batch; where the two differ, or nothing could be recorded, training goes on plainly. With several
    processes the recording holds their collectives, and all of them replay or none does.

    Args:
        gradient: `compute_gradient`, or another of its signature; called with one chunk.
        task: the network whose parameters get gradients and whose buffers change.
        refuse: takes the reason where the plain steps must do; may raise.
        recorder: records; None for CUDA graphs.
    """

    def __init__(
        self,
        gradient: Gradient,
        task: nn.Module,
        refuse: Callable[[str], None],
        recorder: Recorder | None = None,
    ) -> None:
        self._plain, self._recorder, self._refuse = gradient, recorder or GraphRecorder(), refuse
        self._parameters = [p for p in task.parameters() if p.requires_grad]
        self._buffers = list(task.buffers())
        self._calls: dict[Any, int] = {}
        self._recorded_shape: Any = None
        self._inputs: list[Tensor] = []
        self._recorded: tuple[tuple[dict[str, Tensor], list[Tensor | None]], Replay] | None = None
        self._state = "warming up"  # then "recorded", "checked"; or "plain", for good
        self.used = "no step was replayed"  # for the record: what became of the graph
        self.replaying = False  # whether the last gradients are those of a replay that has been checked

    def __call__(
        self, model: nn.Module, views: Views, n_chunks: int, backward: Backward, context: Context = plain
    ) -> dict[str, Tensor]:
        """See `compute_gradient`; the scalars hold until the next call."""
        inputs = views(0)
        shape = signature(inputs)
        self.replaying = self._state == "checked" and shape == self._recorded_shape

        def plainly() -> dict[str, Tensor]:
            return self._recorder.run(lambda: self._plain(model, views, n_chunks, backward, context))

        if self._state == "plain":
            return self._plain(model, views, n_chunks, backward, context)
        if self._state == "warming up":
            terms = plainly()
            self._calls[shape] = self._calls.get(shape, 0) + 1
            if self._calls[shape] == WARM_UP:
                self._record(lambda: self._plain(model, lambda _: tuple(self._inputs), 1, backward, context), inputs)
                self._recorded_shape = shape
            return terms
        if shape != self._recorded_shape:
            return self._beside_the_recording(plainly, inputs)
        return self._check(plainly, inputs) if self._state == "recorded" else self._replay(inputs)

    def release(self) -> None:
        """Gives the recording's memory back; what follows runs plainly."""
        self._state, self._recorded, self._inputs = "plain", None, []
        self._free()

    def _free(self) -> None:
        """Hands the allocator's unused blocks back: plain steps and a recording have separate pools."""
        if any(parameter.is_cuda for parameter in self._parameters):
            torch.cuda.empty_cache()

    def _beside_the_recording(
        self, plainly: Callable[[], dict[str, Tensor]], inputs: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """A plain step, for which the recording is given up if it leaves too little memory."""
        before, random = [b.clone() for b in self._buffers], random_state(inputs[0].device)
        try:
            return plainly()
        except OutOfMemoryError:
            if world_size() > 1:  # the others are in the middle of it, and do not start anew
                raise
            # and out of here, so that the error lets go of the step's tensors
        self._take_gradients()
        self._give_up("the recorded step leaves too little memory for a plain one")
        copy_all(self._buffers, before)
        set_random_state(inputs[0].device, random)
        return plainly()

    def _record(self, work: Callable[[], dict[str, Tensor]], inputs: Sequence[Tensor]) -> None:
        gradients, obstacle = self._take_gradients(), ""
        self._inputs = [x.clone() for x in inputs]
        clear_autocast_cache()  # weights must be cast anew at each replay, and not by the caller with these casts
        if self._recorder.waited:  # known before a recording, which would break off in the middle
            obstacle = "a step waits for the device, so it cannot be recorded"
        else:
            try:
                self._recorded = self._recorder.record(lambda: (work(), self._take_gradients()))
            except RuntimeError as error:
                obstacle = f"a step could not be recorded: {first_line(error)}"
        clear_autocast_cache()
        self._give_gradients(gradients)
        self._state = "recorded"
        self._go_on(obstacle, inputs[0].device)

    def _replay(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        assert self._recorded is not None
        (terms, gradients), replay = self._recorded
        copy_all(self._inputs, inputs)
        replay()
        self._give_gradients(gradients)
        return terms

    def _check(self, plainly: Callable[[], dict[str, Tensor]], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Both ways, of which the plain one counts; waits for the device."""
        device = inputs[0].device
        before, random = [b.clone() for b in self._buffers], random_state(device)
        terms = self._beside_the_recording(plainly, inputs)
        if self._recorded is None:
            return terms
        after, gradients = [b.clone() for b in self._buffers], self._take_gradients()
        copy_all(self._buffers, before)
        random_after = random_state(device)
        set_random_state(device, random)
        again = self._replay(inputs)
        expected: dict[str, list[Tensor | None]] = {
            "loss": [terms["loss"]],
            "gradient": gradients,
            "batch norm": [*after],
        }
        got: dict[str, list[Tensor | None]] = {
            "loss": [again["loss"]],
            "gradient": self._take_gradients(),
            "batch norm": [*self._buffers],
        }
        far = {name: distance(expected[name], got[name]) for name in expected}
        copy_all(self._buffers, after)
        set_random_state(device, random_after)
        self._give_gradients(gradients)
        worst = max(far, key=lambda name: far[name])
        differs = f"a replayed step differs from the plain one: {worst} by {far[worst]:.1%}"
        # NaN: a step that diverged says nothing; the next one may.
        known = everywhere(all(value == value for value in far.values()), device)
        if self._go_on(differs if far[worst] > TOLERANCE else "", device) and known:
            self._state, self.used = "checked", "replayed"
            self._free()
        return terms

    def _go_on(self, obstacle: str, device: torch.device) -> bool:
        """Whether no process has an obstacle; else gives up, on all of them at the same step."""
        if good := everywhere(not obstacle, device):
            return good
        self._give_up(obstacle or "another process cannot replay its step")
        return False

    def _give_up(self, reason: str) -> None:
        self.used = f"given up: {reason}"
        self.release()
        self._refuse(reason)

    def _take_gradients(self) -> list[Tensor | None]:
        gradients = [p.grad for p in self._parameters]
        self._give_gradients([None] * len(gradients))
        return gradients

    def _give_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient


class GraphedUpdate:
    """An optimizer's step, with what is computed beside it, replayed.

    It is recorded for gradients that lie where a replayed pass leaves them; with others, as after a batch of another
    shape, the step runs plainly. The first replay is compared with
    a plain step on the same gradients. The learning rates are on the device from the first step on, so that plain
    steps and replayed ones, of this process and of others, start the same kernels.

    Args:
        optimizer: needs nothing of the host in a step but each group's learning rate (``replayable``).
        ready: whether the gradients are those of a replayed pass.
        refuse: takes the reason where plain steps must do.
        recorder: records; None for CUDA graphs.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        ready: Callable[[], bool],
        refuse: Callable[[str], None],
        recorder: Recorder | None = None,
    ) -> None:
        self._optimizer, self._ready, self._refuse = optimizer, ready, refuse
        self._recorder = recorder or GraphRecorder()
        self._rates: list[Tensor] = []  # (), of each group
        self._place: Any = None  # where the last gradients lay, or those of the recording
        self._calls = 0  # that had their gradients there
        self._recorded: tuple[Tensor, Replay] | None = None
        self._state = "warming up"  # then "recorded", "checked"; or "plain", for good
        self.used = "no step was replayed"

    def __call__(self, work: Callable[[], Tensor], reads: Sequence[Tensor | None], *, plainly: bool) -> Tensor:
        """Takes a step.

        Args:
            work: the optimizer's step; it returns a tensor, and reads nothing that changes from step to step besides
                `reads`, the parameters, the optimizer's state and its groups' learning rates.
            reads: a tensor of the loss, and each parameter's gradient.
            plainly: not as a replay: this step does more than others.

        Returns:
            What ``work`` returns.
        """
        with self._rates_on(next(read.device for read in reads if read is not None)):
            if plainly or self._state == "plain" or not self._ready():
                return work()
            place = [None if read is None else (read.data_ptr(), read.stride()) for read in reads]
            if self._state == "warming up":
                row = self._recorder.run(work)
                self._calls = self._calls + 1 if place == self._place else 1
                self._place = place
                if self._calls == WARM_UP:
                    self._record(work)
                return row
            if place != self._place:
                return work()
            return self._check(work) if self._state == "recorded" else self._replay()

    def release(self) -> None:
        """Gives the recording's memory back; what follows runs plainly."""
        self._state, self._recorded = "plain", None

    @contextmanager
    def _rates_on(self, device: torch.device) -> Iterator[None]:
        """The groups' learning rates as tensors, whose values the host may change between replays."""
        groups = self._optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        if not self._rates:
            self._rates = [torch.zeros((), device=device) for _ in groups]
        for group, rate, number in zip(groups, self._rates, numbers, strict=True):
            group["lr"] = rate.fill_(number)
        try:
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number

    def _record(self, work: Callable[[], Tensor]) -> None:
        if self._recorder.waited:
            self._give_up("it waits for the device")
            return
        try:
            self._recorded = self._recorder.record(work)
        except RuntimeError as error:
            self._give_up(first_line(error))
        else:
            self._state = "recorded"

    def _replay(self) -> Tensor:
        assert self._recorded is not None
        row, replay = self._recorded
        replay()
        return row.clone()

    def _check(self, work: Callable[[], Tensor]) -> Tensor:
        """Both ways, of which the plain one counts; waits for the device."""
        written = [p for group in self._optimizer.param_groups for p in group["params"]]
        written += [
            value for state in self._optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        with torch.no_grad():
            try:
                before, after = ([tensor.clone() for tensor in written] for _ in range(2))
            except OutOfMemoryError:
                self._give_up("there is too little memory to compare a replayed step with a plain one")
                return work()
            row = work()
            copy_all(after, written)
            copy_all(written, before)
            again = self._replay()
            # Of the changes, which are small beside what changes.
            expected = (a - b for a, b in zip(after, before, strict=True))
            got = (w - b for w, b in zip(written, before, strict=True))
            far = distance(expected, got) + distance([row], [again])
            copy_all(written, after)
        if far > TOLERANCE:
            self._give_up(f"a replayed step differs from the plain one by {far:.1%}")
        elif far == far:  # NaN: a step that diverged says nothing; the next one may
            self._state, self.used = "checked", "replayed"
            if row.is_cuda:
                torch.cuda.empty_cache()
        return row

    def _give_up(self, reason: str) -> None:
        self.used = f"given up: {reason}"
        self.release()
        self._refuse(reason)
