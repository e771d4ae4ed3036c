"""A step's forward and backward pass as one CUDA graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import OutOfMemoryError, Tensor, clear_autocast_cache, nn

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

    def __call__(
        self, model: nn.Module, views: Views, n_chunks: int, backward: Backward, context: Context = plain
    ) -> dict[str, Tensor]:
        """See `compute_gradient`; the scalars hold until the next call."""
        inputs = views(0)
        shape = signature(inputs)

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
