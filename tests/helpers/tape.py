"""A stand-in for CUDA graphs on the CPU: operations taped once, then repeated on the same memory.

It has a graph's two properties that matter to the code around it: whatever Python decided is decided for good, and
inputs and results stay where they were. What a graph cannot record, it refuses too: a value that the host reads.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # of what was there already: batch norm's operation
        self.made: set[int] = set()  # overwrites its statistics without saying so in its schema

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in WAITING:
            raise RuntimeError("operation not permitted while taping")
        kwargs = kwargs or {}
        if function.namespace == "profiler":  # torch's optimizers name their steps for it
            return function(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and id(tensor) not in self.made:
                self.before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        result = function(*args, **kwargs)
        self.made |= {id(tensor) for tensor in tree_leaves(result)} - self.before.keys()
        self.operations.append((function, args, kwargs, result))
        return result

    def restore(self) -> None:
        for tensor, before in self.before.values():
            tensor.detach().copy_(before)

    def replay(self) -> None:
        # What autocast does stands on the tape already.
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, taped in self.operations:
                result = function(*args, **kwargs)
                for work in tree_leaves(result):
                    if isinstance(work, torch.ScriptObject):  # a collective, for which the caller waited
                        work.wait()
                for target, source in zip(tree_leaves(taped), tree_leaves(result), strict=True):
                    if isinstance(target, Tensor) and not torch._C._is_alias_of(target, source):
                        target.copy_(source)


class TapeRecorder:
    """The CPU's `ssl_bench.runtime.cuda_graph.Recorder`. ``waited`` is for the test to set; ``replays`` counts."""

    def __init__(self) -> None:
        self.waited = False
        self.replays = 0

    def run(self, work: Callable[[], T]) -> T:
        return work()

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        tape = Tape()
        try:
            with tape:
                result = work()
        finally:
            with torch.no_grad():
                tape.restore()  # a recording does nothing

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return result, replay
