"""The functions behind the command line. Their signatures are its options, their docstrings its help."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from quickstudy.errors import RecipeError, suggest

SETTINGS = (
    *("dataset", "method", "backbone", "train", "validation", "test", "optimizer", "schedule"),
    *("pretrained", "published"),
)
"""The sections of a recipe; ``--<section>.<key>`` overrides a setting of it."""


def call(name: str, function: Callable[..., int | None], arguments: Sequence[str]) -> int | None:
    """Parse the arguments of a command by the signature of its function, and call it.

    A parameter named ``settings`` receives the arguments that override settings of a recipe; any other ``list[str]``
    without a default, the last of the positional ones, as many words as there are.

    Raises:
        RecipeError: an argument is missing, unknown or of the wrong type.
    """
    description = (inspect.getdoc(function) or "").partition("\nArgs:")[0]
    parser = ArgumentParser(prog=f"quickstudy {name}", exit_on_error=False, description=description)
    parameters = inspect.signature(function).parameters
    lists = {name for name, p in parameters.items() if p.annotation == "list[str]" and p.default is p.empty}
    lists.discard("settings")
    parser.add_function_arguments(function, as_positional=True, as_group=False, skip={"settings", *lists})
    for name_of_list in lists:  # jsonargparse would take one word, "[a,b]"
        text = re.search(rf"^ +{name_of_list}: (.+)", inspect.getdoc(function) or "", re.MULTILINE)
        parser.add_argument(name_of_list, nargs="+", help=text and text[1])
    _without_underscores(parser)
    own, keywords = list(arguments), {}
    if "settings" in parameters:
        own, keywords["settings"] = _split(arguments)
    flags = {f"--{parameter.name}" for parameter in parameters.values() if parameter.default is False}
    own = _flagged(own, flags)
    first = next(iter(parameters.values()), None)
    if first is not None and first.default is not first.empty:  # jsonargparse has no optional positional arguments
        shown = parser.format_usage().removeprefix("usage: ").rstrip()
        parser.usage = re.sub(rf"\[--{first.name} (\S+)\]", r"[\1]", shown, count=1)
        word = _first_word(own)
        if word is not None:
            own[word] = f"--{first.name}={own[word]}"  # `recipes sine`
    try:
        parsed = parser.parse_args(own)
    except ArgumentError as error:
        message = re.sub(r"\s*\n\s*", " ", str(error))
        choice = re.search(r'key "([\w.]+)": .*typing\.Literal\[(.+?)\].*(?:Given|Got) value: (\S+)', message)
        if choice:
            message = f"--{choice[1]} takes one of {choice[2]}, not {choice[3]!r}"
        wrong = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        known = [option for action in parser._actions for option in action.option_strings]
        known += [f"--{section}" for section in SETTINGS if keywords]
        hint = suggest(wrong.group(1), known) if wrong else ""
        raise RecipeError(f"{message}{hint}; see `quickstudy {name} --help`") from error
    return function(**parser.instantiate(parsed).as_dict(), **keywords)


def _flagged(arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    """Give flags that stand alone the value true, and others the true or false that follows."""
    whole: list[str] = []
    for argument in arguments:
        if whole and whole[-1] in flags:
            value = argument if argument in ("true", "false") else "true"
            whole[-1] += f"={value}"
            if argument == value:
                continue
        whole.append(argument)
    if whole and whole[-1] in flags:
        whole[-1] += "=true"
    return whole


def _first_word(arguments: Sequence[str]) -> int | None:
    """Return where the first argument is that is neither an option nor the value of one; flags have theirs already."""
    value_follows = False
    for index, argument in enumerate(arguments):
        if argument.startswith("-"):
            value_follows = "=" not in argument and argument not in {"-h", "--help"}
        elif value_follows:
            value_follows = False
        else:
            return index
    return None


def _without_underscores(parser: ArgumentParser) -> None:
    """Call the option ``--from_`` ``--from``: parameters cannot have the names of Python's keywords."""
    options = parser._option_string_actions
    for option, action in [*options.items()]:
        if option.endswith("_"):
            action.option_strings = [option.rstrip("_")]
            options[option.rstrip("_")] = options.pop(option)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those of the command and those that override settings of a recipe."""
    own: list[str] = []
    settings: list[str] = []
    value_follows = False
    for argument in arguments:
        if value_follows and not argument.startswith("--"):
            settings[-1] += f"={argument}"
            value_follows = False
        elif re.match(rf"--({'|'.join(SETTINGS)})\b(?!-)", argument):
            settings.append(argument)
            value_follows = "=" not in argument
        else:
            own.append(argument)
            value_follows = False
    return own, settings


def numbers_of(text: str, option: str) -> list[int]:
    """Read numbers such as ``0,1,2``.

    Raises:
        RecipeError: they are not whole numbers.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise RecipeError(f"{option} takes whole numbers with commas between them, such as 0,1,2; got {text!r}")
    return numbers


def recipe_and_name(recipe: str, command: str = "train") -> tuple[str, str]:
    """Return the YAML and the name of a recipe, given its name or the path of a file.

    Args:
        recipe: its name, or a path that ends in ``.yaml``.
        command: that it is for.

    Raises:
        RecipeError: there is none.
    """
    from quickstudy.engine.recipe import recipe_text

    text = recipe_text(recipe, command)
    if not recipe.endswith((".yaml", ".yml")):
        return text, recipe
    sys.path.append(str(Path(recipe).parent.resolve()))  # class_path finds modules beside the recipe
    return text, Path(recipe).stem


def pick_device(device: str) -> str:
    """Do as :func:`quickstudy.engine.evaluate.pick_device`, which imports torch."""
    from quickstudy.engine.evaluate import pick_device

    return pick_device(device)
