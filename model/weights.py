"""Weights in and out of Hugging Face folders: sharded safetensors with an index, from a local path or a hub name.

Our packed matrices are Hugging Face's matrices stacked: reading concatenates, writing slices, nothing is permuted. Everything
streams, one block of rows at a time, so a model of any size takes little memory.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model.config import MistralConfig, read_config, read_json, write_config
from model.folder import write_file
from model.foreign import foreign_folder
from model.hub import INDEX_NAME, SINGLE_NAME
from model.mistral import Mistral
from model.tensor_file import TensorFile, TensorStream, write_tensor_file

MAX_SHARD_BYTES = 2**30


class TensorFolder:
    """The tensors of a Hugging Face folder, read one at a time. A context manager: files stay open inside the block.

    Raises: FileNotFoundError for a missing folder, index or shard; ValueError naming a file that is truncated or of another
        format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._stack = ExitStack()
        self._open_files: dict[str, TensorFile] = {}
        index = self.folder / INDEX_NAME
        single = self.folder / SINGLE_NAME
        if index.is_file():
            self._file_of: dict[str, str] = read_json(index).get("weight_map", {})
            if not self._file_of:
                raise ValueError(f"{index}: holds no weight_map; the folder is incomplete, fetch or export it again")
            if not isinstance(self._file_of, dict) or not all(isinstance(file, str) for file in self._file_of.values()):
                raise ValueError(f"{index}: weight_map must give a file name for each weight; fetch or export the folder again")
        elif single.is_file():
            self._file_of = dict.fromkeys(self._open(single.name).names, single.name)
        else:
            raise FileNotFoundError(
                foreign_folder(self.folder) or f"{self.folder}: holds neither {INDEX_NAME} nor {SINGLE_NAME}"
            )

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._open_files.clear()

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_with(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._file_with(name).dtype(name)

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, on the CPU, in its stored dtype."""
        return self._file_with(name).tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, on the CPU, in its stored dtype."""
        return self._file_with(name).rows(name, start, stop)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor in small blocks of rows, on the CPU, in its stored dtype."""
        return self._file_with(name).blocks(name)

    def check(self, config: MistralConfig) -> list[str]:
        """Check that the folder has exactly the model's weights, each in its shape. Returns their names in the model's order.

        Rotary frequencies, which old folders store, are ignored.
        Raises: ValueError naming the weight.
        """
        shapes = hugging_face_shapes(config)
        surplus = [name for name in self.names if name not in shapes and not name.endswith("rotary_emb.inv_freq")]
        if surplus:
            raise ValueError(
                f"{self.folder}: weight {surplus[0]} has no place in this model ({len(surplus)} such weights); see config.json"
            )
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise ValueError(
                    f"{self.folder}: weight {name} has shape {list(self.shape(name))}, config.json asks for {list(shape)}"
                )
        return list(shapes)

    def _file_with(self, name: str) -> TensorFile:
        if name not in self._file_of:
            raise ValueError(f"{self.folder}: weight {name} is missing; the folder is incomplete or of another model")
        file = self._open(self._file_of[name])
        if not file.holds(name):
            raise ValueError(f"{file.path}: does not hold {name}, which the index promises; fetch or export the folder again")
        return file

    def _open(self, file: str) -> TensorFile:
        if file not in self._open_files:
            path = self.folder / file
            if path.parent != self.folder or not path.is_file():
                raise FileNotFoundError(f"{path}: named by the index but not there; fetch or export the folder again")
            self._open_files[file] = self._stack.enter_context(TensorFile(path))
        return self._open_files[file]


def hugging_face_rows(config: MistralConfig) -> dict[str, tuple[str, int, int]]:
    """Hugging Face name -> (our parameter, start, stop): the tensor is rows start to stop of our parameter.

    The order is the model's; tensors that are packed in one parameter follow one another.
    """
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    feed_forward, width = config.intermediate_size, config.hidden_size
    stacks: dict[str, list[tuple[str, int]]] = {
        "embed_tokens.weight": [("model.embed_tokens.weight", config.vocab_size)],
        "norm.weight": [("model.norm.weight", width)],
        "lm_head.weight": [("lm_head.weight", config.vocab_size)],
    }
    stacked = {
        "self_attn.qkv_proj": [("self_attn.q_proj", query), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
        "mlp.gate_up_proj": [("mlp.gate_proj", feed_forward), ("mlp.up_proj", feed_forward)],
        "self_attn.o_proj": [("self_attn.o_proj", width)],
        "mlp.down_proj": [("mlp.down_proj", width)],
        "input_layernorm": [("input_layernorm", width)],
        "post_attention_layernorm": [("post_attention_layernorm", width)],
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in stacked.items():
            stacks[f"layers.{layer}.{ours}.weight"] = [(f"model.layers.{layer}.{name}.weight", rows) for name, rows in theirs]
    found = {}
    for ours, stack in stacks.items():
        stops = itertools.accumulate(rows for _, rows in stack)
        found.update({name: (ours, stop - rows, stop) for (name, rows), stop in zip(stack, stops, strict=True)})
    return found


def hugging_face_shapes(config: MistralConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, in the model's order."""
    with torch.device("meta"):
        parameters = dict(Mistral(config).named_parameters())
    rows = hugging_face_rows(config)
    return {name: (stop - start, *parameters[ours].shape[1:]) for name, (ours, start, stop) in rows.items()}


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    config: MistralConfig | None = None,  # in place of the folder's own; it must ask for the same weights
) -> Mistral:
    """A Mistral from a Hugging Face folder.

    Raises: FileNotFoundError or ValueError naming the file or tensor that is missing, truncated, surplus or of a wrong shape.
    """
    config = config or read_config(folder)
    with torch.device("meta"):
        model = Mistral(config)
    model = model.to(dtype).to_empty(device=device)
    load_rows(folder, config, {name: (parameter.detach(), 0) for name, parameter in model.named_parameters()})
    return model


def load_rows(folder: str | Path, config: MistralConfig, targets: Mapping[str, tuple[Tensor, int]]) -> None:
    """Fill rows of a model's parameters from a Hugging Face folder, such as one rank's shards; only these rows are read.

    Args: targets: our name of every parameter -> (rows to fill, index of the first of them in the whole parameter).
    Raises: FileNotFoundError or ValueError as `load_model` does.
    """
    with TensorFolder(folder) as tensors:
        tensors.check(config)
        for name, (ours, start, stop) in hugging_face_rows(config).items():
            target, first = targets[ours]
            begin, end = max(first, start), min(first + len(target), stop)
            if begin < end:
                rows = tensors.rows(name, begin - start, end - start)
                if not rows.isfinite().all():
                    raise ValueError(
                        f"{folder}: weight {name} holds NaN or infinite values: the folder is damaged, or its training "
                        "diverged; fetch or export it again"
                    )
                target[begin - first : end - first].copy_(rows)


def save_model(
    model: Mistral,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,  # of the written weights; default: the model's
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json and the sharded weights into an existing folder, in Hugging Face's form.

    The same model always gives the same bytes.
    """
    parameters = dict(model.named_parameters())
    dtype = dtype or parameters["norm.weight"].dtype
    rows = hugging_face_rows(model.config)
    write_config(folder, model.config, dtype)
    tensors = {name: TensorStream.of(parameters[ours][start:stop], dtype) for name, (ours, start, stop) in rows.items()}
    write_tensor_folder(folder, tensors, max_shard_bytes=max_shard_bytes)


def convert_folder(
    source: str | Path,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    config: MistralConfig | None = None,
) -> MistralConfig:
    """Copy a model's configuration and weights into another, existing folder, in a dtype (default: the final norm's).

    config: written in place of the source's own; it must ask for the same weights.

    The result equals `load_model` and `save_model`, without ever holding the model: any size takes little memory.
    Raises: FileNotFoundError or ValueError as `load_model` does. Returns: the model's configuration.
    """
    config = config or read_config(source)
    with TensorFolder(source) as tensors:
        names = tensors.check(config)
        dtype = dtype or tensors.dtype("model.norm.weight")
        write_config(folder, config, dtype)
        streams = {name: TensorStream(tensors.shape(name), dtype, partial(tensors.blocks, name)) for name in names}
        write_tensor_folder(folder, streams)
    return config


def write_tensor_folder(
    folder: str | Path,
    tensors: Mapping[str, TensorStream],  # in the order to write
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Write `model-*.safetensors` and the index into an existing folder, one block of rows at a time in memory.

    Args: max_shard_bytes: maximal size of a shard; a larger tensor has a shard of its own. share: (this process's number,
        number of processes) where several write the folder together, each some shards; number 0 writes the index as well.
    Raises: ValueError and OSError as `write_tensor_file` does.
    """
    folder, (number, processes) = Path(folder), share
    shards = plan_shards({name: tensor.bytes for name, tensor in tensors.items()}, max_shard_bytes)
    files = {f"model-{shard:05d}-of-{len(shards):05d}.safetensors": names for shard, names in enumerate(shards, start=1)}
    for file in list(files)[number::processes]:
        write_tensor_file(folder / file, {name: tensors[name] for name in files[file]})
    if number == 0:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {
            "metadata": {"total_size": sum(tensor.bytes for tensor in tensors.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_file(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names, in order, grouped into files of at most `limit` bytes; a larger tensor has a file of its own."""
    shards: list[list[str]] = []
    used = limit
    for name, size in sizes.items():
        if used + size > limit or not shards:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def read_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a Hugging Face folder under its Hugging Face name, one at a time."""
    with TensorFolder(folder) as tensors:
        for name in tensors.names:
            yield name, tensors.tensor(name)
