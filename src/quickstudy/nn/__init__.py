"""Backbones and layers that are batched over tasks and differentiated twice."""

from quickstudy.nn.backbone import adopt
from quickstudy.nn.conv4 import Conv4
from quickstudy.nn.fixed import FixedStatistics, population_statistics
from quickstudy.nn.layers import Conv2d, Linear
from quickstudy.nn.lstm import LSTM, BidirectionalLSTM, CellState, CoordinateLSTM
from quickstudy.nn.mlp import MLP
from quickstudy.nn.norm import BatchNorm, Statistics, recorded, replayed
from quickstudy.nn.resnet import DropBlock, ResNet12, WideResNet

__all__ = [
    "LSTM",
    "MLP",
    "BatchNorm",
    "BidirectionalLSTM",
    "CellState",
    "Conv2d",
    "Conv4",
    "CoordinateLSTM",
    "DropBlock",
    "FixedStatistics",
    "Linear",
    "ResNet12",
    "Statistics",
    "WideResNet",
    "adopt",
    "population_statistics",
    "recorded",
    "replayed",
]
