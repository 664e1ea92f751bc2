"""The weights of a model in `transformers`, the reference."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.mistral import Mistral
from model.weights import save_model


@pytest.fixture
def reference_of(tmp_path):
    """reference_of(model) -> transformers' model with the same weights, through a folder that we exported."""

    def load(model: Mistral):
        folder = tmp_path / f"reference-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        save_model(model, folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    return load
