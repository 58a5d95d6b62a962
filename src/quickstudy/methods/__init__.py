"""Meta-learners, one file each."""

from quickstudy.methods.base import Method, Norm, task_loss, task_score
from quickstudy.methods.inner import gradient
from quickstudy.methods.maml import MAML
from quickstudy.methods.nearest import NearestNeighbour
from quickstudy.methods.protonet import ProtoNet

__all__ = ["MAML", "Method", "NearestNeighbour", "Norm", "ProtoNet", "gradient", "task_loss", "task_score"]
