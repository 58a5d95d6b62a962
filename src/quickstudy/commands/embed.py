"""``quickstudy embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from quickstudy.commands import pick_device, recipe_and_name


def embed(
    recipe: str,
    seed: int = 0,
    device: str = "auto",
    out: Path | None = None,
    layout: Literal["own", "leo"] = "own",
    resume: bool = False,
    overwrite: bool = False,
    *,
    settings: list[str],
) -> None:
    """Pre-train a backbone as a classifier of the meta-train classes, and write the embeddings of all images.

    The epoch with the best few-shot accuracy of nearest centroids on the meta-validation classes is kept; any method
    then learns from its embeddings as from a dataset, quickstudy.data.Embeddings.
    `quickstudy recipes` names the recipes of this command, such as cifar-fs-resnet12. Any setting of one is overridden
    by --SECTION.KEY VALUE, for example --train.epochs 20, --train.batch 128, --optimizer.lr 0.05,
    --backbone my.Network, --backbone.drop_rate 0.1, --dataset.train_transforms+=quickstudy.data.ColorJitter.

    Args:
        recipe: name of a recipe of this command, the path of a YAML file, or with --resume the folder of a run.
        seed: of the weights, the order of the images and their augmentation.
        device: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.
        out: folder of the results; runs/embed/RECIPE if not given.
        layout: of the embeddings: that of this library, or that of LEO's authors.
        resume: continue a stopped training, or write the embeddings of a finished one again.
        overwrite: replace what the folder holds.
        settings: overrides in command-line form.
    """
    from rich.console import Console

    from quickstudy import engine
    from quickstudy.engine.progress import Bar

    run = engine.Pretrained(Path(recipe))
    if run.exists():
        text, name, seed = run.recipe_text, run.name, run.info["seeds"][0]
    else:
        whole = recipe.startswith("embed/") or recipe.endswith((".yaml", ".yml"))
        text, name = recipe_and_name(recipe if whole else f"embed/{recipe}", "embed")
        run = engine.Pretrained(Path("runs/embed") / name.removeprefix("embed/"))
    parsed = engine.parse_recipe(text, settings, engine.EmbedRecipe)
    made = engine.instantiate(parsed, engine.EmbedRecipe)
    console = Console()
    updates = made.train.epochs * made.batches()
    with Bar(name, updates, made.train.batch, made.dataset.metric, console, unit="images") as bar:
        run = engine.pretrain(
            parsed,
            out or run.folder,
            name=name,
            seed=seed,
            device=pick_device(device),
            layout=layout,
            resume=resume,
            overwrite=overwrite,
            listener=bar,
        )
    best, images = run.info["best"], run.info["embeddings"]
    console.print(
        f"{run.embeddings}   {run.info['features']} numbers for each of {sum(images.values()):,} images; epoch "
        f"{best['epoch']}: nearest centroids {100 * best['val_score']:.1f} % ± {100 * best['val_interval']:.1f} on "
        f"{made.validation.task.way}-way {made.validation.task.shot}-shot validation tasks\n"
        f"next: quickstudy train RECIPE --dataset quickstudy.data.Embeddings --dataset.of {made.dataset.name} "
        f"--dataset.root {run.embeddings}",
        soft_wrap=True,
        highlight=False,
    )
