"""Split a data set by language: mostly Japanese records, and the rest.

    python -m recipes.shisa.split_languages recipes/shisa/split_pretrain.toml

Shisa's data sets hold both languages in one table. The recipe needs them apart: to mix pre-training nine to one, to learn the
vocabulary, to fine-tune once more on Japanese conversations alone, and to measure the held-out loss of each language.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from engine.data.languages import share, without_code
from engine.data.records import Unusable, read_conversation, read_text, said_in
from engine.data.sources import RECORD_SUFFIXES, Record, find_sources
from engine.settings.toml import PathName
from model.folder import complete_folder, write_file
from recipes.command import command
from recipes.data_making.rows import compressed

PARTS = ("ja", "rest")


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """A split of a data set by language."""

    kind: Literal["text", "conversations"]
    """text: records with a text field; conversations: ShareGPT, messages, Alpaca, or prompt and completion."""
    paths: tuple[PathName, ...]
    """Files (.jsonl, .json, each also .gz; .parquet), folders, patterns, or hub:owner/name[:split]."""
    out: PathName
    """Folder for ja.jsonl.gz, rest.jsonl.gz, and split.json with their counts."""
    text_field: str = "text"
    """Field of a record that holds the text (kind text)."""
    least_share: float = 0.5
    """A record counts as Japanese if at least this share of its letters is Japanese."""
    overwrite: bool = False
    """Replace an existing folder."""

    def __post_init__(self) -> None:
        if not 0 < self.least_share <= 1:
            raise ValueError(f"least_share = {self.least_share}: must be above 0 and at most 1")
        if self.kind != "text" and self.text_field != "text":
            raise ValueError(f"text_field = '{self.text_field}' has no effect on {self.kind}: leave it out")


def run(settings: SplitSettings) -> dict[str, Any]:
    """Write the two parts; returns the report, which is also written as split.json.

    User and assistant turns decide a conversation's language, without fenced code and system message. A request for translation
    holds about twice as many English as Japanese letters, and so belongs to the rest. Unusable records are left out and
    counted. The same source gives the same bytes.

    Raises: ValueError or FileNotFoundError naming the source, also when a part would be empty.
    """
    counts = {part: {"records": 0, "characters": 0} for part in PARTS}
    skipped: dict[str, dict[str, Any]] = {}
    with complete_folder(settings.out, overwrite=settings.overwrite) as folder:
        with ExitStack() as opened:
            # Level 1, as the files are read only twice.
            files = {part: opened.enter_context(compressed(folder / f"{part}.jsonl.gz", level=1)) for part in PARTS}
            for record in _records(settings):
                try:
                    kept, text = _read(record.value, settings)
                except Unusable as unusable:
                    first = {"count": 0, "first": record.place, "detail": unusable.detail}
                    skipped.setdefault(unusable.reason, first)["count"] += 1
                    continue
                part = "ja" if share(text, "ja") >= settings.least_share else "rest"
                files[part].write(json.dumps(kept, ensure_ascii=False).encode() + b"\n")
                counts[part]["records"] += 1
                counts[part]["characters"] += len(text)
        for part, count in counts.items():
            if not count["records"]:
                raise ValueError(
                    f"{', '.join(settings.paths)}: no record belongs to the part '{part}', so there is nothing to split: "
                    "prepare the whole source, or change least_share"
                )
        report = {"least_share": settings.least_share, "parts": counts, "skipped": skipped}
        write_file(folder / "split.json", json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    for part, count in counts.items():
        file = Path(settings.out) / f"{part}.jsonl.gz"
        print(f"{file}: {count['records']:,} records, {count['characters']:,} characters")
    for reason, skip in skipped.items():
        print(f"skipped {skip['count']:,}: {reason}; first at {skip['first']}: {skip['detail']}")
    return report


def _records(settings: SplitSettings) -> Iterator[Record]:
    """Every record of the sources, under one progress bar."""
    sources = find_sources(settings.paths, RECORD_SUFFIXES)
    with tqdm(desc="splitting", unit=" records", disable=None) as progress:
        for source in sources:
            for record in source.records("blank"):
                progress.update()
                yield record


def _read(value: Any, settings: SplitSettings) -> tuple[dict[str, Any], str]:
    """The record to keep, and the text that decides its language. Raises: Unusable."""
    if settings.kind == "text":
        text = read_text(value, settings.text_field)
        return {"text": text}, text
    messages = read_conversation(value)
    return {"messages": messages}, without_code(said_in(messages))


def main(argv: Sequence[str] | None = None) -> None:
    command(SplitSettings, run, argv, "python -m recipes.shisa.split_languages")


if __name__ == "__main__":
    main()
