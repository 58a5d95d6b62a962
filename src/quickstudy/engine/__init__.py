"""Training, evaluation and checkpoints; knows no method by name."""

from quickstudy.engine.evaluate import evaluate
from quickstudy.engine.job import train
from quickstudy.engine.models import LOOP, Models, meta_loss, scores
from quickstudy.engine.pretrain import EmbedRecipe, Pretrained, pretrain
from quickstudy.engine.recipe import Recipe, instantiate, parse_recipe, recipe_names, recipe_text
from quickstudy.engine.run import Run
from quickstudy.engine.statistics import Estimate, estimate
from quickstudy.engine.train import build_methods

__all__ = [
    "LOOP",
    "EmbedRecipe",
    "Estimate",
    "Models",
    "Pretrained",
    "Recipe",
    "Run",
    "build_methods",
    "estimate",
    "evaluate",
    "instantiate",
    "meta_loss",
    "parse_recipe",
    "pretrain",
    "recipe_names",
    "recipe_text",
    "scores",
    "train",
]
