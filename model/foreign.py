"""Model folders in other forms than Hugging Face's safetensors: what they are, and what to do with them."""

from pathlib import Path

_FOREIGN = {
    "adapter_config.json": (
        "the folder holds an adapter (LoRA), not a whole model; merge it into its base with peft's merge_and_unload(), "
        "save that with save_pretrained() and name the result"
    ),
    "*.bin": (
        "the weights are pickles (.bin), which are never opened here; convert them with transformers: "
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    ),
    "consolidated*": (
        "the weights are in Mistral's own layout (consolidated, params.json); take the repository's Hugging Face files "
        "(config.json, model-*.safetensors), or convert it with transformers' convert_mistral_weights_to_hf.py"
    ),
    "*.gguf": "the weights are in llama.cpp's form (GGUF), mostly quantized; take the model that they were made from",
}


def foreign_folder(folder: Path) -> str | None:
    """What a model folder in another form than Hugging Face's safetensors is, and what to do; None where nothing is known."""
    for pattern, kind in _FOREIGN.items():
        found = next(iter(sorted(folder.glob(pattern))), None)
        if found is not None:
            return f"{found}: {kind}"
    return None
