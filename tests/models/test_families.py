"""Every family of timm, through both tracks: what a backbone gives is what the method and the classifier take.

One small model stands for its family, at its own image size. In timm 1.0.31 there are 98, and none is left out.
"""

import copy

import pytest
import timm
import torch
from torch import nn

from ssl_bench.methods import BarlowTwins, Classifier
from ssl_bench.models.backbone import create_backbone, load_backbone, native_size, save_backbone

# Parts of names of small models; the first that a family has decides which of its models stands for it.
SMALL = (
    "test", "atto", "femto", "pico", "nano", "xxs", "tiny", "mini", "_xs", "lite", "small", "050", "_s", "18", "_b0",
)  # fmt: skip

FAMILIES = [family for family in timm.list_modules() if family != "backbone"]  # that is ours: the CIFAR stems


def smallest(family: str) -> str:
    names = timm.list_models(module=family)
    return min(names, key=lambda name: (next((i for i, part in enumerate(SMALL) if part in name), 99), len(name), name))


def without_numbers(module: nn.Module) -> nn.Module:
    """The same modules with tensors on the meta device, which have shapes alone."""
    twins = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    twins |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    return copy.deepcopy(module, twins)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_timm_goes_through_both_tracks(tmp_path, family):
    backbone, feature_dim = create_backbone(smallest(family), stem="imagenet", init="timm")
    assert backbone.num_features == feature_dim
    side = native_size(backbone)
    images = torch.empty(4, 3, side, side, device="meta")
    method = without_numbers(BarlowTwins(backbone, feature_dim, projector=(16, 16)))
    classifier = without_numbers(Classifier(backbone, feature_dim, 10))
    for network, forward in ((method.train(), method.embed), (classifier.train(), classifier.logits)):
        forward(images).sum().backward()
        # A parameter without a gradient would stop several processes: DistributedDataParallel waits for it.
        assert not [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    save_backbone(backbone, tmp_path / "b.safetensors")
    loaded, _ = load_backbone(tmp_path / "b.safetensors")
    state = backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
