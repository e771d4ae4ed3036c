"""Downloads that are continued after a break, checked before they are used, and unpacked into their folder only."""

import gzip
import hashlib
import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ssl_bench.runtime.console import Tally, say
from ssl_bench.runtime.interrupt import stop_if_requested

ATTEMPTS = 5  # in a row that bring nothing, for each address
WAIT = 1.0  # seconds before the second attempt, doubled each time
TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 2**20


class DownloadError(OSError):
    """A file could not be downloaded, or is another one; the message names the address."""


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Args:
        urls: addresses of the same file, in the order in which to try them.
        name: of the file.
        md5: hex digits, as the data set's publisher gives them.
    """

    urls: Sequence[str]
    name: str
    md5: str


def fetch(file: RemoteFile, folder: Path) -> Path:
    """Downloads a file into a folder, or goes on with the part of it that is there.

    Returns:
        its path, once its digest is right.

    Raises:
        DownloadError: no address gives the file.
        OSError: the folder cannot be written.
        Stopped: a signal asked this process to stop; the part that is there stays.
    """
    target, part = folder / file.name, folder / f"{file.name}.part"
    if target.exists():
        if _md5(target) == file.md5:
            return target
        os.replace(target, part)  # cut off, or another file: `_receive` finds out
    faults = []
    for url in file.urls:
        fault = _from(url, file, part)
        if fault is None:
            os.replace(part, target)
            return target
        faults.append(f"{url}: {fault}")
    raise DownloadError("; ".join(faults))


def _from(url: str, file: RemoteFile, part: Path) -> str | None:
    """Downloads from one address; returns what is wrong, or None once the part is the whole file."""
    failed, wait, fault, again = 0, WAIT, "", False
    while failed < ATTEMPTS:
        before = part.stat().st_size if part.exists() else 0
        try:
            whole = _receive(url, file.name, part)
        except urllib.error.HTTPError as error:
            fault, whole = f"HTTP error {error.code}", False
            if error.code == 416:  # nothing is left to send: it is whole, or what we have is another file
                whole = True
            elif error.code < 500:
                return fault
        except DownloadError:  # of our own disk, which no second attempt mends
            raise
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            fault, whole = " ".join(str(reason).split()) or type(reason).__name__, False
        else:
            fault = "broken off"
        size = part.stat().st_size if part.exists() else 0
        # A server may announce more than there is: then the digest alone says whether it is whole.
        if size and (whole or size == before):
            digest = _md5(part)
            if digest == file.md5:
                return None
            if whole:
                part.unlink()
                if again or not before:
                    return f"gives another file: md5 must be {file.md5}, got {digest} of {size} bytes"
                again = True  # what was there may have been of another file: once more, from the start
        failed = failed + 1 if size <= before else 0
        if failed and failed < ATTEMPTS:
            _sleep(wait)
            wait *= 2
    return f"{fault} ({ATTEMPTS} attempts)"


def _sleep(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        stop_if_requested("downloading")
        time.sleep(min(left, 0.2))


def _receive(url: str, name: str, part: Path) -> bool:
    """Appends what the server sends to the part; returns whether that is all there is."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if have and not _starts_at(response, have):
            have = 0  # a server that knows no ranges sends the file from its start
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        with _disk_errors(part), open(part, "ab" if have else "wb") as file:
            pass  # made or emptied before the first byte is waited for
        with Tally(f"downloading {name}", total, "bytes") as tally:
            while data := response.read(_CHUNK):
                stop_if_requested("downloading")
                with _disk_errors(part), open(part, "ab") as file:
                    file.write(data)
                have += len(data)
                tally(have)
    return total is None or have >= total


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(f"{path}: {error.strerror}") from error


def _starts_at(response: http.client.HTTPResponse, place: int) -> bool:
    found = response.headers.get("Content-Range", "")
    return response.status == 206 and found.replace("bytes ", "").split("-")[0].strip() == str(place)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a tar archive, or a single file packed by gzip, into a folder.

    Raises:
        DownloadError: the archive is damaged, or has a member that would lie outside the folder, is a link out of it or
            a device.
    """
    try:
        if tarfile.is_tarfile(archive):
            if not hasattr(tarfile, "data_filter"):
                raise DownloadError(f"{archive}: Python must be 3.11.4 or later to unpack it safely")
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        else:
            with gzip.open(archive) as packed, open(folder / archive.stem, "wb") as file:
                shutil.copyfileobj(packed, file, _CHUNK)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, UnicodeError, zlib.error) as error:
        raise DownloadError(f"{archive}: cannot be unpacked ({' '.join(str(error).split())})") from error


def unfinished_name(folder: str) -> str:
    """The folder of a download that is not whole yet."""
    return f"{folder.replace('/', '-')}.partial"


def download(files: Iterable[RemoteFile], root: Path, folder: str, *, inside: bool) -> None:
    """Downloads and unpacks a data set; its folder gets its name when all of it is there.

    Args:
        files: the archives.
        root: where the folder goes; what is unfinished lies beside it and is gone on with the next time.
        folder: the data set's, below the root.
        inside: whether the archives hold the folder itself, or only what lies in it.

    Raises:
        DownloadError: see `fetch` and `unpack`; or the archives do not hold the folder.
        OSError: the root cannot be written.
    """
    unfinished = root / unfinished_name(folder)
    unpacked = unfinished / "unpacked"
    unfinished.mkdir(parents=True, exist_ok=True)
    say(f"downloading into {root}")
    archives = [fetch(file, unfinished) for file in files]
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir()
    for archive in archives:
        stop_if_requested("unpacking")
        unpack(archive, unpacked)
    source = unpacked / folder if inside else unpacked
    if not source.is_dir():
        raise DownloadError(f"{archives[0]}: must hold the folder {folder}, got {sorted(os.listdir(unpacked))[:5]}")
    (root / folder).parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, root / folder)
    shutil.rmtree(unfinished)
