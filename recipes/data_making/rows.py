"""Writes records to a file that appears when it is complete: JSON Lines (.jsonl, .jsonl.gz) or Parquet, by its name."""

from __future__ import annotations

import gzip
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from engine.data.sources import NEEDS_EXTRA
from model.folder import complete_file

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def check_name(path: str | Path) -> None:
    """Raises: ValueError where the name says no format that is written; FileNotFoundError where its folder cannot be made."""
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: unknown type of file: must end in one of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        _pyarrow(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{path}: its folder cannot be made: {error.strerror or error}; choose another folder") from None


def beside(path: str | Path, name: str) -> Path:
    """Another file of a result, whatever its format: data/ja.jsonl.gz and "journal" give data/ja.journal."""
    path = Path(path)
    suffix = next(suffix for suffix in SUFFIXES if path.name.endswith(suffix))
    return path.with_name(f"{path.name.removesuffix(suffix)}.{name}")


@contextmanager
def row_writer(path: str | Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that adds a record. The same records give the same bytes; what JSON lacks, such as a date, becomes text.

    On leaving without an error the file appears, all at once; on an error an old file stays as it was.
    Raises: ValueError for Parquet where a field's values have no common type; OSError naming a path that cannot be written.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        rows: list[Mapping[str, Any]] = []
        yield rows.append
        with complete_file(path) as partial:
            _write_parquet(path, partial, rows)
        return
    # Not inside `complete_file`: it would take the caller's errors for the file's own.
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with ExitStack() as opened:
            with _named(path):
                file = opened.enter_context(compressed(hidden) if path.suffix == ".gz" else hidden.open("wb"))

            def add(row: Mapping[str, Any]) -> None:
                line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)
                with _named(path):
                    # Half a surrogate pair has no UTF-8; its escape is JSON, too.
                    file.write(line.encode("utf-8", "backslashreplace") + b"\n")

            yield add
            with _named(path):
                opened.close()
        with complete_file(path) as partial:
            hidden.replace(partial)
    finally:
        hidden.unlink(missing_ok=True)


@contextmanager
def compressed(path: Path, level: int = 6) -> Iterator[IO[bytes]]:
    """A gzip file to write. Its bytes depend on the content alone (no name, no time)."""
    with path.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=level, mtime=0) as packed:
        yield cast(IO[bytes], packed)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raises: OSError naming the file in place of one that does not."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"{path}: could not be written: {reason}; free the disk or choose another folder") from None


def _write_parquet(path: Path, partial: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    pyarrow = _pyarrow(path)
    from pyarrow import parquet

    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[name] = pyarrow.array([row.get(name) for row in rows])
        except pyarrow.ArrowException as error:
            raise ValueError(
                f"{path}: the values of '{name}' have no common type, which Parquet needs ({error}): "
                "name a file that ends in .jsonl.gz"
            ) from None
    parquet.write_table(pyarrow.table(columns), partial)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path}: Parquet {NEEDS_EXTRA}") from None
    return pyarrow
