"""Fills in what data a recipe is about, so that the experiment is known by it and not by where the files lie."""

from dataclasses import replace

from ssl_bench.recipe import registry
from ssl_bench.recipe.schema import Recipe, is_its_path


def with_content(recipe: Recipe, known: dict[str, str | None] | None = None) -> Recipe:
    """The recipe with ``data.content`` and ``eval.data_content``, where a name does not say what the data is.

    Lists the data set's files; reads the labels of one that is not decoded yet, and no image.

    Args:
        recipe: any.
        known: what earlier calls found, which is added to; for many recipes about the same data.

    Raises:
        ValueError, OSError: in one line; there is no such data, or it is not what the recipe says.
    """
    from ssl_bench.data.dataset import data_content

    memo = {} if known is None else known

    def found(key: str, name: str, given: str | None, **where: object) -> str | None:
        if not is_its_path(name):
            if given is not None:
                raise ValueError(f"{key} must be null (the data set's name, {name}, says what it is), got {given}")
            return None
        which = repr((name, where))
        if which not in memo:
            memo[which] = data_content(name, locate=registry.foreign("dataset", name), **where)  # type: ignore[arg-type]
        content = memo[which]
        if given is not None and content != given:
            raise ValueError(f"{key} must be that of the files there, {content}, or null, got {given}")
        return content

    data, evaluated = recipe.data, recipe.eval
    where = {"path": data.path, "size": data.size, "hf_config": data.hf_config, "cache_dir": data.cache_dir}
    content = found("data.content", data.name, data.content, **where)
    recipe = replace(recipe, data=replace(data, content=content))
    if evaluated.data is None:
        return recipe
    where = {"path": evaluated.data_path, "size": evaluated.data_size, "cache_dir": data.cache_dir}
    content = found("eval.data_content", evaluated.data, evaluated.data_content, **where)
    return replace(recipe, eval=replace(evaluated, data_content=content))
