"""Meta-learners, one file each."""

from quickstudy.methods.base import Method, Norm, task_loss, task_score
from quickstudy.methods.finetune import FineTune
from quickstudy.methods.inner import gradient
from quickstudy.methods.leo import LEO
from quickstudy.methods.maml import MAML
from quickstudy.methods.matching import MatchingNet
from quickstudy.methods.metalstm import MetaLSTM
from quickstudy.methods.nearest import NearestNeighbour
from quickstudy.methods.oplstm import OPLSTM
from quickstudy.methods.plainlstm import PlainLSTM
from quickstudy.methods.protonet import ProtoNet, prototypes
from quickstudy.methods.reptile import Reptile
from quickstudy.methods.sap import SAP
from quickstudy.methods.tnet import TNet
from quickstudy.methods.warpmaml import WarpMAML

__all__ = [
    "LEO",
    "MAML",
    "OPLSTM",
    "SAP",
    "FineTune",
    "MatchingNet",
    "MetaLSTM",
    "Method",
    "NearestNeighbour",
    "Norm",
    "PlainLSTM",
    "ProtoNet",
    "Reptile",
    "TNet",
    "WarpMAML",
    "gradient",
    "prototypes",
    "task_loss",
    "task_score",
]
