"""Files (and datasets of the Hugging Face hub) as streams of records, each with its file and line.

Text files give strings; JSONL, JSON arrays, Parquet files and hub datasets give the decoded value of each record. `records`
reads the values' meaning.
"""

import glob
import gzip
import importlib.util
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.dataset import REPORT, file_sha256

SPLITS = ("blank", "line", "file")
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
TEXT_SUFFIXES = (".txt", ".txt.gz", *RECORD_SUFFIXES)
HUB = "hub:"
# For Parquet (pyarrow) and the hub (datasets).
NEEDS_EXTRA = "needs the optional packages of 'data': pip install 'komainu[data]', or make ... EXTRAS=data"
_NEEDS_DATASETS = f"a dataset of the hub {NEEDS_EXTRA}"


class Record(NamedTuple):
    """place: `file:line` (or `file, row n`), for error messages. value: a text, or a decoded JSON value."""

    place: str
    value: Any


@dataclass
class SourceFile:
    """One file. position: bytes read so far, of `size`, for a progress bar."""

    path: Path
    size: int
    position: int = 0

    @property
    def name(self) -> str:
        return str(self.path)

    def identity(self) -> dict[str, Any]:
        """Equal for equal content, wherever the file lies."""
        return {"bytes": self.size, "sha256": file_sha256(self.path)}

    def records(self, split: str) -> Iterator[Record]:
        """The records of the file.

        Args: split: the end of a document of a text file: a "blank" line, each "line", or the end of the "file".
        Raises: ValueError naming file and line for an empty file, broken JSON, broken gzip or text that is not UTF-8.
        """
        suffix = self.path.name.removesuffix(".gz").rpartition(".")[2]
        read = {"jsonl": self._json_lines, "json": self._json_array, "parquet": self._rows}
        empty = True
        for record in self._texts(split) if suffix == "txt" else read[suffix]():
            empty = False
            yield record
        if empty:
            raise ValueError(f"{self.name}: empty: no record in it")

    def _lines(self) -> Iterator[tuple[int, str]]:
        number = 0
        with open(self.path, "rb") as file:
            try:
                lines = io.BufferedReader(gzip.GzipFile(fileobj=file)) if self.path.suffix == ".gz" else file
                for number, line in enumerate(lines, 1):
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                    self.position = file.tell()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.name}:{number}: byte {error.start} of the line is not UTF-8: convert the file to UTF-8"
                ) from None
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{self.name}: broken gzip file after line {number} ({error}): fetch it again") from None

    def _texts(self, split: str) -> Iterator[Record]:
        if split == "file":
            text = "".join(line for _, line in self._lines()).replace("\r\n", "\n").strip("\n")
            if text.strip():
                yield Record(f"{self.name}:1", text)
            return
        first = 0
        lines: list[str] = []
        for number, line in self._lines():
            line = line.rstrip("\r\n")
            if line.strip():
                if not lines:
                    first = number
                lines.append(line)
            if lines and (split == "line" or not line.strip()):
                yield Record(f"{self.name}:{first}", "\n".join(lines))
                lines = []
        if lines:
            yield Record(f"{self.name}:{first}", "\n".join(lines))

    def _json_lines(self) -> Iterator[Record]:
        for number, line in self._lines():
            if line.strip():
                yield Record(f"{self.name}:{number}", _decode(line.rstrip(), f"{self.name}:{number}"))

    def _json_array(self) -> Iterator[Record]:
        text = "".join(line for _, line in self._lines())
        if not text.strip():
            return
        if _is_json_lines(text):
            # Many tools name JSON Lines so.
            yield from self._json_lines()
            return
        values = _decode(text, self.name)
        if not isinstance(values, list):
            raise ValueError(
                f"{self.name}: holds a JSON {type(values).__name__}, not an array of records: "
                "write a JSON array, or one record a line (JSONL)"
            )
        for number, value in enumerate(values, 1):
            yield Record(f"{self.name}, record {number}", value)

    def _rows(self) -> Iterator[Record]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ValueError(f"{self.name}: Parquet {NEEDS_EXTRA}") from None
        number = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    for value in batch.to_pylist():
                        number += 1
                        yield Record(f"{self.name}, row {number}", value)
                    self.position = self.size * number // max(1, file.metadata.num_rows)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self.name}: not a readable Parquet file: {error}") from None


def check_hub_access(name: str) -> None:
    """Ask the hub whether this machine may read a dataset; download nothing. Raises: ValueError naming it and the reason."""
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"{name}: {_NEEDS_DATASETS}")
    import huggingface_hub

    repository, asked, _ = _hub_parts(name)
    try:
        huggingface_hub.HfApi().dataset_info(repository, revision=asked or None)
        huggingface_hub.HfApi().auth_check(repository, repo_type="dataset")
    except Exception as error:
        raise ValueError(f"{name}: not available: {_words_of_hub(error)}") from None


def _hub_parts(name: str) -> tuple[str, str, list[str]]:
    """(repository, revision or "", split or configuration and split) of a name. Raises: ValueError for another form."""
    pinned, *parts = name.removeprefix(HUB).split(":")
    repository, _, asked = pinned.partition("@")
    if not repository or len(parts) > 2:
        raise ValueError(f"{name}: must be hub:owner/name[@revision], then :split or :configuration:split")
    return repository, asked, parts


def _words_of_hub(error: Exception) -> str:
    """The hub's own words say why: a gated repository asks for a login, a wrong configuration lists the known ones."""
    return " ".join((getattr(error, "server_message", None) or str(error)).split())


class HubSource:
    """A dataset of the Hugging Face hub, downloaded when it is opened.

    Its name is `hub:owner/name[@revision]`, then nothing (the split "train"), `:split` or `:configuration:split`.
    """

    def __init__(self, name: str):
        try:
            import datasets
            import huggingface_hub
        except ImportError:
            raise ValueError(f"{name}: {_NEEDS_DATASETS}") from None
        repository, asked, parts = _hub_parts(name)
        configuration, part = ([None, *parts] if len(parts) < 2 else parts) if parts else (None, "train")
        self.name = name
        self.position = 0
        try:
            self.revision = huggingface_hub.HfApi().dataset_info(repository, revision=asked or None).sha
            self._rows = datasets.load_dataset(repository, configuration or None, split=part or "train", revision=self.revision)
        except Exception as error:
            # Network, hub and dataset fail in many ways; the user needs the name and the reason in one line.
            said = _words_of_hub(error)
            remedy = "; name one as hub:owner/name:configuration:split" if "Config name is missing" in said else ""
            raise ValueError(f"{name}: not available: {said}{remedy}") from None
        self.size = len(self._rows)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "revision": self.revision, "rows": len(self._rows)}

    def records(self, split: str) -> Iterator[Record]:
        """The rows. Raises: ValueError for an empty dataset."""
        if not len(self._rows):
            raise ValueError(f"{self.name}: empty: no record in it")
        for number, value in enumerate(self._rows, 1):
            self.position = number
            yield Record(f"{self.name}, row {number}", value)


def find_sources(paths: Sequence[str], suffixes: Sequence[str]) -> list[SourceFile | HubSource]:
    """The sources named by files, folders (searched through), globs and `hub:` names, in a fixed order.

    Folders and globs give their files with one of `suffixes`, without hidden files and prepared datasets.
    Raises: FileNotFoundError or ValueError naming a path that gives nothing, is of an unknown type or comes twice.
    """
    found: list[SourceFile | HubSource] = []
    seen: dict[Path, str] = {}
    for name in paths:
        if name.startswith(HUB):
            found.append(HubSource(name))
            continue
        path = Path(name)
        if path.is_file():
            if not path.name.endswith(tuple(suffixes)):
                raise ValueError(f"{name}: unknown type of file: must end in one of {', '.join(suffixes)}")
            files = [path]
        else:
            matches = [path] if path.is_dir() else [Path(match) for match in sorted(glob.glob(name, recursive=True))]
            if not matches:
                raise FileNotFoundError(f"{name}: no such file or folder, and no file matches it as a pattern")
            files = [file for match in matches for file in _within(match, suffixes)]
            if not files:
                raise ValueError(f"{name}: holds no file that ends in one of {', '.join(suffixes)}")
        for file in files:
            key = file.resolve()
            if key in seen:
                raise ValueError(
                    f"{file}: named twice (by '{seen[key]}' and '{name}'): name it once, and weight it in the "
                    "mixture of the training run"
                )
            seen[key] = name
            found.append(SourceFile(file, file.stat().st_size))
    if not found:
        raise ValueError("no paths given: name at least one file, folder or pattern")
    return found


def _within(path: Path, suffixes: Sequence[str]) -> list[Path]:
    if path.is_file():
        return [path] if path.name.endswith(tuple(suffixes)) else []
    if (path / REPORT).is_file():
        return []
    children = sorted(child for child in path.iterdir() if not child.name.startswith("."))
    return [file for child in children for file in _within(child, suffixes)]


def _is_json_lines(text: str) -> bool:
    """Whether each line of a text holds an object of its own, by its first two lines."""
    first, _, rest = text.strip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


def _decode(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.lineno > 1:
            place = f"{place}:{error.lineno}"
        if text[error.pos : error.pos + 1] == "\ufeff":
            raise ValueError(
                f"{place}: a byte-order mark inside the file, where two files were joined: remove these three bytes"
            ) from None
        raise ValueError(f"{place}: broken JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{place}: JSON that cannot be read: {error}") from None
