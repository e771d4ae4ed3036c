"""From a command line to a checked recipe: Hydra composes the groups in ``configs/``, the dataclasses check them.

``group=choice`` picks a file of ``configs/group/``; ``key=value`` sets a key. A method, optimizer or schedule from
outside the repository is given as ``method=package.module:Class`` or by the name of its entry point. A protocol's
``when`` rules (``if`` some keys have these values, ``set`` others) come before the command line's words.
"""

import copy
import dataclasses
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ssl_bench.recipe import registry
from ssl_bench.recipe.schema import Plugin, Recipe, flatten
from ssl_bench.runtime.suggestion import nearest

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GROUPS = ("data", "model", "method", "optimizer", "schedule", "eval", "protocol")
PLUGINS = ("method", "optimizer", "schedule")


def choices(group: str) -> list[str]:
    """The files of one config group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def compose(track: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a command line means.

    Args:
        track: "pretrain" or "classify"; the root file in ``configs/``.
        overrides: ``key=value`` and ``group=choice`` words.

    Raises:
        ValueError: one line that names the key, what was given and what is allowed.
    """
    words = list(dict(_parse(word) for word in overrides).items())  # the last word on a key counts
    user = [rewritten for key, value in words for rewritten in _rewrite(track, key, value)]
    user = _one_duration(words) + user
    plain = _hydra(track, user)
    rules = _implied(plain.pop("when", None) or [], {"track": track, **flatten(plain)})
    if rules:
        plain = _hydra(track, rules + user)
        plain.pop("when", None)
    return build(track, plain)


def build(track: str, plain: dict[str, Any]) -> Recipe:
    """A recipe from nested plain values such as `Recipe.to_dict` gives, checked whole.

    Raises:
        ValueError: as `compose`.
    """
    plain = {name: value for name, value in plain.items() if name not in ("track", "protocol")}
    if track == "classify":
        plain.pop("method", None)
    for kind in PLUGINS:
        node = plain.pop(kind, None)
        if node is None:
            continue
        target = node.get("target")
        if not target:
            raise ValueError(f"{kind}.target is required: a known name or package.module:Class")
        values = {name: value for name, value in node.items() if name != "target"}
        plain[kind] = Plugin(target, registry.check(kind, target, values))
    try:
        recipe = _recipe_checker().validate_python({"track": track, **plain})
    except ValidationError as error:
        raise ValueError(_complaint(error)) from None
    _cross_check(recipe)
    return recipe


@cache
def _recipe_checker() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)  # takes 5 ms, and a study builds hundreds of recipes


def override(plain: dict[str, Any], words: Sequence[str], allowed: Sequence[str]) -> dict[str, Any]:
    """A recorded recipe with some keys set anew.

    Args:
        plain: nested, as `Recipe.to_dict` gives it.
        words: ``key=value``.
        allowed: the keys, and sections of keys, that may be set.

    Raises:
        ValueError: another key, or one that does not exist.
    """
    plain = copy.deepcopy(plain)
    for word in words:
        key, value = _parse(word)
        if key not in known_keys() and key.partition(".")[0] not in PLUGINS:  # whose keys are their own
            raise ValueError(unknown_key(key))
        if not any(key == name or key.startswith(f"{name}.") for name in allowed):
            raise ValueError(f"{key} is fixed by the run's record (here may be set: {', '.join(allowed)})")
        *sections, last = key.split(".")
        node = plain
        for section in sections:
            node = node[section]
        node[last] = yaml.safe_load(value)
    return plain


def _cross_check(recipe: Recipe) -> None:
    """What no single field can tell."""
    if (recipe.epochs is None) == (recipe.steps is None):
        raise ValueError(f"give exactly one of epochs and steps: got epochs={recipe.epochs}, steps={recipe.steps}")
    if recipe.chunk_size is not None and recipe.batch_size % recipe.chunk_size:
        raise ValueError(f"chunk_size: got {recipe.chunk_size}, allowed: a divisor of batch_size={recipe.batch_size}")
    if not 0 < recipe.augment.crop_scale[0] <= recipe.augment.crop_scale[1]:
        raise ValueError(f"augment.crop_scale: got {recipe.augment.crop_scale}, allowed: 0 < low <= high <= 1")
    if recipe.augment.blur_sigma[0] > recipe.augment.blur_sigma[1]:
        raise ValueError(f"augment.blur_sigma: got {recipe.augment.blur_sigma}, allowed: low <= high, in pixels")
    if recipe.track == "pretrain":
        from ssl_bench.eval import get_evaluator

        for name in recipe.eval.protocols:
            if not get_evaluator(name).tabulated:
                raise ValueError(
                    f"eval.protocols: got {name!r}, a monitor; it has its own key, eval.online_every_epochs"
                )


def _complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        name = ".".join(map(str, first["loc"]))
        return unknown_key(name)
    return registry.explain(error)


def unknown_key(name: str) -> str:
    """The one line for a key that does not exist."""
    known = [*known_keys(), *GROUPS]
    scope = name.rpartition(".")[0]
    siblings = [one for one in known if one.rpartition(".")[0] == scope]
    siblings = siblings or sorted({one.partition(".")[0] for one in known})  # a scope that is none itself
    return f"unknown key {name!r}{nearest(name, known)} (known here: {', '.join(siblings)})"


def known_keys() -> list[str]:
    """Every key of a recipe, dotted, without the plug-ins' own."""
    names = []
    for field in dataclasses.fields(Recipe):
        if dataclasses.is_dataclass(field.type) and field.type is not Plugin:
            names += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(field.type)]
        else:
            names.append(field.name)
    return names


def _parse(word: str) -> tuple[str, str]:
    key, sign, value = word.partition("=")
    if not sign or not re.fullmatch(r"[\w.]+", key):
        raise ValueError(f"cannot read {word!r}: expected key=value or group=choice (see --help)")
    return key, value


def _rewrite(track: str, key: str, value: str) -> list[str]:
    """One word of the command line as Hydra overrides."""
    if key not in GROUPS:
        if key.split(".")[0] not in {*GROUPS, *(name.split(".")[0] for name in known_keys())}:
            raise ValueError(unknown_key(key))
        return [f"++{key}={_quoted(value)}"]
    if track == "classify" and key == "method":
        raise ValueError("the classification track has no method; leave out method=")
    if value in choices(key):
        return [f"{key}={value}"]
    if key in PLUGINS and (":" in value or value in registry.installed(key)):
        return [f"{key}=plugin", f"++{key}.target='{value}'"]
    known = [name for name in choices(key) if name != "plugin"] + (
        sorted(registry.installed(key)) if key in PLUGINS else []
    )
    more = "; or package.module:Class" if key in PLUGINS else ""
    raise ValueError(f"unknown {key} {value!r}{nearest(value, known)} (known: {', '.join(known)}{more})")


def _quoted(value: str) -> str:
    """Hydra's grammar for values, except for text that it would take apart (paths, spaces, colons)."""
    if re.fullmatch(r"[\w.+-]*|[\[{].*[\]}]|'.*'|\".*\"", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _one_duration(words: Sequence[tuple[str, str]]) -> list[str]:
    """Giving a duration in one unit drops what the files say of it in another; giving it in two is an error."""
    given = {key for key, _ in words}
    plain = set(known_keys())
    drops = []
    for key in sorted(given):
        match = re.fullmatch(r"(.*?)(steps|epochs|fraction)", key)
        if not match or (match[1] and not match[1].endswith(("_", "."))):
            continue
        for unit in ("steps", "epochs", "fraction"):
            twin = match[1] + unit
            if twin == key or not (twin in plain or key.split(".")[0] in PLUGINS):
                continue
            if twin in given:
                raise ValueError(f"give {key} or {twin}, not both")
            drops.append(f"++{twin}=null")
    return drops


def _implied(rules: list[dict[str, Any]], flat: dict[str, Any]) -> list[str]:
    """The overrides of every ``when`` rule whose conditions hold."""
    return [
        f"++{key}={_hydra_value(value)}"
        for rule in rules
        if all(flat.get(key) == wanted for key, wanted in rule["if"].items())
        for key, value in rule["set"].items()
    ]


def _hydra_value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def _hydra(track: str, overrides: list[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return OmegaConf.to_container(hydra_compose(track, overrides), resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error
