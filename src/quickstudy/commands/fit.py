"""``quickstudy fit``."""

from __future__ import annotations

import sys
from pathlib import Path

DEMO = "runs/demo"


def fit(
    model: str = DEMO,
    images: Path | None = None,
    out: Path = Path("classifier"),
    seed: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Learn classes of your own from a few images of each; writes a classifier for `quickstudy predict`.

    Any number of classes will do, and of images of each, unless the model was made for a number of classes. Images of
    any size and colours are brought to those that the model knows. Those that cannot be read are named and left out.

    Args:
        model: folder of a run, of `quickstudy embed`, or of another classifier; that of `quickstudy demo` if not given.
        images: folder with a folder of images for each class, such as pets/cat/1.jpg.
        out: folder of the classifier.
        seed: of a run with several: whose weights; its first if not given.
        device: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.
        overwrite: replace the classifier that is there.
    """
    from quickstudy import FewShotClassifier
    from quickstudy.data.layouts import SUFFIXES, class_files, class_images, other_files
    from quickstudy.data.progress import track
    from quickstudy.data.reader import readable
    from quickstudy.errors import DataError, RecipeError

    if images is None:
        raise RecipeError("name your images: --images FOLDER, a folder with a folder of images for each class")
    if model == DEMO and not Path(DEMO).exists():
        raise RecipeError(
            f"there is no {DEMO} here: `quickstudy demo` makes it in a few minutes; or name another run, as in "
            f"`quickstudy fit RUN --images {images}`"
        )
    found = class_files(images)
    if len(found) < 2:
        raise DataError(
            f"{images} has {len(found)} folders of images, and there are to be at least two, one for each class, as in "
            f"{images / 'cat' / '1.jpg'} and {images / 'dog' / '1.jpg'}"
        )
    for file in class_images(images):
        print(f"left out: {file} is in no folder of a class", file=sys.stderr)
    classes = {}
    for name, files in track(found.items(), "reading images", len(found)):
        classes[name], broken = readable(files)
        for reason in broken:
            print(f"left out: {reason}", file=sys.stderr)
        for other in other_files(images / name):
            print(f"left out: {other} is not an image file ({', '.join(SUFFIXES)})", file=sys.stderr)
        if not classes[name]:
            raise DataError(f"{images / name} has no image that can be read: replace its files, or remove it")
    classifier = FewShotClassifier(model, seed=seed, device=device)
    classifier.fit(
        [file for files in classes.values() for file in files],
        [name for name, files in classes.items() for _ in files],
    )
    classifier.save(out, overwrite=overwrite)
    print(f"{out}   {', '.join(f'{name} ({len(files)})' for name, files in classes.items())}")
    print(f"next: quickstudy predict {out} IMAGE ...")
