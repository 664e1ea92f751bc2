"""safetensors files, read and written a run of rows at a time.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes with the length of the header, little-endian; the
header, JSON, with each tensor's dtype, shape and [begin, end) in what follows; the tensors, row by row.

The safetensors package maps a file that it reads, so that every page read counts as the process's memory while the file is
open, and copies the tensors that it writes. Here no more is held than is asked for. The package still judges whether a file is
whole.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
BLOCK_BYTES = 16 * 2**20


class TensorFile:
    """A safetensors file opened for reading. A context manager.

    Raises: ValueError naming the file where it is truncated or foreign.
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
        """Raises: ValueError for a dtype that no weight here has."""
        stored = self._header[name]["dtype"]
        if stored not in _DTYPES:
            raise ValueError(f"{self.path}: {name} is stored as {stored}; known are {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, on the CPU, in its stored dtype."""
        return self._read(name, self.shape(name), 0)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor of one dimension or more, on the CPU, in its stored dtype."""
        rows, *row = self.shape(name)
        start, stop, _ = slice(start, stop).indices(rows)
        return self._read(name, (max(0, stop - start), *row), start * math.prod(row))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor of one dimension or more as runs of rows of about BLOCK_BYTES."""
        rows, *row = self.shape(name)
        step = max(1, BLOCK_BYTES // max(1, math.prod(row) * self.dtype(name).itemsize))
        for start in range(0, rows, step):
            yield self.rows(name, start, min(start + step, rows))

    def _read(self, name: str, shape: tuple[int, ...], skipped: int) -> Tensor:
        """A tensor of this shape from the stored one, without the `skipped` values before it."""
        tensor = torch.empty(shape, dtype=self.dtype(name))
        self._file.seek(self._begin + self._header[name]["data_offsets"][0] + skipped * tensor.itemsize)
        view = _bytes(tensor)
        while len(view):  # the system moves at most 2 GiB a call
            moved = self._file.readinto(view)
            if not moved:
                raise ValueError(f"{self.path}: became shorter while it was read; fetch or export it again")
            view = view[moved:]
        return tensor


def write_tensor_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, parts_of: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write one safetensors file, holding one part of a tensor at a time. The same tensors always give the same bytes.

    Args: shapes: every tensor's shape, in the order to write; parts_of: gives the tensor of a name as runs of its rows, of any
        dtype and device, when its turn comes.
    Raises: ValueError when the parts of a tensor do not add up to the shape announced; OSError naming the file where it cannot
        be written, as on a full disk.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "wb", buffering=0) as file:
            _write(file, memoryview(len(text).to_bytes(8, "little") + text))
            for name, shape in shapes.items():
                rows = 0
                for part in parts_of(name):
                    rows += _check_part(name, part, shape)
                    _write(file, _bytes(part.detach().to(device="cpu", dtype=dtype).contiguous()))
                if shape and rows != shape[0]:
                    raise ValueError(f"{name}: has {rows} rows, {list(shape)} was announced")
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{path}: could not be written: {reason}; free the disk or choose another folder") from None


def _check_part(name: str, part: Tensor, shape: tuple[int, ...]) -> int:
    """Rows of a part. Raises: ValueError where its rows are not those of the shape."""
    if tuple(part.shape[1:]) != tuple(shape[1:]) or part.ndim != len(shape):
        raise ValueError(f"{name}: has shape {list(part.shape)}, {list(shape)} was announced")
    return len(part) if part.ndim else 1


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _write(file: Any, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]
