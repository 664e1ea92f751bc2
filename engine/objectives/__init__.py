"""Objectives: what a run minimises."""

from collections.abc import Callable

from torch import Tensor

from engine.data.batch import Batch, Step
from model.mistral import Mistral

# (model, micro-batch, its step) -> this micro-batch's part of the step's values, "loss" among them. Parts add up over
# micro-batches and ranks: the objective divides by the whole step's weight (or pairs), never by the micro-batch's.
Objective = Callable[[Mistral, Batch, Step], dict[str, Tensor]]
