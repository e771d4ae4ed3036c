"""DINO's loss is lightly's with centre and temperature; teacher, centre, temperature and freeze move as they should."""

import pytest
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from method_cases import FEATURES, assert_same_loss, inputs, network
from torch import Tensor
from torch.nn import functional as F

from ssl_bench.methods import DINO, Crop

SMALL = {"projector": (7, 9, 5), "prototypes": 6}


def dino(**options) -> DINO:
    backbone = network()
    torch.manual_seed(1)
    return DINO(backbone, FEATURES, **SMALL, **options).double()


def scores(crops: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(10, crops, 6, dtype=torch.float64, generator=generator).requires_grad_()
    return student, torch.randn(10, 2, 6, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("crops", [2, 5])
def test_loss_gradient_and_centre_equal_lightlys_step_after_step(crops):
    ours = dino(student_temp=0.2, teacher_temp=0.05, warmup=0.0, center_momentum=0.7)
    theirs = DINOLoss(6, teacher_temp=0.05, student_temp=0.2, center_momentum=0.7).double()
    for seed in range(3):
        student, teacher = scores(crops, seed)
        value = ours.loss(student, teacher, teacher[:, 0])["loss"]
        expected = theirs([teacher[:, i] for i in (0, 1)], [student[:, v] for v in range(crops)])
        assert_same_loss(value, expected, [student], rtol=1e-7)  # its temperature is a float32
        torch.testing.assert_close(ours.center, theirs.center.squeeze(), rtol=1e-12, atol=1e-15)


def test_the_loss_is_the_papers_sum_over_pairs_of_different_crops():
    ours = dino()
    ours.begin_step(0.0)  # which sets the temperature in float64
    center = torch.linspace(-1, 1, 6, dtype=torch.float64)
    ours.center.copy_(center)
    student, teacher = scores(4)
    total, entropy, pairs = torch.zeros(()).double(), 0.0, 0
    for n in range(10):
        for i in (0, 1):
            target = torch.exp((teacher[n, i] - center) / 0.04)
            target = target / target.sum()
            entropy -= float((target * target.log()).sum()) / 20
            for v in range(4):
                if v != i:
                    predicted = torch.exp(student[n, v] / 0.1)
                    total = total - (target * (predicted / predicted.sum()).log()).sum()
                    pairs += 1
    terms = ours.loss(student, teacher, teacher[:, 0])
    assert float(terms["entropy"]) == pytest.approx(entropy, rel=1e-10)
    assert_same_loss(terms["loss"], total / pairs, [student])


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")  # lightly's
def test_the_head_is_the_official_one():
    theirs = DINOProjectionHead(FEATURES, 9, 5, 6, norm_last_layer=True).double()
    ours = DINO(network(), FEATURES, projector=(9, 9, 5), prototypes=6).double()
    bottleneck, last = ours.projector
    linear = [layer for layer in theirs.layers if isinstance(layer, torch.nn.Linear)]
    for mine, other in zip((layer for layer in bottleneck if isinstance(layer, torch.nn.Linear)), linear, strict=True):
        mine.load_state_dict(other.state_dict())
    with torch.no_grad():
        last.weight.copy_(3 * theirs.last_layer.weight_v)  # only its direction counts
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    torch.testing.assert_close(ours.projector(x), theirs(x), rtol=1e-10, atol=1e-12)


def test_batch_norm_stands_in_front_of_each_gelu_if_asked_for():
    kinds = [type(layer).__name__ for layer in dino(batch_norm=True).projector[0]]
    assert kinds == ["Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"]
    assert [kind for kind in kinds if kind != "BatchNorm1d"] == [type(layer).__name__ for layer in dino().projector[0]]


def test_temperature_teacher_and_freeze_follow_the_run():
    method = dino(momentum=0.9, warmup=0.4, frozen=0.2)
    for p in method.projector.parameters():
        p.data += 1
    crops = inputs(method.views, 4)
    temperatures, teacher = [], [p.clone() for p in method.teacher.projector.parameters()]
    for progress, learns in ((0.0, False), (0.19, False), (0.2, True), (0.4, True), (0.7, True)):
        method.begin_step(progress)
        temperatures.append(float(method.temperature))
        momentum = 1 - 0.1 * (1 + torch.cos(torch.tensor(torch.pi * progress, dtype=torch.float64))) / 2
        teacher = [
            momentum * t + (1 - momentum) * s for t, s in zip(teacher, method.projector.parameters(), strict=True)
        ]
        for now, expected in zip(method.teacher.projector.parameters(), teacher, strict=True):
            torch.testing.assert_close(now, expected.detach(), rtol=1e-10, atol=1e-12)
        student = method(*crops)["student"]
        first, last = torch.autograd.grad(
            student.square().sum(), [method.projector[0][0].weight, method.projector[1].weight]
        )
        assert first.any()
        assert bool(last.any()) == learns
    assert temperatures == pytest.approx([0.04, 0.04 + 0.03 * 0.19 / 0.4, 0.055, 0.07, 0.07])


def test_the_student_sees_every_crop_and_the_teacher_the_large_ones():
    method = dino(local_crops=2)
    crops = inputs(method.views, 4)
    assert [x.shape[-1] for x in crops] == [8, 8, 3, 3]
    found = method(*crops)
    torch.testing.assert_close(found["student"][:, 3], method.embed(crops[3]))
    torch.testing.assert_close(found["teacher"][:, 1], method.teacher(crops[1]))
    assert found["student"].shape == (4, 4, 6)
    assert found["teacher"].shape == (4, 2, 6)
    assert not found["teacher"].requires_grad
    cosines = found["student"].detach()
    assert cosines.abs().max() <= 1
    assert method.get_submodule(method.evaluated) is method.teacher.backbone


def test_the_crops_are_the_official_codes():
    views = DINO(network(), FEATURES, **SMALL).views
    assert views[:2] == (Crop(scale=(0.4, 1.0)),) * 2  # blur 1 and 0.1, solarisation 0 and 0.2 are the recipe's
    assert views[2:] == (Crop(size=96 / 224, scale=(0.05, 0.4), blur_p=0.5, solarize_p=0.0),) * 8


def test_a_frozen_layers_scores_are_the_same_to_the_last_bit():
    method = dino(local_crops=0, frozen=0.5)
    crops, found = inputs(method.views, 4), []
    for progress in (0.0, 0.5):
        method.begin_step(progress)
        found.append(method(*crops))
        loss = method.loss(**found[-1])["loss"]
        assert bool(torch.autograd.grad(loss, method.projector[1].weight)[0].any()) == (progress == 0.5)
    assert torch.equal(found[0]["student"], found[1]["student"])
    weight, bottleneck = method.projector[1].weight, method.projector[0](method.backbone(crops[0]))
    expected = F.normalize(bottleneck) @ F.normalize(weight).T
    torch.testing.assert_close(found[0]["student"][:, 0], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prototypes": 0}, "dino: prototypes must be > 0, got 0"),
        ({"student_temp": 0.0}, "dino: student_temp must be > 0, got 0.0"),
        ({"teacher_temp": float("nan")}, "dino: teacher_temp must be > 0, got nan"),
        ({"warmup_teacher_temp": -1.0}, "dino: warmup_teacher_temp must be > 0, got -1.0"),
        ({"warmup": 2.0}, r"dino: warmup must be in \[0, 1\], got 2.0"),
        ({"momentum": 1.1}, r"dino: momentum must be in \[0, 1\], got 1.1"),
        ({"center_momentum": -0.1}, r"dino: center_momentum must be in \[0, 1\], got -0.1"),
        ({"frozen": float("nan")}, r"dino: frozen must be in \[0, 1\], got nan"),
        ({"projector": ()}, r"dino: projector must be one or more widths > 0, got \(\)"),
        ({"local_crops": -1}, "dino: local_crops must be >= 0, got -1"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        DINO(network(), FEATURES, **(SMALL | options))
