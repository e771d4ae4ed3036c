"""``ssl-bench estimate pretrain|classify ...``: the time and memory of one recipe, from steps that are measured now."""

from collections.abc import Sequence

from ssl_bench.recipe.compose import compose
from ssl_bench.recipe.schema import Recipe
from ssl_bench.runtime.console import duration
from ssl_bench.runtime.memory import available_memory
from ssl_bench.study.estimate import BATCH, STEPS, Speed, measured
from ssl_bench.study.grid import TRACKS, split_override

GIB = 1 << 30
MARGIN = 0.9  # of the free memory that is counted on


def main(track: str, overrides: Sequence[str] = ()) -> int:
    """Measures and prints; runs nothing else and leaves no files.

    Args:
        track: "pretrain" or "classify".
        overrides: the recipe, as on that track's command line.

    Returns:
        0; 1 if the recipe needs more memory than is free.

    Raises:
        ValueError: one line; a wrong recipe, or its steps fail.
    """
    if track not in TRACKS:
        raise ValueError(f"estimate: TRACK must be {' or '.join(TRACKS)}, got {track!r}")
    from ssl_bench.recipe.content import with_content

    recipe = with_content(compose(track, overrides))
    words = dict(map(split_override, overrides))
    whole = recipe.chunk_size or recipe.batch_size  # images in memory at a time
    # Small steps are measured as they are; of large ones the memory by a line through two sizes.
    sizes = [whole] if whole <= BATCH else [BATCH // 2, BATCH]
    found = {size: _measured(track, words, recipe, size) for size in sizes}
    speed, largest = found[sizes[-1]], sizes[-1]
    seconds = speed.seconds(recipe)
    steps = recipe.steps or max(1, round((recipe.epochs or 0) * speed.train_size / recipe.batch_size))
    what = recipe.method.target or "supervised"
    print(f"{what}, {recipe.model.name} on {recipe.data.name}, {recipe.optimizer.target}, {recipe.precision}")
    print(f"steps   {steps} of {recipe.batch_size} images ({steps * recipe.batch_size / speed.train_size:.4g} epochs)")
    print(f"speed   {speed.images_per_second:.0f} images/s on {speed.device}, measured with {largest} images a step")
    print(f"time    {duration(seconds)} of training on one process; evaluations come on top")
    needed, how = memory(found, whole)
    free = free_memory(speed.device)
    print(f"memory  {needed / GIB:.2f} GiB of {free / GIB:.2f} GiB that are free ({how})")
    if needed <= free:
        return 0
    if recipe.recompute == "none" and recipe.chunk_size is None and not (recipe.compile or recipe.cuda_graphs):
        again = {size: _measured(track, {**words, "recompute": "blocks"}, recipe, size) for size in sizes}
        if (less := memory(again, whole)[0]) <= MARGIN * free:
            print(f"        -> recompute=blocks would fit: {less / GIB:.2f} GiB, the same result")
            return 1
    print(f"        -> {advice(found, free, recipe.batch_size)}")
    return 1


def _measured(track: str, words: dict[str, str], recipe: Recipe, size: int) -> Speed:
    one = measured(track, words, recipe, size)
    if isinstance(one, str):
        raise ValueError(f"estimate: {STEPS} steps of {size} images must run to be measured: {one}")
    return one


def memory(found: dict[int, Speed], whole: int) -> tuple[float, str]:
    """The bytes that steps of ``whole`` images need, and how that is known."""
    (smallest, *_), largest = found, max(found)
    if whole == largest:
        return found[largest].peak, f"measured with {whole} images at a time"
    slope, fixed = line(found)
    text = f"{whole} images at a time, by a line through {smallest} and {largest}"
    return fixed + slope * whole, text


def line(found: dict[int, Speed]) -> tuple[float, float]:
    """Bytes for each image, and those beside, by two measured peaks."""
    smallest, largest = min(found), max(found)
    slope = max(found[largest].peak - found[smallest].peak, 0) / max(largest - smallest, 1)
    return slope, found[largest].peak - slope * largest


def advice(found: dict[int, Speed], free: float, batch: int) -> str:
    """What to do about a step that does not fit."""
    slope, fixed = line(found)
    limit = int((MARGIN * free - fixed) / slope) if slope else 0
    fits = next((size for size in range(min(limit, batch), 1, -1) if batch % size == 0), None)
    if fits is None:
        return "no chunk_size fits: a smaller model or smaller images, or another machine"
    return f"chunk_size={fits} would fit (batch norm is then over {fits} images)"


def free_memory(device: str) -> float:
    """The bytes that a run on this kind of device may take."""
    import torch

    if device != "the CPU" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return available_memory()
