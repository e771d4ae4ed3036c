"""Downloads from a local server that breaks off, lies, or serves something else."""

import gzip
import io
import re
import tarfile
import threading
from collections.abc import Iterator
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from tiny_disk import mounted

from ssl_bench.data import download as module
from ssl_bench.data.download import DownloadError, RemoteFile, download, fetch, unpack

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Server(ThreadingHTTPServer):
    """Serves `content` at every path; `requests` are the ranges that were asked for."""

    content: bytes = CONTENT
    breaks_after: int | None = None  # bytes of each answer
    length_is_off_by = 0
    ranges = True
    errors: list[int]
    requests: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/set.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.requests.append(wanted)
        if self.server.errors:
            self.send_error(self.server.errors.pop(0))
            return
        content, start = self.server.content, 0
        if wanted and self.server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(content):
                self.send_error(416)
                return
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body) + self.server.length_is_off_by))
        self.end_headers()
        self.wfile.write(body[: self.server.breaks_after])

    def log_message(self, *_arguments: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "WAIT", 0.0)
    with Server(("127.0.0.1", 0), Handler) as found:
        found.errors, found.requests = [], []
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def remote(server: Server, *, content: bytes = CONTENT) -> RemoteFile:
    return RemoteFile([server.url], "set.bin", md5(content).hexdigest())


def test_a_whole_file_is_taken_once(server, tmp_path):
    for _ in range(2):
        assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == [""]
    assert [path.name for path in tmp_path.iterdir()] == ["set.bin"]


def test_a_broken_download_is_gone_on_with(server, tmp_path):
    server.breaks_after = 1_200_000
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == ["", "bytes=1200000-", "bytes=2400000-"]


def test_so_is_one_of_a_process_that_was_killed(server, tmp_path):
    (tmp_path / "set.bin.part").write_bytes(CONTENT[:1_000_000])
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=1000000-"]


def test_a_part_of_another_file_is_thrown_away(server, tmp_path):
    (tmp_path / "set.bin.part").write_bytes(b"x" * 1_000_000)
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=1000000-", ""]
    (tmp_path / "set.bin").write_bytes(b"x" * 4_000_000)  # longer than the file
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "set.bin.part").write_bytes(CONTENT[:1_000_000])
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT


def test_a_server_that_promises_more_than_there_is(server, tmp_path):
    server.length_is_off_by = 1000
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT


def test_a_server_that_promises_less(server, tmp_path):
    server.length_is_off_by = -1000
    with pytest.raises(
        DownloadError, match=rf"{re.escape(server.url)}: gives another file: md5 must be .* 2999000 bytes"
    ):
        fetch(remote(server), tmp_path)
    assert not any(tmp_path.iterdir())


def test_another_file_is_refused_and_not_kept(server, tmp_path):
    server.content = CONTENT[::-1]
    with pytest.raises(DownloadError, match=rf"gives another file: md5 must be {md5(CONTENT).hexdigest()}, got"):
        fetch(remote(server), tmp_path)
    assert not any(tmp_path.iterdir())


def test_another_file_in_pieces_ends_too(server, tmp_path):
    server.content, server.breaks_after = CONTENT[::-1], 1_200_000
    with pytest.raises(DownloadError, match="gives another file"):
        fetch(remote(server), tmp_path)
    assert len(server.requests) == 6  # from the start, and once more
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_said_at_once(server, tmp_path):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        with pytest.raises(DownloadError, match=r"set\.bin\.part: No space left on device"):
            fetch(remote(server), disk)
        assert len(server.requests) == 1


def test_errors_of_the_server_are_tried_again_and_those_of_the_address_are_not(server, tmp_path):
    server.errors = [503, 500]
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 3
    server.errors, server.requests[:] = [404], []
    with pytest.raises(DownloadError, match="HTTP error 404"):
        fetch(RemoteFile([server.url], "other.bin", "0"), tmp_path)
    assert len(server.requests) == 1


def test_a_second_address_is_tried(server, tmp_path):
    server.errors = [404]
    file = RemoteFile([server.url, server.url], "set.bin", md5(CONTENT).hexdigest())
    assert fetch(file, tmp_path).read_bytes() == CONTENT


def test_an_address_that_nobody_answers_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.0)
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:9/x: .*refused.* \(5 attempts\)") as caught:
        fetch(RemoteFile(["http://127.0.0.1:9/x"], "x", "0"), tmp_path)
    assert "\n" not in str(caught.value)


def tar(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize(
    "members",
    [{"../evil": b"x"}, {"a/../../evil": b"x"}, {"a": link("a", "/etc"), "a/evil": b"x"}, {"a": link("a", "../../b")}],
    ids=["above", "detour", "link", "link above"],
)
def test_an_archive_cannot_write_outside_its_folder(tmp_path, members):
    (tmp_path / "x.tar.gz").write_bytes(tar(members))
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        unpack(tmp_path / "x.tar.gz", inside)
    assert not (tmp_path / "deep" / "evil").exists()
    assert not (tmp_path / "evil").exists()


def test_a_damaged_archive_is_named(tmp_path):
    whole = gzip.compress(CONTENT)
    torn = whole[:5000] + bytes(1000) + whole[6000:]
    for name, content in (("x.tar.gz", tar({"a": CONTENT})[:1000]), ("x.gz", whole[:1000]), ("y.gz", torn)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DownloadError, match=rf"{re.escape(name)}: cannot be unpacked"):
            unpack(tmp_path / name, tmp_path)


def test_a_data_set_gets_its_name_when_all_of_it_is_there(server, tmp_path):
    server.content = tar({"set-py/a": b"1", "set-py/b": b"2"})
    server.errors = [500] * 5
    with pytest.raises(DownloadError):
        download([remote(server, content=server.content)], tmp_path, "set-py", inside=True)
    assert not (tmp_path / "set-py").exists()
    download([remote(server, content=server.content)], tmp_path, "set-py", inside=True)
    assert sorted(path.name for path in (tmp_path / "set-py").iterdir()) == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["set-py"]
