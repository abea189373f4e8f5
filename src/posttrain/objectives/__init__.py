"""The stages' losses: pure functions of a model and a micro-batch."""

from posttrain.objectives.lm import LanguageModel
from posttrain.types import Objective, Stage

# What each stage of the shared trainer minimises.
OBJECTIVES: dict[Stage, Objective] = {"pt": LanguageModel(), "sft": LanguageModel()}
