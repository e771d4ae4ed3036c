"""Convolutions over small maps as matrix products: the same function, gradients and all, as torch's convolution."""

import copy

import pytest
import torch
from torch import nn

from ssl_bench.models.backbone import create_backbone
from ssl_bench.models.small_maps import SmallMapConv2d, use_small_maps

MAPS = [(1, 1), (2, 2), (1, 2), (2, 1)]


def pair(stride: int, dtype=torch.float64) -> tuple[nn.Conv2d, nn.Conv2d]:
    """torch's convolution and ours, of equal weights."""
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, 3, stride=stride, padding=1, bias=False, dtype=dtype)
    ours = nn.Sequential(copy.deepcopy(plain))
    use_small_maps(ours)
    assert type(ours[0]) is SmallMapConv2d
    return plain, ours[0]


def pixels(shape: tuple[int, int], n: int = 6, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 5, *shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", MAPS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradients_are_the_convolutions(shape, stride, memory_format, monkeypatch):
    plain, ours = pair(stride)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *_: pytest.fail("torch's convolution was called"))
    x = pixels(shape).contiguous(memory_format=memory_format)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = nn.functional.conv2d(a, plain.weight, stride=stride, padding=1)
    z = ours(b)
    torch.testing.assert_close(z, y, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    y.backward(g)
    z.backward(g)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_second_derivatives(shape, stride):
    _, ours = pair(stride)
    x = pixels(shape, n=2).requires_grad_()
    weight = ours.weight

    def function(x, weight):
        return torch.func.functional_call(ours, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))


@pytest.mark.parametrize("stride", [1, 2])
def test_under_autocast_it_computes_in_bfloat16_and_is_no_further_from_the_truth_than_torch(stride):
    plain, ours = pair(stride, torch.float32)
    exact = copy.deepcopy(plain).double()
    x = pixels((2, 2), n=256, dtype=torch.float32)

    def run(module, x, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        y.float().square().mean().backward()
        return y, module.weight.grad

    (y, grad), (reference, reference_grad), (true, true_grad) = (
        run(ours, x, True), run(plain, x, True), run(exact, x.double(), False),
    )  # fmt: skip
    assert y.dtype == reference.dtype == torch.bfloat16
    assert grad.dtype == torch.float32
    assert (y - true).norm() <= 1.1 * (reference - true).norm()
    assert (grad - true_grad).norm() <= 1.1 * (reference_grad - true_grad).norm()


def test_larger_maps_go_to_torch_bit_for_bit():
    plain, ours = pair(1)
    x = pixels((3, 2))
    assert torch.equal(ours(x), plain(x))


def test_only_what_it_can_do_is_exchanged():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False), nn.Conv2d(4, 4, 3, 3, 1, bias=False),
    )  # fmt: skip
    use_small_maps(model)
    assert all(type(module) is nn.Conv2d for module in model)


def test_a_resnet_is_the_same_network():
    """Against timm's own, float64, 32 x 32 images, ImageNet stem: maps of 2 and 1 pixels in the last two stages."""
    import timm

    ours, _ = create_backbone("resnet18", stem="imagenet", init="timm", seed=3)
    plain = timm.create_model("resnet18", num_classes=0)
    plain.load_state_dict(ours.state_dict())
    assert sum(type(module) is SmallMapConv2d for module in ours.modules()) == 16
    ours, plain = ours.double(), plain.double()
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-9, atol=1e-9)
    ours(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, parameter), reference in zip(ours.named_parameters(), plain.parameters(), strict=True):
        scale = float(reference.grad.abs().max())
        assert float((parameter.grad - reference.grad).abs().max()) <= 1e-8 * scale, name
