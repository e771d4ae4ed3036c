"""The suggestion at the end of every error about an unknown name."""

import difflib
from collections.abc import Iterable

# What other suites call a key or a group, by the names here; those of one plug-in ("lr") stand without its section.
ALIASES = {
    "learning_rate": "lr", "base_lr": "lr", "wd": "weight_decay", "l2": "weight_decay", "temp": "temperature",
    "tau": "temperature", "bs": "batch_size", "batch": "batch_size", "max_epochs": "epochs", "num_epochs": "epochs",
    "max_steps": "steps", "num_steps": "steps", "micro_batch": "chunk_size", "accumulate": "chunk_size",
    "dataset": "data", "arch": "model", "backbone": "model", "network": "model", "encoder": "model",
    "loss": "method", "ssl": "method", "algorithm": "method", "opt": "optimizer", "optim": "optimizer",
    "scheduler": "schedule", "lr_scheduler": "schedule", "evaluation": "eval", "num_workers": "workers",
    "gpu": "device", "cuda": "device", "amp": "precision", "fp16": "precision", "bf16": "precision",
    "output": "run_dir", "output_dir": "run_dir", "save_dir": "run_dir", "logdir": "run_dir", "logger": "tracker",
    "image_size": "size", "img_size": "size",
}  # fmt: skip
CLOSE = 0.6  # of `difflib`'s ratio: metod and method have 0.91, foo and protocols 0.33


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or an empty string if no known name is close, nor one that others call so."""
    names = list(known)
    found = [ALIASES[name]] if ALIASES.get(name) in names else difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return suggested(found[0]) if found and found[0] != name else ""


def suggested(name: str) -> str:
    """The words for one."""
    return f"; did you mean {name!r}?"


def meant_key(name: str, keys: Iterable[str], groups: Iterable[str]) -> str | None:
    """The key or group that a word on the command line probably means.

    Args:
        name: an unknown key, dotted or not.
        keys: the known ones, dotted.
        groups: what is chosen by ``group=choice``; the sections of keys bear their names too.

    Returns:
        another name, or None where none is close.
    """
    known, chosen = ([one for one in names if one != name] for names in (keys, groups))
    section, _, last = name.rpartition(".")
    beside = [key for key in known if key.rpartition(".")[0] == section]
    if section and beside:  # the section is right: only its own keys are meant
        there = {key.rpartition(".")[2]: key for key in beside}
        word = ALIASES.get(last, last)
        found = [word] if word in there else difflib.get_close_matches(last, there, n=1, cutoff=CLOSE)
        elsewhere = [key for key in known if key.rpartition(".")[2] == word]
        return there[found[0]] if found else elsewhere[0] if elsewhere else None
    if section:  # a misspelt section: the same key of the nearest
        found = difflib.get_close_matches(name, known, n=1, cutoff=CLOSE)
        return found[0] if found else None
    word = ALIASES.get(last, last)
    # Misspelt, perhaps in the words of others.
    if word == last and not any(key.rpartition(".")[2] == last for key in known):
        top = [key for key in known if "." not in key] + chosen
        found = difflib.get_close_matches(last, [*top, *ALIASES], n=1, cutoff=CLOSE + 0.1)
        word = ALIASES.get(found[0], found[0]) if found else last
    if word in chosen and word != last:
        return word
    same = sorted((key for key in known if key.rpartition(".")[2] == word), key=lambda key: "." in key)
    if same:
        return same[0]
    found = difflib.get_close_matches(last, known, n=1, cutoff=CLOSE)
    return found[0] if found else None
