"""TVLARS in transformers.Trainer: Barlow Twins on the digits (``pip install transformers``).

python examples/transformers_trainer.py --steps 30
"""

import argparse
import tempfile

import timm
import torch
from plain_pytorch import digits, view
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from ssl_bench.methods import BarlowTwins
from ssl_bench.optim import TVLARS


class Images(torch.utils.data.Dataset):
    """The digits as the Trainer's default collator wants them: dicts."""

    def __init__(self) -> None:
        self.images = digits()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index]}


class BarlowTwinsModel(nn.Module):
    """What the Trainer calls: images in, {"loss": ...} out."""

    def __init__(self) -> None:
        super().__init__()
        backbone = timm.create_model("resnet18", num_classes=0)
        self.method = BarlowTwins(backbone, backbone.num_features, projector=(512, 512, 1024))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        outputs = self.method(view(pixel_values), view(pixel_values))  # gather them on several processes
        return {"loss": self.method.loss(**outputs)["loss"]}


def train(steps: int, folder: str, batch_size: int = 256) -> list[float]:
    """Trains for so many steps; returns the losses."""
    torch.manual_seed(0)
    model, data = BarlowTwinsModel(), Images()
    optimizer = TVLARS(model.parameters(), lr=1.0, decay=1e-4, delay_steps=2 * (len(data) // batch_size))
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        max_grad_norm=0.0,  # the Trainer clips by default, which would change what the layer-wise norms see
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    constant = LambdaLR(optimizer, lambda _: 1.0)  # the Trainer's own would be linear decay, on top of phi(t)
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, constant))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Barlow Twins under TVLARS in transformers.Trainer.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=256)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as output:
        for step, loss in enumerate(train(given.steps, output, given.batch_size), 1):
            print(f"step {step:3d}  loss {loss:.2f}")
