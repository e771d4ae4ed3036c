"""From a command line to a checked recipe.

The files of ``configs/`` are merged in the order in which the track's root file (``configs/pretrain.yaml``) lists them,
then its own keys, then a protocol's ``when`` rules (``if`` these keys have these values, ``set`` those), then the
command line. ``group=choice`` picks ``configs/group/choice.yaml``, or code from outside the repository by
``package.module:Name`` or by the name of its entry point; ``key=value`` sets a key.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ssl_bench.recipe import registry, weights
from ssl_bench.recipe.identity import flatten
from ssl_bench.recipe.schema import AveragingOptions, Plugin, Recipe
from ssl_bench.recipe.trial import trial
from ssl_bench.recipe.values import Kind, holds, load_yaml, read_value
from ssl_bench.runtime.suggestion import meant_key, nearest, suggested

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GROUPS = ("data", "model", "method", "optimizer", "schedule", "eval", "protocol")
PLUGINS = ("method", "optimizer", "schedule")  # whose own keys `registry` checks
# The groups whose choice may be code from outside: its kind in `registry`, and the key that holds its name.
FOREIGN = {"data": ("dataset", "name"), "model": ("backbone", "name"), **{kind: (kind, "target") for kind in PLUGINS}}
UNITS = ("steps", "epochs", "fraction")  # of one duration

_CHECKER = TypeAdapter(Recipe)

Tree = Mapping[str, Any]  # nested, by the sections of a recipe; never changed in place


def compose(track: str, overrides: Sequence[str] = ()) -> Recipe:
    """Composes the recipe of a command line.

    Args:
        track: "pretrain" or "classify"; the root file in ``configs/``.
        overrides: ``key=value`` and ``group=choice``; the last one of a key counts.

    Raises:
        ValueError: one line that names the key, what it must be and what was given.
    """
    given = dict(map(_split, overrides))
    tree = _from_files(track, {key: given.pop(key) for key in GROUPS if key in given})
    kinds = _kinds({**tree, **{key: text for key, text in given.items() if key.endswith(".target")}})
    values = {key: read_value(key, text, kinds.get(key)) for key, text in given.items()}
    for key in sorted(given):
        _check_key(key, tree)
        for twin in _twins(key):
            if twin in given:
                if not (_is_null(given[key]) or _is_null(given[twin])):
                    raise ValueError(f"give {key} or {twin}, not both")
                continue
            # A duration given in one unit replaces what the files say in another.
            if twin in known_keys() or twin.partition(".")[0] in PLUGINS:
                values[twin] = None
    rules = tree.pop("when", [])
    implied = _implied(rules, {"track": track, **flatten(_with(tree, values))})
    return build(track, _with(_with(tree, implied), values))


def merge(overrides: dict[str, str], later: dict[str, str]) -> dict[str, str]:
    """Merges overrides by key; later ones count, and a later duration replaces the same duration in another unit."""
    replaced = {twin for key, value in later.items() if not _is_null(value) for twin in _twins(key)}
    return {key: value for key, value in overrides.items() if key not in replaced} | later


def build(track: str, plain: Tree) -> Recipe:
    """Checks nested plain values, such as `Recipe.to_dict` gives, and makes a recipe of them.

    Raises:
        ValueError: as `compose`.
    """
    plain = {name: value for name, value in plain.items() if name not in ("track", "protocol")}
    if track == "classify":
        plain.pop("method", None)
    for kind in PLUGINS:
        if (node := plain.pop(kind, None)) is not None:
            values = dict(node)
            if not (target := values.pop("target", None)):
                raise ValueError(f"{kind}.target must be a known name or package.module:Name, got {target}")
            plain[kind] = Plugin(target, registry.check(kind, target, values))
    try:
        recipe = _recipe(track, plain)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            raise ValueError(unknown_key(".".join(map(str, first["loc"])))) from None
        if first["type"] == "dataclass_type":  # pydantic would name the class
            section = ".".join(map(str, first["loc"]))
            own = ", ".join(key for key in known_keys() if key.startswith(f"{section}."))
            raise ValueError(f"{section} must be given by its keys ({own}), got {first['input']!r}") from None
        raise ValueError(registry.explain(error)) from None
    _cross_check(recipe)
    return recipe


def composed(plain: Tree) -> Recipe:
    """A recipe from what `Recipe.to_dict` gave, without another look at its plug-ins.

    Raises:
        ValueError: it was none.
    """
    nodes = {kind: dict(plain[kind]) for kind in PLUGINS if plain[kind] is not None}
    plugins = {kind: Plugin(node.pop("target"), node) for kind, node in nodes.items()}
    return _recipe(plain["track"], {k: v for k, v in plain.items() if k != "track" and k not in PLUGINS} | plugins)


def _recipe(track: str, plain: Tree) -> Recipe:
    return _CHECKER.validate_python({"track": track, **plain})


def _cross_check(recipe: Recipe) -> None:
    """Checks what depends on several fields, and that the code which the run names exists."""
    if (recipe.epochs is None) == (recipe.steps is None):
        raise ValueError(f"give exactly one of epochs and steps, got epochs={recipe.epochs} and steps={recipe.steps}")
    from ssl_bench.data.sampler import images_per_chunk

    images_per_chunk(recipe.batch_size, recipe.chunk_size, world_size=1)  # the processes are not known yet
    if recipe.compile and recipe.recompute != "none":
        raise ValueError(f"recompute must be none with compile=true, got {recipe.recompute}")
    if not 0 < recipe.augment.crop_scale[0] <= recipe.augment.crop_scale[1]:
        raise ValueError(f"augment.crop_scale must be 0 < low <= high <= 1, got {recipe.augment.crop_scale}")
    if recipe.augment.blur_sigma[0] > recipe.augment.blur_sigma[1]:
        raise ValueError(f"augment.blur_sigma must be low <= high, in pixels, got {recipe.augment.blur_sigma}")
    _check_model(recipe)
    _check_averaging(recipe)
    _check_micro_batches(recipe)
    if recipe.method.target and (
        check_batch := getattr(registry.resolve("method", recipe.method.target), "check_batch", None)
    ):
        check_batch(recipe.batch_size, **recipe.method.options)
    registry.resolve("dataset", recipe.data.name)
    _check_evaluation_data(recipe)
    for name in recipe.eval.protocols if recipe.track == "pretrain" else ():
        if not getattr(registry.resolve("evaluator", name), "tabulated", True):
            raise ValueError(
                f"eval.protocols must be evaluators of a finished run, got {name!r}, a monitor "
                "(eval.online_every_epochs switches it on)"
            )


def _check_model(recipe: Recipe) -> None:
    """Checks the backbone's keys as far as that needs no timm, which is not imported here."""
    model, size = recipe.model, recipe.model.img_size or recipe.data.size
    if ":" in model.name:
        registry.resolve("backbone", model.name)
    if model.img_size and recipe.data.size and model.img_size != recipe.data.size:
        raise ValueError(
            f"model.img_size must be data.size={recipe.data.size} where both are given, got {model.img_size}"
        )
    if size and model.patch_size and size % model.patch_size:
        raise ValueError(f"model.patch_size must divide the image's side of {size} pixels, got {model.patch_size}")
    weights.resolve(model)


def _check_averaging(recipe: Recipe) -> None:
    """An optimizer that averages its weights itself needs neither a schedule nor another average."""
    average, optimizer = recipe.averaging, recipe.optimizer
    if average.kind == "none" and average.start_fraction:
        raise ValueError(f"averaging.start_fraction must be 0 with averaging.kind=none, got {average.start_fraction}")
    if average.kind != "ema" and average.decay != AveragingOptions.decay:
        default = AveragingOptions.decay
        raise ValueError(f"averaging.decay must be {default} without averaging.kind=ema, got {average.decay}")
    if not optimizer.target:
        return
    made = trial(recipe)
    from ssl_bench.optim.averaging import has_evaluation_point  # here, because --help must not wait for torch

    if made is None or not has_evaluation_point(made):
        return
    name = f"optimizer={optimizer.target}, which averages its weights itself"
    if recipe.schedule.target != "constant":
        raise ValueError(f"schedule must be constant with {name}, got {recipe.schedule.target}")
    if average.kind != "none":
        raise ValueError(f"averaging.kind must be none with {name}, got {average.kind}")


def _check_micro_batches(recipe: Recipe) -> None:
    """What an optimizer that measures micro-batch gradients can be given (`ssl_bench.optim.clars`)."""
    target = recipe.optimizer.target
    if not target or not hasattr(registry.resolve("optimizer", target), "micro_gradients"):
        return
    if recipe.precision == "fp16":
        raise ValueError(f"precision must be fp32 or bf16 with optimizer={target}, which scales no gradients, got fp16")
    fresh = "micro_batch" in recipe.optimizer.options
    if fresh and recipe.track == "pretrain":
        raise ValueError(
            f"optimizer must be clars_chunks in pretraining, got {target}: of its micro-batches the loss is another"
        )
    if not fresh and recipe.chunk_size in (None, recipe.batch_size):
        raise ValueError(
            f"chunk_size must be below batch_size with optimizer={target}, whose micro-batches are the chunks, "
            f"got {recipe.chunk_size}"
        )


def _check_evaluation_data(recipe: Recipe) -> None:
    options = recipe.eval
    if recipe.data.hf_config is not None and recipe.data.name != "hf":
        raise ValueError(f"data.hf_config must be null (it is for data=hf), got {recipe.data.hf_config!r}")
    if options.data is not None:
        if recipe.track == "classify":
            raise ValueError(f"eval.data must be null on the track classify, got {options.data!r}")
        registry.resolve("dataset", options.data)
    for name in ("data_path", "data_size", "data_content") if options.data is None else ():
        if (value := getattr(options, name)) is not None:
            raise ValueError(f"eval.{name} must be null without eval.data, got {value!r}")


def override(plain: Tree, overrides: Sequence[str], allowed: Sequence[str]) -> Tree:
    """Sets some keys of a recorded recipe anew.

    Args:
        plain: nested, as `Recipe.to_dict` gives it.
        overrides: ``key=value``.
        allowed: the keys, and sections of keys, that may be set.

    Raises:
        ValueError: another key, or one that does not exist.
    """
    for key, text in map(_split, overrides):
        if key in GROUPS:
            raise ValueError(f"cannot choose {key}={text} for a recorded run: set single keys of {', '.join(allowed)}")
        _check_key(key, {})  # nothing is imported that the record names
        if not any(key == name or key.startswith(f"{name}.") for name in allowed):
            raise ValueError(f"{key} is fixed by the run's record (may be set here: {', '.join(allowed)})")
        plain = _with(plain, {key: read_value(key, text, _own_kinds().get(key))})
    return plain


@cache
def choices(group: str) -> tuple[str, ...]:
    """The files of one config group."""
    return tuple(sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")))


@cache
def known_keys() -> tuple[str, ...]:
    """Every key of a recipe, dotted, without the plug-ins' own."""
    return tuple(key for key in flatten(Recipe("pretrain").to_dict()) if key not in ("track", *PLUGINS))


def unknown_key(name: str, tree: Tree | None = None) -> str:
    """The error for a key that does not exist: the key that was probably meant, and the keys of its section."""
    known = list(known_keys())  # and those of the recipe's plug-ins
    for kind in PLUGINS:
        if target := ((tree or {}).get(kind) or {}).get("target"):
            known += [f"{kind}.{one}" for one in registry.options(registry.resolve(kind, target))]
    likely = meant_key(name, known, GROUPS)
    meant = suggested(likely) if likely else ""
    section = name.rpartition(".")[0]
    beside = [key for key in known if key.rpartition(".")[0] == section]
    if not (section and beside):
        beside += dict.fromkeys(f"{key.partition('.')[0]}.*" for key in known if "." in key)
    return f"unknown key {name!r}{meant} (known: {', '.join(beside)})"


def _check_key(key: str, tree: Tree) -> None:
    """Refuses what is neither a key nor a section; the plug-ins' own keys are checked by `registry`."""
    if key.partition(".")[0] not in PLUGINS and not any(f"{known}.".startswith(f"{key}.") for known in known_keys()):
        raise ValueError(unknown_key(key, tree))


def _split(override: str) -> tuple[str, str]:
    key, sign, value = override.partition("=")
    if not sign or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ValueError(f"cannot read {override!r}: expected key=value or group=choice (see --help)")
    return key, value


@cache
def _own_kinds() -> dict[str, Kind | None]:
    """For every key of a recipe but the plug-ins', whether it holds text."""
    found: dict[str, Kind | None] = {}
    for name, annotation in get_type_hints(Recipe, include_extras=True).items():
        if is_dataclass(annotation) and annotation is not Plugin:
            inner = get_type_hints(annotation, include_extras=True)
            found |= {f"{name}.{each}": holds(kind) for each, kind in inner.items()}
        else:
            found[name] = holds(annotation)
    return found


def _kinds(tree: Tree) -> dict[str, Kind | None]:
    """The same with the keys of the plug-ins that are chosen."""
    found = dict(_own_kinds())
    for kind in PLUGINS:
        target = tree.get(f"{kind}.target") or (tree.get(kind) or {}).get("target")
        if target:
            known = registry.options(registry.resolve(kind, target))
            found |= {f"{kind}.{name}": holds(option.annotation) for name, option in known.items()}
            found[f"{kind}.target"] = "text"
    return found


def _twins(key: str) -> list[str]:
    """The names of the same duration in other units: epochs for steps; X_epochs and X_fraction for X_steps."""
    match = re.fullmatch(rf"(|.*[._])({'|'.join(UNITS)})", key)
    return [match[1] + unit for unit in UNITS if unit != match[2]] if match else []


def _is_null(text: str) -> bool:
    """Whether a value of the command line says that a duration is not given in this unit."""
    return text.lower() == "null"


def _implied(rules: Iterable[Mapping[str, Any]], flat: Mapping[str, Any]) -> dict[str, Any]:
    """The keys set by those ``when`` rules whose conditions hold; ``${key}`` stands for that key's value.

    A condition is a value, or a list of which the key has one.
    """
    found: dict[str, Any] = {}
    for rule in rules:
        conditions = rule["if"].items()
        if all(flat.get(key) in (wanted if isinstance(wanted, list) else [wanted]) for key, wanted in conditions):
            found |= rule["set"]
    references = {key: re.fullmatch(r"\$\{([\w.]+)\}", str(value)) for key, value in found.items()}
    return found | {key: flat[match[1]] for key, match in references.items() if match}


def _from_files(track: str, chosen: Mapping[str, str]) -> dict[str, Any]:
    """One file of each group and the root file, merged; groups that are not chosen are as the files say."""
    defaults, own = _read(CONFIGS / f"{track}.yaml")
    if "method" in chosen and "method" not in defaults:
        raise ValueError("the classification track has no method; leave out method=")
    contents = {}
    for group, choice in {**defaults, **chosen}.items():
        inner, contents[group] = _group_file(group, choice)
        for other in inner.keys() - chosen.keys():  # tvlars.yaml chooses the constant schedule
            contents[other] = _group_file(other, inner[other])[1]
    protocol = contents.pop("protocol")  # the only file that sets keys of all sections
    # A model's own file comes last: a ViT has no stem to choose, whatever the protocol says of ResNets'.
    return _merged(_merged(_merged(contents, protocol), {"model": contents["model"]}), own)


def _group_file(group: str, choice: str) -> tuple[dict[str, str], Tree]:
    if choice in choices(group):
        return _read(CONFIGS / group / f"{choice}.yaml")
    kind, key = FOREIGN.get(group, ("", ""))
    foreign = sorted(registry.installed(kind)) if kind else []
    if kind and (":" in choice or choice in foreign):
        return {}, {key: choice}
    known = [*choices(group), *foreign]
    more = "; or package.module:Name" if kind else ""
    raise ValueError(f"unknown {group} {choice!r}{nearest(choice, known)} (known: {', '.join(known)}{more})")


@cache
def _read(path: Path) -> tuple[dict[str, str], Tree]:
    """A file's ``defaults:`` (group -> choice) and its other keys."""
    content = load_yaml(str(path), path.read_text()) or {}
    defaults = {group: choice for entry in content.pop("defaults", []) for group, choice in entry.items()}
    return defaults, content


# OmegaConf takes 11 ms for what these lines do in a fraction of one, and a study composes hundreds of recipes.
def _merged(below: Tree, above: Tree) -> dict[str, Any]:
    """Merges two trees section by section; where both have a value, that of ``above`` counts."""
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        result[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _with(tree: Tree, values: Mapping[str, Any]) -> Tree:
    """The tree with dotted keys set."""
    for key, value in values.items():
        for section in reversed(key.split(".")):
            value = {section: value}
        tree = _merged(tree, value)
    return tree
