"""Which experiment a recipe is: the keys that count, and where two recipes differ; for records of every age."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Keys that cannot change a result: two recipes that differ only here are the same experiment. (The number of processes
# is not part of a recipe.)
IRRELEVANT = frozenset(
    {"run_dir", "resume", "tracker", "log_every", "check_every_epochs", "device", "compile", "cuda_graphs"}
    | {"recompute", "data.workers", "data.cache_dir", "data.resident", "optimizer.foreach", "optimizer.fused"}
    | {"checkpoint.every_steps", "checkpoint.every_epochs", "checkpoint.keep", "checkpoint.final"}
    | {"checkpoint.snapshots", "model.checkpoint"}  # which weights: model.checkpoint_sha256
)

# The data sets whose name alone says which images they hold.
NAMED_DATA = frozenset({"cifar10", "cifar100", "stl10", "stl10_unlabeled", "fashion_mnist", "tiny_imagenet", "digits"})

# The keys that say where data lies, with that of the data set's name; and, by that, the one that says what lies there.
PLACES = {"data.path": "data.name", "eval.data_path": "eval.data"}
CONTENTS = {"data.name": "data.content", "eval.data": "eval.data_content"}

# Keys added after the first records were written, each with the value that a recipe without it implies. At that value a
# key is not part of the identity, so that older records keep theirs. Never remove one or change its value.
ADDED: dict[str, Any] = {
    "loss_scale": 1.0,
    "sync_batch_norm": True,
    "last_batch": "carry",
    "method.divisor": None,
    "data.hf_config": None,
    "data.content": None,
    "eval.data": None,
    "eval.data_path": None,
    "eval.data_size": None,
    "eval.data_content": None,
    "model.img_size": None,
    "model.patch_size": None,
    "model.dynamic_img_size": False,
    "model.pretrained": False,
    "model.checkpoint_sha256": None,
    "param_groups.freeze": [],
    "param_groups.freeze_epochs": 0.0,
    "averaging.kind": "none",
    "averaging.decay": 0.999,
    "averaging.start_fraction": 0.0,
}


def without_additions(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's dotted keys without those of `ADDED` at their old value: equal for records of every age."""
    return {name: value for name, value in flat.items() if name not in ADDED or value != ADDED[name]}


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def is_its_path(data_name: str) -> bool:
    """Whether a data set is whatever lies at ``data.path``, so that another path is another experiment.

    A named set is the same wherever it lies; a reader of any files, or one from outside (by ``package.module:name`` or
    by its entry point's name), is told which by the path.
    """
    return data_name not in NAMED_DATA


def counts_by_path(flat: Mapping[str, Any], name: str = "data.name") -> bool:
    """Whether a recipe's data is known by its path alone: the name does not say it, and its content is not known.

    Args:
        flat: the recipe's dotted keys; a record of an earlier version has no content.
        name: the key of the data set's name, a value of `PLACES`.
    """
    return is_its_path(str(flat.get(name))) and flat.get(CONTENTS[name]) is None


def relevant(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted keys of a nested recipe that can change its result, with their values."""
    flat = without_additions(flatten(recipe))
    left_out = IRRELEVANT | {path for path, name in PLACES.items() if not counts_by_path(flat, name)}
    return {key: value for key, value in flat.items() if key not in left_out}


def identity(recipe: Mapping[str, Any]) -> str:
    """16 hex digits that name a nested recipe's experiment: equal if and only if the result must be equal."""
    return hashlib.sha256(json.dumps(relevant(recipe), sort_keys=True).encode()).hexdigest()[:16]


def differences(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Why two nested recipes are not the same experiment: ``optimizer.lr: the run has 1.0, asked for 2.0``, by key.

    Args:
        recorded: the recipe of a run on disk, of any age.
        asked: the recipe given now.
    """
    sides, absent = (relevant(recorded), relevant(asked)), object()
    lines = []
    for key in sorted(sides[0].keys() | sides[1].keys()):
        if sides[0].get(key, absent) != sides[1].get(key, absent):  # as values: 1 and 1.0 are equal
            has, wants = (json.dumps(side[key]) if key in side else "nothing" for side in sides)
            lines.append(f"{key}: the run has {has}, asked for {wants}")
    return lines
