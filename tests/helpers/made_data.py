"""Small data sets that the tests make: encoded images, parquet folders, folder trees."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from ssl_bench.data.sources import Source


def pixels(n: int, size: int = 8, seed: int = 0) -> np.ndarray:
    """(n, size, size, 3) random uint8."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def all_images(source: Source) -> np.ndarray:
    """(N, H, W, 3) of a whole split."""
    (batch,) = source.batches([torch.arange(len(source))])
    assert batch.dtype == torch.uint8
    assert batch.shape[1:] == source.image_shape
    return batch.permute(0, 2, 3, 1).numpy()


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """An encoded image; PNG keeps every pixel."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[object],
    *,
    columns: tuple[str, str] = ("image", "label"),
    names: Sequence[str] | None = None,
    struct: bool = True,
) -> None:
    """One parquet file as the `datasets` library writes it (small row groups, so that several are read)."""
    cells = [{"bytes": image, "path": None} for image in images] if struct else list(images)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    table = pa.table({columns[0]: pa.array(cells, kind), columns[1]: pa.array(labels)})
    if names is not None:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)


def one_parquet(
    folder: Path, images: Sequence[bytes | None], labels: Sequence[object] | None = None, **options: Any
) -> Path:
    """A data set whose two splits are equal; labels 0, 1, 2, ... unless given."""
    labels = list(range(len(images))) if labels is None else labels
    for split in ("train", "test"):
        write_parquet(folder / f"{split}.parquet", images, labels, **options)
    return folder


def parquet_set(folder: Path, n_train: int = 20, n_test: int = 10, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """A data set of two splits with labels 0, 1, ..., 9, 0, ...; returns the pixels of both."""
    train, test = pixels(n_train, size), pixels(n_test, size, seed=1)
    for name, images in (("train", train), ("test", test)):
        labels = [i % 10 for i in range(len(images))]
        write_parquet(folder / f"{name}-00000-of-00001.parquet", [encode(image) for image in images], labels)
    return train, test


def write_images(folder: Path, images: Sequence[np.ndarray], pattern: str = "{}.png") -> list[Path]:
    """Image files in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / pattern.format(i) for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(encode(image))
    return paths


WNIDS = ("n02", "n01", "n03")


def tiny_archive(folder: Path, per_class: int = 4) -> dict[str, np.ndarray]:
    """Tiny ImageNet's folder layout; one validation image of each class, in the order given. PNG data, .JPEG names."""
    images = {wnid: pixels(per_class + 1, seed=i) for i, wnid in enumerate(WNIDS)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    lines = []
    (folder / "val" / "images").mkdir(parents=True)
    for i, wnid in enumerate(WNIDS):
        write_images(folder / "train" / wnid / "images", images[wnid][:-1], wnid + "_{}.JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("box\n")
        (folder / "val" / "images" / f"val_{i}.JPEG").write_bytes(encode(images[wnid][-1]))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t7\t7\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return images
