"""The ways to start new rows, by name, apart from their code, so that settings load without torch."""

from typing import Literal

Method = Literal["weighted", "mean", "random", "distilled"]
"""`model.vocabulary.resize` describes and computes them."""
