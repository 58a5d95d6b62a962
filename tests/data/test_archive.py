import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from quickstudy.data.archive import Archive, TarArchive, open_files
from quickstudy.errors import DataError

Zip = Callable[..., Path]


def test_files_are_listed_and_read(make_zip: Zip) -> None:
    with Archive(make_zip({"a/": b"", "a/b.txt": b"hello", "a/c..d": b"dots"})) as archive:
        assert archive.names == ["a/b.txt", "a/c..d"]
        assert archive.read("a/b.txt") == b"hello"


def test_threads_may_read_at_once(make_zip: Zip) -> None:
    files = {f"{i}": bytes([i]) * 10_000 for i in range(100)}
    with Archive(make_zip(files)) as archive, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(archive.read, archive.names)) == list(files.values())


def test_a_folder_has_the_same_interface(tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "b.txt").write_bytes(b"hello")
    with open_files(tmp_path / "set") as files:
        assert files.names == ["set/a/b.txt"]
        assert files.read("set/a/b.txt") == b"hello"
        with pytest.raises(DataError, match=r"cannot read .*set/none: No such file"):
            files.read("set/none")


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "C:evil", "a\\..\\..\\evil", "\\evil"]
)
def test_a_member_outside_of_the_archive_is_refused(make_zip: Zip, name: str) -> None:
    with pytest.raises(DataError, match="has a member outside of itself"):
        Archive(make_zip({"fine": b"", name: b""}))


def test_a_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="has a link for a member, 'link'"):
        Archive(tmp_path / "files.zip")


def test_an_absurd_expansion_is_refused_before_anything_is_read(make_zip: Zip) -> None:
    path = make_zip({f"{i}": bytes(1_000_000) for i in range(3)})
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match="most that was expected: do not use it"):
        Archive(path, limit=2_000_000)
    Archive(path, limit=3_000_000).close()


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_archive(make_zip: Zip, keep: float) -> None:
    path = make_zip({f"{i}": b"content" * 20 for i in range(50)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(DataError, match=r"cannot open the archive .*files\.zip: .*; it may be truncated"):
        Archive(path)


def test_a_missing_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.zip: No such file or directory"):
        Archive(tmp_path / "none.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_named(tmp_path: Path, method: int) -> None:
    path = tmp_path / "files.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("fine", b"fine")
        archive.writestr("a/broken", bytes(range(256)) * 10)
    content = bytearray(path.read_bytes())
    where = content.index(b"a/broken") + 30
    content[where : where + 20] = b"\xff" * 20
    path.write_bytes(content)
    with Archive(path) as archive:
        assert archive.read("fine") == b"fine"
        with pytest.raises(DataError, match=r"cannot read a/broken in the archive .*files\.zip"):
            archive.read("a/broken")


def test_a_name_that_is_not_there(make_zip: Zip) -> None:
    with Archive(make_zip({"a": b""})) as archive, pytest.raises(DataError, match="cannot read b"):
        archive.read("b")


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix != ".tar" else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["files.tar", "files.tgz", "files.tar.gz"])
def test_a_tar_archive_is_read_in_any_order_by_several_threads(tmp_path: Path, cache: Path, name: str) -> None:
    files = {f"a/{i}": bytes([i]) * 10_000 for i in range(100)}
    with open_files(tar_of(tmp_path / name, files)) as archive, ThreadPoolExecutor(8) as pool:
        names = sorted(archive.names, reverse=True)
        assert list(pool.map(archive.read, names)) == [files[name] for name in names]
        with pytest.raises(DataError, match="cannot read none in the archive"):
            archive.read("none")
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "C:\\evil"])
def test_a_tar_member_outside_of_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="has a member outside of itself"):
        TarArchive(tar_of(tmp_path / "files.tgz", {"fine": b"", name: b""}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_archive_is_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "files.tar", "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = kind, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match="has a link for a member, 'link'"):
        TarArchive(tmp_path / "files.tar")


def test_a_tar_bomb_is_refused_while_it_inflates(tmp_path: Path, cache: Path) -> None:
    path = tar_of(tmp_path / "files.tgz", {f"{i}": bytes(2_000_000) for i in range(5)})
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match="most that was expected: do not use it"):
        TarArchive(path, limit=3_000_000)
    assert list(cache.iterdir()) == []
    TarArchive(path, limit=11_000_000).close()


@pytest.mark.parametrize(
    ("name", "keep"),
    [(name, keep) for name in ("files.tar", "files.tgz") for keep in (0, 10, 0.5)] + [("files.tgz", 0.99)],
)
def test_a_truncated_tar_archive(tmp_path: Path, name: str, keep: float) -> None:
    noise = np.random.default_rng(0)
    path = tar_of(tmp_path / name, {f"{i}": noise.bytes(3000) for i in range(50)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(DataError, match=r"cannot open the archive .*files\.(tar|tgz): .*; it may be truncated"):
        TarArchive(path)


def test_a_missing_tar_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tgz: No such file or directory"):
        open_files(tmp_path / "none.tgz")
