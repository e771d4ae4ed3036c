"""The data that a recipe is about: what it holds, by which the experiment is known, not by where the files lie."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ssl_bench.recipe import registry
from ssl_bench.recipe.identity import is_its_path
from ssl_bench.recipe.schema import DataOptions, Recipe

if TYPE_CHECKING:
    from ssl_bench.data.dataset import Dataset


def with_content(recipe: Recipe, known: dict[str, str | None] | None = None) -> Recipe:
    """The recipe with ``data.content`` and ``eval.data_content``, where a name does not say what the data is.

    Lists the data set's files; reads the labels of one that is not decoded yet, and no image.

    Args:
        recipe: any.
        known: what earlier calls found, which is added to; for many recipes about the same data.

    Raises:
        ValueError, OSError: in one line; there is no such data, or it is not what the recipe says.
    """
    memo = {} if known is None else known
    recipe = replace(recipe, data=replace(recipe.data, content=_content("data.content", recipe.data, memo)))
    if (other := evaluated(recipe)) is None:
        return recipe
    return replace(recipe, eval=replace(recipe.eval, data_content=_content("eval.data_content", other, memo)))


def _content(key: str, data: DataOptions, memo: dict[str, str | None]) -> str | None:
    """What ``key`` must be; the size of the images and the cache's place make no difference to it."""
    if not is_its_path(data.name):
        if data.content is not None:
            raise ValueError(
                f"{key} must be null (the data set's name, {data.name}, says what it is), got {data.content}"
            )
        return None
    which = repr((data.name, data.path, data.hf_config))
    if which not in memo:
        from ssl_bench.data.dataset import data_content

        memo[which] = data_content(data.name, **_place(data))
    if data.content is not None and data.content != memo[which]:
        raise ValueError(f"{key} must be that of the files there, {memo[which]}, or null, got {data.content}")
    return memo[which]


def evaluated(recipe: Recipe) -> DataOptions | None:
    """``eval.data`` and its keys as those of data; None where the evaluation is on what is trained on."""
    options = recipe.eval
    if options.data is None:
        return None
    return replace(
        recipe.data,
        name=options.data,
        path=options.data_path,
        size=options.data_size or recipe.data.size,
        content=options.data_content,
        hf_config=None,
        holdout=0.0,
    )


def load(data: DataOptions, *, labels: bool | str = True, test: bool = True) -> "Dataset":
    """Loads the data set that a recipe's options name, see `ssl_bench.data.dataset.load_dataset`."""
    from ssl_bench.data.dataset import load_dataset

    return load_dataset(
        data.name,
        **_place(data),
        resident=data.resident,
        workers=data.workers,
        content=data.content,
        labels=labels,
        test=test,
    )


def _place(data: DataOptions) -> dict[str, Any]:
    """Where the data set lies and how it is read, as keywords."""
    found = {key: getattr(data, key) for key in ("path", "size", "cache_dir", "hf_config")}
    return {"locate": registry.foreign("dataset", data.name), **found}
