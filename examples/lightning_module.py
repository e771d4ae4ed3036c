"""TVLARS in Lightning: Barlow Twins on the digits (``pip install lightning`` or ``pytorch-lightning``).

python examples/lightning_module.py --steps 30
"""

import argparse

import timm
import torch
from plain_pytorch import digits, view
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ssl_bench.methods import BarlowTwins
from ssl_bench.optim import TVLARS

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl


class BarlowTwinsModule(pl.LightningModule):
    """Barlow Twins, optimized by TVLARS.

    Args:
        lr: TVLARS's gamma.
        delay_steps: d_e; epochs times the steps of an epoch.
    """

    def __init__(self, lr: float = 1.0, delay_steps: int = 0) -> None:
        super().__init__()
        backbone = timm.create_model("resnet18", num_classes=0)
        self.method = BarlowTwins(backbone, backbone.num_features, projector=(512, 512, 1024))
        self.lr, self.delay_steps = lr, delay_steps
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        (images,) = batch
        outputs = self.method(view(images), view(images))
        if self.trainer.world_size > 1:  # the loss of the global batch: all_gather with a gradient
            outputs = {name: self.all_gather(z, sync_grads=True).flatten(0, 1) for name, z in outputs.items()}
        loss = self.method.loss(**outputs)["loss"]
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:  # no scheduler: phi(t) is TVLARS's own
        return TVLARS(self.parameters(), lr=self.lr, decay=1e-4, delay_steps=self.delay_steps)


def train(steps: int, batch_size: int = 256, **trainer: object) -> BarlowTwinsModule:
    """Trains for so many steps."""
    pl.seed_everything(0, verbose=False)
    loader = DataLoader(TensorDataset(digits()), batch_size=batch_size, shuffle=True, drop_last=True)
    module = BarlowTwinsModule(delay_steps=2 * len(loader))
    quiet = {f"enable_{name}": False for name in ("checkpointing", "progress_bar", "model_summary")} | {"logger": False}
    pl.Trainer(max_steps=steps, max_epochs=-1, accelerator="auto", **quiet | trainer).fit(module, loader)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Barlow Twins under TVLARS in Lightning.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    for step, loss in enumerate(train(arguments.steps, arguments.batch_size).losses, 1):
        print(f"step {step:3d}  loss {loss:.2f}")
