"""Pickles of arrays, lists and text, read without running the code that a pickle may hold.

A pickle is a program: it names functions of any module and calls them. Here it gets none but our own stand-ins for
the few that arrays are saved with. Not even NumPy's: the state of a ``dtype`` from a stranger can make bytes pass for
pointers.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quickstudy.data.archive import Member
from quickstudy.errors import DataError


def load_pickle(path: Path | Member) -> Any:
    """Return what a pickle holds: dicts, lists, tuples, text, numbers and NumPy arrays (which are read-only).

    The strings of Python 2 are read as latin-1.

    Raises:
        DataError: the file cannot be read, is damaged, or holds anything else; nothing of it was run.
    """
    try:
        with path.open("rb") if isinstance(path, Path) else io.BytesIO(path.read_bytes()) as file:
            return _plain(_Unpickler(file, encoding="latin-1").load())
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle may fail in any way
        raise DataError(
            f"{path} is damaged, or not a pickle of arrays and text alone ({error}): get it again from a source that "
            "you trust"
        ) from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")  # as NumPy 2 calls it
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _KNOWN[module, name]


class _Type:
    """Stands for a ``numpy.dtype`` of plain numbers, text or objects."""

    def __init__(self, description: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"[<>|=]?([biufcSU]\d+|O8?)", description):
            raise pickle.UnpicklingError(f"it has an array of type {description}")
        self.dtype = np.dtype(description)

    def __setstate__(self, state: Sequence) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])

    def array(self, content: Any) -> np.ndarray:
        """Return the elements, one after the other: from bytes, or from a list if they are objects."""
        if self.dtype.hasobject:
            if not isinstance(content, list):
                raise pickle.UnpicklingError("it has objects made of bytes")
            array = np.empty(len(content), dtype=object)
            array[:] = _plain(content)
            return array
        return np.frombuffer(content.encode("latin-1") if isinstance(content, str) else bytes(content), self.dtype)


class _Array:
    """Stands for a ``numpy.ndarray``, which pickles make empty and fill afterwards."""

    array: np.ndarray

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: Sequence) -> None:
        _, shape, kind, fortran, content = state
        self.array = kind.array(content).reshape(shape, order="F" if fortran else "C")


def _from_buffer(content: bytes, kind: _Type, shape: tuple[int, ...], order: str) -> np.ndarray:
    return kind.array(content).reshape(shape, order="F" if order == "F" else "C")


def _scalar(kind: _Type, content: bytes) -> Any:
    return kind.array(content)[0]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes bytes as {encoding}")
    return text.encode("latin-1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
}


def _plain(value: Any) -> Any:
    """Put arrays in the place of their stand-ins."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value
