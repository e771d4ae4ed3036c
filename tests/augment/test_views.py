"""The pipelines: equal to torchvision's with the same parameters, however the batch is sliced."""

import importlib.util
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ssl_bench.augment.resample import crop_boxes
from ssl_bench.augment.views import (
    Augmentation,
    Normalize,
    PadCropFlipRotate,
    Params,
    RandomResizedCropFlip,
    SSLView,
    take,
)

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
COLOR: Any = {"mean": MEAN, "std": STD}
PIPELINES: list[Augmentation] = [
    SSLView(32, blur_p=0.5, solarize_p=0.2, **COLOR),
    SSLView(24, blur_p=1.0, **COLOR),
    SSLView(14, crop_scale=(0.05, 0.4), blur_p=0.5, **COLOR),
    SSLView(40, blur_p=0.5, solarize_p=0.2, **COLOR),
    RandomResizedCropFlip(32, **COLOR),
    PadCropFlipRotate(**COLOR),
    Normalize(**COLOR),
]


def images(n: int, height: int = 32, width: int = 32) -> Tensor:
    """Smooth images with some contrast, as photographs are."""
    noise = torch.randn(n, 3, height // 4 + 1, width // 4 + 1, generator=torch.manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic", align_corners=False)
    return smooth.mul(70).add(128).clamp(0, 255).byte()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normalized(x: Tensor) -> Tensor:
    return F.normalize(x, list(MEAN), list(STD))


def reference_view(view: SSLView, image: Tensor, params: Params, box: Tensor, i: int) -> Tensor:
    """One sample of an SSLView by torchvision's functions, up to before solarization."""
    top, left, height, width = box[i].int().tolist()
    size = [view.size, view.size]
    x = F.resized_crop(image.float() / 255, top, left, height, width, size, InterpolationMode.BICUBIC, antialias=True)
    x = x.clamp(0, 1)
    x = F.horizontal_flip(x) if params["flip"][i] else x
    brightness, contrast, saturation = params["factors"][i].tolist()
    operations: list[Callable[[Tensor], Tensor]] = [
        lambda y: F.adjust_brightness(y, brightness),
        lambda y: F.adjust_contrast(y, contrast),
        lambda y: F.adjust_saturation(y, saturation),
        lambda y: F.adjust_hue(y, params["hue"][i].item()),
    ]
    if params["jitter"][i]:
        for number in params["order"][i].tolist():
            x = operations[number](x)
    x = F.rgb_to_grayscale(x, 3) if params["gray"][i] else x
    if params["blur"][i]:
        x = F.gaussian_blur(x, [view.blur_kernel] * 2, [params["sigma"][i].item()])
    return x


SMALL_CROPS = [(32, 32, 14, (0.05, 0.4)), (32, 32, 16, (0.05, 0.14))]  # of DINO and SwAV


@pytest.mark.parametrize(
    ("height", "width", "size", "scale"), [(32, 32, 32, (0.08, 1)), (36, 28, 24, (0.08, 1)), *SMALL_CROPS]
)
def test_view_equals_torchvision(height: int, width: int, size: int, scale: tuple[float, float]) -> None:
    view = SSLView(size, crop_scale=scale, jitter=(0.6, 0.6, 0.6, 0.3), blur_p=0.5, solarize_p=0.3, **COLOR)
    x = images(96, height, width)
    params = view.draw(len(x), generator())
    box = crop_boxes(params, height, width, view.crop_ratio)
    ours = view(x, params)
    for i in range(len(x)):
        theirs = reference_view(view, x[i], params, box, i)
        sure = (theirs - 0.5).abs() > 1e-4  # solarization jumps at its threshold
        theirs = F.solarize(theirs, 0.5) if params["solarize"][i] else theirs
        difference = (ours[i] - normalized(theirs)).abs()
        assert difference[sure].max() < 1e-4  # in units of 1 / std, so 2.5e-5 of the range
    for name in ("jitter", "gray", "blur", "solarize", "flip"):  # every branch was taken
        assert 0 < params[name].sum() < len(x)


@pytest.mark.parametrize("off", [{}, {"jitter_p": 1.0}, {"jitter_p": 0.0, "gray_p": 1.0}])
def test_view_with_one_kind_of_sample_only(off: dict[str, float]) -> None:
    view = SSLView(16, **off, **COLOR)
    x = images(3, 16, 16)
    params = view.draw(3, generator(1))
    box = crop_boxes(params, 16, 16, view.crop_ratio)
    theirs = torch.stack([normalized(reference_view(view, x[i], params, box, i)) for i in range(3)])
    torch.testing.assert_close(view(x, params), theirs, rtol=0, atol=1e-4)


def test_probe_crops_equal_torchvision() -> None:
    probe = RandomResizedCropFlip(20, **COLOR)
    x = images(20, 24, 30)
    params = probe.draw(len(x), generator())
    box = crop_boxes(params, 24, 30, probe.crop_ratio)
    ours = probe(x, params)
    for i in range(len(x)):
        theirs = F.resized_crop(x[i].float() / 255, *box[i].int().tolist(), [20, 20], antialias=True)
        theirs = F.horizontal_flip(theirs) if params["flip"][i] else theirs
        torch.testing.assert_close(ours[i], normalized(theirs), rtol=0, atol=2e-5)


def test_supervised_pipeline_equals_torchvision() -> None:
    transform = PadCropFlipRotate(pad=4, degrees=15, **COLOR)
    x = images(70)
    params = transform.draw(len(x), generator())
    assert params["shift"].unique().tolist() == list(range(-4, 5))
    assert params["angle"].abs().max() <= 15
    assert params["angle"].std() > 7
    ours = transform(x, params)
    different = 0
    for i in range(len(x)):
        top, left = (params["shift"][i] + 4).tolist()
        theirs = F.crop(F.pad(x[i], [4]), top, left, 32, 32)
        theirs = F.horizontal_flip(theirs) if params["flip"][i] else theirs
        theirs = F.rotate(theirs, params["angle"][i].item(), InterpolationMode.NEAREST)
        different += ((ours[i] - normalized(theirs.float() / 255)).abs() > 1e-5).any(0).sum().item()
    assert different <= 1e-3 * 70 * 32 * 32


def test_normalize_needs_no_parameters() -> None:
    x = images(5, 8, 6)
    theirs = normalized(x.float() / 255)
    transform = Normalize(**COLOR)
    torch.testing.assert_close(transform(x), theirs, rtol=0, atol=2e-6)
    torch.testing.assert_close(transform(x, take(transform.draw(9, generator()), slice(0, 5))), theirs)


@pytest.mark.parametrize("transform", PIPELINES, ids=lambda t: type(t).__name__)
def test_slices_of_a_batch_are_bitwise_the_whole(transform: Augmentation) -> None:
    n = 150  # more than one block
    x = images(n)
    params = transform.draw(n, generator(2))
    whole = transform(x, params)
    for rows in (slice(0, 1), slice(1, 75), slice(75, 150), torch.randperm(n, generator=generator())[:31]):
        assert torch.equal(transform(x[rows], take(params, rows)), whole[rows])


@pytest.mark.parametrize("transform", PIPELINES, ids=lambda t: type(t).__name__)
def test_result_is_a_function_of_the_generator(transform: Augmentation) -> None:
    x = images(8)
    before = torch.get_rng_state()
    first = transform(x, transform.draw(8, generator(3)))
    again = transform(x, transform.draw(8, generator(3)))
    other = transform(x, transform.draw(8, generator(4)))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == isinstance(transform, Normalize)
    assert torch.equal(before, torch.get_rng_state())  # the global generator is nobody's
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert first.dtype == torch.float32


@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: SSLView(32, blur_p=0.5, solarize_p=0.2, dtype=dtype, **COLOR),
        lambda dtype: RandomResizedCropFlip(32, dtype=dtype, **COLOR),
        lambda dtype: PadCropFlipRotate(dtype=dtype, **COLOR),
        lambda dtype: Normalize(dtype=dtype, **COLOR),
    ],
)
def test_bfloat16_is_the_rounded_float32_under_autocast_too(make: Callable[[torch.dtype], Augmentation]) -> None:
    x = images(70)
    single, half = make(torch.float32), make(torch.bfloat16)
    params = single.draw(len(x), generator())
    with torch.autocast("cpu", torch.bfloat16):
        ours = half(x, params)
    assert ours.dtype == torch.bfloat16
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, single(x, params).bfloat16())


@pytest.mark.parametrize("off", [{}, {"gray_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0}])
def test_fixed_shape_view_equals_the_sorted_one(off: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile=True` with a backend that traces the whole view, but runs it without a compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    arguments = {"blur_p": 0.5, "solarize_p": 0.2, **COLOR, **off}
    plain, fixed = SSLView(16, **arguments), SSLView(16, **arguments, compile=True)
    x = images(40, 20, 24)
    params = plain.draw(len(x), generator())
    ours, theirs = fixed(x, params), plain(x, params)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    # a value on solarization's threshold may fall on either side
    assert (ours - theirs).abs().gt(1e-5).float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("transform", PIPELINES, ids=lambda t: type(t).__name__)
def test_gpu_equals_cpu_and_never_waits(transform: Augmentation) -> None:
    x = images(150)
    params = transform.draw(len(x), generator())
    on_gpu = x.cuda()
    transform(on_gpu, params)  # the first call may move constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = transform(on_gpu, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ours.device.type == "cuda"
    assert transform._has_kernel, "a kernel of its own failed"
    assert ours.is_contiguous(memory_format=torch.channels_last)
    theirs = transform(x, params)
    # a value on solarization's threshold, or halfway between two pixels, may fall on either side
    assert (ours.cpu() - theirs).abs().gt(1e-4).float().mean() < 1e-3


@pytest.mark.slow
def test_compiled_view_equals_the_plain_one() -> None:
    plain = SSLView(16, blur_p=0.5, dtype=torch.bfloat16, **COLOR)
    compiled = SSLView(16, blur_p=0.5, dtype=torch.bfloat16, compile=True, **COLOR)
    x = images(40, 20, 24)
    for seed in range(3):
        params = plain.draw(len(x), generator(seed))
        torch.testing.assert_close(compiled(x, params), plain(x, params), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_compiled_classification_view_equals_the_plain_one() -> None:
    plain, compiled = PadCropFlipRotate(**COLOR), PadCropFlipRotate(compile=True, **COLOR)
    x = images(40, 20, 24)
    params = plain.draw(len(x), generator())
    torch.testing.assert_close(compiled(x, params), plain(x, params), rtol=0, atol=1e-6)


def test_probabilities_are_those_asked_for() -> None:
    n = 20000
    view = SSLView(8, flip=0.3, jitter_p=0.6, gray_p=0.1, blur_p=0.7, solarize_p=0.4, **COLOR)
    params = view.draw(n, generator())
    for name, p in {"flip": 0.3, "jitter": 0.6, "gray": 0.1, "blur": 0.7, "solarize": 0.4}.items():
        assert abs(params[name].float().mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert params["sigma"].min() >= 0.1
    assert params["sigma"].max() <= 2
    assert abs(params["sigma"].mean() - 1.05) < 4 * 1.9 / 12**0.5 / n**0.5
    pairs = torch.stack([params[name].float() for name in ("flip", "jitter", "gray", "blur", "solarize")])
    off_diagonal = torch.corrcoef(pairs) - torch.eye(5)
    assert off_diagonal.abs().max() < 4 / n**0.5  # independent of one another


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size"),
        ({"crop_scale": (1.0, 0.08)}, "crop_scale"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"flip": 1.5}, "flip"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "jitter"),
        ({"jitter": (-0.4, 0.4, 0.2, 0.1)}, "jitter"),
        ({"jitter": (0.4, 0.4, 0.2)}, "jitter"),
        ({"jitter_p": -0.1}, "jitter_p"),
        ({"gray_p": 2.0}, "gray_p"),
        ({"blur_p": float("nan")}, "blur_p"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma"),
        ({"blur_kernel": 4}, "blur_kernel"),
        ({"blur_kernel": 17}, "blur_kernel"),
        ({"solarize_p": -1.0}, "solarize_p"),
        ({"solarize_threshold": 128.0}, "solarize_threshold"),
        ({"std": (0.2, 0.0, 0.2)}, "std"),
        ({"mean": (0.5,)}, "mean"),
        ({"dtype": torch.uint8}, "dtype"),
    ],
)
def test_bad_values_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^SSLView: .*{message}.* must be .*, got .*$"):
        SSLView(**{"size": 8, **COLOR, **arguments})


def test_bad_values_of_the_other_pipelines_are_refused() -> None:
    with pytest.raises(ValueError, match="PadCropFlipRotate: pad must be"):
        PadCropFlipRotate(pad=-1, **COLOR)
    with pytest.raises(ValueError, match="PadCropFlipRotate: degrees must be"):
        PadCropFlipRotate(degrees=-1, **COLOR)
    with pytest.raises(ValueError, match="RandomResizedCropFlip: crop_scale must be"):
        RandomResizedCropFlip(8, crop_scale=(0.9, 0.1), **COLOR)


def test_bad_batches_are_refused() -> None:
    view = SSLView(8, **COLOR)
    params = view.draw(4, generator())
    with pytest.raises(ValueError, match=r"images must be \(n, 3, H, W\) uint8"):
        view(torch.rand(4, 3, 8, 8), params)
    with pytest.raises(ValueError, match="5 rows, one per image"):
        view(images(5, 8, 8), params)


def test_the_benchmark_runs(tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "augmentation.py"
    spec = importlib.util.spec_from_file_location("benchmark_augmentation", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # a peer's warnings are not ours
        rows = benchmark.main(["--quick", "--json", str(tmp_path / "rows.json")])
    record = json.loads((tmp_path / "rows.json").read_text())
    assert record["rows"] == rows
    assert record["packages"]["torch"]
    assert {row["library"] for row in rows} >= {"ssl_bench bf16", "ssl_bench fp32", "torchvision v2", "kornia"}
    assert all(row["images_per_second"] > 0 for row in rows if "skipped" not in row)
    assert "skipped" not in next(row for row in rows if row["library"] == "torchvision v2")
