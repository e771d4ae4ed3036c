"""The slowly moving copy of the network that BYOL, MoCo and DINO learn from."""

import copy
import math

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """A frozen copy of backbone and projector, whose weights are an exponential moving average of the student's.

    Its batch norms keep running statistics of their own, as in the official codes; only parameters are averaged.

    Args:
        backbone: the student's, copied.
        projector: the student's, copied.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.projector = copy.deepcopy(projector).requires_grad_(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, D), without a graph."""
        return self.projector(self.backbone(x))

    @torch.no_grad()
    def follow(self, backbone: nn.Module, projector: nn.Module, momentum: float) -> None:
        """teacher <- momentum teacher + (1 - momentum) student, in one pass over the parameters.

        Args:
            backbone: the student's.
            projector: the student's.
            momentum: in [0, 1].
        """
        teacher: list[Tensor] = list(self.parameters())
        student: list[Tensor] = [*backbone.parameters(), *projector.parameters()]
        torch._foreach_lerp_(teacher, student, 1 - momentum)


def cosine(start: float, end: float, progress: float) -> float:
    """Goes from start to end along half a cosine, as progress goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
