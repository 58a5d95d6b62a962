"""``quickstudy train``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from quickstudy.commands import pick_device, seed_list


def train(
    recipe: str,
    seeds: str = "0",
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
        recipe: name of a recipe (`quickstudy recipes`), or the path of a YAML file.
        seeds: one model is trained for each, such as 0,1,2; together in one job where that is faster.
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

    parsed = engine.parse_recipe(engine.recipe_text(recipe), settings)
    name = recipe if not recipe.endswith((".yaml", ".yml")) else Path(recipe).stem
    folder = out or Path("runs") / name
    numbers = seed_list(seeds)
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
