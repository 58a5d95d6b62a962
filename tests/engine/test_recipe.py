"""Recipes: parsed by type, explained when wrong, and every one of them runs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from pydoc import locate

import pytest
import torch
import yaml
from helpers import SINE, published_classes, write_class_folders

from quickstudy import engine
from quickstudy.data import Omniglot, write_embeddings
from quickstudy.data.base import SPLITS
from quickstudy.data.embeddings import LEO_FOLDERS
from quickstudy.engine import testing
from quickstudy.engine.recipe import dump_recipe, parse_recipe, recipe_names, recipe_text
from quickstudy.engine.testing import Wish
from quickstudy.engine.train import Group, build_methods
from quickstudy.errors import DataError, RecipeError
from quickstudy.task import TaskShape

PUBLISHED = Path(__file__).parents[2] / "results" / "published.csv"


def test_overrides_reach_every_depth() -> None:
    overrides = ["--train.updates=7", "--method.backbone.widths=[3]", "--optimizer=torch.optim.SGD", "--optimizer.lr=2"]
    settings = parse_recipe(SINE, overrides)
    recipe = engine.instantiate(settings)
    assert recipe.train.updates == 7
    assert len(recipe.method.backbone.linears) == 1  # type: ignore[arg-type]
    optimizer = recipe.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 2


def test_single_settings_of_what_a_recipe_leaves_out_are_overridden() -> None:
    bare = "\n".join(
        [
            "dataset: quickstudy.data.Glyphs",
            "method: {class_path: quickstudy.methods.ProtoNet, init_args: {backbone: quickstudy.nn.Conv4}}",
            "train: {task: {way: 5, shot: 1, queries: 10}}",
        ]
    )
    whole = engine.instantiate(parse_recipe(bare))
    assert (whole.test_task, whole.validation_task) == (TaskShape(5, 1, 15), TaskShape(5, 1, 15))
    changed = engine.instantiate(parse_recipe(bare, ["--test.task.queries=4", "--train.task.shot=3"]))
    assert (changed.test_task, changed.validation_task) == (TaskShape(5, 3, 4), TaskShape(5, 3, 4))
    both = parse_recipe(bare, ["--validation.task.way=2", "--test.task.queries=4", "--optimizer.lr=0.5"])
    made = engine.instantiate(both)
    assert (made.test_task, made.validation_task) == (TaskShape(5, 1, 4), TaskShape(2, 1, 4))
    parameter = torch.nn.Parameter(torch.zeros(1))
    for settings, lr in ((both, 0.5), (parse_recipe(bare), 1e-3)):
        optimizer = engine.instantiate(settings).optimizer([parameter])
        assert isinstance(optimizer, torch.optim.Adam)
        assert optimizer.param_groups[0]["lr"] == lr
    assert engine.instantiate(parse_recipe(bare, ["--optimizer=torch.optim.SGD"])).optimizer([parameter]).defaults


def test_a_dumped_recipe_reads_back_the_same() -> None:
    for text in (SINE, recipe_text("omniglot/maml-conv4-20w1s")):
        settings = parse_recipe(text)
        assert parse_recipe(dump_recipe(settings)) == settings


def test_task_sizes_that_are_not_given() -> None:
    recipe = engine.instantiate(parse_recipe(SINE))
    assert recipe.validation_task == recipe.test_task == recipe.train.task
    recipe = engine.instantiate(parse_recipe(recipe_text("omniglot/protonet-mlp-5w1s"), ["--train.task.queries=3"]))
    assert recipe.test_task == TaskShape(5, 1, 15)


@pytest.mark.parametrize(
    ("old", "new", "suggestion"),
    [
        ("updates: 30", "updtes: 30", "updates"),
        ("steps: 2", "stesp: 2", "steps"),
        ("widths", "wdths", "widths"),
        ("validation:", "validaton:", "validation"),
        ("meta_batch", "metabatch", "meta_batch"),
        ("quickstudy.methods.MAML", "quickstudy.methods.MALM", "MAML"),
    ],
)
def test_a_misspelt_key_is_named_and_the_right_one_suggested(old: str, new: str, suggestion: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(SINE.replace(old, new))
    assert new.split(":")[0].split(".")[-1] in str(caught.value)
    assert f"did you mean '{suggestion}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--train.updates=many", "train.updates"),
        ("--train.updates=-1", "at least 0"),
        ("--train.meta_batch=0", "at least 1"),
        ("--train.clip_norm=-1", "above zero"),
        ("--train.clip_parameter_norm=0", "above zero"),
        ("--train.decay_if_broken=-1", "zero or more"),
        ("--validation.every=0", "at least 1"),
        ("--test.tasks=0", "at least 1"),
        ("--train.task.shot=0", "one shot"),
        ("--method.order=3", "order"),
        ("--method.norm=joint", "norm batch or support, not 'joint'"),
        ("--train.clip_each_task=true", "clip_value"),
        ("--method.steps=-1", "zero or more"),
    ],
)
def test_a_wrong_value_is_explained(override: str, message: str) -> None:
    with pytest.raises((RecipeError, DataError), match=message):
        engine.instantiate(parse_recipe(SINE, [override]))


def test_text_that_is_not_yaml() -> None:
    with pytest.raises(RecipeError, match="not valid YAML"):
        parse_recipe("train: [")


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'sine/maml-5shot'"):
        recipe_text("sine/mmal-5shot")
    with pytest.raises(RecipeError, match="cannot read"):
        recipe_text("nowhere.yaml")


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        recipe_text(str(tmp_path / "x.yaml"))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few and small images of a few classes, laid out as the datasets of photographs are."""
    root = tmp_path_factory.mktemp("photographs")
    many = published_classes("miniimagenet-ravi", 20, 5, 5)  # for training of more ways than the test
    write_class_folders(root / "miniImagenet", many, images=7)
    write_class_folders(root / "tieredImageNet", published_classes("tieredimagenet", 5, 5, 5), images=7)
    write_class_folders(root / "cifar-fs", published_classes("cifar-fs", 5, 5, 5), images=7)
    birds = [f"{number:03d}.Bird" for number in range(1, 21)]  # ten, five and five of the splits
    write_class_folders(root / "CUB_200_2011", {"images": birds}, images=7)
    return root


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few embeddings of a few classes, laid out as those of LEO's authors and as ours are."""
    root = tmp_path_factory.mktemp("embeddings")
    generator = torch.Generator().manual_seed(0)
    for folder in LEO_FOLDERS.values():
        for split in SPLITS:
            names = [f"{split}{number}" for number in range(5) for _ in range(7)]
            vectors = torch.randn(len(names), 640, generator=generator)
            write_embeddings(root / folder / "center", split, vectors, names, layout="leo")
            write_embeddings(root / "cifar-fs", split, vectors, names)
    return root


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_runs_for_two_updates(
    name: str, photographs: Path, embeddings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a validation, all in small: on its own data where that is at hand, else on images of the same shape.

    Those of no updates are tested, without the weights that they start from.
    """
    text, (dataset, title) = recipe_text(name), name.split("/")
    given = yaml.safe_load(text)
    only_tested = given["train"].get("updates") == 0
    task = given.get("validation", {}).get("task") or given["test"].get("task") or given["train"]["task"]
    overrides = ["--train.updates=2", "--train.batching=loop", "--train.trace=false", "--train.meta_batch=1"]
    overrides += ["--train.task.queries=2", f"--validation.task={json.dumps(task | {'queries': 2})}"]
    overrides += ["--validation.tasks=1"]
    if dataset == "omniglot" and Omniglot().location() is None:
        overrides += ["--dataset=quickstudy.data.Glyphs"]
    if given["dataset"]["class_path"] == "quickstudy.data.Embeddings":
        overrides += [f"--dataset.root={embeddings}"]
    elif dataset in {"miniimagenet", "tieredimagenet", "cifar-fs", "cub"}:
        monkeypatch.setenv("QUICKSTUDY_CACHE", str(photographs / "cache"))
        overrides += [f"--dataset.root={photographs}", "--dataset.image_size=32"]
        text = text.replace("size: 84", "size: 28")  # of crops
    if "conv4" in title and given["dataset"]["class_path"] != "quickstudy.data.Embeddings":
        overrides += ["--method.backbone.channels=4"]
    if title.startswith("lstm-") and dataset != "sine":
        overrides += ["--method.hidden=[8, 4]"]
    if only_tested:
        settings = parse_recipe(text, [*overrides, "--train.updates=0", "--pretrained=null"])
        assert testing.test_recipe(settings, Wish(tasks=1, queries=2), "cpu", name=name).score.count == 1
        return
    settings = parse_recipe(text, overrides)

    def make() -> engine.Recipe:
        return engine.instantiate(settings)

    group = Group(make(), [0], build_methods(make, [0]), "cpu")
    before = group.models.state(0)
    for _ in range(2):
        assert torch.isfinite(group.update()).all()
    assert group.validate()[0]["val_score"] >= 0
    assert any(not torch.equal(before[key], tensor) for key, tensor in group.models.state(0).items())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_what_it_is_and_what_was_published(name: str) -> None:
    text = recipe_text(name)
    assert text.startswith("# ")
    known = {row["id"]: row for row in csv.DictReader(PUBLISHED.open())}
    recipe = yaml.safe_load(text)
    dataset = name.split("/")[0]
    backbone = recipe["method"].get("init_args", {}).get("backbone", {})
    if backbone.get("class_path") == "quickstudy.nn.Conv4" and dataset != "glyphs":
        assert f"-conv4{'-32' if backbone.get('init_args', {}).get('channels') == 32 else ''}-" in name
    used = getattr(locate(recipe["dataset"]["class_path"]), "name", None)
    assert (recipe["dataset"]["init_args"]["of"] if used == "embeddings" else used) == dataset
    assert len(set(recipe["published"])) == len(recipe["published"])
    shape = recipe.get("test", {}).get("task") or recipe["train"]["task"]
    for identifier in recipe["published"]:
        row = known[identifier]
        trained_on, tested_on = row["dataset"], row["tested_on"]
        assert trained_on == dataset
        assert identifier.split("/")[0] == (dataset if tested_on == dataset else f"{dataset}-to-{tested_on}")
        assert int(row["shot"]) == shape["shot"]
        assert row["way"] == str(shape["way"] or "")
    own = [identifier for identifier in recipe["published"] if known[identifier]["tested_on"] == dataset]
    assert own or "No published number" in " ".join(re.split(r"[#\s]+", text))
