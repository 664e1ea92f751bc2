"""A model folder's configuration, fitted to a tokenizer: padding is cut, end tokens are completed, disagreement is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kernels import TILE
from model.config import MistralConfig, read_config, with_generation_ends
from model.vocabulary.chat import end_id
from model.vocabulary.tokenizer import MODEL_FILE, Tokenizer
from model.vocabulary.tokenizer_json import JSON_FILE


def fitted_config(folder: str | Path, tokenizer: Tokenizer) -> MistralConfig:
    """The configuration of a model for a tokenizer: rows beyond its pieces are padding.

    The end tokens are the token that answers end with, then those that generation_config.json and config.json name.

    Raises:
        ValueError: the model has another number of rows than the tokenizer has pieces, more than padding apart; or its folder
            has a tokenizer with another number of pieces; or an end token is no piece.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_rows(config, tokenizer, folder)
    if (folder / MODEL_FILE).is_file() or (folder / JSON_FILE).is_file():
        own = Tokenizer.load(folder)
        if own.vocab_size != tokenizer.vocab_size:
            lost = own.pieces()[tokenizer.vocab_size :]
            named = f", {lost[0]!r} the first of those that would be lost" if lost else ""
            raise ValueError(
                f"{folder}: the model's own tokenizer has {own.vocab_size:,} pieces{named}; the given one has "
                f"{tokenizer.vocab_size:,}: give the tokenizer that the model was trained with"
            )
    config = with_generation_ends(folder, config).ending_with(end_id(tokenizer))
    for id in config.end_ids:
        if id >= tokenizer.vocab_size:
            raise ValueError(
                f"{folder}: eos_token_id names {id}, but the tokenizer has {tokenizer.vocab_size:,} pieces: mend config.json "
                "or generation_config.json, or add the token's files"
            )
    return replace(config, unpadded_vocab_size=tokenizer.vocab_size)


def check_rows(config: MistralConfig, tokenizer: Tokenizer, source: str | Path) -> None:
    """Check that a model has one row for each piece of a tokenizer, and at most padding behind them. Raises: ValueError."""
    padding = config.vocab_size - tokenizer.vocab_size
    said = config.unpadded_vocab_size != config.vocab_size
    if config.unpadded_vocab_size != tokenizer.vocab_size if said else not 0 <= padding <= TILE:
        raise ValueError(
            f"{source}: the model has rows for {config.unpadded_vocab_size:,} pieces, the tokenizer has "
            f"{tokenizer.vocab_size:,}: give the tokenizer that the model was trained with, or resize the model with "
            "recipes.vocabulary"
        )
