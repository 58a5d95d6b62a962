"""Errors that a user can act on: each names the thing, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class QuickstudyError(Exception):
    """Base class: the command line prints its message alone and exits with status 1."""


class DataError(QuickstudyError):
    """A dataset is missing, damaged or too small for the tasks asked of it."""


class FileError(QuickstudyError):
    """A file cannot be written."""


class RecipeError(QuickstudyError):
    """A recipe or a setting cannot be understood."""


class InputError(QuickstudyError, ValueError):
    """What a classifier is given to learn or to predict cannot serve; a ``ValueError`` too, as scikit-learn expects."""


class BackboneError(QuickstudyError):
    """A network cannot serve as a backbone."""


class TrainingError(QuickstudyError):
    """A training cannot go on, or cannot be resumed."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known word nearest to ``word``, or an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
