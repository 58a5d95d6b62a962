"""Files of datasets, in an archive (from strangers, read in memory, never extracted) or in a folder."""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
import tempfile
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import BinaryIO

from quickstudy.errors import DataError
from quickstudy.files import cache_folder

GIB = 1024**3

TAR_SUFFIXES = (".tar", ".tgz", ".tar.gz")


class Source(ABC):
    """Files that can be read by name; several threads may read at once."""

    path: Path
    """Of the archive or the folder."""

    names: list[str]

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return one file.

        Raises:
            DataError: it is not there, or cannot be read.
        """

    def close(self) -> None:  # noqa: B027 - a folder has nothing to close
        """Close what is open."""

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Archive(Source):
    """The files of a zip archive that is safe to read.

    Args:
        path: the archive.
        limit: most bytes that its files may take when unpacked, all together.

    Raises:
        DataError: it is missing, truncated or no zip archive, a member would leave the folder it is unpacked in or is
            a link, or it would unpack to more than ``limit``.
    """

    def __init__(self, path: Path, *, limit: int = 64 * GIB) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise _unopened(path, error) from error
        members = self._zip.infolist()
        try:
            for info in members:
                _refuse(path, info.filename, link=stat.S_ISLNK(info.external_attr >> 16))
            _bound(path, sum(info.file_size for info in members), limit)
        except DataError:
            self._zip.close()
            raise
        self.names = [info.filename for info in members if not info.is_dir()]

    def read(self, name: str) -> bytes:
        """Return one file; its checksum is verified.

        Raises:
            DataError: the file is damaged, encrypted, or not in the archive.
        """
        try:
            return self._zip.read(name)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
            raise _unread(self.path, name, error) from error

    def close(self) -> None:
        """Close the file."""
        self._zip.close()


class TarArchive(Source):
    """The files of a tar archive that is safe to read.

    One that is compressed as a whole (``.tgz``, ``.tar.gz``) is inflated first, into a file without a name in the
    cache, which is gone when the archive is closed: its members can then be read in any order.

    Args:
        path: the archive.
        limit: most bytes that it may take when inflated.

    Raises:
        DataError: it is missing, truncated or no tar archive, a member would leave the folder it is unpacked in or is
            a link, it would inflate to more than ``limit``, or there is no room for that.
    """

    def __init__(self, path: Path, *, limit: int = 64 * GIB) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = path.open("rb") if path.suffix == ".tar" else _inflated(path, limit)
        except (OSError, EOFError, zlib.error) as error:
            raise _unopened(path, error) from error
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                members = tar.getmembers()
            for member in members:
                _refuse(path, member.name, link=member.issym() or member.islnk())
            _bound(path, sum(member.size for member in members), limit)
        except (OSError, EOFError, tarfile.TarError) as error:
            self._file.close()
            raise _unopened(path, error) from error
        except DataError:
            self._file.close()
            raise
        self._spans = {one.name: (one.offset_data, one.size) for one in members if one.isreg() and not one.issparse()}
        self.names = [*self._spans]

    def read(self, name: str) -> bytes:
        """Return one file.

        Raises:
            DataError: the file is not in the archive, or the archive ends within it.
        """
        start, size = self._spans.get(name, (0, -1))
        if size < 0:
            raise _unread(self.path, name, "it is not there")
        with self._lock:
            self._file.seek(start)
            content = self._file.read(size)
        if len(content) < size:
            raise _unread(self.path, name, "the archive ends within it")
        return content

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _inflated(path: Path, limit: int) -> BinaryIO:
    """Return a temporary file with the inflated content of a gzip file."""
    folder, size = cache_folder(), 0
    with gzip.open(path) as packed:
        packed.peek(1)  # whatever is wrong with the archive itself comes before anything is written
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it stays open as long as the archive
        except OSError as error:
            raise _no_room(path, folder, error) from error
        try:
            while chunk := packed.read(1 << 20):
                size += len(chunk)
                _bound(path, size, limit)
                try:
                    file.write(chunk)
                except OSError as error:
                    raise _no_room(path, folder, error) from error
        except BaseException:
            file.close()
            raise
    file.seek(0)
    return file


def _refuse(path: Path, name: str, *, link: bool) -> None:
    outside = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
    if outside or ".." in PureWindowsPath(name).parts:  # Windows paths split at both kinds of slash
        raise DataError(f"the archive {path} has a member outside of itself, {name!r}: do not use it")
    if link:
        raise DataError(f"the archive {path} has a link for a member, {name!r}: do not use it")


def _bound(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise DataError(
            f"the archive {path} would unpack to {size / GIB:,.1f} GiB or more, and {limit / GIB:,.1f} GiB are the "
            "most that was expected: do not use it"
        )


def _no_room(path: Path, folder: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot unpack {path} in {folder}: {error.strerror or error}; free some space or make it writable, or set "
        "QUICKSTUDY_CACHE to a folder elsewhere"
    )


def _unopened(path: Path, error: Exception) -> DataError:
    reason = (error.strerror or error) if isinstance(error, OSError) else error
    return DataError(f"cannot open the archive {path}: {reason}; it may be truncated: remove it and fetch it again")


def _unread(path: Path, name: str, reason: object) -> DataError:
    return DataError(f"cannot read {name} in the archive {path}: {reason}; remove the archive and fetch it again")


class Folder(Source):
    """The files of a folder, with the interface of :class:`Archive`; names begin with the folder's own name.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = [
            Path(path.name, Path(where).relative_to(path), file).as_posix()
            for where, _, files in os.walk(path)
            for file in files
        ]

    def read(self, name: str) -> bytes:
        """Return one file.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return (self.path.parent / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self.path.parent / name}: {error.strerror}") from error


@dataclass(frozen=True)
class Member:
    """One file of an archive or a folder, with what a ``Path`` offers for reading it.

    Args:
        files: where it is.
        name: one of ``files.names``.
    """

    files: Source
    name: str

    def read_bytes(self) -> bytes:
        """Return its content.

        Raises:
            DataError: it cannot be read.
        """
        return self.files.read(self.name)

    def __str__(self) -> str:
        return f"{self.name} in {self.files.path}"


def open_files(path: Path, *, limit: int = 64 * GIB) -> Source:
    """Open a folder, or an archive that unpacks to at most ``limit`` bytes: tar by its name, or else zip.

    Raises:
        DataError: it is no archive, or not a safe one.
    """
    if path.is_dir():
        return Folder(path)
    return (TarArchive if path.name.endswith(TAR_SUFFIXES) else Archive)(path, limit=limit)
