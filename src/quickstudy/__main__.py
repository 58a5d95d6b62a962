"""The command line: a table of name -> typed function, and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": ("quickstudy.commands.train:train", "meta-train a recipe; writes the folder of a run"),
    "test": ("quickstudy.commands.test:test", "test a run on classes it has never met: mean and 95 % interval"),
    "reproduce": ("quickstudy.commands.reproduce:reproduce", "run recipes to the end; published beside measured"),
    "fit": ("quickstudy.commands.fit:fit", "learn your own classes from a folder of images; writes a classifier"),
    "predict": ("quickstudy.commands.predict:predict", "say of which class images are, with probabilities"),
    "embed": ("quickstudy.commands.embed:embed", "pre-train a backbone as a classifier; write embeddings"),
    "curves": ("quickstudy.commands.curves:curves", "draw learning curves of runs beside the published numbers"),
    "recipes": ("quickstudy.commands.recipes:recipes", "list the recipes: published number, source, what was measured"),
    "data list": ("quickstudy.commands.data:list_datasets", "list the datasets: where they are and how to get them"),
    "data get": ("quickstudy.commands.data:get", "download a dataset"),
    "data prepare": ("quickstudy.commands.data:prepare", "pack your own copy of a dataset, whatever its layout"),
    "data show": ("quickstudy.commands.data:show", "draw a contact sheet of a dataset as PNG"),
    "study permutation": ("quickstudy.commands.study:permutation", "does the order of the support set matter?"),
    "study methods": ("quickstudy.commands.study:methods", "all methods with the same network, tasks and budget"),
    "study domains": ("quickstudy.commands.study:domains", "trained on one dataset, tested on others: one table"),
    "study learned-updates": ("quickstudy.commands.study:learned_updates", "what has OP-LSTM learned to do?"),
    "demo": ("quickstudy.commands.demo:demo", "from nothing to a tested few-shot model in under three minutes"),
}


HELP = {"-h", "--help", "help"}


def group_of(word: str) -> list[str]:
    """Return the names of the commands of two words that begin with this one."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def usage(word: str = "") -> str:
    """Return the help of the command as a whole, or of the commands that have this for their first word."""
    names = group_of(word) if word else [*COMMANDS]
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {COMMANDS[name][1]}" for name in names]
    return "\n".join(
        [
            f"usage: quickstudy {word} COMMAND ..." if word else "usage: quickstudy COMMAND ...",
            "",
            "Few-shot learning in PyTorch.",
            "",
            *lines,
            "",
            "`quickstudy COMMAND --help` tells more of each.",
        ]
    )


def find(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split the arguments into the name of a command, of one or two words, and the rest.

    Raises:
        RecipeError: there is no such command.
    """
    from quickstudy.errors import RecipeError, suggest

    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, list(arguments[words:])
    word = arguments[0]
    inner = group_of(word)
    if inner:
        raise RecipeError(f"quickstudy {word} needs one of: {', '.join(name.split()[1] for name in inner)}")
    raise RecipeError(f"there is no command {word!r}{suggest(word, COMMANDS)}; `quickstudy --help` lists them")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 on an error that a message explains, 128 + n on signal n."""
    from quickstudy.errors import QuickstudyError

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in HELP:
        print(usage())
        return 0
    if arguments[1:] and arguments[1] in HELP and group_of(arguments[0]):
        print(usage(arguments[0]))
        return 0
    if arguments[0] == "--version":
        from quickstudy import __version__

        print(f"quickstudy {__version__}")
        return 0
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that class_path finds a user's own module, as with `python -m quickstudy`
    try:
        name, rest = find(arguments)
        module, function = COMMANDS[name][0].split(":")
        from quickstudy.commands import call

        status = call(name, getattr(import_module(module), function), rest) or 0
        sys.stdout.flush()
        return status
    except QuickstudyError as error:
        print(f"quickstudy: {error}", file=sys.stderr)
        signal_number = getattr(error, "signal_number", None)
        return 1 if signal_number is None else 128 + signal_number
    except BrokenPipeError:  # what reads our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
