"""Tries whether a method keeps its contract: ``ssl-bench check-method package.module:Name``."""

from collections.abc import Sequence

from ssl_bench.recipe.compose import compose
from ssl_bench.recipe.registry import resolve


def main(method: str, overrides: Sequence[str] = ()) -> int:
    """Prints a line for each check; returns 1 if one failed.

    Args:
        method: a known name, an entry point, or package.module:Name.
        overrides: ``method.key=value``.

    Raises:
        ValueError: an unknown method or key, in one line.
    """
    for override in overrides:
        if not override.startswith("method."):
            raise ValueError(f"overrides must be method.key=value, got {override!r}")
    resolve("method", method)
    recipe = compose("pretrain", [f"method={method}", *overrides])
    given = {override[len("method.") : override.index("=")] for override in overrides}

    from ssl_bench.training.check_method import Case, findings

    failed = 0
    for finding in findings(Case(method, {name: recipe.method.options[name] for name in given})):
        print(finding, flush=True)
        failed += not finding.good
    print(f"{method}: {f'{failed} checks failed' if failed else 'keeps the contract'}")
    return 1 if failed else 0
