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
        Entry(
            name="omniglot-runs",
            target="quickstudy.data.omniglot_runs:OmniglotRuns",
            description="Lake et al.'s twenty one-shot tasks, 20-way within an alphabet: to test on, no others",
            classes="20 tasks of 20 characters",
            size="0.4 MB download, 0.6 MB packed at 28×28",
            licence="MIT",
            homepage="https://github.com/brendenlake/omniglot",
            how="quickstudy data get omniglot-runs, or your own all_runs.zip in $QUICKSTUDY_DATA/omniglot",
            citation="Lake, Salakhutdinov, Tenenbaum: Human-level concept learning through probabilistic program "
            "induction. Science 350, 2015",
        ),
        Entry(
            name="miniimagenet",
            target="quickstudy.data.miniimagenet:MiniImageNet",
            description="photographs of 100 classes of ImageNet, 600 of each, in Ravi and Larochelle's split",
            classes="64 / 16 / 20",
            size="no download, 1.3 GB packed at 84×84",
            licence="ImageNet's terms: non-commercial research and education, not to be passed on",
            homepage="https://image-net.org",
            how="ImageNet's terms forbid mirrors: get ILSVRC2012_img_train.tar from https://image-net.org and unpack "
            "it and the archives in it, a folder for each class; put Ravi and Larochelle's train.csv, val.csv and "
            "test.csv (https://github.com/twitter-research/meta-learning-lstm, data/miniImagenet) beside the folders. "
            "Then, or with any other copy that you have: `quickstudy data prepare miniimagenet --from FOLDER`. Or "
            "put the images into $QUICKSTUDY_DATA/miniimagenet/{train,val,test}/<WordNet id>/*.jpg (set "
            "QUICKSTUDY_DATA to a folder of yours), or name the folder as the dataset's `root`",
            citation="Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra: Matching networks for one shot learning. "
            "NIPS 2016; split: Ravi, Larochelle: Optimization as a model for few-shot learning. ICLR 2017",
        ),
        Entry(
            name="tieredimagenet",
            target="quickstudy.data.tieredimagenet:TieredImageNet",
            description="779,165 photographs of 608 classes of ImageNet, split by what they are kinds of",
            classes="351 / 97 / 160",
            size="no download, 16 GB packed at 84×84",
            licence="ImageNet's terms: non-commercial research and education, not to be passed on",
            homepage="https://github.com/renmengye/few-shot-ssl-public",
            how="ImageNet's terms forbid mirrors: get ILSVRC2012_img_train.tar from https://image-net.org and unpack "
            "it and the archives in it, a folder for each class. Then, or with {train,val,test}_images_png.pkl (or "
            "_images.npz) and _labels.pkl as they were released: `quickstudy data prepare tieredimagenet --from "
            "FOLDER`. Or name the folder as the dataset's `root`",
            citation="Ren, Triantafillou, Ravi, Snell, Swersky, Tenenbaum, Larochelle, Zemel: Meta-learning for "
            "semi-supervised few-shot classification. ICLR 2018",
        ),
        Entry(
            name="cifar-fs",
            target="quickstudy.data.cifarfs:CIFARFS",
            description="CIFAR-100 in Bertinetto et al.'s split: 600 photographs of each class, 32×32",
            classes="64 / 16 / 20",
            size="169 MB download, 184 MB packed",
            licence="none given",
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            how="quickstudy data get cifar-fs; or put cifar-100-python.tar.gz into $QUICKSTUDY_DATA/cifar-fs, or the "
            "images of CIFAR-100, training and test alike, into $QUICKSTUDY_DATA/cifar-fs/{train,val,test}/<class>/ "
            "as PNG or WebP (set QUICKSTUDY_DATA to a folder of yours), or these folders into "
            "$QUICKSTUDY_DATA/cifar-fs.zip, or name the folder or the archive as the dataset's `root`",
            citation="Krizhevsky: Learning multiple layers of features from tiny images. 2009; split: Bertinetto, "
            "Henriques, Torr, Vedaldi: Meta-learning with differentiable closed-form solvers. ICLR 2019",
        ),
        Entry(
            name="fc100",
            target="quickstudy.data.cifarfs:FC100",
            description="CIFAR-100 split by kinds (Oreshkin et al.): 600 photographs of each class, 32×32",
            classes="60 / 20 / 20",
            size="169 MB download (that of cifar-fs), 184 MB packed",
            licence="none given",
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            how="quickstudy data get fc100; or put cifar-100-python.tar.gz into $QUICKSTUDY_DATA/fc100, or the images "
            "of CIFAR-100 into $QUICKSTUDY_DATA/fc100/{train,val,test}/<class>/ (set QUICKSTUDY_DATA to a folder of "
            "yours), or these folders into $QUICKSTUDY_DATA/fc100.zip, or name the folder or the archive as the "
            "dataset's `root`",
            citation="Krizhevsky: Learning multiple layers of features from tiny images. 2009; split: Oreshkin, "
            "Rodriguez, Lacoste: TADAM: Task dependent adaptive metric for improved few-shot learning. NeurIPS 2018",
        ),
        Entry(
            name="cub",
            target="quickstudy.data.cub:CUB",
            description="CUB-200-2011: photographs of 200 species of birds, 41 to 60 of each",
            classes="100 / 50 / 50",
            size="1.2 GB download, 250 MB packed at 84×84",
            licence="non-commercial research and education; the photographs are their owners'",
            homepage="https://data.caltech.edu/records/65de6-vp158",
            how="quickstudy data get cub; or get CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 "
            "and put it, or what it unpacks to, into $QUICKSTUDY_DATA/cub (set QUICKSTUDY_DATA to a folder of yours), "
            "or name that folder as the dataset's `root`",
            citation="Wah, Branson, Welinder, Perona, Belongie: The Caltech-UCSD Birds-200-2011 dataset. Caltech "
            "2011; split: Chen, Liu, Kira, Wang, Huang: A closer look at few-shot classification. ICLR 2019",
        ),
        Entry(
            name="embeddings",
            target="quickstudy.data.embeddings:Embeddings",
            description="images as vectors of a pre-trained network: those of LEO's authors, or your own",
            classes="64 / 16 / 20 (miniImageNet), 351 / 97 / 160 (tieredImageNet), or yours",
            size="several GB download, read as they are",
            licence="the released ones: none given; yours: that of the images",
            homepage="https://github.com/google-deepmind/leo",
            how="quickstudy data get embeddings, for those of LEO's authors; or get "
            "https://storage.googleapis.com/leo-embeddings/embeddings.zip and unpack it in $QUICKSTUDY_DATA, which "
            "makes $QUICKSTUDY_DATA/embeddings/miniImageNet/center and so on (set QUICKSTUDY_DATA to a folder of "
            "yours), or name the folder that holds miniImageNet/ as the dataset's `root`; your own are "
            "{train,val,test}.safetensors in `root`, written by `quickstudy embed`, or by "
            "`quickstudy.data.write_embeddings`",
            citation="Rusu, Rao, Sygnowski, Vinyals, Pascanu, Osindero, Hadsell: Meta-learning with latent embedding "
            "optimization. ICLR 2019",
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
