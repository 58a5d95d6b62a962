"""The scikit-learn face: a classifier that learns a user's own classes from a few examples of each."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data
from torch import Tensor, nn

from quickstudy.data.images import unit_floats
from quickstudy.data.own import examples
from quickstudy.data.reader import ArrayReader
from quickstudy.engine.checkpoint import load_weights, save_weights
from quickstudy.engine.evaluate import pick_device
from quickstudy.engine.trained import FILES as MODEL_FILES
from quickstudy.engine.trained import Trained, read_info, write_info
from quickstudy.errors import DataError, InputError, RecipeError
from quickstudy.files import write_folder
from quickstudy.methods import Method, Norm, ProtoNet
from quickstudy.task import Support, Task

INFO, EXAMPLES = "classifier.json", "examples.safetensors"

Inputs = Any
"""``n`` pictures (:data:`~quickstudy.data.reader.AnyPicture`), or an array ``[n, ...]`` of what the model reads."""


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """A few-shot learner as a classifier of scikit-learn: ``fit`` adapts a trained model to the classes of ``y``.

    ::

        classifier = FewShotClassifier("runs/demo").fit(["a1.png", "a2.png", "b1.png"], ["a", "a", "b"])
        classifier.predict(["new.png"])  # ["a"]

    For a model that was trained on images, ``X`` is a list of pictures (paths, images of Pillow, or arrays of pixels in
    any mix), or one array of them; they are brought to the colours, the size and the range of values that it knows. For
    any other ``X`` is an array ``[n, ...]``, taken as :class:`~quickstudy.data.Arrays` takes one. There may be any
    number of examples of each class, and of classes, unless the parameters of the method depend on the number of
    classes.

    Args:
        model: the folder of a run, of ``quickstudy embed`` (then the nearest centroid on its backbone) or of a saved
            classifier (whose model is used, not its classes); what :func:`~quickstudy.meta_train` returned; or a
            method: one that is not built is built for the data, with random weights. ``None`` is the nearest centroid
            of vectors ``[n, features]``, which needs no training.
        seed: of a run with several, whose weights (its first if ``None``); of a method that is not built, what its
            weights are drawn by (0 if ``None``).
        norm: whose statistics normalise what is to be predicted (:class:`~quickstudy.methods.Method`). With
            ``support`` a prediction does not depend on the others; with ``batch`` and ``joint`` all that is given to
            one call is predicted together.
        batch_size: how many are predicted at a time, to bound memory; it has no influence on the result.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; ``auto`` is a GPU if there is one.

    Attributes:
        classes_: the classes, sorted, ``[way]``; columns of probabilities are in this order.
        model_: the :class:`~quickstudy.engine.trained.Trained` model.
        support_: the examples it has learned from, as the model sees them, ordered by class.
    """

    n_features_in_: int  # these two are set by scikit-learn, for arrays
    feature_names_in_: np.ndarray

    def __init__(
        self,
        model: str | os.PathLike[str] | Trained | Method | None = None,
        *,
        seed: int | None = None,
        norm: Norm = "support",
        batch_size: int = 64,
        device: str = "cpu",
    ) -> None:
        self.model = model
        self.seed = seed
        self.norm: Norm = norm
        self.batch_size = batch_size
        self.device = device

    def fit(self, X: Inputs, y: Any) -> Self:
        """Learn from labelled examples.

        Args:
            X: examples, ``n`` pictures or an array ``[n, ...]``.
            y: the class of each, ``[n]``: strings, whole numbers or booleans.

        Raises:
            InputError: ``X`` is not what the model reads, or there are fewer than two classes.
            RecipeError: there is no such model or device, or the model cannot take this number of classes, or this
                ``norm``.
            DataError: an image file cannot be read.
            ValueError: as of any classifier of scikit-learn.
        """
        vars(self).pop("support_", None)  # what it had learned: not to be mixed with what follows, should this fail
        if self.batch_size < 1:
            raise InputError(f"batch_size is at least 1, not {self.batch_size}")
        self.model_ = self._opened()
        if self.model_.shape is not None and self.model_.method.way is None:
            raise InputError("the model has learned regression, which has no classes: choose another")
        if isinstance(self.model_.reader, ArrayReader):
            X, y = validate_data(self, _numbers(X), y, dtype=[np.float64, np.float32], allow_nd=True)
        else:
            X, y = _pictures(X), column_or_1d(y, warn=True)
            check_consistent_length(X, y)
        with warnings.catch_warnings():  # one example of each class is no sign of a regression
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        names = self.classes_.tolist()
        if len(names) < 2:
            raise InputError(f"a classifier needs examples of at least two classes; got one class, {names[0]!r}")
        x, labels = self._inputs(X), torch.from_numpy(labels)
        order = labels.argsort(stable=True)  # as in the tasks of this library, which some methods read in order
        return self._learn(Support(x[order], labels[order], len(names)))

    def predict_proba(self, X: Inputs) -> np.ndarray:
        """Return the probability of each class, float64 ``[n, way]``, with columns in the order of ``classes_``.

        Raises:
            InputError: ``X`` is not what the model reads.
            DataError: an image file cannot be read.
            ValueError: as of any classifier of scikit-learn.
        """
        check_is_fitted(self, "support_")
        if isinstance(self.model_.reader, ArrayReader):
            X = validate_data(self, _numbers(X), dtype=[np.float64, np.float32], allow_nd=True, reset=False)
        else:
            X = _pictures(X)
        method, dtype = self.model_.method, self.support_.x.dtype
        size = self.batch_size if method.norm == "support" else len(X)
        logits = []
        with torch.no_grad():
            for start in range(0, len(X), size):
                x = self._inputs(X[start : start + size]).to(self._device, dtype)
                logits.append(method.predict(self._state, x).cpu().double())
        return torch.cat(logits).softmax(1).numpy()

    def predict(self, X: Inputs) -> np.ndarray:
        """Return the most probable class of each, ``[n]``.

        Raises:
            InputError, DataError, ValueError: as of :meth:`predict_proba`.
        """
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a fitted classifier into a folder: the model, and the examples, from which :meth:`load` learns again.

        ======================== ==============================================================
        ``classifier.json``      the classes and the arguments
        ``examples.safetensors`` the examples as the model sees them, and their classes
        ``model.*``              the model (:class:`~quickstudy.engine.trained.Trained`), if any
        ======================== ==============================================================

        Args:
            folder: where; made if need be.
            overwrite: replace the classifier that is there.

        Returns:
            ``folder``.

        Raises:
            RecipeError: the folder holds a classifier already, or other things; or the model was made in Python.
            FileError: it cannot be written; what was there is unharmed.
        """
        check_is_fitted(self, "support_")
        folder = Path(folder)
        if folder.exists():
            found = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
            if found - {INFO, EXAMPLES, *MODEL_FILES}:
                raise RecipeError(f"{folder} holds other things than a classifier; choose another folder")
            if found and not overwrite:
                raise RecipeError(f"{folder} holds a classifier already: choose another folder, or set overwrite")
        columns = getattr(self, "feature_names_in_", None)

        def fill(new: Path) -> None:
            if self.model is not None:
                self.model_.save(new)
            save_weights(new / EXAMPLES, {"x": self.support_.x, "y": self.support_.y})
            write_info(
                new / INFO,
                classes=self.classes_.tolist(),
                dtype=self.classes_.dtype.str,
                columns=None if columns is None else columns.tolist(),
                norm=self.norm,
                batch_size=self.batch_size,
            )

        return write_folder(folder, fill)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: str = "cpu") -> Self:
        """Return the classifier that :meth:`save` has written; no code in the files is run.

        Args:
            folder: where it is.
            device: what to learn and to predict on.

        Raises:
            RecipeError: there is no classifier there.
            TrainingError: it is damaged, or of another version.
        """
        folder = Path(folder)
        if not (folder / INFO).is_file():
            raise RecipeError(
                f"{folder} is not a saved classifier (it has no {INFO}); `quickstudy fit MODEL --images FOLDER "
                f"--out {folder}` makes one"
            )
        names = ("classes", "dtype", "columns", "norm", "batch_size")
        classes, dtype, columns, norm, batch_size = read_info(folder / INFO, *names)
        learned = load_weights(folder / EXAMPLES)
        model = folder if (folder / MODEL_FILES[0]).is_file() else None
        classifier = cls(model, norm=norm, batch_size=batch_size, device=device)
        classifier.classes_, classifier.model_ = np.array(classes, dtype=dtype), classifier._opened()
        if isinstance(classifier.model_.reader, ArrayReader):
            classifier.n_features_in_ = learned["x"].shape[1]
        if columns is not None:
            classifier.feature_names_in_ = np.array(columns, dtype=object)
        return classifier._learn(Support(learned["x"], learned["y"], len(classes)))

    def _opened(self) -> Trained:
        """Return the model that the arguments name; not yet built, if it is a method that is not."""
        if self.model is None:
            return Trained(ProtoNet(nn.Flatten()))
        if isinstance(self.model, Trained):
            return copy.deepcopy(self.model)
        if isinstance(self.model, Method):
            return Trained.of(copy.deepcopy(self.model))
        if not isinstance(self.model, str | os.PathLike):
            raise RecipeError(
                "a model is the folder of one, a method (such as ProtoNet(Conv4())), or what meta_train returns first "
                f"(trained, history = meta_train(recipe)), not {type(self.model).__name__}"
            )
        return Trained.open(os.fspath(self.model), self.seed)

    def _learn(self, support: Support) -> Self:
        """Adapt the model to the examples."""
        method, x = self.model_.method, support.x.float()
        example = Task(x, support.y, x, support.y, support.way)
        if self.model_.shape is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed or 0)
                method.build(example)
        method.check(example)
        method.set_norm(self.norm)
        self._device = pick_device(self.device)
        method.eval().to(self._device)
        weight = next(method.parameters(), None)
        support = support._replace(x=support.x.to(torch.float64 if weight is None else weight.dtype))
        with torch.no_grad():
            self._state = method.adapt(Support(support.x.to(self._device), support.y.to(self._device), support.way))
        self.support_ = support
        return self

    def _inputs(self, X: Any) -> Tensor:
        """Return examples as the model sees them, ``[n, ...]``, of the shape that it reads."""
        x, shape = self.model_.reader(X), self.model_.shape
        if shape is not None and x.shape[1:] != shape:
            expected, got = ([*lengths] for lengths in (shape, x.shape[1:]))
            raise InputError(f"the model reads examples of shape {expected}; X has examples of shape {got}")
        return x


def _pictures(X: Any) -> Sequence[Any] | np.ndarray | Tensor:
    """Return pictures as something with a length that can be sliced."""
    if isinstance(X, str | os.PathLike | Image.Image) or not isinstance(X, Iterable):
        raise InputError(f"X is a list of pictures, or an array of them, not a {type(X).__name__}: put one into a list")
    pictures = X if isinstance(X, np.ndarray | Tensor) else list(X)
    if not len(pictures):
        raise InputError("X is empty: give at least one picture")
    return pictures


def _numbers(X: Any) -> Any:
    """Return ``X``, which is to be an array of numbers and no pictures; images in bytes as datasets hold them."""
    if isinstance(X, list | tuple) and X and isinstance(X[0], str | os.PathLike | Image.Image):
        raise InputError(
            "this model reads arrays of numbers [n, ...], and X holds pictures: give a model that was trained on "
            "images, such as FewShotClassifier('runs/demo'), which `quickstudy demo` makes"
        )
    try:
        array = X if isinstance(X, np.ndarray | Tensor) else np.asarray(X)
        if str(array.dtype).endswith("uint8") and array.ndim in (3, 4):
            return unit_floats(examples(array, "X")).numpy()
    except DataError as error:
        raise InputError(str(error)) from error
    except ValueError:  # of several shapes, which scikit-learn has a message for
        pass
    return X
