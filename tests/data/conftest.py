import hashlib
import os
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from quickstudy.data.download import Remote
from quickstudy.data.images import ImageClasses

OWN_DATA = os.environ.get("QUICKSTUDY_DATA")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the data or the cache of the person who runs it."""
    monkeypatch.delenv("QUICKSTUDY_DATA", raising=False)
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def own_data() -> str:
    if not OWN_DATA:
        pytest.skip("QUICKSTUDY_DATA is not set")
    return OWN_DATA


@pytest.fixture
def classes() -> ImageClasses:
    """Twelve classes of 9 to 20 images; the two channels of every image are its class and its number."""
    counts = np.array([9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    images = torch.zeros(int(counts.sum()), 2, 3, 3, dtype=torch.uint8)
    for c, (start, count) in enumerate(zip(offsets, counts)):
        images[start : start + count, 0] = c
        images[start : start + count, 1] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    return ImageClasses.from_offsets(images, offsets, [f"class{c}" for c in range(12)], "numbered")


@pytest.fixture
def make_zip(tmp_path: Path) -> Callable[..., Path]:
    def make(files: dict[str, bytes], name: str = "files.zip") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in files.items():
                archive.writestr(member, content)
        return path

    return make


@dataclass
class Server:
    """A real server of some files; it knows no ranges of those in ``/plain``."""

    port: int
    files: dict[str, bytes] = field(default_factory=dict)
    """By path, such as ``/a.zip``; others are not found."""

    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and range of every request."""

    break_after: list[int] = field(default_factory=list)
    """Bytes after which the next answers break off."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def remote(self, name: str, content: bytes) -> Remote:
        """Serve a file, and return where it is."""
        self.files[f"/{name}"] = content
        return Remote(name, f"md5:{hashlib.md5(content).hexdigest()}", (self.url("gone"), self.url(name)))


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.asked.append((self.path, asked))
            content = state.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.path != "/plain" else 0  # type: ignore[index]
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : start + state.break_after.pop(0) if state.break_after else None])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as real:
        state = Server(real.server_address[1])
        thread = threading.Thread(target=real.serve_forever, args=(0.01,))
        thread.start()
        yield state
        real.shutdown()
        thread.join()
