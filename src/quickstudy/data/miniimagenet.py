"""miniImageNet (Vinyals et al., 2016) in the split of Ravi and Larochelle (2017)."""

from __future__ import annotations

from typing import ClassVar

from quickstudy.data.arrays import miniimagenet_pickles
from quickstudy.data.folders import ClassFolders
from quickstudy.data.layouts import Layout, Published, imagenet_tree, listed_images, split_folders

RAVI = Published("miniimagenet-ravi", "Ravi and Larochelle's")

NAMES = ("miniImagenet", "miniimagenet")
"""Of the folder in each place that is searched, besides the place itself."""

IMAGES = 600
"""Of each class."""


class MiniImageNet(ClassFolders):
    """miniImageNet: 100 classes of ImageNet, 600 photographs of each; 64 / 16 / 20 to train, validate and test on.

    It is read from any of these, and the first that is found is taken:

    - ``{train,val,test}/<WordNet id>/*.jpg``, where fewer classes will do;
    - ``images/*.jpg`` with ``{train,val,test}.csv``;
    - the pickles ``mini-imagenet-cache-{train,val,test}.pkl``, read without running the code they may hold (their
      images are of 84x84 pixels);
    - the training images of ILSVRC-2012, with Ravi and Larochelle's ``{train,val,test}.csv`` beside them, which say
      which 600 of each class; without these the first 600, which is not quite the published dataset.

    A class of Ravi and Larochelle's lists under another split than theirs is refused, because its results could not be
    compared with published ones. The folders are looked for in ``miniImagenet/`` and ``miniimagenet/`` of each place,
    and in the place itself. The arguments are those of :class:`~quickstudy.data.folders.ClassFolders`.
    """

    name = "miniimagenet"
    layouts: ClassVar[tuple[Layout, ...]] = (
        split_folders(NAMES, RAVI),
        listed_images(NAMES, RAVI),
        miniimagenet_pickles(NAMES, RAVI),
        imagenet_tree(RAVI, listed=True, note=", those that train.csv, val.csv and test.csv list"),
        imagenet_tree(
            RAVI,
            count=IMAGES,
            note=f", the first {IMAGES} of each (not the published ones: train.csv, val.csv, test.csv are not there)",
        ),
    )
