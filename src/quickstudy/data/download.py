"""Downloads: several addresses for every file, a checksum, and nothing half-fetched under the file's name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quickstudy.data.progress import Progress, download_bar
from quickstudy.data.resume import ResumingDownloader
from quickstudy.errors import DataError

if TYPE_CHECKING:
    from requests import RequestException

ATTEMPTS = 3
"""How often one mirror is asked to go on after the connection broke."""


@dataclass(frozen=True)
class Remote:
    """A file on the net.

    Args:
        name: what it is called on disk.
        checksum: ``"md5:..."`` or ``"sha256:..."``, in hexadecimal; ``None`` if none is known.
        mirrors: addresses of the same file, tried in turn.
    """

    name: str
    checksum: str | None
    mirrors: tuple[str, ...]


def fetch(remote: Remote, folder: Path, progress: Progress | None = None) -> Path:
    """Return the file in ``folder``, after downloading it if it is not there with the right checksum.

    What a broken connection leaves behind is kept as ``<name>.part``, and the next attempt continues it.

    Args:
        remote: what to fetch.
        folder: where it goes; made if need be.
        progress: called with the bytes received so far, and the bytes in all (0 if not known); if not given, a bar
            is drawn on a terminal.

    Raises:
        DataError: no mirror had the right file (the message lists each with the cause, and says how to fetch it by
            hand), or it cannot be written.
    """
    failures: list[tuple[str, str]] = []
    with download_bar(remote.name) as bar:
        for url in remote.mirrors:
            try:
                failure = _fetch_from(url, remote, folder, progress or bar)
            except OSError as error:  # the disk, not the net: another mirror would not help
                raise DataError(
                    f"cannot write {folder / remote.name}: {error.strerror or error}; free some space or make the "
                    "folder writable, or set QUICKSTUDY_CACHE to a folder elsewhere"
                ) from error
            if failure is None:
                return folder / remote.name
            failures.append((url, failure))
    listed = "".join(f"\n  {url}: {failure}" for url, failure in failures)
    raise DataError(
        f"cannot download {remote.name}:{listed}\nfetch {remote.name} yourself and put it at {folder / remote.name} "
        f"({f'its checksum is {remote.checksum}' if remote.checksum else 'no checksum of it is known'})"
    )


def _fetch_from(url: str, remote: Remote, folder: Path, progress: Progress) -> str | None:
    """Download from one mirror, and return why that failed, or None."""
    import pooch
    from requests import RequestException

    pooch.get_logger().setLevel("WARNING")  # at its default it announces every file on standard error
    failure = "not tried"
    for _ in range(ATTEMPTS):
        downloader = ResumingDownloader(folder / f"{remote.name}.part", progress)
        try:
            pooch.retrieve(url, remote.checksum, remote.name, folder, downloader=downloader)  # type: ignore[arg-type]
            return None
        except RequestException as error:
            failure = _cause(error)
            if not downloader.received:
                break
        except ValueError as error:  # pooch's word for a wrong checksum; it has removed the file
            found = re.search(r"but got (\w+)", str(error))
            what = f"found {found[1]}" if found else str(error)
            failure = f"wrong checksum: expected {remote.checksum}, {what}; the file was removed"
            if not downloader.resumed:  # else its beginning may stem from another mirror: start afresh
                break
    return failure


def _cause(error: RequestException) -> str:
    """Say in few words what went wrong with a request."""
    from requests import HTTPError, Timeout

    if isinstance(error, HTTPError) and error.response is not None:
        return f"{error.response.status_code} {error.response.reason}"
    if isinstance(error, Timeout):
        return "no answer in time"
    inner = error.args[0] if error.args else error
    inner = getattr(inner, "reason", None) or inner  # of urllib3's MaxRetryError
    text = inner.args[0] if isinstance(inner, Exception) and inner.args and isinstance(inner.args[0], str) else inner
    return re.sub(r"^.*?<[^>]*>: |^\w+\([^)]*\): ", "", str(text))
