"""The datasets there are, with the facts about each; importing this imports none of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from quickstudy.errors import DataError, suggest

if TYPE_CHECKING:
    from quickstudy.data.base import Dataset


@dataclass(frozen=True)
class Entry:
    """What there is to know of a dataset before it is on the machine.

    Args:
        name: as in the command line and in the names of recipes.
        target: its class, as ``"module:Class"``.
        description: one line.
        classes: how many, in meta-training / validation / test.
        size: of the download and of the packed images.
        licence: of the data.
        homepage: where it comes from.
        how: how to get it.
        citation: the paper to cite, if there is one.
    """

    name: str
    target: str
    description: str
    classes: str
    size: str
    licence: str
    homepage: str
    how: str
    citation: str = ""

    def load(self) -> type[Dataset]:
        """Import the dataset's class and return it."""
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)


DATASETS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="sine",
            target="quickstudy.data.sine:Sine",
            description="sine waves to regress from a few points",
            classes="endless",
            size="none",
            licence="none needed",
            homepage="https://arxiv.org/abs/1703.03400",
            how="made as it is used",
            citation="Finn, Abbeel, Levine: Model-agnostic meta-learning for fast adaptation of deep networks. "
            "ICML 2017",
        ),
        Entry(
            name="glyphs",
            target="quickstudy.data.glyphs:Glyphs",
            description="distorted characters of many scripts from the fonts of matplotlib, 28×28, grey",
            classes="1019 / 100 / 248",
            size="no download, 22 MB packed",
            licence="Bitstream Vera and public domain (the DejaVu fonts)",
            homepage="https://dejavu-fonts.github.io",
            how="drawn at first use, in seconds",
        ),
        Entry(
            name="omniglot",
            target="quickstudy.data.omniglot:Omniglot",
            description="handwritten characters of 50 alphabets, 20 drawings of each, grey",
            classes="1028 / 172 / 423, times four with rotations",
            size="14 MB download, 26 MB packed at 28×28",
            licence="MIT",
            homepage="https://github.com/brendenlake/omniglot",
            how="quickstudy data get omniglot, or your own copy in $QUICKSTUDY_DATA",
            citation="Lake, Salakhutdinov, Tenenbaum: Human-level concept learning through probabilistic program "
            "induction. Science 350, 2015",
        ),
    )
}


def dataset_entry(name: str) -> Entry:
    """Return the entry of a dataset.

    Raises:
        DataError: there is none of that name; the message suggests the nearest.
    """
    if name not in DATASETS:
        raise DataError(f"no dataset {name!r}{suggest(name, DATASETS)}; there are {', '.join(DATASETS)}")
    return DATASETS[name]
