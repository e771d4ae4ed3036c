"""Every family of timm, through both tracks: what a backbone gives is what the method and the classifier take."""

import copy

import pytest
import timm
import torch
from torch import nn

from ssl_bench.methods import BarlowTwins, Classifier
from ssl_bench.models.backbone import create_backbone, load_backbone, native_size, save_backbone

# Parts of names of small models; the first that a family has decides which of its models stands for it.
SMALL = (
    "test",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxs",
    "tiny",
    "mini",
    "_xs",
    "lite",
    "small",
    "050",
    "_s",
    "18",
    "_b0",
)

FAMILIES = [family for family in timm.list_modules() if family != "backbone"]  # that is ours: the CIFAR stems

# The families of which no model can be a backbone here, and why.
UNFIT: dict[str, str] = {}

# The families with parameters that no feature depends on; several processes need DistributedDataParallel told so.
UNUSED: dict[str, str] = {}


def smallest(family: str) -> str:
    names = timm.list_models(module=family)
    return min(names, key=lambda name: (next((i for i, part in enumerate(SMALL) if part in name), 99), len(name), name))


def without_numbers(module: nn.Module) -> nn.Module:
    """The same modules with tensors on the meta device, which have shapes alone."""
    twins = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    twins |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    return copy.deepcopy(module, twins)


def gradients_of(network: nn.Module, outputs) -> list[str]:
    """The trainable parameters without a gradient of what the network makes of two images."""
    outputs.sum().backward()
    return [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_timm_goes_through_both_tracks(tmp_path, family):
    name = smallest(family)
    if family in UNFIT:
        with pytest.raises(ValueError, match=UNFIT[family]):
            create_backbone(name, stem="imagenet", init="timm")
        return
    backbone, feature_dim = create_backbone(name, stem="imagenet", init="timm")
    assert backbone.num_features == feature_dim
    side = native_size(backbone)
    images = torch.empty(4, 3, side, side, device="meta")
    method = without_numbers(BarlowTwins(backbone, feature_dim, projector=(16, 16)))
    classifier = without_numbers(Classifier(backbone, feature_dim, 10))
    for network, forward in ((method, method.embed), (classifier, classifier.logits)):
        unused = gradients_of(network.train(), forward(images))
        assert bool(unused) == (family in UNUSED), unused[:5]
    save_backbone(backbone, tmp_path / "b.safetensors")
    loaded, _ = load_backbone(tmp_path / "b.safetensors")
    state = backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_the_lists_name_families_that_exist():
    assert {*UNFIT, *UNUSED} <= set(timm.list_modules())
