"""Which evaluation protocol stands beside which number: the one place that decides it."""

from collections.abc import Iterable, Mapping

# In order of preference where several cover equally many runs. `online` is a monitor, never a result.
PROTOCOLS = ("test-v1", "linear-aug-v1", "linear-cached-v1", "knn-v1", "paper-probe", "released-probe")
MONITORS = frozenset({"online"})


def ordered(counts: Mapping[str, int]) -> list[str]:
    """The protocols of a problem, the one that covers the most runs first.

    Args:
        counts: by protocol the number of runs that have it.
    """
    order = {name: rank for rank, name in enumerate(PROTOCOLS)}
    return sorted(counts, key=lambda name: (-counts[name], order.get(name, len(order)), name))


def among_ours(problem: str, found: Iterable[str]) -> str:
    """The protocol by which our runs of a problem are compared with each other.

    Args:
        problem: "classification" or a method's name.
        found: what they have, as ``ordered`` gives it.
    """
    return next(iter(found), "test-v1" if problem == "classification" else "linear-cached-v1")


def beside_paper(problem: str) -> str:
    """The protocol of ours that may stand beside a number of the paper: never another, even where this one is missing.

    For classification the paper's number is the test set's; for the rest the linear probe that its text describes.
    """
    return "test-v1" if problem == "classification" else "paper-probe"
