"""``quickstudy train``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from quickstudy.commands import numbers_of, pick_device, recipe_and_name


def train(
    recipe: str,
    seeds: str | None = None,
    device: str = "auto",
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    *,
    settings: list[str],
) -> None:
    """Meta-train a recipe. Any setting of it is overridden by --SECTION.KEY VALUE.

    For example --train.updates 1000, --method.steps 3, --optimizer.lr 0.01, --dataset.class_path my.Dataset,
    --method.backbone.class_path my.Network. `quickstudy recipes NAME` prints all settings of a recipe.

    Args:
        recipe: name of a recipe (`quickstudy recipes`), the path of a YAML file, or with --resume the folder of a run.
        seeds: one model is trained for each, such as 0,1,2; together in one job where that is faster. 0 if not given.
        device: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.
        out: folder of the run; runs/RECIPE if not given.
        resume: continue a stopped training.
        overwrite: replace what the folder holds.
        settings: overrides in command-line form.
    """
    from rich.console import Console

    from quickstudy import engine
    from quickstudy.analysis import draw_curves
    from quickstudy.engine.progress import Bar
    from quickstudy.engine.tensorboard import Board, Several

    begun = engine.Run(Path(recipe))
    if begun.exists():
        text, name, folder, numbers = begun.recipe_text, begun.name, begun.folder, begun.info["seeds"]
    else:
        (text, name), numbers = recipe_and_name(recipe), [0]
        folder = Path("runs") / name
    parsed = engine.parse_recipe(text, settings)
    folder = out or folder
    if seeds is not None:
        numbers = numbers_of(seeds, "--seeds")
    made = engine.instantiate(parsed)
    console = Console()
    boards = [Board(folder)] if find_spec("tensorboard") else []
    with Bar(name, made.train.updates, made.train.meta_batch, made.dataset.metric, console) as bar:
        run = engine.train(
            parsed,
            folder,
            name=name,
            seeds=numbers,
            device=pick_device(device),
            resume=resume,
            overwrite=overwrite,
            listener=Several(bar, *boards),
        )
    draw_curves([run], run.folder / "curves.png")
    console.print(f"{run.folder}   next: quickstudy test {run.folder}", soft_wrap=True, highlight=False)
