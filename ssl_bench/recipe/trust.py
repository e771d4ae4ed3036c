"""What a file that somebody else wrote (a run's record, a study) may name only if the user trusts it.

``package.module:Name`` is imported, from the current folder too, and a path is read, which for some formats runs code
(CIFAR's original archive is a pickle). Names of the suite's own, of installed packages' entry points and of timm's
models are nobody else's to choose.
"""

from collections.abc import Collection, Mapping
from typing import Any

# The keys whose values are names of code, as a command line or a recorded recipe has them.
_CODE = frozenset(
    {"data", "data.name", "model", "model.name", "eval.data", "eval.protocols"}
    | {f"{kind}{end}" for kind in ("method", "optimizer", "schedule") for end in ("", ".target")}
)
_PATHS = frozenset({"data.path", "data.cache_dir", "eval.data_path", "model.checkpoint", "model.pretrained"})


def refuse_untrusted(source: str, values: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Refuses values that would be imported or used as a path.

    Args:
        source: the file that they come from, for the error.
        values: by dotted key; lists as lists or as text.
        given: the keys that the user set instead, on the command line.

    Raises:
        ValueError: one line that names the key, the value and ``--trust``.
    """
    for key, value in values.items():
        if key in given or value is None or value == "null":
            continue
        if key == "model.pretrained" and str(value).lower() in ("true", "false"):  # published weights are no path
            continue
        if key in _CODE and ":" in str(value):
            raise ValueError(
                f"{key} must be built in or an installed entry point, got {value!r} from {source}: --trust imports it"
            )
        if key in _PATHS:
            raise ValueError(f"{key} must be given on the command line, got {value!r} from {source}: --trust reads it")
