import errno
import hashlib
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quickstudy.data import resume
from quickstudy.data.download import Remote, fetch
from quickstudy.data.resume import CHUNK
from quickstudy.errors import DataError

CONTENT = bytes(range(256)) * 2000
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture
def server(server: Any) -> Any:
    """Serves the file at ``/good`` and ``/plain``, and another one at ``/wrong``."""
    server.files = {"/good": CONTENT, "/plain": CONTENT, "/wrong": CONTENT[::-1]}
    return server


def remote(*urls: str, checksum: str = SHA256) -> Remote:
    return Remote("file.zip", checksum, urls)


@pytest.mark.parametrize("checksum", [SHA256, f"md5:{hashlib.md5(CONTENT).hexdigest()}"])
def test_a_file_is_fetched_once(server: Any, tmp_path: Path, checksum: str) -> None:
    told: list[tuple[int, int]] = []
    file = remote(server.url("good"), checksum=checksum)
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        assert fetch(file, folder, lambda done, total: told.append((done, total))) == folder / "file.zip"
        assert (folder / "file.zip").read_bytes() == CONTENT
    assert len(server.asked) == 1
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert told == sorted(told)
    assert os.listdir(folder) == ["file.zip"]


def test_the_next_mirror_is_tried(server: Any, tmp_path: Path) -> None:
    urls = (server.url("missing"), server.url("wrong"), server.url("good"), server.url("never"))
    assert fetch(remote(*urls), tmp_path).read_bytes() == CONTENT
    assert [path for path, _ in server.asked] == ["/missing", "/wrong", "/good"]
    assert os.listdir(tmp_path) == ["file.zip"]


def test_a_file_of_another_content_is_replaced(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file.zip").write_bytes(b"old")
    assert fetch(remote(server.url("good")), tmp_path).read_bytes() == CONTENT


def test_if_all_fail_each_is_listed_with_its_cause_and_the_way_by_hand(server: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/file"
    urls = (server.url("missing"), server.url("wrong"), closed, "nonsense://x")
    with pytest.raises(DataError) as raised:
        fetch(remote(*urls), tmp_path)
    lines = str(raised.value).splitlines()
    assert lines[0] == "cannot download file.zip:"
    assert lines[1] == f"  {urls[0]}: 404 Not Found"
    found = hashlib.sha256(CONTENT[::-1]).hexdigest()
    assert lines[2] == f"  {urls[1]}: wrong checksum: expected {SHA256}, found {found}; the file was removed"
    assert lines[3].startswith(f"  {closed}: ")
    assert "refused" in lines[3]
    assert lines[4].startswith("  nonsense://x: ")
    assert lines[5] == f"fetch file.zip yourself and put it at {tmp_path / 'file.zip'} (its checksum is {SHA256})"
    assert len(lines) == 6
    assert os.listdir(tmp_path) == []


def test_a_broken_download_goes_on_where_it_stopped(server: Any, tmp_path: Path) -> None:
    server.break_after = [5 * CHUNK + 10, 3 * CHUNK]
    assert fetch(remote(server.url("good")), tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, f"bytes={5 * CHUNK}-", f"bytes={8 * CHUNK}-"]
    assert os.listdir(tmp_path) == ["file.zip"]


def test_a_download_that_keeps_breaking_is_given_up_and_the_part_is_kept(server: Any, tmp_path: Path) -> None:
    server.break_after = [CHUNK] * 3
    with pytest.raises(DataError, match=r"/good: Connection broken: IncompleteRead\(.*\)\nfetch file"):
        fetch(remote(server.url("good")), tmp_path)
    assert (tmp_path / "file.zip.part").read_bytes() == CONTENT[: 3 * CHUNK]


def test_an_interrupted_download_goes_on_in_the_next_session(server: Any, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(remote(server.url("good")), tmp_path, interrupt)
    assert os.listdir(tmp_path) == ["file.zip.part"]
    assert fetch(remote(server.url("good")), tmp_path).read_bytes() == CONTENT
    assert server.asked[1][1] is not None
    assert os.listdir(tmp_path) == ["file.zip"]


@pytest.mark.parametrize("part", [b"of another file", CONTENT + b"!", CONTENT])
@pytest.mark.parametrize("path", ["good", "plain"])
def test_a_part_that_does_not_fit_is_thrown_away(server: Any, tmp_path: Path, part: bytes, path: str) -> None:
    (tmp_path / "file.zip.part").write_bytes(part)
    assert fetch(remote(server.url(path)), tmp_path).read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file.zip"]


def test_a_full_disk_is_not_blamed_on_the_mirror(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(url: str, start: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resume, "_get", full)
    with pytest.raises(DataError, match=r"cannot write .*file\.zip: No space left on device; free some space"):
        fetch(remote(server.url("good"), server.url("good")), tmp_path)


def test_room_on_the_disk_comes_first(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(CONTENT) - 1))
    with pytest.raises(DataError, match=r"No space left on device \(0\.5 MB are to come, and 0\.5 MB are free\); free"):
        fetch(remote(server.url("good")), tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file.zip.part").write_bytes(CONTENT[:10])  # the rest has room
    assert fetch(remote(server.url("good")), tmp_path).read_bytes() == CONTENT


def test_a_file_without_a_known_checksum(server: Any, tmp_path: Path) -> None:
    unknown = Remote("file.zip", None, (server.url("missing"), server.url("good")))
    assert fetch(unknown, tmp_path).read_bytes() == CONTENT
    with pytest.raises(DataError, match=r"put it at .*other\.zip \(no checksum of it is known\)"):
        fetch(Remote("other.zip", None, (server.url("missing"),)), tmp_path)
