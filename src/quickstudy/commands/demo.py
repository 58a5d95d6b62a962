"""``quickstudy demo``."""

from __future__ import annotations

from pathlib import Path

from quickstudy.commands import pick_device

RECIPE = "glyphs/protonet-conv4-5w1s"


def demo(out: Path = Path("runs/demo"), device: str = "auto", *, settings: list[str]) -> None:
    """Meta-train a prototypical network on printed characters, and test it on scripts that it has never seen.

    Needs no download, and takes two or three minutes on two cores.

    Args:
        out: folder of the run; what an earlier demo left there is replaced.
        device: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.
        settings: overrides in command-line form, such as --train.updates 200.
    """
    import torch
    from rich.console import Console

    from quickstudy import engine
    from quickstudy.analysis import draw_curves, draw_task
    from quickstudy.data import ImageClasses
    from quickstudy.engine.progress import Bar
    from quickstudy.engine.testing import Wish, test_run, trained_methods
    from quickstudy.errors import RecipeError
    from quickstudy.methods import NearestNeighbour

    console = Console()

    def say(name: str, text: str) -> None:
        console.print(f"{name:<18}{text}", soft_wrap=True, highlight=False)

    there = engine.Run(out)
    if there.exists() and there.name != RECIPE:
        raise RecipeError(f"{out} holds a training of {there.name}, which is no demo: choose another folder with --out")
    device = pick_device(device)
    parsed = engine.parse_recipe(engine.recipe_text(RECIPE), settings)
    recipe = engine.instantiate(parsed)
    known, unseen = recipe.dataset.split("train"), recipe.dataset.split("test")
    assert isinstance(known, ImageClasses)
    assert isinstance(unseen, ImageClasses)
    side = "×".join(map(str, known.images.shape[2:]))
    say(
        recipe.dataset.name,
        f"{len(known):,} characters to learn from, {len(unseen)} of other scripts to be tested on, {side}",
    )
    title = f"{'protonet-conv4':<17}" if console.is_terminal else "protonet-conv4"
    with Bar(title, recipe.train.updates, recipe.train.meta_batch, recipe.dataset.metric, console) as bar:
        run = engine.train(parsed, out, name=RECIPE, device=device, overwrite=True, listener=bar)

    result = test_run(run, Wish(), device)
    shape, seed = recipe.test_task, run.info["seeds"][0]
    assert shape.way is not None
    task = unseen.tasks(shape, 0, 1, seed=seed)[0]
    pixels = engine.Models([NearestNeighbour().build(task)])
    scores, _ = engine.evaluate(pixels, unseen.to(device), shape, [seed], tasks=recipe.test.tasks)
    floor = engine.estimate(scores[..., 1])
    say(
        "unseen scripts",
        f"{result.score.percent(1)} ({result.score.count} tasks)   nearest pixels {floor.percent(1)}   "
        f"chance {100 / shape.way:.0f} %",
    )

    (method,) = trained_methods(run, "best", seeds=[seed])
    method.eval()
    with torch.no_grad():
        prediction = method.predict(method.adapt(task.support), task.query_x)
    heading = f"One task of scripts never seen: {shape.way}-way {shape.shot}-shot"
    picture = draw_task(task, prediction, run.folder / "task.png", heading)
    levels = {"chance (unseen scripts)": 100 / shape.way, "nearest pixels (unseen scripts)": 100 * floor.mean}
    curves = draw_curves([run], run.folder / "curves.png", levels)
    say("pictures", f"{picture}  {curves}")
    say("next", f"quickstudy fit {run.folder} --images YOUR_FOLDER      quickstudy recipes      quickstudy data list")
