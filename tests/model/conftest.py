"""Small models, and the same weights in `transformers`, the reference."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.config import MistralConfig
from model.mistral import Mistral, initialize
from model.weights import save_model

# Initialised widely, so that attention is far from uniform and the most likely token from a tie.
SMALL = MistralConfig(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=5,
    max_position_embeddings=128,
    initializer_range=0.3,
)


@pytest.fixture(scope="session")
def small_model():
    """small_model(seed=0, **changes of the configuration) -> Mistral in float32."""

    def build(seed: int = 0, **changes) -> Mistral:
        model = Mistral(replace(SMALL, **{"unpadded_vocab_size": 0, **changes}))
        initialize(model, seed)
        return model.requires_grad_(False)

    return build


@pytest.fixture
def reference_of(tmp_path):
    """reference_of(model) -> transformers' model with the same weights, through a folder that we exported."""

    def load(model: Mistral):
        folder = tmp_path / f"reference-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        save_model(model, folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    return load
