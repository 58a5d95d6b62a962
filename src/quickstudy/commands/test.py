"""``quickstudy test``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from quickstudy.commands import pick_device, recipe_and_name


def test(
    run: str,
    on: str | None = None,
    tasks: int | None = None,
    queries: int | None = None,
    way: int | None = None,
    shot: int | None = None,
    steps: int | None = None,
    norm: Literal["batch", "support", "joint"] | None = None,
    weights: Literal["best", "last"] = "best",
    device: str = "auto",
    record: Path | None = None,
    *,
    settings: list[str],
) -> None:
    """Test a run on the meta-test classes of its dataset, or of another; print and keep the result.

    A recipe that needs no training (of the nearest neighbour, or of fine-tuning) is tested by its name, and any setting
    of it is overridden by --SECTION.KEY VALUE.

    Args:
        run: folder of a run; or name of a recipe, or path of a YAML file, that needs no training.
        on: another dataset, by name (`quickstudy data list`): the score across domains. Its images are brought to the
            colours and the size that the model reads. One of certain tasks alone, such as omniglot-runs, is tested on
            all of these, as they are.
        tasks: test tasks of each seed; those of the recipe if not given, as are the settings below.
        queries: query examples of each class.
        way: classes of a task.
        shot: support examples of each class.
        steps: inner steps, of methods that take some.
        norm: whose statistics normalise queries.
        weights: of the best validation, or the last.
        device: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.
        record: append the result to this CSV file, such as results/measured.csv.
        settings: overrides in command-line form.
    """
    from rich.console import Console

    from quickstudy import engine
    from quickstudy.engine.testing import Wish, append_measured, test_recipe, test_run
    from quickstudy.errors import RecipeError, suggest

    wish = Wish(on=on, tasks=tasks, way=way, shot=shot, queries=queries, steps=steps, norm=norm, weights=weights)
    if run in engine.recipe_names() or run.endswith((".yaml", ".yml")):
        text, name = recipe_and_name(run)
        result = test_recipe(engine.parse_recipe(text, settings), wish, pick_device(device), name=name)
    else:
        near = "" if Path(run).exists() or run.startswith("runs") else suggest(run, engine.recipe_names())
        if near:
            raise RecipeError(f"there is no recipe {run!r}{near}, and no folder of a run either")
        trained = engine.Run.open(run)
        if settings:
            raise RecipeError(f"a run is tested as it was trained: leave {settings[0]} out")
        result = test_run(trained, wish, pick_device(device))
    console = Console()
    console.print(result.text(), soft_wrap=True, highlight=False)
    if record is not None:
        append_measured(record, result)
        console.print(f"recorded in {record}", highlight=False)
