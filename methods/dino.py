"""DINO (Caron et al. 2021, arXiv 2104.14294)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from ssl_bench.methods.base import Method, check
from ssl_bench.methods.parts.multi_crop import multi_crop, prediction_loss
from ssl_bench.methods.parts.prototypes import Prototypes
from ssl_bench.methods.parts.teacher import Teacher, cosine


class DINO(Method):
    """Makes every crop's distribution over prototypes that of a teacher, centred and sharpened, on a large crop.

    Evaluated is the teacher's backbone, as in the paper. Defaults are the paper's for ViT-S/16; crops and freeze
    are the official code's (commit 7064315).

    Args:
        backbone: maps images (n, 3, H, W) to features (n, feature_dim).
        feature_dim: the number of features, > 0.
        projector: widths of the head's Linear layers, each > 0, with GELU between them; the last is the bottleneck,
            which is normalised. Paper: 2048-2048-256.
        batch_norm: put batch norm in front of each GELU, an option of the official code. Paper: no; ``method=dino``
            does, for convolutional networks.
        prototypes: K, > 0. Paper: 65536; ``method=dino`` takes 4096 for small data, solo-learn's value for CIFAR.
        student_temp: divides the student's scores, > 0. Paper: 0.1.
        teacher_temp: divides the teacher's, > 0; smaller is sharper. Paper: 0.07; ``method=dino`` takes 0.04.
        warmup_teacher_temp: what that grows from, linearly, > 0. Paper: 0.04.
        warmup: share of the run that it grows for, in [0, 1]; 0 = none. Paper: 30 of 300 epochs.
        momentum: the teacher's at the start, in [0, 1]; a cosine takes it to 1. Paper: 0.996.
        center_momentum: that of the mean score which is subtracted from the teacher's, in [0, 1]. Paper: 0.9.
        frozen: share of the run, from its start, in which the last layer gets no gradient, in [0, 1]; 0 = none. Code:
            the first of 100 epochs.
        global_scale: range of the two large crops' share of the image's area, in (0, 1]. Code: 0.4 to 1.
        local_scale: that of the small crops. Code: 0.05 to 0.4.
        local_crops: how many small crops, >= 0; 0 = none. Code: 8.
        local_size: pixels of their sides; 0 = 96/224 of the images', as in the paper, in whole patches.

    Raises:
        ValueError: a value out of its range, or small crops that the backbone cannot take.
    """

    evaluated = "teacher.backbone"
    center: Tensor
    temperature: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector: tuple[int, ...] = (2048, 2048, 256),
        batch_norm: bool = False,
        prototypes: int = 65536,
        student_temp: float = 0.1,
        teacher_temp: float = 0.07,
        warmup_teacher_temp: float = 0.04,
        warmup: float = 0.1,
        momentum: float = 0.996,
        center_momentum: float = 0.9,
        frozen: float = 0.01,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        local_crops: int = 8,
        local_size: int = 0,
    ) -> None:
        check("dino", "> 0", prototypes=prototypes, student_temp=student_temp, teacher_temp=teacher_temp)
        check("dino", "> 0", warmup_teacher_temp=warmup_teacher_temp)
        check("dino", "in [0, 1]", warmup=warmup, momentum=momentum, center_momentum=center_momentum, frozen=frozen)
        if not projector or min(projector) < 1:
            raise ValueError(f"dino: projector must be one or more widths > 0, got {tuple(projector)}")
        bottleneck = _bottleneck(feature_dim, projector, batch_norm)
        head = nn.Sequential(bottleneck, Prototypes(projector[-1], prototypes, cosine=True))
        super().__init__(backbone, feature_dim, head)
        self.views = multi_crop(
            "dino", backbone, global_scale=global_scale, local_scale=local_scale, local_crops=local_crops,
            local_size=local_size,
        )  # fmt: skip
        self.teacher = Teacher(backbone, head)
        self.student_temp, self.momentum, self.center_momentum = student_temp, momentum, center_momentum
        self.teacher_temp, self.warmup, self.frozen = (warmup_teacher_temp, teacher_temp), warmup, frozen
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("temperature", torch.tensor(self._teacher_temp(0.0)))

    def begin_step(self, progress: float) -> None:
        """Moves the teacher, sharpens it less, and ends the last layer's freeze when it is time."""
        self.teacher.follow(self.backbone, self.projector, cosine(self.momentum, 1.0, progress))
        self.temperature.fill_(self._teacher_temp(progress))
        self.projector[1].learning.fill_(progress >= self.frozen)  # type: ignore[index]

    def _teacher_temp(self, progress: float) -> float:
        start, end = self.teacher_temp
        return start + (end - start) * (min(1.0, progress / self.warmup) if self.warmup else 1.0)

    def forward(self, *crops: Tensor) -> dict[str, Tensor]:
        """The student's scores of every crop (n, crops, K) and the teacher's of the large ones (n, 2, K).

        Each crop goes through in a pass of its own. "z1" is the student's bottleneck of the first crop.
        """
        bottleneck, last_layer = self.projector.children()
        z = [bottleneck(self.backbone(x)) for x in crops]
        teacher = torch.stack([self.teacher(x) for x in crops[:2]], 1)
        return {"student": last_layer(torch.stack(z, 1)), "teacher": teacher, "z1": z[0].detach()}

    def loss(self, student: Tensor, teacher: Tensor, z1: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Cross-entropy of the student's softmax to the teacher's, over all pairs of different crops.

        Args:
            student: (N, crops, K) of the global batch, the two large crops first.
            teacher: (N, 2, K) of the large crops.
            z1: (N, D), only for its spread to be logged.

        Returns:
            "loss", and "entropy", that of the teacher's distribution, which the loss cannot fall below: near 0 or log K
            it has collapsed.
        """
        targets = ((teacher.detach() - self.center) / self.temperature).softmax(2)
        with torch.no_grad():  # the next step's: this one's targets are made
            self.center.lerp_(teacher.mean(dim=(0, 1)), 1 - self.center_momentum)
        loss = prediction_loss(student, targets, self.student_temp)
        return {"loss": loss, "entropy": torch.special.entr(targets).sum(2).mean()}


def _bottleneck(feature_dim: int, widths: tuple[int, ...], batch_norm: bool) -> nn.Sequential:
    """Linear layers with GELU between them, initialised as in the official code."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((feature_dim, *widths)):
        if layers:
            layers += [nn.BatchNorm1d(inputs), nn.GELU()] if batch_norm else [nn.GELU()]
        layers.append(linear := nn.Linear(inputs, outputs))
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers)
