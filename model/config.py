"""The dimensions of a Mistral model, its presets, and Hugging Face's `config.json`, read and written."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.folder import write_file
from model.foreign import foreign_folder
from model.sampling import Sampling

if TYPE_CHECKING:
    import torch

# In front of the name of one of PRESETS, where a model is named.
PRESET = "preset:"
_DIMENSIONS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class MistralConfig:
    """Mistral as published (Jiang et al. 2023, https://arxiv.org/abs/2310.06825, table 1).

    vocab_size: rows of embedding and head, padding included (see `model.vocabulary.resize`).
    unpadded_vocab_size: number of real pieces; padding rows take no probability in training or sampling. 0 means vocab_size.
    sliding_window: number of tokens that a token sees, itself included; None for all earlier tokens.
    eos_token_id: the end token, or several; None where the model names none.
    """

    vocab_size: int = 32000
    unpadded_vocab_size: int = 0
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = 4096
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self) -> None:
        if self.unpadded_vocab_size == 0:
            object.__setattr__(self, "unpadded_vocab_size", self.vocab_size)
        for name in _DIMENSIONS:
            _check_integer(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if type(getattr(self, name)) not in (int, float):
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be a number")
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} = {getattr(self, name)}: must be a finite number above 0")
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: must be even, as rotary embedding pairs its halves")
        _check_integer("unpadded_vocab_size", self.unpadded_vocab_size)
        if not 0 < self.unpadded_vocab_size <= self.vocab_size:
            raise ValueError(
                f"unpadded_vocab_size = {self.unpadded_vocab_size}: must lie in 1 .. vocab_size = {self.vocab_size}"
            )
        if self.sliding_window is not None:
            _check_integer("sliding_window", self.sliding_window)
            if self.sliding_window < 1:
                raise ValueError(f"sliding_window = {self.sliding_window}: must be at least 1, or null for no window")
        for name in ("bos_token_id", "eos_token_id"):
            self._check_tokens(name)

    def _check_tokens(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, (list, tuple)) and name == "eos_token_id":
            ids = tuple(dict.fromkeys(value))
            object.__setattr__(self, name, ids[0] if len(ids) == 1 else ids or None)
        else:
            ids = () if value is None else (value,)
        for id in ids:
            if type(id) is not int or not 0 <= id < self.vocab_size:
                raise ValueError(f"{name} = {value!r}: must be a token id in 0 .. {self.vocab_size - 1}, or null for none")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The end tokens, the main one first."""
        ends = self.eos_token_id
        return () if ends is None else (ends,) if isinstance(ends, int) else ends

    def ending_with(self, *ids: int) -> MistralConfig:
        """The same configuration with these end tokens, in front of its own."""
        return replace(self, eos_token_id=(*ids, *self.end_ids))

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        attention = self.hidden_size * self.head_dim * (heads + self.num_attention_heads)
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        layer = attention + feed_forward + 2 * self.hidden_size
        return self.num_hidden_layers * layer + (2 * self.vocab_size + 1) * self.hidden_size


def _check_integer(name: str, value: object) -> None:
    if type(value) is not int:
        raise ValueError(f"{name} = {value!r}: must be an integer")


MISTRAL_7B = MistralConfig()
PRESETS: dict[str, MistralConfig] = {
    "mistral-7b": MISTRAL_7B,
    # Mistral's 32,000 pieces and 88,000 Japanese pieces, padded to 938 whole tiles.
    "shisa-7b": replace(MISTRAL_7B, vocab_size=120064, unpadded_vocab_size=120000),
    # Trains on two CPU cores in minutes; nearly all of its cost is the head over the real vocabulary.
    "tiny": MistralConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=128,
        max_position_embeddings=2048,
    ),
    # A CPU computes a step in seconds.
    "small": MistralConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
    ),
}


def preset(name: str) -> MistralConfig:
    """A preset by name. Raises: ValueError naming the nearest preset for an unknown name."""
    if not name:
        raise ValueError(f"the preset has no name; the known ones are {', '.join(PRESETS)}")
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown preset {name!r}; the nearest known one is {nearest!r}")
    return PRESETS[name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: FileNotFoundError or ValueError naming the file and, for broken JSON, the line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


def read_config(folder: str | Path) -> MistralConfig:
    """The configuration of a Hugging Face Mistral folder, written by `transformers` 4 or 5.

    Raises: FileNotFoundError or ValueError naming the file and the key, also for another architecture or a feature that this
        model lacks.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(foreign_folder(Path(folder)) or f"{path}: no such file")
    table = read_json(path)
    quantized = table.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method", quantized) if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{path}: quantization_config = {method!r} is not supported: the weights are quantized; take the model that they "
            "were made from, or dequantize it with transformers first"
        )
    if table.get("model_type") != "mistral":
        raise ValueError(f"{path}: model_type is {table.get('model_type')!r}; only 'mistral' models can be read")
    ropes = {key: table.get(key) or {} for key in ("rope_scaling", "rope_parameters")}
    for key, value in ropes.items():
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {key} = {value!r}: must be an object")
    unsupported = {
        "hidden_act": table.get("hidden_act", "silu") not in ("silu", "swish"),
        "tie_word_embeddings": table.get("tie_word_embeddings", False),
        "attention_bias": table.get("attention_bias", False),
        **{key: not _plain_rotary(value) for key, value in ropes.items()},
    }
    for key, wrong in unsupported.items():
        if wrong:
            raise ValueError(f"{path}: {key} = {table[key]!r} is not supported by this model")
    # As in transformers, the older key counts where both are there.
    rope = ropes["rope_scaling"] or ropes["rope_parameters"]
    try:
        # An absent key means the default of transformers' MistralConfig, which is not always ours.
        heads, width = table["num_attention_heads"], table["hidden_size"]
        return MistralConfig(
            vocab_size=table["vocab_size"],
            unpadded_vocab_size=table.get("unpadded_vocab_size", 0),
            hidden_size=width,
            intermediate_size=table["intermediate_size"],
            num_hidden_layers=table["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=table.get("num_key_value_heads", 8) or heads,
            head_dim=table.get("head_dim") or width // heads,
            rms_norm_eps=table.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", table.get("rope_theta", 10000.0)),
            sliding_window=table.get("sliding_window", 4096),
            max_position_embeddings=table.get("max_position_embeddings", 4096 * 32),
            initializer_range=table.get("initializer_range", 0.02),
            bos_token_id=table.get("bos_token_id", 1),
            eos_token_id=table.get("eos_token_id", 2),
        )
    except KeyError as error:
        raise ValueError(f"{path}: key {error} is missing") from None
    except (TypeError, ZeroDivisionError):
        raise ValueError(
            f"{path}: hidden_size = {width!r} and num_attention_heads = {heads!r}: must be positive integers"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _plain_rotary(rope: dict[str, Any]) -> bool:
    """Whether rotary parameters ask for nothing but a base."""
    return rope.get("rope_type", rope.get("type", "default")) == "default" and rope.get("partial_rotary_factor", 1) == 1


def with_generation_ends(folder: str | Path, config: MistralConfig) -> MistralConfig:
    """A folder's configuration with every end token that its generation_config.json names too, in front.

    Raises: ValueError naming the file, for an end token that is no token of the model.
    """
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return config
    try:
        return config.ending_with(*replace(config, eos_token_id=read_json(path).get("eos_token_id")).end_ids)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def _json_ends(config: MistralConfig) -> int | list[int] | None:
    return list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id


def config_table(config: MistralConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json`. Rotary base and dtype are written in both spellings, for `transformers` 4 and 5."""
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "dtype": name,
        "eos_token_id": _json_ends(config),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "mistral",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": False,
        "torch_dtype": name,
        "unpadded_vocab_size": config.unpadded_vocab_size,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def generation_table(config: MistralConfig) -> dict[str, Any]:
    """The content of `generation_config.json`.

    It names every end token, and suppresses the padding rows, so that `transformers` never samples one.
    """
    table: dict[str, Any] = {"bos_token_id": config.bos_token_id, "eos_token_id": _json_ends(config)}
    if config.unpadded_vocab_size < config.vocab_size:
        table["suppress_tokens"] = list(range(config.unpadded_vocab_size, config.vocab_size))
    return table


def write_config(folder: str | Path, config: MistralConfig, dtype: torch.dtype) -> None:
    """Write `config.json` and `generation_config.json`. The same configuration always gives the same bytes."""
    for name, table in (("config.json", config_table(config, dtype)), ("generation_config.json", generation_table(config))):
        text = json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_file(Path(folder) / name, text)


def write_sampling(folder: str | Path, sampling: Sampling) -> None:
    """Add the choice of the next token to a folder's `generation_config.json`, so that servers sample as the model is meant to.

    Without `do_sample: true`, transformers decodes greedily whatever temperature a request names; without `top_k`, it keeps 50.
    """
    path = Path(folder) / "generation_config.json"
    table = read_json(path) | {"do_sample": sampling.temperature > 0, "repetition_penalty": sampling.repetition_penalty}
    if sampling.temperature > 0:
        table |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        table |= {"min_p": sampling.min_p} if sampling.min_p else {}
    write_file(path, json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
