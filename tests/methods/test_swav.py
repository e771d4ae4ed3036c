"""SwAV's loss is lightly's, its assignments are Sinkhorn's, its queue and its prototypes change as in the paper."""

import pytest
import torch
from lightly.loss import SwaVLoss
from method_cases import FEATURES, assert_same_loss, inputs, network, small_vit
from torch import Tensor
from torch.nn import functional as F

from ssl_bench.methods import Crop, SwAV
from ssl_bench.methods.parts.prototypes import sinkhorn


def swav(**options):
    torch.manual_seed(1)
    method = SwAV(network(), FEATURES, projector=(7, 5), prototypes=6, **options).double()
    method.begin_step(0.5)
    return method


def outputs(n: int = 10, crops: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores as cosines with prototypes, and the large crops' embeddings."""
    z = torch.randn(n, crops, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z = F.normalize(z, dim=2)
    return (z @ swav().prototypes.weight.detach().T).requires_grad_(), z[:, 0], z[:, 1]


def as_lists(scores: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return [scores[:, 0], scores[:, 1]], [scores[:, v] for v in range(2, scores.shape[1])]


@pytest.mark.parametrize("crops", [2, 5])
@pytest.mark.parametrize(("temperature", "epsilon", "iterations"), [(0.1, 0.05, 3), (0.3, 0.2, 1)])
def test_loss_and_gradient_equal_lightlys(crops, temperature, epsilon, iterations):
    scores, z1, z2 = outputs(crops=crops)
    ours = swav(temperature=temperature, epsilon=epsilon, iterations=iterations).loss(scores, z1, z2)["loss"]
    assert_same_loss(ours, SwaVLoss(temperature, iterations, epsilon)(*as_lists(scores)).squeeze(), [scores])


def test_assignments_are_balanced_and_those_of_the_naive_iteration():
    scores = outputs(30)[0][:, 0].detach()
    q = torch.exp(scores / 0.5)
    for _ in range(3):
        for k in range(6):
            q[:, k] /= q[:, k].sum() * 6
        for i in range(30):
            q[i] /= q[i].sum() * 30
    torch.testing.assert_close(sinkhorn(scores, 0.5, 3), q * 30, rtol=1e-10, atol=0)
    many = sinkhorn(scores, 0.5, 200)
    torch.testing.assert_close(many.sum(1), torch.ones(30).double())
    torch.testing.assert_close(many.sum(0), torch.full((6,), 5.0).double())


def test_a_small_epsilon_does_not_overflow_in_float32():
    sharp = sinkhorn(outputs()[0][:, 0].detach().float(), 1e-3, 3)
    assert sharp.isfinite().all()
    torch.testing.assert_close(sharp.sum(1), torch.ones(10))


def test_rows_without_weight_are_assigned_but_do_not_count():
    scores = outputs()[0][:, 0].detach()
    weight = torch.zeros(10, 1).double()
    weight[7:] = -torch.inf
    torch.testing.assert_close(sinkhorn(scores, 0.1, 3, weight)[:7], sinkhorn(scores[:7], 0.1, 3))


def test_images_of_the_last_steps_are_assigned_along_with_the_batch():
    """A queue of two batches: none in it, then one, then two, then the two latest."""
    ours, seen = swav(queue=20, queue_start=0.2), []
    ours.begin_step(0.2)
    for step in range(4):
        scores, z1, z2 = outputs(seed=step)
        weight = ours.prototypes.weight.detach()
        earlier = [torch.cat([z[view] for z in seen[-2:]]) @ weight.T for view in (0, 1)] if seen else None
        expected = SwaVLoss()(*as_lists(scores), earlier).squeeze()
        assert_same_loss(ours.loss(scores, z1, z2)["loss"], expected, [scores])
        seen.append((z1, z2))
    before = ours.queue.clone()
    ours.begin_step(0.1)  # not yet time
    ours.loss(*outputs(seed=5))
    assert (ours.queue_weight[:10] == 0).all()
    assert (ours.queue_weight[10:] == 1).all()
    assert torch.equal(ours.queue[:, 10:], before[:, :10])


def test_a_queue_that_the_batch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"^swav: queue must be a multiple of the batch of 10 images, got 15$"):
        swav(queue=15).loss(*outputs())


def test_prototypes_are_normalised_before_a_step_and_frozen_at_first():
    method = swav(frozen=0.2)
    with torch.no_grad():
        method.prototypes.weight.mul_(3)
    direction = F.normalize(method.prototypes.weight.detach())
    for progress, learns in ((0.0, False), (0.19, False), (0.2, True), (0.9, True)):
        method.begin_step(progress)
        torch.testing.assert_close(method.prototypes.weight.detach(), direction)
        crops = inputs(method.views, 4)
        scores = method(*crops)["scores"]
        expected = torch.stack([F.normalize(method.embed(x)) @ method.prototypes.weight.T for x in crops], 1)
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-14)
        gradient = torch.autograd.grad(scores.square().sum(), method.prototypes.weight)[0]
        assert bool(gradient.any()) == learns


def test_the_crops_are_the_papers():
    views = SwAV(network(), FEATURES).views
    assert views[:2] == (Crop(scale=(0.14, 1.0), blur_p=0.5, solarize_p=0.0),) * 2
    assert views[2:] == (Crop(size=96 / 224, scale=(0.05, 0.14), blur_p=0.5, solarize_p=0.0),) * 6


def test_a_vision_transformer_gets_crops_of_whole_patches():
    vit = small_vit(dynamic_img_size=True)
    method = SwAV(vit, 24, projector=(7, 5), prototypes=6, local_crops=2)
    assert [view.size for view in method.views] == [None, None, 4, 4]  # 8 x 96 / 224 = 3.4: two patches of 2
    assert method(*(x.float() for x in inputs(method.views, 3)))["scores"].shape == (3, 4, 6)


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (network, {"prototypes": 0}, "swav: prototypes must be > 0, got 0"),
        (network, {"temperature": 0.0}, "swav: temperature must be > 0, got 0.0"),
        (network, {"epsilon": float("nan")}, "swav: epsilon must be > 0, got nan"),
        (network, {"iterations": 0}, "swav: iterations must be > 0, got 0"),
        (network, {"frozen": 1.5}, r"swav: frozen must be in \[0, 1\], got 1.5"),
        (network, {"queue": -1}, "swav: queue must be >= 0, got -1"),
        (network, {"queue_start": -0.5}, r"swav: queue_start must be in \[0, 1\], got -0.5"),
        (
            network,
            {"global_scale": (1.0, 0.5)},
            r"swav: global_scale must be 0 < low <= high <= 1, got \(1.0, 0.5\)",
        ),
        (network, {"local_scale": (0.0, 0.5)}, r"swav: local_scale must be 0 < low <= high <= 1, got \(0.0, 0.5\)"),
        (network, {"local_crops": -1}, "swav: local_crops must be >= 0, got -1"),
        (network, {"local_size": -1}, "swav: local_size must be >= 0, got -1"),
        (small_vit, {}, "swav: local_crops must be 0 for a backbone that takes images of one size only .*"),
        (
            lambda: small_vit(dynamic_img_size=True),
            {"local_size": 5},
            "swav: local_size must be a multiple of the backbone's patch size 2, got 5",
        ),
    ],
)
def test_bad_values_are_refused(backbone, options, message):
    net = backbone()
    with pytest.raises(ValueError, match=f"^{message}$"):
        SwAV(net, getattr(net, "num_features", FEATURES), **options)
