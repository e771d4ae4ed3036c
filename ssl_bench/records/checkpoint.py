"""Checkpoints that no crash can damage: written whole or not at all, with checksums, the last few kept."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ssl_bench.records.storage import TEMPORARY, jsonable, naming, one_line, remove_atomically, sync

FORMAT = 1  # of a checkpoint folder; another number is refused by name

_LOG = logging.getLogger(__name__)

_STATE, _META, _SUMS = "state.pt", "meta.json", "SHA256SUMS"
_NAME = re.compile(r"step-(\d{8,})")

# What torch.load(weights_only=True) gives back exactly as it was.
_PRIMITIVES = (int, float, str, bool, bytes, torch.dtype, torch.device, type(None))
_CONTAINERS = (dict, OrderedDict, list, tuple, torch.Size)


class CheckpointError(OSError):
    """A checkpoint cannot be written or read; one line that names the file and the reason."""


class Checkpoints:
    """A run's checkpoints: ``step-00000100/`` with state.pt, meta.json and SHA256SUMS (for ``sha256sum -c``) each.

    One process saves; any number may load. What a killed save leaves behind has a temporary name and is removed when
    the run is opened again.

    Args:
        folder: where they are; made on the first save.
        keep: how many to keep, >= 1. A new one is complete before an old one goes, so the disk holds ``keep + 1``.
        warn: takes a one-line message when a damaged checkpoint is skipped; logged by default.
    """

    def __init__(self, folder: str | Path, keep: int = 2, *, warn: Callable[[str], None] = _LOG.warning) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint: keep must be >= 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self._warn = warn
        self._damaged: set[int] = set()
        self._current: set[int] = set()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, damaged or not, in ascending order."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
        """Writes one checkpoint, whole or not at all, then deletes those beyond the last ``keep``.

        A step that this object has saved, or loaded as the latest, is not written again. Checkpoints of later steps,
        and those that ``load_latest`` found damaged, are deleted: the run continued from before them.

        Args:
            step: the number of steps completed, >= 0.
            state: nested dicts (str or int keys), lists and tuples of tensors, numbers, strings, bytes and None.
            meta: what is worth reading without torch (identity, world size, ...); "format" and "step" are added.

        Returns:
            the checkpoint's folder.

        Raises:
            CheckpointError: the disk is full or not writable. Nothing is left of this one; the earlier ones stay.
            ValueError: something in ``state`` could be saved but not be loaded safely; names where it is.
        """
        target = self._path(step)
        if step in self._current:
            return target
        check_state(state, "state")
        head = jsonable({"format": FORMAT, "step": step, **meta})
        text = (json.dumps(head, indent=2, allow_nan=False) + "\n").encode()
        temporary = self.folder / f"{TEMPORARY}{os.getpid()}-{target.name}"
        with naming(f"checkpoint {target}: not written, earlier checkpoints are untouched", CheckpointError):
            try:
                if not self.folder.is_dir():
                    self.folder.mkdir(parents=True)
                    sync(self.folder.parent)
                # A dead writer's: in containers every trainer may have the same process id.
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                sums = f"{_write(temporary / _STATE, partial(torch.save, dict(state)))}  {_STATE}\n"
                sums += f"{_write(temporary / _META, lambda file: file.write(text))}  {_META}\n"
                _write(temporary / _SUMS, lambda file: file.write(sums.encode()))
                sync(temporary)
                if target.exists():  # damaged, or later than what was loaded: nobody can want it any more
                    remove_atomically(target)
                os.rename(temporary, target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync(self.folder)
        self._current.add(step)
        self._damaged.discard(step)
        self._prune(step)
        return target

    def load_latest(
        self, unfit: Callable[[dict[str, Any]], str] = lambda _meta: ""
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """The newest undamaged checkpoint that fits, or None where there is none at all.

        One that is damaged or unfit is skipped with a warning that names it and the reason. Nothing is unpickled
        blindly: files are compared with their checksums first, and then only tensors and primitives are accepted.

        Args:
            unfit: meta -> why the run cannot go on from there, or "".

        Returns:
            (step, state with all tensors on the CPU, meta).

        Raises:
            CheckpointError: all are damaged, or one is of another format version.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                state, meta = self.load(step)
            except _DamagedError as error:
                self._damaged.add(step)
                reasons.append(str(error))
                self._warn(f"checkpoint skipped: {error}")
            else:
                if reason := unfit(meta):
                    self._warn(f"checkpoint skipped: {self._path(step)}: {reason}")
                    continue
                self._current.add(step)
                return step, state, meta
        if reasons and len(reasons) == len(self.steps()):
            raise CheckpointError(f"checkpoints {self.folder}: every one is damaged: {'; '.join(reasons)}")
        return None

    def load(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """One step's (state, meta), checked as in ``load_latest``.

        Raises:
            CheckpointError: it is absent, damaged, or of another format version.
        """
        folder = self._path(step)
        _verify(folder)
        try:
            meta = json.loads((folder / _META).read_text())
            version = meta["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _DamagedError(f"{folder / _META}: {one_line(error)}") from error
        if version != FORMAT:
            raise CheckpointError(f"checkpoint {folder}: its format is {version}, this version reads {FORMAT}")
        try:
            state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for files that are no checkpoint, or a harmful one
            raise _DamagedError(f"{folder / _STATE}: refused by torch.load: {one_line(error)}") from error
        return state, meta

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _prune(self, newest: int) -> None:
        """Deletes all but the last ``keep`` sound checkpoints up to ``newest``."""
        kept = [step for step in self.steps() if step <= newest and step not in self._damaged][-self.keep :]
        for step in self.steps():
            if step not in kept:
                with naming(f"checkpoint {self._path(step)}: deleting", CheckpointError):
                    remove_atomically(self._path(step))


class _DamagedError(CheckpointError):
    """The checkpoint's files are not those that were written."""


class _HashingFile:
    """A file that computes the SHA-256 of what is written to it, so that a checkpoint need not be read again.

    torch's writer turns a failed write into a RuntimeError about file positions. So a failure is kept in ``error`` for
    the caller to raise, and later writes are ignored.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            self.sha256.update(data)
            view = memoryview(data)
            try:
                while view:
                    view = view[self._file.write(view) :]
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _write(path: Path, dump: Callable[[Any], object]) -> str:
    """Writes a file by ``dump(file)``, waits for the disk, and returns its SHA-256."""
    with open(path, "wb", buffering=0) as file:
        hashing = _HashingFile(file)
        dump(hashing)
        if hashing.error is not None:
            raise hashing.error
        os.fsync(file.fileno())
    return hashing.sha256.hexdigest()


def _verify(folder: Path) -> None:
    """Compares the files with their checksums."""
    try:
        lines = (folder / _SUMS).read_text().splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for name in (_META, _STATE):
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sums.get(name):
                    raise _DamagedError(f"{folder / name}: does not match its checksum in {_SUMS}")
    except _DamagedError:
        raise
    except (OSError, ValueError) as error:
        raise _DamagedError(f"{folder}: {one_line(error)}") from error


def check_state(value: Any, where: str = "state") -> None:
    """Refuses, before anything is written, what could be pickled but not be read back safely.

    Raises:
        ValueError: names where it is.
    """
    if type(value) in (torch.Tensor, torch.nn.Parameter) or type(value) in _PRIMITIVES:
        return
    if type(value) not in _CONTAINERS:
        raise ValueError(
            f"checkpoint: {where} must be a tensor, number, string, bytes, None, or a dict, list or tuple of them, "
            f"got a {type(value).__module__}.{type(value).__name__}"
        )
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise ValueError(f"checkpoint: keys of {where} must be strings or integers, got {key!r}")
            check_state(item, f"{where}.{key}")
    else:
        for index, item in enumerate(value):
            check_state(item, f"{where}[{index}]")
