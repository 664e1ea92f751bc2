"""safetensors files, read and written one block of rows at a time.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes with the length of the header, little-endian; the
header in JSON, with each tensor's dtype, shape and byte range [begin, end) in the data; the data, row by row.

Why not the safetensors package: it maps the files that it reads, so every page read counts as the process's memory while the
file is open, and it copies the tensors that it writes. This module holds one block of rows at a time. The package still checks
whether a file is whole.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.folder import complete_file

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
BLOCK_BYTES = 16 * 2**20


class TensorFile:
    """A safetensors file opened for reading. A context manager.

    Raises: ValueError naming the file when it is truncated or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: truncated or not a safetensors file ({error}); fetch or export it again") from None
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        length = int.from_bytes(self._file.read(8), "little")
        self._begin = 8 + length
        self._header: dict[str, dict[str, Any]] = json.loads(self._file.read(length))
        self._header.pop("__metadata__", None)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def names(self) -> list[str]:
        return sorted(self._header)

    def holds(self, name: str) -> bool:
        return name in self._header

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Raises: ValueError for a dtype that is not supported, such as FP8."""
        stored = self._header[name]["dtype"]
        if stored not in _DTYPES:
            raise ValueError(f"{self.path}: {name} is stored as {stored}; convert it to one of {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, on the CPU, in its stored dtype."""
        return self._read(name, self.shape(name), 0)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a tensor of one dimension or more, on the CPU, in its stored dtype."""
        rows, *row = self.shape(name)
        start, stop, _ = slice(start, stop).indices(rows)
        return self._read(name, (max(0, stop - start), *row), start * math.prod(row))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor of one dimension or more, in blocks of rows of about BLOCK_BYTES."""
        rows, *row = self.shape(name)
        step = max(1, BLOCK_BYTES // max(1, math.prod(row) * self.dtype(name).itemsize))
        for start in range(0, rows, step):
            yield self.rows(name, start, min(start + step, rows))

    def _read(self, name: str, shape: tuple[int, ...], skipped: int) -> Tensor:
        """A tensor of this shape from the stored values, after the first `skipped` of them."""
        tensor = torch.empty(shape, dtype=self.dtype(name))
        self._file.seek(self._begin + self._header[name]["data_offsets"][0] + skipped * tensor.itemsize)
        view = _bytes(tensor)
        while len(view):  # the system reads at most 2 GiB a call
            read = self._file.readinto(view)
            if not read:
                raise ValueError(f"{self.path}: became shorter while it was read; fetch or export it again")
            view = view[read:]
        return tensor


class TensorStream(NamedTuple):
    """A tensor to write. Its shape and dtype are known beforehand; its values are computed when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # in the file
    blocks: Callable[[], Iterable[Tensor]]  # gives the tensor in blocks of rows, of any dtype and device

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> "TensorStream":
        """A whole tensor, written in a dtype (default: its own)."""
        return cls(tuple(tensor.shape), dtype or tensor.dtype, lambda: (tensor,))

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_file(path: Path, tensors: Mapping[str, TensorStream]) -> None:
    """Write one safetensors file in the order given, one block of rows at a time in memory.

    The same tensors always give the same bytes. The file appears under its name only when it is complete.
    Raises: ValueError when the blocks of a tensor do not add up to its shape; OSError naming the file when it cannot be
        written, as on a full disk.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.bytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with complete_file(path) as partial, open(partial, "wb", buffering=0) as file:
        _write(file, memoryview(len(text).to_bytes(8, "little") + text))
        for name, tensor in tensors.items():
            rows = 0
            for block in tensor.blocks():
                rows += _check_block(name, block, tensor.shape)
                _write(file, _bytes(_narrowed(name, block.detach(), tensor.dtype)))
            if tensor.shape and rows != tensor.shape[0]:
                raise ValueError(f"{name}: has {rows} rows, {list(tensor.shape)} was announced")


def _narrowed(name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    """A block on the CPU in a dtype. Raises: ValueError when a finite value leaves the dtype's range."""
    narrow = block.to(device="cpu", dtype=dtype).contiguous()
    if block.dtype != dtype and dtype.is_floating_point and narrow.isinf().any():
        lost = block.cpu()[narrow.isinf()]
        lost = lost[lost.isfinite()]
        if len(lost):
            raise ValueError(
                f"{name}: {lost.abs().max().item():g} is beyond the range of {str(dtype).removeprefix('torch.')} "
                f"(at most {torch.finfo(dtype).max:g}) and would become infinite; write another dtype, such as float32"
            )
    return narrow


def _check_block(name: str, block: Tensor, shape: tuple[int, ...]) -> int:
    """Number of rows of a block. Raises: ValueError when a row has another shape than announced."""
    if tuple(block.shape[1:]) != tuple(shape[1:]) or block.ndim != len(shape):
        raise ValueError(f"{name}: has shape {list(block.shape)}, {list(shape)} was announced")
    return len(block) if block.ndim else 1


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _write(file: Any, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]
