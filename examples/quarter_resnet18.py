"""A backbone from outside: ResNet-18 at a quarter of its width, small enough for many runs on two CPU cores.

ssl-bench classify data=cifar10 model.name=examples.quarter_resnet18:quarter_resnet18 model.stem=imagenet ...
"""

from timm.models.resnet import BasicBlock, ResNet
from torch import nn


def quarter_resnet18() -> nn.Module:
    """Channels 16, 32, 64 and 128 instead of 64 to 512, and a stem of three 3x3 convolutions (He et al. 2019's D)."""
    return ResNet(BasicBlock, (2, 2, 2, 2), channels=(16, 32, 64, 128), stem_type="deep", stem_width=8, num_classes=0)
