"""Embeddings: both layouts on disk, tasks of vectors, and pickles that are read without being run."""

from __future__ import annotations

import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quickstudy.__main__ import main
from quickstudy.data import Embeddings, contact_sheet, write_embeddings
from quickstudy.data.base import SPLITS
from quickstudy.data.embeddings import FILES, Layout, read_embeddings
from quickstudy.data.unpickle import load_pickle
from quickstudy.errors import DataError
from quickstudy.task import TaskShape

WIDTH = 3


def vectors(classes: int, each: int, first: int = 0) -> torch.Tensor:
    """Rows that tell their class and their number."""
    rows = torch.zeros(classes * each, WIDTH)
    rows[:, 0] = torch.arange(first, first + classes).repeat_interleave(each)
    rows[:, 1] = torch.arange(each).repeat(classes)
    return rows


def names(split: str, classes: int, each: int) -> list[str]:
    return [f"{split}{number}" for number in range(classes) for _ in range(each)]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write six, four and three classes of the splits, of 5 examples each."""

    def write(folder: str, layout: Layout = "own") -> Path:
        for first, (split, classes) in zip((0, 6, 10), zip(SPLITS, (6, 4, 3))):
            write_embeddings(tmp_path / folder, split, vectors(classes, 5, first), names(split, classes, 5), layout)
        return tmp_path

    return write


@pytest.mark.parametrize("layout", FILES)
def test_what_was_written_is_read(tmp_path: Path, layout: Layout) -> None:
    rows = torch.randn(7, WIDTH, dtype=torch.float64)
    classes = list("abacbac")
    for given in (rows, rows.numpy()):
        path = write_embeddings(tmp_path, "val", given, classes, layout)
        assert path == tmp_path / FILES[layout].format("val")
        embeddings, found = read_embeddings(tmp_path, "val", layout)
        assert torch.equal(embeddings, rows.float())
        assert found == classes


@pytest.mark.filterwarnings("ignore:numpy.core")
def test_the_layout_of_leo_is_for_its_authors_code(tmp_path: Path) -> None:
    """Which knows NumPy by its old names, and takes each key apart."""
    path = write_embeddings(tmp_path, "val", vectors(2, 2), ["n01", "n01", "n02", "n02"], "leo")
    assert b"numpy._core" not in path.read_bytes()
    content = pickle.loads(path.read_bytes(), encoding="latin1")
    assert content["embeddings"].dtype == np.float32
    fields = [key.split("-") for key in content["keys"]]
    assert [label for _, label, _ in fields] == ["n01", "n01", "n02", "n02"]
    assert all(file.split("_")[0] == label for _, label, file in fields)


@pytest.mark.parametrize(
    ("of", "folder", "layout"),
    [
        ("embeddings", "", "own"),
        ("birds", "birds", "own"),
        ("miniimagenet", "miniImageNet/center", "leo"),
        ("tieredimagenet", "tieredImageNet/center", "leo"),
    ],
)
def test_tasks_hold_the_embeddings_as_they_are(
    written: Callable[..., Path], of: str, folder: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = written(folder, layout)
    dataset = Embeddings(of, root=str(root))
    assert dataset.name == of
    assert dataset.location() == f"in {dataset.prepare()}" == f"in {root / folder}"
    for split, first, count in (("train", 0, 6), ("val", 6, 4), ("test", 10, 3)):
        source = dataset.split(split)
        assert source.names == tuple(f"{split}{number}" for number in range(count))
        task = source.tasks(TaskShape(3, 2, 3), 0, 4, seed=0)
        assert task.support_x.shape == (4, 6, WIDTH)
        assert task.query_x.shape == (4, 9, WIDTH)
        assert task.query_x.dtype == torch.float32
        both = torch.cat([task.support_x.view(4, 3, 2, -1), task.query_x.view(4, 3, 3, -1)], dim=2)
        assert (both[..., 0] == both[:, :, :1, 0]).all()  # one class, all five of its examples
        assert torch.equal(both[..., 1].sort(-1).values, torch.arange(5.0).expand(4, 3, -1))
        assert set(both[..., 0].unique().tolist()) <= {*map(float, range(first, first + count))}
    monkeypatch.setenv("QUICKSTUDY_DATA", str(root))
    shutil.move(root / (folder or "train.safetensors"), root / "away")
    with pytest.raises(DataError, match=f"{of}: .* are in none of these folders"):
        Embeddings(of).split("train")
    assert Embeddings(of).location() is None


def test_places_are_searched_by_name(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTUDY_DATA", str(written("embeddings")))
    assert len(Embeddings().split("train")) == 6
    with pytest.raises(DataError, match="root"):  # those of something else are not taken for those of miniImageNet
        Embeddings("miniimagenet").split("train")
    written("embeddings/miniImageNet/multiview", "leo")
    assert Embeddings("miniimagenet", crop="multiview").split("test").counts.tolist() == [5, 5, 5]
    with pytest.raises(DataError, match="center"):
        Embeddings("miniimagenet").split("test")


def test_classes_whose_rows_are_scattered(tmp_path: Path) -> None:
    rows = torch.arange(12.0).view(6, 2)
    for split in SPLITS:
        write_embeddings(tmp_path, split, rows, list("babcca"))
    source = Embeddings(root=str(tmp_path)).split("train")
    assert source.names == ("b", "a", "c")
    assert torch.equal(source.of_class(0), rows[[0, 2]])
    assert torch.equal(source.of_class(1), rows[[1, 5]])
    assert torch.equal(source.of_class(2), rows[[3, 4]])


def test_training_on_the_classes_of_validation_too(written: Callable[..., Path]) -> None:
    for folder, layout in (("", "own"), ("miniImageNet/center", "leo")):
        of = "miniimagenet" if folder else "embeddings"
        dataset = Embeddings(of, train_on_val=True, root=str(written(folder, layout)))
        source = dataset.split("train")
        assert source.names == (*(f"train{i}" for i in range(6)), *(f"val{i}" for i in range(4)))
        assert source.images[:, 0].tolist() == [float(c) for c in range(10) for _ in range(5)]
        assert dataset.split("val").names == tuple(f"val{i}" for i in range(4))
        assert len(dataset.split("test")) == 3


def test_no_class_is_in_two_splits(tmp_path: Path) -> None:
    for split in SPLITS:
        write_embeddings(tmp_path, split, vectors(2, 3), list("aaabbb"))
    with pytest.raises(DataError, match=r"the class a is in both train and val"):
        Embeddings(train_on_val=True, root=str(tmp_path)).split("train")


def test_classes_may_be_numbers_and_rows_are_finite(tmp_path: Path) -> None:
    rows = vectors(2, 2)
    for labels in ([0, 0, 1, 1], np.array([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])):
        write_embeddings(str(tmp_path), "val", rows, labels)
        assert read_embeddings(tmp_path, "val")[1] == ["0", "0", "1", "1"]
    with pytest.raises(DataError, match="finite"):
        write_embeddings(tmp_path, "val", rows / 0, [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"of": "tieredimagenet", "crop": "multiview"}, "only miniImageNet has"),
        ({"crop": "centre"}, "'center' or 'multiview', not 'centre'"),
    ],
)
def test_what_there_is_not_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Embeddings(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("valid", vectors(1, 2), ["a", "a"]), "'valid'"),
        (("val", vectors(1, 2), ["a"]), r"\[2, 3\] and 1 names"),
        (("val", torch.zeros(4), ["a"] * 4), r"\[4\]"),
        (("val", torch.zeros(0, 3), []), "0 names"),
        (("val", vectors(1, 2), ["a-b", "c"], "leo"), "'a-b'"),
        (("val", vectors(1, 2), ["a", "black_bird"], "leo"), "'black_bird'"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, arguments: tuple, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_embeddings(tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["0-a-b_0", "0-a", "0-a-a_0-1", "plain", "0-a_1-a_1"])
def test_a_key_must_name_its_class_twice(tmp_path: Path, key: str) -> None:
    leo_file(tmp_path, [key, "1-c-c_1"])
    with pytest.raises(DataError, match="the key"):
        read_embeddings(tmp_path, "train", "leo")


def test_images_are_named_once(tmp_path: Path) -> None:
    leo_file(tmp_path, ["0-a-a_0", "1-a-a_0"])
    with pytest.raises(DataError, match="2 keys name 1 different images"):
        read_embeddings(tmp_path, "train", "leo")


def leo_file(folder: Path, keys: list[str], **others: Any) -> None:
    content = {"keys": keys, "embeddings": np.zeros((len(keys), WIDTH))} | others
    (folder / "train_embeddings.pkl").write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"embeddings": np.zeros((3, WIDTH))}, r"\[3, 3\], and 2 have a class"),
        ({"embeddings": np.full((2, WIDTH), np.nan)}, "not all embeddings are finite"),
        ({"embeddings": "none"}, "no embeddings and keys"),
        ({"embeddings": [[1.0], [2.0, 3.0]]}, "no embeddings and keys"),
    ],
)
def test_damaged_contents_are_named(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    leo_file(tmp_path, ["0-a-a_0", "1-a-a_1"], **entries)
    with pytest.raises(DataError, match=rf"train_embeddings.pkl are damaged .*{message}"):
        read_embeddings(tmp_path, "train", "leo")


@pytest.mark.parametrize("layout", FILES)
def test_a_damaged_file_is_named(written: Callable[..., Path], layout: Layout) -> None:
    path = written("", layout) / FILES[layout].format("train")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=f"{path.name}.* damaged"):
        Embeddings(root=str(path.parent)).split("train")


def test_they_are_no_pictures(written: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="embeddings, meta-train classes: these are not images"):
        contact_sheet(Embeddings(root=str(written(""))).split("train"), tmp_path / "sheet.png")


def test_those_of_leo_are_downloaded_and_unpacked(
    written: Callable[..., Path],
    make_zip: Callable[..., Path],
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    root = written("embeddings/miniImageNet/center", "leo")
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.pkl")}
    content = make_zip({"embeddings/README": b"", **files}).read_bytes()
    monkeypatch.setattr("quickstudy.data.embeddings.ARCHIVE", server.remote("embeddings.zip", content))
    for _ in range(2):
        assert main(["data", "get", "embeddings"]) == 0
        assert "downloads/embeddings" in capsys.readouterr().out
    assert [path for path, _ in server.asked] == ["/gone", "/embeddings.zip"]
    assert len(Embeddings("miniimagenet").split("train")) == 6
    folder = Embeddings("miniimagenet").prepare().parents[1]
    assert [path.name for path in folder.iterdir()] == ["miniImageNet"]


def test_another_archive_is_not_unpacked(
    make_zip: Callable[..., Path], server: Any, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    content = make_zip({"embeddings/other/center/train_embeddings.pkl": b""}).read_bytes()
    monkeypatch.setattr("quickstudy.data.embeddings.ARCHIVE", server.remote("embeddings.zip", content))
    with pytest.raises(DataError, match=r"holds no embeddings of miniImageNet or tieredImageNet: remove it"):
        Embeddings.get()


# ------------------------------------------------------------------ pickles


def short(text: bytes) -> bytes:
    """A string as Python 2 pickled it: SHORT_BINSTRING, or BINSTRING."""
    return (b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + struct.pack("<i", len(text))) + text


def python2_array(array: np.ndarray) -> bytes:
    """The opcodes with which Python 2 saved an array in protocol 2."""
    shape = b"".join(b"K" + bytes([size]) for size in array.shape) + {1: b"\x85", 2: b"\x86"}[array.ndim]
    order = b"<" if array.dtype.kind == "f" else b"|"
    size = array.dtype.itemsize if array.dtype.kind == "S" else -1
    alignment = 1 if array.dtype.kind == "S" else -1
    state = b"K\x03" + short(order) + b"NNNJ" + struct.pack("<i", size) + b"J" + struct.pack("<i", alignment) + b"K\x00"
    kind = b"cnumpy\ndtype\n" + short(array.dtype.str[1:].encode()) + b"K\x00K\x01\x87R(" + state + b"tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R"
    return made + b"(K\x01" + shape + kind + b"\x89" + short(array.tobytes()) + b"tb"


def test_pickles_of_python_2(tmp_path: Path) -> None:
    """Byte strings everywhere, some of them beyond ASCII, as in the files of LEO's authors."""
    rows = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH) - 1.7
    keys = np.array([b"0-n01-n01_7.JPEG", b"1-n02-n02_caf\xe9.JPEG"])
    content = b"\x80\x02}(" + short(b"embeddings") + python2_array(rows) + short(b"keys") + python2_array(keys)
    content += short(b"labels") + b"](" + short(b"caf\xe9") + b"K\x07e" + b"u."
    path = tmp_path / "train_embeddings.pkl"
    path.write_bytes(content)
    assert load_pickle(path)["labels"] == ["café", 7]
    embeddings, found = read_embeddings(tmp_path, "train", "leo")
    assert torch.equal(embeddings, torch.from_numpy(rows))
    assert found == ["n01", "n02"]


ARRAYS = [
    np.arange(6, dtype=np.uint8).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(3, dtype=">i4"),
    np.array([True, False]),
    np.array(["a", "ß"]),
    np.array([b"a", b"\xff"]),
    np.array(["a", "long"], dtype=object),
    np.array(3.5),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: array.dtype.str + str(array.shape))
def test_arrays_of_every_protocol(tmp_path: Path, array: np.ndarray, protocol: int) -> None:
    path = tmp_path / "array.pkl"
    content = {"a": [array, (array, array.copy())], "b": np.float32(2.5), b"c": 1.5, 3: None}
    path.write_bytes(pickle.dumps(content, protocol))
    found = load_pickle(path)
    assert found.keys() == content.keys()
    assert found["b"] == 2.5
    for ours in (found["a"][0], found["a"][1][0]):
        assert ours.dtype == array.dtype
        np.testing.assert_array_equal(ours, array)
    assert found["a"][0] is found["a"][1][0]


def attacks(target: Path) -> dict[str, bytes]:
    class Touch:
        def __reduce__(self):
            return (Path.touch, (target,))

    class Evaluate:
        def __reduce__(self):
            return (eval, (f"open({str(target)!r}, 'w')",))

    def call(module: str, name: str, argument: str) -> bytes:
        return f"c{module}\n{name}\n(S'{argument}'\ntR.".encode()

    inside = np.empty(1, dtype=object)
    inside[0] = Touch()
    return {
        "method": pickle.dumps(Touch()),
        "function": pickle.dumps({"embeddings": Evaluate()}),
        "in an array": pickle.dumps(inside),
        "system": call("os", "system", f"touch {target}"),
        "system, by its other name": call("posix", "system", f"touch {target}"),
        "an attribute of what is allowed": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
        "a module of numpy": call("numpy", "load", str(target)),
        "another function of numpy": call("numpy.core.multiarray", "fromfile", str(target)),
    }


@pytest.mark.parametrize("name", attacks(Path()))
def test_a_pickle_cannot_run_code(tmp_path: Path, name: str) -> None:
    target = tmp_path / "attacked"
    path = tmp_path / "train_embeddings.pkl"
    path.write_bytes(attacks(target)[name])
    with pytest.raises(DataError, match=r"train_embeddings.pkl is damaged.*it asks for"):
        read_embeddings(tmp_path, "train", "leo")
    assert not target.exists()
    if name in {"method", "system"}:  # the attacks are real ones
        pickle.loads(path.read_bytes())
        assert target.exists()


def test_bytes_cannot_pass_for_objects(tmp_path: Path) -> None:
    """NumPy's own arrays can be made of addresses, by way of a dtype whose flags say that it has no objects."""

    class Forged:
        def __reduce__(self):
            return (np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0))

    class Array:
        def __reduce__(self):
            state = (1, (1,), Forged(), False, struct.pack("<Q", 1))
            return (np.ndarray.__reduce__(np.zeros(1))[0], (np.ndarray, (0,), b"b"), state)

    path = tmp_path / "array.pkl"
    path.write_bytes(pickle.dumps(Array()))
    with pytest.raises(DataError, match="objects made of bytes"):
        load_pickle(path)


@pytest.mark.parametrize(
    "array", [np.zeros(2, dtype=[("a", "f4")]), np.zeros(2, "M8[s]"), np.zeros(2, "V4")], ids=lambda a: a.dtype.str
)
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "array.pkl"
    path.write_bytes(pickle.dumps(array))
    with pytest.raises(DataError, match="array of type"):
        load_pickle(path)


def test_files_that_are_no_pickles(tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    for content in (b"", b"hello", pickle.dumps(np.zeros(9))[:-30], b"\x80\x04]\x94h\x00a."):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"file.pkl is damaged"):
            load_pickle(path)
    with pytest.raises(DataError, match=r"cannot read .*none.pkl: No such file"):
        load_pickle(tmp_path / "none.pkl")
