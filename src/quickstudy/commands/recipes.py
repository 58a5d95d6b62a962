"""``quickstudy recipes``."""

from __future__ import annotations

from typing import Literal


def recipes(filter: str = "", measured: bool = False, format: Literal["table", "markdown"] = "table") -> None:
    """List the recipes with what was published and what was measured, or print all settings of one.

    Accuracies are in percent, others are mean squared errors, each with its 95 % interval.

    Args:
        filter: only recipes in whose name a word begins with this; the full name of a recipe prints its settings.
        measured: only recipes that were run here.
        format: a table for people, or that of README.md: Markdown, of what was run here.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from quickstudy import analysis, engine
    from quickstudy.engine.recipe import dump_recipe, matching_recipes

    names, embedding = engine.recipe_names(), engine.recipe_names("embed")
    if filter in names or filter in embedding:
        command, kind = ("train", engine.Recipe) if filter in names else ("embed", engine.EmbedRecipe)
        text = engine.recipe_text(filter, command)
        comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        print(comment + dump_recipe(engine.parse_recipe(text, kind=kind), kind), end="")
        return
    found = matching_recipes(filter)
    if format == "markdown":
        print(analysis.markdown(found), end="")
        return
    header = ["recipe", "published", "measured here", "how"]
    lines = [line for line in analysis.summary(found) if line[-1] or not measured]
    console = Console()
    if not console.is_terminal:
        console.width = 160
    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, no_wrap=name == "recipe")
    for line in lines:
        table.add_row(*map(escape, line))
    console.print(table, highlight=False)
    console.print(
        "\nquickstudy recipes NAME shows a recipe, quickstudy train NAME runs it; quickstudy embed NAME takes "
        f"{', '.join(embedding)}",
        soft_wrap=True,
        highlight=False,
    )
