"""miniImageNet (Vinyals et al., 2016) in the split of Ravi and Larochelle (2017)."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import ClassVar

from quickstudy.data.base import SPLITS, Split
from quickstudy.data.folders import ClassFolders, Files, class_files
from quickstudy.errors import DataError


class MiniImageNet(ClassFolders):
    """miniImageNet: 100 classes of ImageNet, 600 photographs of each; 64 / 16 / 20 to train, validate and test on.

    The files lie in ``{train,val,test}/<WordNet id>/``, and fewer classes will do. A class of Ravi and Larochelle's
    lists under another split than theirs is refused, because its results could not be compared with published ones.
    The folders are looked for in ``miniImagenet/`` and ``miniimagenet/`` of each place, and in the place itself. The
    arguments are those of :class:`~quickstudy.data.folders.ClassFolders`.
    """

    name = "miniimagenet"
    layout: ClassVar[str] = "a folder with train/, val/ and test/, each with a folder of images for every class,"

    @classmethod
    def find(cls, place: Path) -> Path | None:
        """Return the folder in which ``train/``, ``val/`` and ``test/`` lie, or ``None``."""
        candidates = (place / "miniImagenet", place / "miniimagenet", place)
        return next((path for path in candidates if all((path / split).is_dir() for split in SPLITS)), None)

    @classmethod
    def files(cls, folder: Path) -> Files:
        """Return the image files of every class of every split.

        Raises:
            DataError: a class is in another split than Ravi and Larochelle's, or in two, or a folder cannot be read.
        """
        files: Files = {split: class_files(folder / split) for split in SPLITS}
        known = ravi_split()
        wrong = [
            f"{split}/{name} belongs in {known[name]}/"
            for split in SPLITS
            for name in files[split]
            if known.get(name, split) != split
        ]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise DataError(
                f"{cls.name}: {len(wrong)} classes of {folder} are in another split than Ravi and Larochelle's: "
                f"{'; '.join(wrong[:5])}{more}; move their folders"
            )
        seen: dict[str, Split] = {}
        for split in SPLITS:
            for name in files[split]:
                if name in seen:
                    raise DataError(
                        f"{cls.name}: the class {name} is in both {seen[name]}/ and {split}/ of {folder}, and no class "
                        "may be in two splits: remove one of its folders"
                    )
                seen[name] = split
        return files


@lru_cache(maxsize=1)
def ravi_split() -> dict[str, Split]:
    """Return the split of each of the 100 classes (WordNet ids), as in Ravi and Larochelle (2017)."""
    text = (resources.files("quickstudy.data") / "splits" / "miniimagenet-ravi.json").read_text(encoding="utf-8")
    return {name: split for split, names in json.loads(text).items() for name in names}
