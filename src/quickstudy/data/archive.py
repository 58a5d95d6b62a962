"""Files of datasets, in a zip archive (from strangers, read in memory, never extracted) or in a folder."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType

from quickstudy.errors import DataError

GIB = 1024**3


class Archive:
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
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(
                f"cannot open the archive {path}: {reason}; it may be truncated: remove it and fetch it again"
            ) from error
        try:
            self._check(limit)
        except DataError:
            self._zip.close()
            raise
        self.names: list[str] = [info.filename for info in self._zip.infolist() if not info.is_dir()]

    def _check(self, limit: int) -> None:
        size = 0
        for info in self._zip.infolist():
            name = info.filename
            outside = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
            if outside or ".." in PureWindowsPath(name).parts:  # Windows paths split at both kinds of slash
                raise DataError(f"the archive {self.path} has a member outside of itself, {name!r}: do not use it")
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(f"the archive {self.path} has a link for a member, {name!r}: do not use it")
            size += info.file_size
        if size > limit:
            raise DataError(
                f"the archive {self.path} would unpack to {size / GIB:,.1f} GiB, and {limit / GIB:,.1f} GiB are the "
                "most that was expected: do not use it"
            )

    def read(self, name: str) -> bytes:
        """Return one file; its checksum is verified. Several threads may read at once.

        Raises:
            DataError: the file is damaged, encrypted, or not in the archive.
        """
        try:
            return self._zip.read(name)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
            raise DataError(
                f"cannot read {name} in the archive {self.path}: {error}; remove the archive and fetch it again"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Folder:
    """The files of a folder, with the interface of :class:`Archive`; names begin with the folder's own name.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = [
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

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


@dataclass(frozen=True)
class Member:
    """One file of an archive or a folder, with what a ``Path`` offers for reading it.

    Args:
        files: where it is.
        name: one of ``files.names``.
    """

    files: Archive | Folder
    name: str

    def read_bytes(self) -> bytes:
        """Return its content.

        Raises:
            DataError: it cannot be read.
        """
        return self.files.read(self.name)

    def __str__(self) -> str:
        return f"{self.name} in {self.files.path}"


def open_files(path: Path, *, limit: int = 64 * GIB) -> Archive | Folder:
    """Open a folder, or else a zip archive that unpacks to at most ``limit`` bytes.

    Raises:
        DataError: it is no archive, or not a safe one.
    """
    return Folder(path) if path.is_dir() else Archive(path, limit=limit)
