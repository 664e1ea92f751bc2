"""Opens a model with its tokenizer, to answer or to score."""

from pathlib import Path

import torch

from engine.checkpoint.state import model_folder
from engine.environment import choose_dtype
from model.mistral import Mistral
from model.vocabulary.fitting import fitted_config
from model.vocabulary.tokenizer import Tokenizer
from model.weights import load_model


def open_model(
    name: str,  # a run folder, a Hugging Face folder or a hub repository
    device: torch.device,
    dtype: str = "auto",  # see `choose_dtype`
) -> tuple[Path, Tokenizer, Mistral]:
    """The model's folder (of a run: its newest checkpoint), its tokenizer and the model itself, without padding rows.

    Raises: FileNotFoundError or ValueError naming the fault.
    """
    folder = model_folder(name)
    tokenizer = Tokenizer.load(folder)
    config = fitted_config(folder, tokenizer)
    return folder, tokenizer, load_model(folder, dtype=choose_dtype(dtype, device), device=device, config=config)
