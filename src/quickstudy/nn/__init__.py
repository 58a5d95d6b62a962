"""Backbones and layers that are batched over tasks and differentiated twice."""

from quickstudy.nn.backbone import adopt
from quickstudy.nn.conv4 import Conv4
from quickstudy.nn.layers import Conv2d, Linear
from quickstudy.nn.lstm import LSTM, CellState, CoordinateLSTM
from quickstudy.nn.mlp import MLP
from quickstudy.nn.norm import BatchNorm, Statistics, recorded, replayed

__all__ = [
    "LSTM",
    "MLP",
    "BatchNorm",
    "CellState",
    "Conv2d",
    "Conv4",
    "CoordinateLSTM",
    "Linear",
    "Statistics",
    "adopt",
    "recorded",
    "replayed",
]
