"""CUDA graphs: part of a step is recorded once and then launched as a whole, so that no kernel waits for the host.

A step of ResNet-18 at B = 512 starts some 800 kernels; launching them one by one takes the host longer than a large GPU
needs to compute them. A recording reads and writes fixed memory: inputs are copied into it, results are read from it.
Whatever Python decides is decided once, when recording.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Replay = Callable[[], object]

# Calls before recording, in which libraries choose their algorithms and allocate, and compilers compile.
WARM_UP = 3

# Largest relative distance allowed between plain and replayed work. Both start the same kernels, but kernels without a
# fixed order of summation differ by about 1e-3.
TOLERANCE = 0.01


class Recorder(Protocol):
    """Records device work for replay."""

    waited: bool  # whether the last work that was run waited for the device, in which case it cannot be recorded

    def run(self, work: Callable[[], T]) -> T:
        """Runs the work plainly, on the stream on which it will be recorded and ordered with the caller's stream."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[T, Replay]:
        """Records the work without running it.

        Returns:
            its results, whose memory each replay fills, and the function that replays it.

        Raises:
            RuntimeError: the work waits for the device, or reads what only the host knows.
        """
        ...

    def turn(self) -> AbstractContextManager[None]:
        """A context for one replay, including the copies that fill its inputs and read its results.

        It waits for earlier turns, whatever streams they were queued on.
        """
        ...


class GraphRecorder:
    """Records CUDA graphs, each recorder on its own stream.

    cuBLAS keeps one workspace per stream, and two graphs that may run side by side must not share one.
    """

    def __init__(self) -> None:
        self.waited = False
        self._stream: Any = None
        self._turned: Any = None  # the event at the end of the last turn

    def run(self, work: Callable[[], T]) -> T:
        """See `Recorder`."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        current.wait_stream(self._stream)
        self.waited = any("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)
        for warning in caught:
            if "ynchroniz" not in str(warning.message):  # these are ours: the waits, and torch's note on the debug mode
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result

    def record(self, work: Callable[[], T]) -> tuple[T, Replay]:
        """See `Recorder`."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # "global" would make it an error that other threads (those that pin memory) go on working.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        except BaseException:
            # torch 2.11's generator goes on waiting for the capture's end; a copy of its state does not.
            generator = torch.cuda.default_generators[current.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        finally:
            torch.cuda.set_stream(current)  # a failed capture does not restore it
        return result, graph.replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        """See `Recorder`."""
        current = torch.cuda.current_stream()
        if self._turned is None:
            self._turned = torch.cuda.Event()
        else:
            current.wait_event(self._turned)
        yield
        self._turned.record(current)


class Replayed:
    """A function of tensors without side effects, replayed for inputs of the shapes that it is first called with.

    The call after recording runs both ways. If the results differ, or nothing could be recorded, a warning says so and
    the function is called plainly from then on.

    Args:
        function: maps tensors of one device to a tensor.
        recorder: records it; None for CUDA graphs.
    """

    def __init__(self, function: Callable[..., Tensor], recorder: Recorder | None = None) -> None:
        self._function, self._recorder = function, recorder or GraphRecorder()
        self._calls: dict[Any, int] = {}
        self._shape: Any = None  # of the recorded inputs; only one shape is ever recorded
        self._inputs: list[Tensor] = []
        self._recorded: tuple[Tensor, Replay] | None = None
        self._checked = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Returns the function's result, in memory that no later replay overwrites."""
        shape = signature(inputs)
        if self._shape is None:
            self._calls[shape] = self._calls.get(shape, 0) + 1
            output = self._run(inputs)
            if self._calls[shape] == WARM_UP:
                self._shape = shape
                self._record(inputs)
            return output
        if self._recorded is None or shape != self._shape:
            return self._function(*inputs)
        output, replay = self._recorded
        with self._recorder.turn():
            copy_all(self._inputs, inputs)
            replay()
            output = output.clone()
        if not self._checked:
            self._checked = True
            plain = self._run(inputs)
            if not (far := distance([plain], [output])) <= TOLERANCE:
                self._give_up(f"its replay differs by {far:.1%}")
            return plain
        return output

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        output = self._recorder.run(lambda: self._function(*inputs))
        if output.is_cuda:  # allocated on the recorder's stream, used on the caller's
            output.record_stream(torch.cuda.current_stream())
        return output

    def _record(self, inputs: Sequence[Tensor]) -> None:
        if self._recorder.waited:  # a recording would fail half-way
            self._give_up("it waits for the device")
            return
        self._inputs = [x.clone() for x in inputs]
        try:
            self._recorded = self._recorder.record(lambda: self._function(*self._inputs))
        except RuntimeError as error:
            self._give_up(first_line(error))

    def _give_up(self, reason: str) -> None:
        self._recorded, self._inputs = None, []
        name = getattr(self._function, "__qualname__", type(self._function).__name__)
        warnings.warn(f"{name} runs without a CUDA graph: {reason}", RuntimeWarning, stacklevel=2)


def signature(tensors: Sequence[Tensor]) -> Any:
    """Shape, dtype and strides of the inputs: equal for inputs that one recording can serve."""
    return tuple((x.shape, x.dtype, x.stride()) for x in tensors)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target."""
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def distance(expected: Iterable[Tensor | None], got: Iterable[Tensor | None]) -> float:
    """|expected - got| / |expected| over all tensors; infinite if one is None on one side only. Waits for the GPU."""
    squares, size = 0.0, 0.0
    for a, b in zip(expected, got, strict=True):
        if a is None or b is None:
            if a is not b:
                return float("inf")
            continue
        squares += float((a.double() - b.double()).square().sum())
        size += float(a.double().square().sum())
    return (squares / size) ** 0.5 if size else float(squares > 0)


def first_line(error: RuntimeError) -> str:
    """The first line of the original error: leaving a failed recording raises another one on top."""
    return str(error.__context__ or error).splitlines()[0]
