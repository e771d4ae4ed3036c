"""What could fail only at the end of a run is tried before its first step, on the untrained model."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from ssl_bench.models.backbone import backbone_bytes
from ssl_bench.records.checkpoint import check_state
from ssl_bench.records.storage import one_line

# Of DistributedDataParallel's error at the pass after one that left a parameter out.
_UNUSED = "Expected to have finished reduction in the prior iteration"

Gradient = Callable[..., dict[str, Tensor]]


def rehearse_saving(backbone: nn.Module, state: dict[str, Any]) -> None:
    """Saves the backbone in memory and loads it into itself, and checks that the state could be a checkpoint.

    Args:
        backbone: of the run's end.
        state: of `ssl_bench.training.loop.Trainer.state_dict`.

    Raises:
        ValueError: one line; the model or the optimizer holds what cannot be saved, or be loaded again.
    """
    check_state(state)
    try:
        saved = load(backbone_bytes(backbone))
        backbone.load_state_dict(saved)
    except Exception as error:
        raise ValueError(f"model: its weights must be saved and loaded, which fails: {one_line(error)}") from error
    for name, tensor in backbone.state_dict().items():
        if not torch.equal(tensor.cpu(), saved[name]):
            raise ValueError(f"model: {name} must be loaded as it was saved, got other values")


def every_parameter_used(gradient: Gradient, task: nn.Module, spared: Collection[str] = ()) -> Gradient:
    """The same gradient, which is checked at its first call: with several processes, every parameter must get one.

    DistributedDataParallel reduces gradients in groups, and a group with a parameter that the loss does not reach is
    never reduced: without an error, its other parameters would differ between the processes.

    Args:
        gradient: of the network behind DistributedDataParallel.
        task: the network.
        spared: the names of parameters of which DistributedDataParallel finds out itself that nothing reaches them.

    Raises:
        ValueError: one line that names the parameters, from the first call.
    """
    checked = False

    def unused() -> list[str]:
        without = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
        return [name for name in without if name not in spared]

    def call(*arguments: Any) -> dict[str, Tensor]:
        nonlocal checked
        if checked:
            return gradient(*arguments)
        try:
            scalars = gradient(*arguments)
        except RuntimeError as error:  # in the second chunk's pass
            if _UNUSED not in str(error):
                raise
            _refuse(unused())
        checked = True
        if names := unused():
            _refuse(names)
        return scalars

    return call


def _refuse(names: list[str]) -> None:
    raise ValueError(
        f"every parameter must take part in the loss where there are several processes, got none of "
        f"{listed(names) or 'some'}: remove it, or give it requires_grad=False"
    ) from None


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
