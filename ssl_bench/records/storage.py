"""Files that are whole or absent: atomic writes, JSON that any reader can parse, and errors that name the file."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# The start of the name of an unfinished write. Whoever has locked the folder may delete such files.
TEMPORARY = ".tmp-"

# JSON has no numbers for these. They are written as strings that float() reads back.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@contextmanager
def naming(action: str, error_class: type[OSError] = OSError) -> Iterator[None]:
    """Turns an OSError inside the block into one line: what could not be done, and why.

    Args:
        action: what the block does to which file, e.g. "run_dir runs/a: writing run.json".
        error_class: the class raised instead; the original is its cause and its errno is kept.
    """
    try:
        yield
    except OSError as error:
        named = error_class(f"{action}: {error.strerror or one_line(error)}")
        named.errno = error.errno
        raise named from error


def one_line(error: BaseException) -> str:
    """An error's text on one line, cut after 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + "..."


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries (a new file, a rename), survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)  # fsync needs no write access
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path, *, synced: bool = True) -> Iterator[BinaryIO]:
    """A file to write that gets its name only when it is whole; on an error nothing is left behind.

    Args:
        path: the final name. A file of that name is replaced, and stays as it is until then.
        synced: wait until the bytes and the name are on the disk. Otherwise the file survives a killed process but not
            a power failure.

    Raises:
        OSError: one line that names the file.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with naming(f"{path}: writing"):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                if synced:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if synced:
            sync(path.parent)


def atomic_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a mapping as indented JSON, atomically (see ``atomic_file`` and ``jsonable``)."""
    text = json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def remove_atomically(folder: Path) -> None:
    """Removes a folder so that readers see all of it or nothing, even if this process is killed halfway."""
    doomed = folder.with_name(f"{TEMPORARY}old-{os.getpid()}-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_temporaries(folder: Path) -> int:
    """Deletes what dead writers left in a folder (not in its sub-folders).

    Call it only with the run directory locked: a live writer's file looks the same.

    Returns:
        how many files and folders were deleted.
    """
    if not folder.is_dir():
        return 0
    litter = [path for path in folder.iterdir() if path.name.startswith(TEMPORARY)]
    for path in litter:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return len(litter)


def jsonable(value: Any, where: str = "") -> Any:
    """The JSON form of nested mappings, lists, numbers (of numpy and torch too), strings and paths.

    JSON has no NaN and no infinity: they become the strings "nan", "inf" and "-inf" (``restored`` reads them back).

    Raises:
        ValueError: for anything else; names where it is.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item, f"{where}.{key}" if where else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted(jsonable(item, where) for item in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return jsonable(value.item(), where)
    raise ValueError(f"record: {where or 'value'} must be a value that JSON can hold, got a {type(value).__name__}")


def restored(value: Any) -> Any:
    """The numbers that ``jsonable`` wrote as strings, as floats again, in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restored(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
