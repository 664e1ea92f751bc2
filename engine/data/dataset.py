"""A prepared dataset: a folder of token shards, each document read when it is asked for.

    dataset.json      format, kind, tokenizer, counts, shards, sources, skipped records
    tokens-00000.bin  raw little-endian uint16 (vocabularies up to 65,536 pieces) or uint32, documents end to end
    trained-00000.bin one bit for each token of the same shard, least significant bit first (absent for text)
    lengths.bin       raw little-endian uint32, tokens of each document, special tokens included
    prompts.bin       raw little-endian uint32, tokens before the answer (preferences only)

No document crosses a shard. Kinds: "text" (every token but the first is trained on), "conversations", and "preferences", where
document 2i is the chosen and 2i + 1 the rejected side of pair i.

Documents are read by position and not mapped: mapped files would fill each rank's memory with what it has read so far. The
system caches the files once for all ranks.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import finalize

import numpy as np

FORMAT = "komainu-dataset"
VERSION = 1
KINDS = ("text", "conversations", "preferences")
REPORT = "dataset.json"
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
REMEDY = "prepare the dataset again"
# 256 MiB of uint16: large enough that opening shards costs nothing, small enough to copy and check one at a time.
SHARD_TOKENS = 2**27
FLUSH_TOKENS = 2**20


def tokens_file(shard: int) -> str:
    return f"tokens-{shard:05d}.bin"


def trained_file(shard: int) -> str:
    return f"trained-{shard:05d}.bin"


def read_report(folder: str | Path) -> dict[str, Any]:
    """The content of `dataset.json`.

    Raises: FileNotFoundError where the file is missing; ValueError where it is broken, of another version or no dataset.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, so {folder} is no prepared dataset: make one with recipes.prepare")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}): {REMEDY}") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"{path}: not a prepared dataset (no 'format': '{FORMAT}')")
    if report.get("version") != VERSION:
        raise ValueError(f"{path}: format version {report.get('version')!r}, this program reads {VERSION}: {REMEDY}")
    return report


class TokenDataset:
    """The documents of a prepared folder.

    Attributes:
        kind: "text", "conversations" or "preferences".
        fingerprint: sha256 (hex) over the tokens, lengths, masks and the tokenizer's fingerprint.
        tokenizer_fingerprint: sha256 (hex) of the tokenizer that made the ids.
        vocab_size: pieces of the tokenizer; every id is below it.
        lengths: int64 [documents], tokens of each document, special tokens included.
        prompt_lengths: int64 [documents], tokens before the answer; None unless the kind is "preferences".
        report: the content of dataset.json.
    """

    def __init__(self, folder: Path, report: dict[str, Any]):
        try:
            self.kind: str = report["kind"]
            self.fingerprint: str = report["fingerprint"]
            self.tokenizer_fingerprint: str = report["tokenizer"]["fingerprint"]
            self.vocab_size: int = report["tokenizer"]["vocab_size"]
            documents: int = report["documents"]
            files: list[str] = list(report["files"])
            shard_tokens = np.array([shard["tokens"] for shard in report["shards"]], dtype=np.int64)
            dtype = DTYPES[report["dtype"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / REPORT}: field {error} is missing or wrong: {REMEDY}") from None
        if self.kind not in KINDS:
            raise ValueError(f"{folder / REPORT}: kind {self.kind!r} is none of {', '.join(KINDS)}: {REMEDY}")
        self.folder = folder
        self.report = report
        self._stamps = {name: _stamp(folder / name) for name in files}
        self.lengths = _read_uint32(folder / "lengths.bin", documents)
        self.prompt_lengths = _read_uint32(folder / "prompts.bin", documents) if self.kind == "preferences" else None
        if self.kind == "preferences" and documents % 2:
            raise ValueError(f"{folder / REPORT}: {documents} documents are not pairs: {REMEDY}")
        if (documents and self.lengths.min() < 2) or self.lengths.sum() != shard_tokens.sum():
            raise ValueError(f"{folder / 'lengths.bin'}: does not fit {REPORT}: {REMEDY}")
        self._starts = np.zeros(documents + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=self._starts[1:])
        self._shard_starts = [0, *np.cumsum(shard_tokens).tolist()]
        self._tokens: list[_Array] = []
        self._trained: list[_Array] = []
        for shard, count in enumerate(shard_tokens.tolist()):
            self._tokens.append(_Array(folder / tokens_file(shard), dtype, count))
            if self.kind != "text":
                self._trained.append(_Array(folder / trained_file(shard), np.dtype("u1"), (count + 7) // 8))

    @classmethod
    def open(cls, folder: str | Path) -> "TokenDataset":
        """Open a prepared folder and check that it is whole.

        The sizes of all files are compared with dataset.json. dataset.json is written last, so a newer file was copied or
        changed: its content is hashed and compared too.

        Raises: FileNotFoundError or ValueError with the file and the remedy, for a missing, cut, changed or inconsistent file.
        """
        folder = Path(folder)
        dataset = cls(folder, read_report(folder))
        _, written = _stamp(folder / REPORT)
        dataset._compare(name for name, (_, changed) in dataset._stamps.items() if changed > written)
        return dataset

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int) -> np.ndarray:
        """The ids of one document: uint16 or uint32 [length], read-only."""
        shard, start = self._locate(document)
        return self._tokens[shard].read(start, start + int(self.lengths[document]))

    def trained(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Whether each of the document's tokens `start` to `stop` is trained on: bool [stop - start]."""
        length = int(self.lengths[document])
        stop = length if stop is None else min(stop, length)
        if self.kind == "text":
            return np.ones(max(stop - start, 0), dtype=bool)
        shard, base = self._locate(document)
        first, last = base + start, base + stop
        packed = self._trained[shard].read(first // 8, (last + 7) // 8)
        bits = np.unpackbits(packed, bitorder="little")
        return bits[first % 8 : first % 8 + last - first].astype(bool)

    @cached_property
    def shared_places(self) -> np.ndarray:
        """Preferences: tokens at the start of each pair that can be computed once for both sides: int64 [pairs].

        These are the common prompt without its last token, which predicts another token on each side. They end before the
        first token that is trained on, as its loss would have to count twice.
        """
        assert self.prompt_lengths is not None
        shared = np.zeros(len(self) // 2, dtype=np.int64)
        limits = np.minimum(self.prompt_lengths, self.lengths).reshape(-1, 2).min(axis=1)
        for pair, limit in enumerate(limits.tolist()):
            chosen, rejected = 2 * pair, 2 * pair + 1
            apart = self.tokens(chosen)[:limit] != self.tokens(rejected)[:limit]
            trained = self.trained(chosen, 0, limit) | self.trained(rejected, 0, limit)
            # Nothing predicts the first token, whatever its mask says.
            trained[:1] = False
            ends = np.flatnonzero(apart | trained)
            shared[pair] = max(0, (int(ends[0]) if len(ends) else limit) - 1)
        return shared

    def verify(self) -> None:
        """Hash every file and compare with dataset.json. Raises: ValueError naming the first file that differs."""
        self._compare(self.report["files"])

    def check_unchanged(self) -> None:
        """Raises: ValueError naming a file whose content has changed since the folder was opened.

        A file of another time is hashed: `touch` and copying tools change times alone.
        """
        for name, stamp in self._stamps.items():
            found = _stamp(self.folder / name)
            if found == stamp:
                continue
            if found[0] == stamp[0] and file_sha256(self.folder / name) == self.report["files"][name]:
                self._stamps[name] = found
            else:
                raise ValueError(f"{self.folder / name}: changed while it was being read; restore it and start again")

    def _compare(self, names: Iterable[str]) -> None:
        for name in names:
            if file_sha256(self.folder / name) != self.report["files"][name]:
                raise ValueError(f"{self.folder / name}: its content is not what was written: {REMEDY}")

    def _locate(self, document: int) -> tuple[int, int]:
        if not 0 <= document < len(self.lengths):
            raise IndexError(f"document {document} of {len(self.lengths)}")
        start = int(self._starts[document])
        shard = bisect_right(self._shard_starts, start) - 1
        return shard, start - self._shard_starts[shard]


class DatasetWriter:
    """Writes a prepared folder, document by document, in bounded memory. The folder must exist and be empty.

    The folder is complete only after `finish`, which writes dataset.json last; `prepare` renames the folder after that.
    """

    def __init__(
        self, folder: str | Path, kind: str, *, vocab_size: int, tokenizer_fingerprint: str, shard_tokens: int = SHARD_TOKENS
    ):
        assert kind in KINDS
        self.folder = Path(folder)
        self.kind = kind
        self.vocab_size = vocab_size
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.dtype = DTYPES["uint16" if vocab_size <= 2**16 else "uint32"]
        self.documents = 0
        self.tokens = 0
        self.trained_tokens = 0
        self._shard_tokens = shard_tokens
        self._shards: list[dict[str, int]] = []
        self._hashes: dict[str, str] = {}
        self._lengths = _HashedFile(self.folder / "lengths.bin")
        self._prompts = _HashedFile(self.folder / "prompts.bin") if kind == "preferences" else None
        self._token_file: _HashedFile | None = None
        self._trained_file: _HashedFile | None = None
        self._buffer: list[np.ndarray] = []
        self._mask: list[np.ndarray] = []
        self._numbers: list[tuple[int, int]] = []
        self._buffered = 0

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in (self._token_file, self._trained_file, self._lengths, self._prompts):
            if file is not None:
                file.file.close()

    def add(self, ids: Any, trained: Any = None, prompt_length: int = 0) -> None:
        """Append a document.

        Args: ids: [length >= 2]. trained: bool [length], whether each token is trained on; None for the kind "text".
            prompt_length: tokens before the answer (preferences).
        """
        assert len(ids) >= 2
        assert (trained is None) == (self.kind == "text")
        document = np.asarray(ids)
        assert document.min() >= 0
        assert document.max() < self.vocab_size
        if self._shards and self._shards[-1]["tokens"] + self._buffered + len(ids) > self._shard_tokens:
            self._flush()
            self._close_shard()
        if self._token_file is None:
            self._open_shard()
        self._buffer.append(document.astype(self.dtype))
        if trained is not None:
            mask = np.asarray(trained, dtype=bool)
            assert len(mask) == len(document)
            self._mask.append(mask)
            # Nothing predicts the first token, whatever its mask says.
            self.trained_tokens += int(mask[1:].sum())
        else:
            self.trained_tokens += len(document) - 1
        self._numbers.append((len(document), prompt_length))
        self._buffered += len(document)
        self.documents += 1
        self.tokens += len(document)
        if self._buffered >= FLUSH_TOKENS:
            self._flush()

    def finish(self, **fields: Any) -> dict[str, Any]:
        """Write the rest, then dataset.json with the extra `fields`. Returns: the content of dataset.json."""
        self._flush()
        if self._token_file is not None:
            self._close_shard()
        self._hashes["lengths.bin"] = self._lengths.close()
        if self._prompts is not None:
            self._hashes["prompts.bin"] = self._prompts.close()
        content = {"kind": self.kind, "tokenizer": self.tokenizer_fingerprint, "files": self._hashes}
        report = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "fingerprint": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
            "tokenizer": {"fingerprint": self.tokenizer_fingerprint, "vocab_size": self.vocab_size},
            "dtype": self.dtype.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "shards": self._shards,
            "files": self._hashes,
            **fields,
        }
        file = _HashedFile(self.folder / REPORT)
        file.write((json.dumps(report, ensure_ascii=False, indent=1) + "\n").encode())
        file.close()
        return report

    def _open_shard(self) -> None:
        shard = len(self._shards)
        self._shards.append({"documents": 0, "tokens": 0})
        self._token_file = _HashedFile(self.folder / tokens_file(shard))
        self._trained_file = None if self.kind == "text" else _HashedFile(self.folder / trained_file(shard))

    def _flush(self) -> None:
        if not self._numbers:
            return
        assert self._token_file is not None
        self._token_file.write(np.concatenate(self._buffer).tobytes())
        if self._trained_file is not None:
            # Write whole bytes only; the bits of an incomplete last byte wait for the next flush.
            mask = np.concatenate(self._mask)
            whole = len(mask) // 8 * 8
            self._trained_file.write(np.packbits(mask[:whole], bitorder="little").tobytes())
            self._mask = [mask[whole:]]
        numbers = np.array(self._numbers, dtype="<u4")
        self._lengths.write(numbers[:, 0].tobytes())
        if self._prompts is not None:
            self._prompts.write(numbers[:, 1].tobytes())
        self._shards[-1]["documents"] += len(self._numbers)
        self._shards[-1]["tokens"] += self._buffered
        self._buffer, self._numbers, self._buffered = [], [], 0

    def _close_shard(self) -> None:
        assert self._token_file is not None
        shard = len(self._shards) - 1
        self._hashes[tokens_file(shard)] = self._token_file.close()
        if self._trained_file is not None:
            self._trained_file.write(np.packbits(np.concatenate(self._mask), bitorder="little").tobytes())
            self._hashes[trained_file(shard)] = self._trained_file.close()
        self._mask = []
        self._token_file = self._trained_file = None


class _HashedFile:
    """A new file, hashed while it is written. `close` syncs it to the disk and returns its sha256."""

    def __init__(self, path: Path):
        self.file = open(path, "xb")  # noqa: SIM115 (outlives this call; DatasetWriter closes it)
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._hash.update(data)

    def close(self) -> str:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self._hash.hexdigest()


def file_sha256(path: str | Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: missing: {REMEDY}")
    if path.stat().st_size != expected:
        raise ValueError(f"{path}: {path.stat().st_size} bytes where {REPORT} says {expected}: {REMEDY}")


def _read_uint32(path: Path, count: int) -> np.ndarray:
    _check_size(path, 4 * count)
    return np.fromfile(path, dtype="<u4").astype(np.int64)


def _stamp(path: Path) -> tuple[int, int]:
    """(size, time of the last change in ns) of a file, (-1, -1) where the file is missing."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


class _Array:
    """A file of numbers, of which parts are read by position. Threads may read at once."""

    def __init__(self, path: Path, dtype: np.dtype, count: int) -> None:
        _check_size(path, dtype.itemsize * count)
        self._path, self._dtype = path, dtype
        self._file = os.open(path, os.O_RDONLY)
        finalize(self, os.close, self._file)

    def read(self, first: int, stop: int) -> np.ndarray:
        """The numbers `first` to `stop`, read-only. Raises: ValueError where the file has been cut since it was opened."""
        size = max(0, stop - first) * self._dtype.itemsize
        data = os.pread(self._file, size, first * self._dtype.itemsize)
        if len(data) < size:
            raise ValueError(f"{self._path}: cut short while it was being read; restore it and start again")
        return np.frombuffer(data, dtype=self._dtype)
