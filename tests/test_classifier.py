"""A classifier of a user's own classes: scikit-learn's contract, every method, every form of a picture."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import GLYPHS, published_classes, write_class_folders
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import quickstudy as qs
from quickstudy import FewShotClassifier, engine, methods
from quickstudy.data import Arrays, CenterCrop, Normalise
from quickstudy.data.base import SPLITS
from quickstudy.engine.job import Quiet
from quickstudy.errors import DataError, InputError, RecipeError, TrainingError
from quickstudy.methods import Method
from quickstudy.methods.inner import SGD
from quickstudy.nn import MLP, Conv4
from quickstudy.task import Task, TaskShape

WAY, SIDE = 3, 8


@parametrize_with_checks([FewShotClassifier(), FewShotClassifier(methods.NearestNeighbour(), batch_size=7)])
def test_the_contract_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two seeds."""
    settings = engine.parse_recipe(GLYPHS, ["--method.norm=joint"])
    return engine.train(settings, tmp_path_factory.mktemp("run"), name="glyphs/x", seeds=[0, 1]).folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two classes of five image files, which are neither square nor grey."""
    root = write_class_folders(tmp_path_factory.mktemp("photos"), {"": ["cat", "dog"]}, images=5, side=(40, 30))
    return {name: sorted((root / name).iterdir()) for name in ("cat", "dog")}


def labelled(photos: dict[str, list[Path]]) -> tuple[list[Path], list[str]]:
    return [file for files in photos.values() for file in files], [
        name for name, files in photos.items() for _ in files
    ]


def test_ten_files_in_three_lines(run: Path, photos: dict[str, list[Path]]) -> None:
    paths, names = labelled(photos)
    classifier = FewShotClassifier(run).fit(paths, names)
    assert set(classifier.predict(paths)) <= {"cat", "dog"}
    assert_array_equal(classifier.predict(paths[:1]), classifier.predict(paths)[:1])
    probabilities = classifier.predict_proba(paths)
    assert probabilities.shape == (10, 2)
    assert_allclose(probabilities.sum(1), 1)
    assert 0 <= classifier.score(paths, names) <= 1
    assert len(cross_val_score(clone(classifier), paths, names, cv=5)) == 5


def test_paths_images_and_arrays_are_one(run: Path, photos: dict[str, list[Path]]) -> None:
    paths, names = labelled(photos)
    opened = [Image.open(path) for path in paths]
    pixels = np.stack([np.asarray(picture) for picture in opened])
    expected = FewShotClassifier(run).fit(paths, names).predict_proba(paths)
    tensor = torch.from_numpy(pixels).movedim(3, 1)
    for X in (
        list(map(str, paths)),
        np.array(list(map(str, paths))),
        opened,
        pixels,
        pixels / 255,
        tensor,
        tensor / 255,
    ):
        assert_array_equal(FewShotClassifier(run).fit(X, names).predict_proba(X), expected)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Noisy pictures, of three kinds in turn."""
    x = np.random.default_rng(seed).integers(0, 128, (count, SIDE, SIDE))
    x[np.arange(count), np.arange(count) % WAY] += 127
    return x.astype(np.uint8)


KINDS = np.arange(12) % WAY
MAKE = {
    "ANIL": lambda: methods.MAML(conv(), adapts="head"),
    "FineTune": lambda: methods.FineTune(conv(), SGD(0.1), steps=3),
    "LEO": lambda: methods.LEO(conv(), latents=4),
    "MAML": lambda: methods.MAML(conv(), inner_lr=0.1),
    "MatchingNet": lambda: methods.MatchingNet(conv(), fce="concat"),
    "MetaLSTM": lambda: methods.MetaLSTM(conv()),
    "NearestNeighbour": lambda: methods.NearestNeighbour(conv()),
    "OPLSTM": lambda: methods.OPLSTM(MLP([8, 8], batch_norm=True)),
    "OPLSTM head": lambda: methods.OPLSTM(conv(), adapts="head"),
    "PlainLSTM": lambda: methods.PlainLSTM(conv(), hidden=[8]),
    "ProtoMAML": lambda: methods.MAML(conv(), inner_lr=0.1, head_start="prototypes"),
    "ProtoNet": lambda: methods.ProtoNet(conv()),
    "Reptile": lambda: methods.Reptile(conv(), SGD(0.1)),
    "SAP": lambda: methods.SAP(conv()),
    "TNet": lambda: methods.TNet(conv()),
    "WarpMAML": lambda: methods.WarpMAML(conv()),
}


def conv() -> Conv4:
    return Conv4(4, blocks=2)


def built(name: str, way: int = WAY) -> Method:
    """A method as training begins with it, for pictures of one channel."""
    torch.manual_seed(0)
    x, y = torch.rand(2 * way, 1, SIDE, SIDE), torch.arange(way).repeat(2)
    return MAKE[name]().build(Task(x, y, x, y, way))


def test_no_method_is_forgotten() -> None:
    exported = {kind for name in methods.__all__ if isinstance(kind := getattr(methods, name), type)}
    known = {kind for kind in exported if issubclass(kind, Method)} - {Method}
    assert {type(make()) for make in MAKE.values()} == known


@pytest.mark.parametrize("name", MAKE)
def test_a_prediction_does_not_depend_on_its_neighbours(name: str) -> None:
    classifier = FewShotClassifier(built(name)).fit(pictures(12), KINDS)
    new = pictures(7, seed=1)
    together = classifier.predict_proba(new)
    for size in (1, 3):
        assert_allclose(classifier.set_params(batch_size=size).predict_proba(new), together, atol=1e-5)
    assert_allclose(np.concatenate([classifier.predict_proba(one[None]) for one in new]), together, atol=1e-5)
    assert_allclose(classifier.predict_proba(new[::-1]), together[::-1], atol=1e-5)


def test_a_transductive_norm_predicts_all_of_a_call_together() -> None:
    classifier = FewShotClassifier(built("ProtoNet"), norm="batch", batch_size=2).fit(pictures(12), KINDS)
    new = pictures(7, seed=1)
    together = classifier.predict_proba(new)
    assert_array_equal(classifier.set_params(batch_size=100).predict_proba(new), together)
    assert np.abs(classifier.predict_proba(new[:2]) - together[:2]).max() > 1e-4
    with pytest.raises(RecipeError, match="MAML offers norm batch or support, not 'joint'"):
        FewShotClassifier(built("MAML"), norm="joint").fit(pictures(12), KINDS)


@pytest.mark.parametrize("name", [name for name in MAKE if built(name).any_way])
def test_any_number_of_classes_and_of_examples(name: str) -> None:
    x, y = pictures(9), np.array(["few", "many", "one", "two", "many", "few", "many", "two", "many"])
    classifier = FewShotClassifier(built(name)).fit(x, y)
    assert_array_equal(classifier.classes_, ["few", "many", "one", "two"])
    probabilities = classifier.predict_proba(pictures(5, seed=1))
    assert probabilities.shape == (5, 4)
    assert np.isfinite(probabilities).all()


def test_examples_are_read_class_by_class() -> None:
    reader = methods.PlainLSTM(torch.nn.Flatten(), hidden=[8], reading="sequential")
    x, new = pictures(12) / 255.0, pictures(5, seed=1) / 255.0
    in_turn, grouped = np.arange(12), KINDS.argsort(kind="stable")
    found = [FewShotClassifier(reader).fit(x[rows], KINDS[rows]).predict_proba(new) for rows in (in_turn, grouped)]
    assert_array_equal(*found)


@pytest.mark.parametrize("name", [name for name in MAKE if not built(name).any_way])
def test_methods_for_a_fixed_number_of_classes_say_so(name: str) -> None:
    with pytest.raises(
        RecipeError, match=r"built for 3-way tasks and cannot take 2-way ones.*Give it 3 classes.*ProtoNet"
    ):
        FewShotClassifier(built(name)).fit(pictures(12), KINDS % 2)


def test_a_method_that_is_not_built_is_built_for_the_data_and_stays_as_it_was() -> None:
    method = methods.FineTune(MLP([8]), SGD(0.5), steps=50, start="scratch", adapts="all")
    x = np.random.default_rng(0).normal(size=(40, 3))
    y = x[:, 0] > 0
    first, same, other = (FewShotClassifier(method, seed=seed).fit(x, y) for seed in (1, 1, 2))
    assert first.score(x, y) > 0.8
    assert first.predict([[2.0, 0, 0]]).dtype == bool
    assert_array_equal(first.predict_proba(x), same.predict_proba(x))
    assert np.abs(first.predict_proba(x) - other.predict_proba(x)).max() > 1e-4
    assert not hasattr(method, "way")


def test_seeds_of_a_run(run: Path, photos: dict[str, list[Path]]) -> None:
    paths, names = labelled(photos)
    first, zero, one = (
        FewShotClassifier(run, seed=seed).fit(paths, names).predict_proba(paths) for seed in (None, 0, 1)
    )
    assert_array_equal(first, zero)
    assert np.abs(first - one).max() > 1e-4
    with pytest.raises(RecipeError, match="trained with seeds 0, 1, not 7"):
        FewShotClassifier(run, seed=7).fit(paths, names)


SCRIPT = """
import sys, numpy as np
from quickstudy import FewShotClassifier
classifier = FewShotClassifier.load(sys.argv[1])
np.savez(sys.argv[3], names=classifier.classes_, found=classifier.predict_proba(np.load(sys.argv[2])))
"""


def in_a_new_process(folder: Path, X: np.ndarray, scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    """Classes and probabilities of a saved classifier, where there are no data."""
    np.save(scratch / "x.npy", X)
    nothing = str(scratch / "nothing")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(scratch / "x.npy"), str(scratch / "found.npz")]
    environment = {**os.environ, "QUICKSTUDY_CACHE": nothing, "QUICKSTUDY_DATA": nothing, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True)
    found = np.load(scratch / "found.npz")
    return found["names"], found["found"]


def test_saved_and_loaded(run: Path, photos: dict[str, list[Path]], tmp_path: Path) -> None:
    x, y = np.stack([np.asarray(Image.open(path)) for path in labelled(photos)[0]]), labelled(photos)[1]
    classifier = FewShotClassifier(run, seed=1).fit(x, y)
    names, found = in_a_new_process(classifier.save(tmp_path / "saved"), x, tmp_path)
    assert_array_equal(names, classifier.classes_)
    assert_array_equal(found, classifier.predict_proba(x))


def test_the_model_of_a_saved_classifier_learns_other_classes(
    run: Path, photos: dict[str, list[Path]], tmp_path: Path
) -> None:
    paths, names = labelled(photos)
    folder = FewShotClassifier(run, seed=1, batch_size=5).fit(paths, names).save(tmp_path / "saved")
    other = [name + str(number % 2) for number, name in enumerate(names)]
    expected = FewShotClassifier(run, seed=1, batch_size=5).fit(paths, other).predict_proba(paths)
    loaded = FewShotClassifier.load(folder)
    for classifier in (FewShotClassifier(folder, batch_size=5), loaded, clone(loaded)):
        assert_array_equal(classifier.fit(paths, other).predict_proba(paths), expected)


@pytest.mark.parametrize("y", [[0, 1, 2, 1], ["b", "a", "b", "c"], [True, False, False, True], [0.0, 1.0, 0.0, 1.0]])
def test_classes_of_every_type_are_saved(y: list[Any], tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(4, 3))
    classifier = FewShotClassifier().fit(x, y)
    loaded = FewShotClassifier.load(classifier.save(tmp_path / "saved"))
    assert loaded.classes_.dtype == classifier.classes_.dtype
    assert_array_equal(loaded.predict(x), classifier.predict(x))
    assert_array_equal(loaded.predict_proba(x), classifier.predict_proba(x))


def test_what_is_measured_before_a_test_is_saved(tmp_path: Path, photos: dict[str, list[Path]]) -> None:
    settings = engine.parse_recipe(GLYPHS, ["--method.normalise=centred-l2", "--train.updates=1"])
    folder = engine.train(settings, tmp_path / "run", name="glyphs/x").folder
    classifier = FewShotClassifier(folder).fit(*labelled(photos))
    centre = classifier.model_.method.get_buffer("centre")
    assert centre.abs().max() > 0
    loaded = FewShotClassifier.load(classifier.save(tmp_path / "saved"))
    assert torch.equal(loaded.model_.method.get_buffer("centre"), centre)


PHOTOGRAPHS = """
dataset:
  class_path: quickstudy.data.CIFARFS
  init_args:
    image_size: 14
    test_transforms:
      - {class_path: quickstudy.data.CenterCrop, init_args: {size: 12}}
      - {class_path: quickstudy.data.Normalise, init_args: {mean: [0.5], std: [0.2]}}
    train_transforms:
      - {class_path: quickstudy.data.CenterCrop, init_args: {size: 12}}
backbone: {class_path: quickstudy.nn.Conv4, init_args: {channels: 4, blocks: 2}}
train: {epochs: 1, batch: 8}
validation: {tasks: 4, task: {way: 2, shot: 1, queries: 1}}
"""


def test_a_pre_trained_backbone_is_a_nearest_centroid(
    tmp_path: Path, photos: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(tmp_path / "cache"))
    root = write_class_folders(tmp_path / "data" / "cifar-fs", published_classes("cifar-fs", 3, 3, 3), side=14)
    settings = engine.parse_recipe(PHOTOGRAPHS, [f"--dataset.root={root}"], engine.EmbedRecipe)
    run = engine.pretrain(settings, tmp_path / "embed", name="embed/x")
    paths, names = labelled(photos)
    classifier = FewShotClassifier(run.folder).fit(paths, names)
    assert classifier.model_.method.temperature == run.info["temperature"] != 1
    embedding = run.backbone()(classifier.support_.x)
    assert torch.allclose(classifier.model_.method.embed(classifier.support_.x), embedding)
    x = np.stack([np.asarray(Image.open(path)) for path in paths])
    _, found = in_a_new_process(classifier.save(tmp_path / "saved"), x, tmp_path)
    assert_array_equal(found, classifier.predict_proba(paths))
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / "cache")
    assert_array_equal(FewShotClassifier(run.folder).fit(paths, names).predict_proba(paths), found)


def test_a_run_without_its_data(tmp_path: Path, photos: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(tmp_path / "cache"))
    root = write_class_folders(tmp_path / "data" / "cifar-fs", published_classes("cifar-fs", 3, 3, 3), side=14)
    dataset = yaml.safe_load(PHOTOGRAPHS)["dataset"]
    settings = [
        "--train.updates=1",
        "--method.backbone.blocks=2",
        f"--dataset={yaml.safe_dump(dataset)}",
        f"--dataset.root={root}",
    ]
    for part in ("train", "validation", "test"):
        settings.append(f"--{part}.task={{way: 3, shot: 1, queries: 1}}")
    run = engine.train(engine.parse_recipe(GLYPHS, settings), tmp_path / "run", name="photographs/x")
    paths, names = labelled(photos)
    expected = FewShotClassifier(run.folder).fit(paths, names).predict_proba(paths)
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / "cache")
    assert_array_equal(FewShotClassifier(run.folder).fit(paths, names).predict_proba(paths), expected)


def test_folders_are_not_overwritten_by_accident(tmp_path: Path) -> None:
    classifier = FewShotClassifier().fit([[0.0], [1.0]], ["a", "b"])
    folder = classifier.save(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RecipeError, match="holds a classifier already"):
        FewShotClassifier().fit([[0.0], [1.0]], [5, 6]).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    FewShotClassifier().fit([[0.0], [1.0]], [5, 6]).save(folder, overwrite=True)
    assert_array_equal(FewShotClassifier.load(folder).predict([[0.9]]), [6])
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="holds other things than a classifier"):
        classifier.save(folder, overwrite=True)
    with pytest.raises(RecipeError, match="has no recipe to save"):
        FewShotClassifier(built("ProtoNet")).fit(pictures(12), KINDS).save(tmp_path / "method")
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a saved classifier"):
        FewShotClassifier.load(tmp_path)
    folder = FewShotClassifier().fit([[0.0], [1.0]], ["a", "b"]).save(tmp_path / "saved")
    text = (folder / "classifier.json").read_text()
    for broken in ("{", text.replace('"format": 1', '"format": 9'), text.replace("classes", "clases")):
        (folder / "classifier.json").write_text(broken)
        with pytest.raises(TrainingError, match=r"classifier\.json is damaged, or of another version"):
            FewShotClassifier.load(folder)
    (folder / "classifier.json").write_text(text)
    (folder / "examples.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="cannot read the weights"):
        FewShotClassifier.load(folder)


def test_columns_of_tables_are_remembered(tmp_path: Path) -> None:
    classifier = FewShotClassifier().fit([[0.0, 0.0], [1.0, 1.0]], ["a", "b"])
    classifier.feature_names_in_ = np.array(["height", "width"], dtype=object)  # as scikit-learn does for pandas
    loaded = FewShotClassifier.load(classifier.save(tmp_path / "saved"))
    assert_array_equal(loaded.feature_names_in_, ["height", "width"])
    assert loaded.n_features_in_ == 2


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        ([], [], "X is empty"),
        ("cat.jpg", ["cat"], "not a str: put one into a list"),
        (Image.new("L", (4, 4)), ["cat"], "put one into a list"),
        (pictures(4), ["cat"] * 4, "at least two classes; got one class, 'cat'"),
        (pictures(4), [1, 2, 1], "inconsistent numbers of samples"),
        (pictures(4), [0.1, 0.2, 0.3, 0.4], "continuous"),
        (pictures(4)[0], list("abcdefgh"), "a single one goes into a list"),
        (pictures(4) * 1.0, list("abab"), "floats from 0 to 1; got float64 from 0 to 2"),
        ([None] * 4, list("abab"), "got NoneType"),
    ],
)
def test_what_is_no_set_of_labelled_pictures(X: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShotClassifier(built("ProtoNet")).fit(X, y)


def test_other_mistakes(tmp_path: Path, photos: dict[str, list[Path]]) -> None:
    paths, names = labelled(photos)
    with pytest.raises(InputError, match=r"X holds pictures: give a model.*runs/demo"):
        FewShotClassifier().fit(paths, names)
    with pytest.raises(RecipeError, match="is not the folder of a run"):
        FewShotClassifier(tmp_path).fit(paths, names)
    with pytest.raises(InputError, match="batch_size is at least 1, not 0"):
        FewShotClassifier(batch_size=0).fit([[0.0], [1.0]], ["a", "b"])
    with pytest.raises(NotFittedError):
        FewShotClassifier(built("ProtoNet")).predict(pictures(1))
    classifier = FewShotClassifier(built("ProtoNet")).fit(pictures(12), KINDS)
    with pytest.raises(DataError, match=r"cannot read the image .*gone\.jpg: No such file"):
        classifier.predict([tmp_path / "gone.jpg"])
    points = torch.rand(4, 1)
    regression = methods.MAML(MLP([8])).build(Task(points, points, points, points))
    with pytest.raises(InputError, match="regression, which has no classes"):
        FewShotClassifier(regression).fit([[0.0], [1.0]], ["a", "b"])


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((64,), "bytes"),
        ((8, 8), "bytes"),
        ((1, 8, 6), "bytes"),
        ((8, 6, 3), "bytes"),
        ((1, 8, 8), "bytes"),
        ((1, 8, 8), "integers"),
        ((1, 8, 8), "small"),
        ((1, 8, 8), "normal"),
        ((2, 8, 8), "normal"),
        ((3, 5), "integers"),
        ((1, 8, 8), "binary"),
        ((1, 8, 8), "unit"),
    ],
)
def test_arrays_are_seen_as_in_training(shape: tuple[int, ...], kind: str) -> None:
    x: Any = np.random.default_rng(0).integers(0, 256, (60, *shape), dtype=np.uint8)
    if kind != "bytes":
        x = {
            "integers": x.astype(np.int64),
            "small": x / 1e6,
            "normal": x / 64 - 2,
            "binary": x.astype(np.int64) // 128,
            "unit": x / 256 + 0.001,
        }[kind]
    y, task, images = np.arange(60) // 6, TaskShape(2, 5, 1), len(shape) == 3 or (kind == "bytes" and len(shape) == 2)
    choices: list[list[Any]] = [[], [Normalise([0.5], [0.2])], [CenterCrop(4)]]
    for transforms in choices[: 1 + 2 * images]:
        dataset = Arrays(x, y, train_transforms=transforms, test_transforms=transforms)
        method = methods.ProtoNet(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)))
        test = qs.Testing(2, TaskShape(2, 1, 1))
        recipe = qs.Recipe(dataset, method, qs.Training(task, updates=1), qs.Validation(tasks=2), test)
        trained, _ = qs.meta_train(recipe, device="cpu", listener=Quiet())
        known = FewShotClassifier(trained).fit(x, y).support_.x.double().flatten(1)
        for split in SPLITS:
            seen = dataset.split(split).tasks(task, 0, 3, seed=0).support_x.double().flatten(0, 1).flatten(1)
            assert torch.cdist(seen, known, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-5
        as_list = FewShotClassifier(trained).fit(list(x), y).support_.x.double().flatten(1)
        assert torch.equal(as_list, known)
        other = Arrays(x, y, name="other")
        assert qs.meta_test(trained, recipe, on=other, device="cpu") == qs.meta_test(trained, recipe, device="cpu")


def test_a_run_on_arrays_that_are_no_pictures_is_saved_and_travels(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(60, 1, 12, 12)), np.arange(60) // 6
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    transforms = "[{class_path: quickstudy.data.Normalise, init_args: {mean: [0.5], std: [0.2]}}]"
    arguments = f"{{path: {tmp_path}/mine.npz, test_transforms: {transforms}, train_transforms: {transforms}}}"
    text = GLYPHS.replace("quickstudy.data.Glyphs", f"quickstudy.data.ArrayFile, init_args: {arguments}")
    settings = ["--method.backbone.blocks=2", "--train.updates=1"]
    for part in ("train", "validation", "test"):
        settings.append(f"--{part}.task={{way: 2, shot: 1, queries: 1}}")
    run = engine.train(engine.parse_recipe(text, settings), tmp_path / "run", name="mine/x")
    classifier = FewShotClassifier(run.folder).fit(x, y)
    assert torch.allclose(classifier.support_.x, torch.from_numpy(x / 0.2 - 2.5).float(), atol=1e-5)
    expected = classifier.predict_proba(x)
    assert_array_equal(FewShotClassifier.load(classifier.save(tmp_path / "saved")).predict_proba(x), expected)
    (tmp_path / "mine.npz").unlink()
    assert_array_equal(FewShotClassifier(run.folder).fit(x, y).predict_proba(x), expected)
    with pytest.raises(InputError, match="reads arrays of numbers"):
        classifier.predict(["one.png"])


def test_a_fit_that_fails_leaves_nothing_half_learned() -> None:
    x = pictures(12)
    classifier = FewShotClassifier(built("ProtoNet")).fit(x, KINDS)
    with pytest.raises(DataError):
        classifier.fit([x[0], "nowhere.png"], ["rocket", "whale"])
    with pytest.raises(NotFittedError):
        classifier.predict(x)


def test_arrays_of_more_axes_are_taken_as_they_are() -> None:
    x = np.random.default_rng(0).normal(size=(6, 5, 2))
    classifier = FewShotClassifier().fit(x, [0, 0, 0, 1, 1, 1])
    assert classifier.predict(x[:2]).shape == (2,)
    with pytest.raises(InputError, match=r"examples of shape \[5, 2\]; X has examples of shape \[5, 3\]"):
        classifier.predict(np.zeros((1, 5, 3)))


def test_importing_the_library_is_light() -> None:
    script = "import sys, quickstudy; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_devices() -> None:
    x, y = [[0.0], [1.0]], ["a", "b"]
    assert_array_equal(FewShotClassifier(device="auto").fit(x, y).predict(x), y)
    with pytest.raises(RecipeError, match="the device gpu cannot be used here"):
        FewShotClassifier(device="gpu").fit(x, y)
