"""A downloader for pooch that goes on where a broken download stopped."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickstudy.data.progress import Progress

if TYPE_CHECKING:
    from requests import Response

TIMEOUT = (10, 60)
"""Seconds to wait for a connection, and for the next bytes."""

CHUNK = 1 << 14
"""Bytes read at a time; an unfinished chunk is lost when the connection breaks."""


class ResumingDownloader:
    """Download over HTTP; what an interrupted download has received is kept in ``part``.

    Pooch gives every download a file name of its own. The part is moved to that name at the start (so of several
    processes only one continues it), and moved back if the download breaks.

    Args:
        part: where an unfinished download is kept.
        progress: called with the bytes so far and in all.
    """

    def __init__(self, part: Path, progress: Progress) -> None:
        self.part = part
        self.progress = progress
        self.received = 0
        """Bytes that have come in this attempt."""
        self.resumed = False
        """Whether the file began with what an earlier attempt had left."""

    def __call__(self, url: str, output_file: str, pooch: Any, check_only: bool = False) -> None:
        """Download ``url`` to ``output_file``.

        Raises:
            requests.RequestException: the server cannot be reached, refuses, or breaks off.
            OSError: the file cannot be written.
        """
        with suppress(FileNotFoundError):
            os.replace(self.part, output_file)
        try:
            self._continue(url, output_file)
        except BaseException:
            if os.path.getsize(output_file):
                os.replace(output_file, self.part)
            raise

    def _continue(self, url: str, output_file: str) -> None:
        start = os.path.getsize(output_file)
        response = _get(url, start)
        if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            if response.status_code != 200:  # such as 416, when the part is as long as the file or longer
                response.close()
                response = _get(url, 0)
            start = 0
        with response:
            response.raise_for_status()
            self.resumed = start > 0
            total = start + int(response.headers.get("Content-Length", -start))
            free = shutil.disk_usage(self.part.parent).free
            if total - start > free:
                room = f"{(total - start) / 1e6:,.1f} MB are to come, and {free / 1e6:,.1f} MB are free"
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({room})")
            with open(output_file, "ab" if start else "wb") as file:
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    self.received += len(chunk)
                    self.progress(start + self.received, total)


def _get(url: str, start: int) -> Response:
    import requests

    # Compressed on the way, the bytes could neither be counted nor continued.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    return requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
