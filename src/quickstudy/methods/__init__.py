"""Meta-learners, one file each."""

from quickstudy.methods.base import Method, Norm, task_loss, task_score
from quickstudy.methods.inner import gradient
from quickstudy.methods.maml import MAML
from quickstudy.methods.metalstm import MetaLSTM
from quickstudy.methods.nearest import NearestNeighbour
from quickstudy.methods.oplstm import OPLSTM
from quickstudy.methods.plainlstm import PlainLSTM
from quickstudy.methods.protonet import ProtoNet, prototypes

__all__ = [
    "MAML",
    "OPLSTM",
    "MetaLSTM",
    "Method",
    "NearestNeighbour",
    "Norm",
    "PlainLSTM",
    "ProtoNet",
    "gradient",
    "prototypes",
    "task_loss",
    "task_score",
]
