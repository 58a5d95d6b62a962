"""``quickstudy study``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from quickstudy.commands import numbers_of, pick_device


def permutation(
    problem: Literal["sine", "omniglot"],
    shots: str | None = None,
    seeds: str = "0,1,2",
    out: Path | None = None,
    tasks: int = 200,
    orders: int = 20,
    device: str = "auto",
    *,
    settings: list[str],
) -> None:
    """Does the order of the support set matter? A plain LSTM that reads it as a batch, against one example at a time.

    Each number of shots is trained separately, as in Huisman et al. (2023), or taken from runs/ if it was trained
    before; then each model is tested with the support sets of the same tasks in random orders.
    Any setting of the recipes is overridden by --SECTION.KEY VALUE, such as --train.updates 1000; the runs are then
    kept beside the results.

    Args:
        problem: sine or omniglot.
        shots: with commas between them; those of the paper if not given: 5,10,20,30,40,50, and 1,3,5,8,10.
        seeds: of each training.
        out: folder of the table and the figures; results/studies/permutation-PROBLEM if not given.
        tasks: test tasks of each seed whose support sets are permuted.
        orders: random orders of each.
        device: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.
        settings: overrides in command-line form.
    """
    from rich.console import Console

    from quickstudy.analysis.order import SHOTS, draw_order, draw_validations, study_order
    from quickstudy.engine.run import Run
    from quickstudy.engine.testing import Result, Wish, test_run
    from quickstudy.files import csv_text, write_text

    console = Console()
    where = pick_device(device)
    folder = out or Path("results/studies") / f"permutation-{problem}"

    def run_of(name: str) -> Run:
        run = Run((folder if settings else Path()) / "runs" / name)
        _train_to_the_end(run.folder, name, seeds, device, settings)
        return run

    def test(run: Run) -> Result:
        result = test_run(run, Wish(), where)
        console.print(result.text(), soft_wrap=True, highlight=False)
        return result

    wanted = SHOTS[problem] if shots is None else numbers_of(shots, "--shots")
    rows, runs = study_order(problem, wanted, run_of, test, tasks, orders, where)
    console.print(write_text(folder / "scores.csv", csv_text(rows)))
    console.print(draw_order(rows, folder / "scores.png", f"{problem}: a plain LSTM, batch against sequential reading"))
    console.print(draw_validations(runs, folder / "validations.png", str(rows[0]["metric"])))


def learned_updates(run: Path, tasks: int | None = None, out: Path | None = None, device: str = "auto") -> None:
    """What has OP-LSTM learned? Its updates beside gradient descent, its last matrix beside prototypes.

    For every validation of a run that was trained with validation.keep: cosine and Euclidean distance for each pass
    and for all together, layer by layer, as in Huisman et al. (2023).

    Args:
        run: folder of a run of OP-LSTM.
        tasks: validation tasks of each seed; as many as were validated on if not given.
        out: folder of the table and the figure; results/studies/learned-updates-RECIPE if not given.
        device: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.
    """
    from rich.console import Console

    from quickstudy.analysis.updates import draw_learned_updates
    from quickstudy.analysis.updates import learned_updates as compare
    from quickstudy.engine.run import Run
    from quickstudy.files import csv_text, write_text

    console = Console()
    opened = Run.open(run)
    folder = out or Path("results/studies") / f"learned-updates-{opened.name.replace('/', '-')}"
    with console.status("") as status:
        rows = compare(opened, tasks, pick_device(device), status.update)
    short = [{key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    console.print(write_text(folder / "updates.csv", csv_text(short)))
    console.print(draw_learned_updates(rows, folder / "updates.png", opened.name))


def methods(
    dataset: Literal["glyphs", "omniglot"] = "glyphs",
    shots: str = "1,5",
    budget: int = 4000,
    channels: int = 32,
    only: str = "",
    seeds: str = "0",
    out: Path | None = None,
    device: str = "auto",
    *,
    settings: list[str],
) -> None:
    """Which method is best, with the same network, the same tasks and the same budget?

    Trains every recipe of glyphs/ in 5-way tasks on a dataset, each method in its own setting but for the budget, and
    tests it: a table with 95 % intervals and a figure. What was trained and tested before is not done again.
    Any setting of all recipes is overridden by --SECTION.KEY VALUE, such as --validation.tasks 50.

    Args:
        dataset: glyphs or omniglot.
        shots: support examples of each class, with commas between them; each is trained separately.
        budget: tasks that a method may learn from.
        channels: of the conv-4 that every method has.
        only: only the recipes with this in their name.
        seeds: of each training.
        out: folder of the table, the figure and the runs; results/studies/methods-DATASET, and runs/methods-DATASET
            for the runs, if not given.
        device: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.
        settings: overrides in command-line form.
    """
    from rich.console import Console

    from quickstudy.analysis import methods as study
    from quickstudy.data import dataset_entry
    from quickstudy.engine.recipe import parse_recipe, recipe_text
    from quickstudy.engine.run import Run
    from quickstudy.engine.testing import Result, Wish, kept_result, test_recipe, test_run
    from quickstudy.engine.train import Diverged
    from quickstudy.errors import RecipeError
    from quickstudy.files import csv_text, write_text

    console, where = Console(), pick_device(device)
    folder = out or Path("results/studies") / f"methods-{dataset}"
    runs = folder / "runs" if out else Path("runs") / f"methods-{dataset}"
    names = study.contestants(only)
    if not names:
        raise RecipeError(
            f"no recipe of {study.MODELS} has {only!r} in its name; `quickstudy recipes glyphs` lists them"
        )
    class_path = f"quickstudy.data.{dataset_entry(dataset).load().__name__}"

    def test(name: str, shot: int) -> Result:
        learns = study.learns(name)
        own = [*study.budget(name, class_path, shot, budget if learns else 0, channels), *settings]
        if not learns:
            return test_recipe(parse_recipe(recipe_text(name), own), Wish(), where, name=name)
        run = Run(runs / f"{name.removeprefix(study.MODELS)}-trained-{shot}shot")
        try:
            _train_to_the_end(run.folder, name, seeds, device, own)
        except Diverged as error:  # one that diverges is tested with its best weights, and the others go on
            console.print(f"{name}: {error}", soft_wrap=True, highlight=False)
        return kept_result(run) or test_run(run, Wish(), where)

    title = f"{dataset}: conv-4 of {channels} channels, {budget:,} tasks for each method"
    rows: list[dict[str, object]] = []
    files: list[Path] = []
    for shot in numbers_of(shots, "--shots"):
        for name in names:
            result = test(name, shot)
            console.print(result.text(), soft_wrap=True, highlight=False)
            rows.append(study.method_row(name, shot, result))
            files = [  # again after each, so that a study which is cut short leaves its table
                write_text(folder / "scores.csv", csv_text(rows)),
                write_text(folder / "scores.md", study.methods_table(rows)),
                study.draw_methods(rows, folder / "scores.png", title),
            ]
    console.print(*files, sep="\n")


def domains(
    runs: str,
    on: str | None = None,
    shots: str | None = None,
    way: int | None = None,
    queries: int | None = None,
    tasks: int | None = None,
    norm: Literal["batch", "support", "joint"] | None = None,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """What is a model worth on data unlike that it was trained on? Every run on every dataset: one table.

    Images are brought to the colours and the size that a model reads. A run is tested on the meta-test classes of its
    own dataset as its recipe has it, and on other datasets as they are by default. What was tested before with the
    same weights is not done again.

    Args:
        runs: folders of runs, with commas between them.
        on: datasets to test on, by name (`quickstudy data list`), with commas between them; if not given, those that
            the runs were trained on, where they are on this machine.
        shots: support examples of each class, with commas between them; as these and the settings below are in the
            recipe of each run, if not given.
        way: classes of a task.
        queries: query examples of each class.
        tasks: test tasks of each seed.
        norm: whose statistics normalise queries.
        out: folder of the table and the figure; results/studies/domains-DATASETS if not given.
        device: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.
    """
    from rich.console import Console

    from quickstudy.analysis import domains as study
    from quickstudy.engine.run import Run
    from quickstudy.engine.testing import Wish, kept_result, test_run
    from quickstudy.errors import RecipeError
    from quickstudy.files import csv_text, write_text

    console, where = Console(), pick_device(device)
    opened = [Run.open(folder.strip()) for folder in runs.split(",")]
    own = [study.trained_on(run) for run in opened]
    names = study.testable(own) if on is None else list(dict.fromkeys(name.strip() for name in on.split(",")))
    left_out = ", ".join(name for name in dict.fromkeys(own) if name not in names)
    if not names:
        raise RecipeError(f"{left_out}: not on this machine, or not known by name; say what to test on by --on")
    if on is None and left_out:
        console.print(f"not tested on {left_out}: not on this machine, or not known by name", highlight=False)
    for name in names:
        study.check_domain(name, own)
    folder = out or Path("results/studies") / f"domains-{'-'.join(names)}"
    rows: list[dict[str, object]] = []
    files: list[Path] = []
    for shot in [None] if shots is None else numbers_of(shots, "--shots"):
        for run in opened:
            for name in names:
                wish = Wish(on=name, tasks=tasks, way=way, shot=shot, queries=queries, norm=norm)
                result = kept_result(run, wish) or test_run(run, wish, where)
                console.print(result.text(), soft_wrap=True, highlight=False)
                rows.append(study.domain_row(run, result))
                files = [  # again after each, so that a study which is cut short leaves its table
                    write_text(folder / "scores.csv", csv_text(rows)),
                    write_text(folder / "scores.md", study.domains_table(rows)),
                    study.draw_domains(rows, folder / "scores.png", "trained on one dataset, tested on others"),
                ]
    console.print(*files, sep="\n")


def _train_to_the_end(folder: Path, name: str, seeds: str, device: str, settings: list[str]) -> None:
    """Train a recipe, or go on with what its run has begun; a finished one is left as it is.

    Raises:
        RecipeError, TrainingError: the run is of other seeds or settings.
        Diverged, Interrupted: as of a training.
    """
    from quickstudy.commands.train import train
    from quickstudy.engine.job import check_same
    from quickstudy.engine.recipe import parse_recipe, recipe_text
    from quickstudy.engine.run import Run

    run = Run(folder)
    if run.exists():
        check_same(run, parse_recipe(recipe_text(name), settings), numbers_of(seeds, "--seeds"), updates=True)
    if not run.exists() or not run.finished:
        train(name, seeds, device, folder, resume=run.exists(), settings=settings)
