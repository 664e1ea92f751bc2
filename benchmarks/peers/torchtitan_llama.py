"""torchtitan's Llama at Mistral's shapes; on a GPU its blocks are compiled one by one, as torchtitan does.

Its attention is full and causal, without a window. It keeps packed documents apart by a GPU's variable-length kernel only.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from steps import IGNORED, Row, Steps
from torch import Tensor
from transformers_loop import train
from worker import Worker


def main() -> None:
    worker = Worker()
    (titan,) = worker.need("torchtitan.models.llama3")
    steps = Steps(worker.job["steps_file"])
    packed = any(len(set(row.lengths)) > 1 for step in range(len(steps)) for row in steps.rows(step))
    if packed and worker.device.type != "cuda":
        worker.missing("torchtitan keeps packed documents apart only on a GPU")
    config = json.loads((Path(worker.job["weights"]) / "config.json").read_text(encoding="utf-8"))
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        worker.missing("torchtitan's heads always fill the width")
    settings = shapes(titan, config, steps.longest, "varlen" if packed else "sdpa")
    with torch.device("meta"):
        model = titan.Transformer(settings)
    model.to(worker.dtype).to_empty(device=worker.device)
    with torch.device(worker.device):
        model.freqs_cis = model._precompute_freqs_cis()
    model.load_state_dict(weights(worker.job["weights"], settings))
    if worker.device.type == "cuda":
        for name, block in model.layers.named_children():
            model.layers.register_module(name, torch.compile(block, fullgraph=True))
    train(worker, model.train(), next_token_loss)


def shapes(titan: Any, config: dict[str, Any], longest: int, attention: str) -> Any:
    """torchtitan's settings of a Mistral configuration; the multiplier gives the feed-forward size that it derives."""
    width, feed_forward = config["hidden_size"], config["intermediate_size"]
    heads = {"n_heads": config["num_attention_heads"], "n_kv_heads": config["num_key_value_heads"]}
    sizes = {"dim": width, "n_layers": config["num_hidden_layers"], "vocab_size": config["vocab_size"], **heads}
    factor = {"multiple_of": 1, "ffn_dim_multiplier": (feed_forward + 0.5) / int(8 * width / 3)}
    mask = {"attn_type": attention, "attn_mask_type": "block_causal" if attention == "varlen" else "causal"}
    constants = {"norm_eps": config["rms_norm_eps"], "rope_theta": config["rope_theta"], "max_seq_len": longest}
    settings = titan.TransformerModelArgs(**sizes, **factor, **mask, **constants)
    settings.rope_scaling_args.scaling_factor = 1.0
    return settings


def weights(folder: str, settings: Any) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder under torchtitan's names, query and key rows in its rotary order."""
    from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors.update(load_file(path))
    return Llama3StateDictAdapter(settings, None).from_hf(tensors)


def next_token_loss(model: Any, row: Row, trained: float) -> Tensor:
    """A row's part of the step's loss."""
    masks, positions = None, None
    if len(set(row.lengths)) == 1:
        shape = (len(row.lengths), row.lengths[0])
    else:
        from torchtitan.models.attention import VarlenMetadata

        shape, positions = (1, len(row.tokens_T)), row.positions_T[None]
        bounds = torch.tensor([0, *row.lengths]).cumsum(0).to(device=row.tokens_T.device, dtype=torch.int32)
        masks = VarlenMetadata(bounds, bounds, max(row.lengths), max(row.lengths))
    logits = model(row.tokens_T.view(shape), attention_masks=masks, positions=positions)
    return F.cross_entropy(logits.flatten(0, 1).float(), row.labels_T, ignore_index=IGNORED, reduction="sum") / trained


if __name__ == "__main__":
    main()
