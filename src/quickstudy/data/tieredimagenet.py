"""tieredImageNet (Ren et al., 2018): 608 classes of ImageNet, split by what they are kinds of."""

from __future__ import annotations

from typing import ClassVar

from quickstudy.data.arrays import tieredimagenet_arrays
from quickstudy.data.folders import ClassFolders
from quickstudy.data.layouts import Layout, Published, imagenet_tree, split_folders

REN = Published("tieredimagenet", "Ren et al.'s")

NAMES = ("tieredImageNet", "tieredimagenet", "tiered-imagenet", "tiered_imagenet")
"""Of the folder in each place that is searched, besides the place itself."""


class TieredImageNet(ClassFolders):
    """tieredImageNet: 608 classes of ImageNet, 779,165 photographs; 351 / 97 / 160 to train, validate and test on.

    It is read from any of these, and the first that is found is taken:

    - ``{train,val,test}/<WordNet id>/*.jpg``, where fewer classes will do;
    - the released ``{train,val,test}_images.npz`` or ``_images_png.pkl``, with ``{train,val,test}_labels.pkl``
      (84x84 pixels); pickles are read without running the code they may hold;
    - the training images of ILSVRC-2012: all images of the 608 classes.

    A class of Ren et al.'s lists under another split than theirs is refused, because its results could not be compared
    with published ones. The arguments are those of :class:`~quickstudy.data.folders.ClassFolders`.
    """

    name = "tieredimagenet"
    layouts: ClassVar[tuple[Layout, ...]] = (
        split_folders(NAMES, REN),
        tieredimagenet_arrays(NAMES),
        imagenet_tree(REN),
    )
