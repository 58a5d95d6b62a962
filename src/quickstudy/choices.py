"""Arguments that are one of a few words: what a recipe's types say of them holds in Python too."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from quickstudy.errors import RecipeError, suggest


def check_choices(title: str, annotated: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise unless all that is annotated as a ``Literal`` is one of its values.

    Args:
        title: what the message puts in front of a name, such as ``"train."``.
        annotated: a function, or a class with annotated attributes.
        given: values by name.

    Raises:
        RecipeError: one is something else; the message suggests the nearest.
    """
    for name, known in _choices(annotated).items():
        if name not in given:
            continue
        value, listed = given[name], " or ".join(map(repr, known))
        if not isinstance(value, str | int | float) or value not in known:
            raise RecipeError(f"{title}{name} is {listed}, not {value!r}{suggest(str(value), map(str, known))}")


def choices_checked(function: Callable[..., None]) -> Callable[..., None]:
    """Return an ``__init__`` that begins with :func:`check_choices` of its arguments."""

    @functools.wraps(function)
    def checked(self: object, *args: Any, **kwargs: Any) -> None:
        try:
            given = inspect.signature(function).bind(self, *args, **kwargs).arguments
        except TypeError:
            given = {}  # the call says what is missing, or too much
        check_choices(f"{type(self).__name__}: ", function, given)
        function(self, *args, **kwargs)

    return checked


@functools.cache
def _choices(annotated: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    try:
        hints = get_type_hints(annotated)
    except Exception:  # annotations may be anything, such as names that a type checker alone imports
        return {}
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
