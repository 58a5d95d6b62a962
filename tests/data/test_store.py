import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from quickstudy.data import store
from quickstudy.data.store import Packed, open_store, read_index, write_store
from quickstudy.errors import DataError

SHAPE = (3, 4, 5)


def some_classes(count: int = 5) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(f"class {c} ☃", rng.integers(0, 256, (c, *SHAPE), dtype=np.uint8)) for c in range(1, count + 1)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "stores" / "some"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def test_what_is_written_is_read(folder: Path) -> None:
    assert write_store(folder, some_classes(), SHAPE, {"from": ["here"]}) == folder
    opened = open_store(folder, "some")
    assert opened.names == tuple(name for name, _ in some_classes())
    for i, (_, images) in enumerate(some_classes()):
        assert torch.equal(opened.of_class(i), torch.from_numpy(images))
    assert read_index(folder)["origin"] == {"from": ["here"]}
    assert leftovers(folder) == ["some"]


def test_images_are_mapped_and_writing_to_them_does_not_reach_the_disk(folder: Path) -> None:
    write_store(folder, some_classes(), SHAPE, {})
    open_store(folder, "some").images.zero_()
    assert open_store(folder, "some").images.any()


def test_the_store_is_written_class_by_class(folder: Path) -> None:
    largest = 0

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal largest
        for c in range(40):
            yield f"{c}", np.zeros((50, *SHAPE), np.uint8)
            [temporary] = folder.parent.iterdir()
            largest = max(largest, (temporary / "images.npy").stat().st_size)

    write_store(folder, stream(), SHAPE, {})
    assert largest > 30 * 50 * 60


def test_nothing_is_visible_while_it_is_written(folder: Path) -> None:
    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for item in some_classes():
            assert not folder.exists()
            yield item

    write_store(folder, stream(), SHAPE, {})


@pytest.mark.parametrize("error", [DataError("image 3 is damaged"), KeyboardInterrupt()])
def test_an_interruption_leaves_nothing(folder: Path, error: BaseException) -> None:
    def stream() -> Iterator[tuple[str, np.ndarray]]:
        yield from some_classes()
        raise error

    with pytest.raises(type(error)):
        write_store(folder, stream(), SHAPE, {})
    assert leftovers(folder) == []


def test_a_full_disk_leaves_nothing_and_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(
        DataError, match=r"stores/some: No space left on device; free some space, or set QUICKSTUDY_CACHE"
    ):
        write_store(folder, some_classes(), SHAPE, {})
    assert leftovers(folder) == []


def test_a_write_that_the_system_refuses_leaves_nothing(folder: Path) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(DataError, match="File too large"):
            write_store(folder, [("large", np.zeros((1000, *SHAPE), np.uint8))], SHAPE, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert leftovers(folder) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"make it writable, or set QUICKSTUDY_CACHE"):
        write_store(tmp_path / "file" / "some", some_classes(), SHAPE, {})


def test_images_of_another_shape_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"'odd' has images uint8 \(1, 1, 1\), not uint8 \(3, 4, 5\)"):
        write_store(folder, [("odd", np.zeros((2, 1, 1, 1), np.uint8))], SHAPE, {})
    assert leftovers(folder) == []


def test_of_two_writers_the_first_stays(folder: Path) -> None:
    def slow() -> Iterator[tuple[str, np.ndarray]]:
        write_store(folder, some_classes(2), SHAPE, {"writer": "fast"})
        yield from some_classes(2)

    write_store(folder, slow(), SHAPE, {"writer": "slow"})
    assert read_index(folder)["origin"] == {"writer": "fast"}
    assert leftovers(folder) == ["some"]


# ------------------------------------------------------------------ continued packing


def counting(asked: list[int], stop: int | None = None) -> Callable[[int], Iterator[Packed]]:
    """Give the classes from a numbered one on, keep the numbers that were asked for, and break off before ``stop``."""

    def classes(first: int) -> Iterator[Packed]:
        asked.append(first)
        for number, (name, images) in enumerate(some_classes()[first:], first):
            if number == stop:
                raise KeyboardInterrupt
            yield Packed(name, images, [f"{name}/{i}" for i in range(number % 2)])

    return classes


def assert_complete(folder: Path) -> None:
    opened = open_store(folder, "some")
    assert opened.names == tuple(name for name, _ in some_classes())
    for i, (_, images) in enumerate(some_classes()):
        assert torch.equal(opened.of_class(i), torch.from_numpy(images))
    assert read_index(folder)["unreadable"] == ["class 2 ☃/0", "class 4 ☃/0"]
    assert leftovers(folder) == ["some"]


@pytest.mark.parametrize("stops", [(0,), (3,), (1, 1, 4)])
def test_an_interrupted_packing_is_continued(folder: Path, stops: tuple[int, ...]) -> None:
    asked: list[int] = []
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            write_store(folder, counting(asked, stop), SHAPE, {"of": 1})
        assert not folder.exists()
    write_store(folder, counting(asked), SHAPE, {"of": 1})
    assert asked == [0, *stops]
    assert_complete(folder)


@pytest.mark.parametrize("what", [b"\xff" * 30, b""])
def test_what_a_crash_leaves_half_written_is_done_again(folder: Path, what: bytes) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_store(folder, counting([], 3), SHAPE, {})
    part = folder.parent / ".some.part"
    with open(part / "images.npy", "ab") as file:
        file.write(what)
    with open(part / "journal.jsonl", "a") as file:
        file.write('["class 4 ')
    asked: list[int] = []
    write_store(folder, counting(asked), SHAPE, {})
    assert asked == [3]
    assert_complete(folder)


def test_another_origin_begins_afresh(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_store(folder, counting([], 3), SHAPE, {"files": "old"})
    asked: list[int] = []
    write_store(folder, counting(asked), SHAPE, {"files": "new"})
    assert asked == [0]
    assert_complete(folder)


@pytest.mark.parametrize("inner", [5, 2])
def test_without_locks_each_writer_has_a_folder_of_its_own(
    folder: Path, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")  # not on Windows

    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def slow(first: int) -> Iterator[Packed]:
        for number, item in enumerate(counting([])(first)):
            if number == 2:  # another writer comes, and finishes or breaks off
                with suppress(KeyboardInterrupt):
                    write_store(folder, counting(asked, inner), SHAPE, {"of": 1})
            yield item

    asked: list[int] = []
    monkeypatch.setattr(fcntl, "flock", refuse)
    write_store(folder, slow, SHAPE, {"of": 1})
    assert asked == [0]
    assert_complete(folder)


SCRIPT = """
import sys, time
import numpy as np
from pathlib import Path
from quickstudy.data.store import Packed, write_store

def classes(first):
    print("begins", first, flush=True)
    rng = np.random.default_rng(0)
    for c in range(1, 6):
        images = rng.integers(0, 256, (c, 3, 4, 5), dtype=np.uint8)
        if c > first:
            while c == int(sys.argv[2]):
                time.sleep(0.01)
            yield Packed(f"class {c} ☃", images, [f"class {c} ☃/0"] * (c in (2, 4)))

write_store(Path(sys.argv[1]), classes, (3, 4, 5), {})
"""


def test_a_killed_packing_is_continued_and_a_second_writer_waits(folder: Path) -> None:
    def start(stuck_at: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(folder), str(stuck_at)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    journal = folder.parent / ".some.part" / "journal.jsonl"
    first = start(4)
    while not journal.exists() or len(journal.read_text().splitlines()) < 4:
        assert first.poll() is None
        time.sleep(0.01)
    second = start(0)
    first.kill()  # its lock goes with it
    assert first.communicate()[0] == "begins 0\n"
    assert second.communicate(timeout=60)[0] == "begins 3\n"
    assert_complete(folder)


def cut(folder: Path) -> None:
    os.truncate(folder / "images.npy", (folder / "images.npy").stat().st_size - 1)


def empty(folder: Path) -> None:
    (folder / "images.npy").write_bytes(b"")


def pickle(folder: Path) -> None:
    np.save(folder / "images.npy", np.array([{}], dtype=object))


def floats(folder: Path) -> None:
    np.save(folder / "images.npy", np.zeros((15, *SHAPE)))


def fewer(folder: Path) -> None:
    np.save(folder / "images.npy", np.zeros((14, *SHAPE), np.uint8))


def no_images(folder: Path) -> None:
    (folder / "images.npy").unlink()


def no_index(folder: Path) -> None:
    (folder / "index.json").unlink()


def half_index(folder: Path) -> None:
    (folder / "index.json").write_text((folder / "index.json").read_text()[:40])


def change_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))


def newer(folder: Path) -> None:
    change_index(folder, format=2)


def shuffled(folder: Path) -> None:
    change_index(folder, offsets=[0, 3, 1, 6, 10, 15])


def ragged(folder: Path) -> None:
    change_index(folder, offsets=[0, 15])


def wordy(folder: Path) -> None:
    change_index(folder, offsets=["0", "15"])


DAMAGES = [cut, empty, pickle, floats, fewer, no_images, no_index, half_index, newer, shuffled, ragged, wordy]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_named_and_the_remedy_given(folder: Path, damage) -> None:
    write_store(folder, some_classes(), SHAPE, {})
    damage(folder)
    with pytest.raises(DataError, match=r"stores/some are damaged or of another version \(.*\); remove that folder"):
        open_store(folder, "some")
