"""A run's weights at chosen steps, kept beside its record for later measurements (`ssl_bench.cli.analyze`)."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ssl_bench.records.storage import atomic_file, naming, one_line


class Snapshots:
    """The weights of the whole network (projector or head included, optimizer not), one file for each step.

    Args:
        run_dir: the run's directory; the files are in its sub-folder ``snapshots``.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "snapshots"

    def path(self, step: int) -> Path:
        """The file of the weights after ``step`` steps."""
        return self.folder / f"step-{step:09d}.safetensors"

    def steps(self) -> list[int]:
        """The steps that have a file, ascending."""
        names = [path.stem.removeprefix("step-") for path in self.folder.glob("step-*.safetensors")]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, module: nn.Module) -> None:
        """Writes a network's parameters and buffers, atomically; a file of the same step is replaced.

        Raises:
            OSError: one line that names the file.
        """
        with naming(f"{self.folder}: making the folder"):
            self.folder.mkdir(exist_ok=True)
        # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in module.state_dict().items()
        }
        # Synced, as a checkpoint may follow: a run that continues from there does not write this file again.
        with atomic_file(self.path(step)) as file:
            file.write(save(tensors, metadata={"step": str(step)}))

    def load(self, step: int, module: nn.Module) -> None:
        """Loads the weights of a step into a network of the same architecture.

        Raises:
            ValueError: one line; no such file, a damaged one, or another architecture's.
        """
        path = self.path(step)
        if not path.is_file():
            raise ValueError(f"snapshot: no file {path}; there are steps {self.steps() or 'none'}")
        try:
            module.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"snapshot {path}: damaged, or another network's ({one_line(error)})") from error
