"""The file of weights that a run starts from: found when the recipe is made, and known by its content."""

import hashlib
from functools import cache
from pathlib import Path

from ssl_bench.recipe.schema import ModelOptions


def locate(path: str) -> Path:
    """The file that ``model.checkpoint`` means: itself, or in a folder ``backbone.safetensors`` or ``state.pt``.

    Raises:
        ValueError: no such file, or a folder without.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        inside = [file / name for name in ("backbone.safetensors", "state.pt") if (file / name).is_file()]
        if not inside:
            raise ValueError(
                f"model.checkpoint must hold backbone.safetensors or state.pt if it is a folder, got {path}"
            )
        return inside[0]
    if not file.is_file():
        raise ValueError(
            f"model.checkpoint must be a file of weights or a run's folder, got {path!r}, which does not exist"
        )
    return file


def digest(path: str) -> str:
    """The first 16 hex digits of the SHA-256 of the file that a path means."""
    file = locate(path)
    about = file.stat()
    return _digest(file, about.st_size, about.st_mtime_ns)


@cache  # a study composes hundreds of recipes with one file
def _digest(file: Path, size: int, changed: int) -> str:  # noqa: ARG001 - what tells a changed file
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def resolve(model: ModelOptions) -> None:
    """Fills in what the weights are known by; a recorded recipe is left as it is.

    Raises:
        ValueError: no such file, or two of them.
    """
    if isinstance(model.pretrained, str):
        if model.checkpoint is not None:
            raise ValueError(
                f"give model.pretrained or model.checkpoint, got {model.pretrained} and {model.checkpoint}"
            )
        model.checkpoint, model.pretrained = model.pretrained, False
    if model.checkpoint is None:
        if model.checkpoint_sha256 is not None:
            raise ValueError(
                f"model.checkpoint must be given with checkpoint_sha256, got {model.checkpoint_sha256} alone"
            )
        return
    if model.pretrained:
        raise ValueError(f"give model.pretrained or model.checkpoint, got true and {model.checkpoint}")
    if model.checkpoint_sha256 is None:
        model.checkpoint_sha256 = digest(model.checkpoint)
