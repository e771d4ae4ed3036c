"""The GPU's own kernels equal the plain programs: here by Triton's interpreter, which runs them on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_bench.augment.views import Augmentation, PadCropFlipRotate, SSLView

pytest.importorskip("triton", reason="Triton comes with torch's builds for GPUs")

STATS: Any = {"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)}
CASES: dict[str, tuple[Augmentation, tuple[int, int]]] = {  # with the images' sides
    "cifar": (SSLView(32, **STATS), (32, 32)),
    "all": (SSLView(32, blur_p=0.5, solarize_p=0.5, solarize_threshold=0.4, **STATS), (32, 32)),
    "odd sizes": (SSLView(15, blur_p=1.0, blur_sigma=(0.5, 3.0), solarize_p=0.2, **STATS), (20, 27)),
    "small crops": (SSLView(24, crop_scale=(0.02, 0.1), jitter=(0.8, 0.8, 0.8, 0.5), jitter_p=1.0, **STATS), (32, 30)),
    "plain": (SSLView(32, jitter_p=0, gray_p=0, crop_scale=(1, 1), crop_ratio=(1, 1), **STATS), (32, 32)),
    "rotated": (PadCropFlipRotate(**STATS), (32, 32)),
    "rotated, odd sizes": (PadCropFlipRotate(pad=3, degrees=180, **STATS), (45, 26)),
    "shifted": (PadCropFlipRotate(degrees=0, **STATS), (32, 32)),
}


def views(augmentation: Augmentation, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The plain program's result and the kernel's."""
    generator = torch.Generator().manual_seed(1)
    params = augmentation.draw(24, generator)
    images = torch.randint(0, 256, (24, 3, *shape), dtype=torch.uint8, generator=generator)
    table = augmentation.table(params, *shape)
    plain, pixels = augmentation.program(images, table), augmentation.kernel(images, table)
    assert pixels is not None
    return plain, augmentation._images(pixels, *plain.shape[2:])


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The share of values that differ, by case; from a process that is told to interpret before it imports Triton."""
    path = tmp_path_factory.mktemp("kernel") / "found.json"
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_equals_the_plain_program(case: str, differences: dict[str, float]) -> None:
    # A value on solarization's threshold, or half-way between two pixels, may fall on either side.
    assert differences[case] < (1e-3 if case in ("all", "odd sizes", "rotated", "rotated, odd sizes") else 1e-9)


def test_larger_images_are_left_to_the_plain_program() -> None:
    view = SSLView(48, **STATS)
    images = torch.zeros((2, 3, 32, 32), dtype=torch.uint8)
    assert view.kernel(images, view.table(view.draw(2, torch.Generator()), 32, 32)) is None


class OnGPU(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def test_without_a_compiler_the_plain_program_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    view = SSLView(8, **STATS)
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    table = view.table(view.draw(3, torch.Generator().manual_seed(0)), 8, 8)

    def no_compiler(*_: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify")

    monkeypatch.setattr(view, "kernel", no_compiler)
    expected = view.program(images, table)
    with pytest.warns(
        RuntimeWarning, match="^SSLView runs without its own kernel: RuntimeError: Failed to find C comp"
    ):
        assert torch.equal(view.fused(images.as_subclass(OnGPU), table), expected)
    assert torch.equal(view.fused(images.as_subclass(OnGPU), table), expected)


def main(path: str) -> None:
    """Measures every case."""
    pairs = {name: views(*case) for name, case in CASES.items()}
    found = {name: float((plain - ours).abs().gt(1e-5).float().mean()) for name, (plain, ours) in pairs.items()}
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
