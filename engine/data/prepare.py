"""Tokenise sources once into a prepared dataset (`dataset` describes its files)."""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.data.dataset import KINDS, REPORT, SHARD_TOKENS, VERSION, DatasetWriter, TokenDataset, read_report
from engine.data.languages import check_language
from engine.data.reader import Reader
from engine.data.records import READING, Unusable
from engine.data.sources import RECORD_SUFFIXES, SPLITS, TEXT_SUFFIXES, HubSource, Record, SourceFile, find_sources
from engine.data.too_long import WAYS, TooLong
from model.folder import complete_folder
from model.vocabulary.template import CHAT_TEMPLATE, unmarked
from model.vocabulary.tokenizer import Tokenizer

# Enough texts to keep all of the tokenizer's threads busy, few enough to bound the memory.
BATCH_RECORDS = 256


def prepare(
    paths: Sequence[str],
    out: str | Path,
    *,
    tokenizer: Tokenizer,
    kind: str,
    text_field: str = "text",
    split: str = "blank",
    language: str = "",
    max_length: int | None = None,
    too_long: TooLong = "skip",
    heldout: float = 0.0,
    seed: int = 0,
    strict: bool = False,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write the prepared dataset `out` from files, folders, globs and `hub:` names.

    Args:
        kind: "text", "conversations" or "preferences".
        text_field: field of a JSONL or Parquet record that holds the text ("text" only).
        split: the end of a document of a text file: a "blank" line, each "line", or the end of the "file".
        language: keep only records in this language, by script (`engine.data.languages`); empty: all.
        max_length: most tokens of a document, or of each side of a pair; None: no limit.
        too_long: what becomes of longer ones. "skip": nothing. "cut": their beginning; of a conversation whole exchanges, of a
            pair its prompt with the beginnings of its answers. "split" (not pairs): documents one after another; of a
            conversation whole exchanges, each part behind the system message. An exchange longer than `max_length` loses its
            answer's end. All are counted.
        heldout: validation split, written to `<out>-heldout`: a share of the documents or pairs (below 1), or their number (1
            and above). A hash of the content (of the prompt, for preferences) and the seed chooses them. So duplicates land on
            the same side (which can exceed the number), and the order of the sources does not matter.
        seed: seed of the hash for `heldout`.
        strict: raise for a record that cannot be used, instead of skipping, counting and reporting it.
        overwrite: replace a dataset at `out` that was prepared from other inputs.
        shard_tokens: most tokens of a shard.

    Keeps an existing dataset that was prepared from the same inputs. A new dataset appears under its name only when complete.

    Returns: the content of dataset.json.
    Raises: ValueError or FileNotFoundError with the place and the remedy in one line.
    """
    out = Path(out)
    aside = out.with_name(out.name + "-heldout")
    _check_settings(kind, text_field, split, max_length, too_long, heldout)
    check_language(language)
    sources = find_sources(paths, TEXT_SUFFIXES if kind == "text" else RECORD_SUFFIXES)
    identities = [source.identity() for source in tqdm(sources, desc="hashing sources", unit="file", disable=None)]
    settings = {
        "text_field": text_field,
        "split": split,
        "max_length": max_length,
        "heldout": heldout,
        "seed": seed,
        "shard_tokens": shard_tokens,
    }
    # Named only where they change something: older datasets lack them.
    settings |= {"language": language} if language else {}
    settings |= {"too_long": too_long} if too_long != "skip" else {}
    template = "" if kind == "text" else CHAT_TEMPLATE if tokenizer.template is None else tokenizer.template.source
    # The generation block of ours marks training, not text: a dataset does not depend on it.
    form = template if tokenizer.template else unmarked(template)
    determined_by = [VERSION, kind, settings, tokenizer.fingerprint, form, identities]
    if kind != "text":
        determined_by.append(READING)
    inputs = hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()
    targets = (out, aside) if heldout else (out,)
    ready = [_is_ready(target, inputs, overwrite) for target in targets]
    if all(ready):
        print(f"{out}: already prepared from the same inputs, kept as it is")
        return read_report(out)
    if not heldout and aside.exists():
        raise ValueError(
            f"{aside}: held out by an earlier preparation, and would now be trained on too: remove it, or set heldout again"
        )

    reader = Reader(tokenizer, kind, text_field, language, max_length, too_long, seed, strict)
    limit = _heldout_limit(sources, split, reader, heldout)
    with ExitStack() as stack:
        # The stack exits in reverse: the held-out part is renamed first, so wherever `out` exists, both do.
        writers = []
        for target in targets:
            folder = stack.enter_context(complete_folder(target, overwrite=True))
            writer = DatasetWriter(
                folder,
                kind,
                vocab_size=tokenizer.vocab_size,
                tokenizer_fingerprint=tokenizer.fingerprint,
                shard_tokens=shard_tokens,
            )
            writers.append(stack.enter_context(writer))
        written = _write_sources(sources, split, reader, writers, limit)
        for writer, target in zip(writers, targets, strict=True):
            if not writer.documents:
                raise ValueError(f"heldout = {heldout:g} leaves no document for {target}: change it")
        fields = {
            "inputs": inputs,
            "settings": settings,
            **({"template": template} if template else {}),
            "sources": [{**counts, **identity} for counts, identity in zip(written, identities, strict=True)],
            "records": reader.records,
            "skipped": reader.skipped,
            "too_long": dict(+reader.too_long),
            "characters": reader.characters,
            "roles": dict(reader.roles),
            "heldout_documents": writers[-1].documents if heldout else 0,
        }
        reports = [writer.finish(**fields) for writer in writers]
    return reports[0]


def _write_sources(
    sources: Sequence[SourceFile | HubSource],
    split: str,
    reader: Reader,
    writers: Sequence[DatasetWriter],  # first the dataset, last the held-out part
    limit: int,  # records with a key below this are held out
) -> list[dict[str, Any]]:
    """Write the usable records of all sources.

    Returns: of each source its name, records and documents.
    Raises: ValueError for a source without a usable record; with a filter by language, only where no source has one.
    """
    written: list[dict[str, Any]] = []
    for source, records in zip(sources, _with_progress(sources, split, writers), strict=True):
        records_before, documents_before = reader.records, sum(writer.documents for writer in writers)
        while batch := list(islice(records, BATCH_RECORDS)):
            for entry in reader.entries(batch):
                writer = writers[-1 if entry.key < limit else 0]
                for document in entry.documents:
                    writer.add(*document)
        seen = reader.records - records_before
        used = sum(writer.documents for writer in writers) - documents_before
        if not used and not reader.language:
            raise ValueError(f"{source.name}: none of its {seen} records can be used; the last: {reader.last_skip}")
        written.append({"name": source.name, "records": seen, "documents": used})
    if not any(entry["documents"] for entry in written):
        names = ", ".join(entry["name"] for entry in written)
        raise ValueError(f"{names}: no record can be used; the last: {reader.last_skip}")
    return written


def describe(report: dict[str, Any]) -> list[str]:
    """A dataset.json as lines for a console."""
    unit, divisor = {"text": ("documents", 1), "conversations": ("conversations", 1), "preferences": ("pairs", 2)}[
        report["kind"]
    ]
    lines = [
        f"{report['documents'] // divisor:,} {unit}, {report['tokens']:,} tokens, {report['trained_tokens']:,} of them "
        f"trained on, from {report['records']:,} records of {len(report['sources']):,} sources"
    ]
    if report["heldout_documents"]:
        lines.append(f"{report['heldout_documents'] // divisor:,} {unit} held out (counts above are without them)")
    if report["roles"]:
        lines.append("messages: " + ", ".join(f"{count:,} {role}" for role, count in report["roles"].items()))
    if report.get("too_long"):
        fates = {"cut": "cut", "split": "split into parts", "parts": "such parts"}
        counts = ", ".join(f"{count:,} {fates[name]}" for name, count in sorted(report["too_long"].items()))
        lines.append(f"longer than max_length = {report['settings']['max_length']:,}: {counts}")
    for reason, skip in sorted(report["skipped"].items(), key=lambda item: -item[1]["count"]):
        lines.append(f"skipped {skip['count']:,}: {reason}; first at {skip['first']}: {skip['detail']}")
    return lines


def _heldout_limit(sources: Sequence[SourceFile | HubSource], split: str, reader: Reader, heldout: float) -> int:
    """Records with a key below this are held out. A number of documents needs the keys of all records first."""
    if heldout < 1:
        return int(heldout * 2**64)
    keys = []
    for source in tqdm(sources, desc="choosing what to hold out", unit="file", disable=None):
        for record in source.records(split):
            try:
                keys.append(reader.key(reader.content(record.value)))
            except Unusable:
                continue
    # Equal keys stay together, so duplicates of the last record can exceed the number.
    count = int(heldout)
    return sorted(keys)[count - 1] + 1 if len(keys) > count else 2**64


def _with_progress(
    sources: Sequence[SourceFile | HubSource], split: str, writers: Sequence[DatasetWriter]
) -> Iterator[Iterator[Record]]:
    """The records of each source, under one progress bar over all bytes that shows tokens per second."""
    began = time.perf_counter()
    done = 0
    total = sum(source.size for source in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=None) as bar:

        def watched(source: SourceFile | HubSource) -> Iterator[Record]:
            for number, record in enumerate(source.records(split)):
                if number % BATCH_RECORDS == 0:
                    rate = sum(writer.tokens for writer in writers) / (time.perf_counter() - began)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                    bar.update(done + source.position - bar.n)
                yield record

        for source in sources:
            yield watched(source)
            done += source.size
            bar.update(done - bar.n)


def _check_settings(
    kind: str,
    text_field: str,
    split: str,
    max_length: int | None,
    too_long: str,
    heldout: float,
) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: must be one of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise ValueError(f"split = {split!r}: must be one of {', '.join(SPLITS)}")
    if kind != "text" and (text_field, split) != ("text", "blank"):
        raise ValueError(f"text_field and split have no effect on {kind}: leave them out")
    if too_long not in WAYS:
        raise ValueError(f"too_long = {too_long!r}: must be one of {', '.join(WAYS)}")
    if too_long != "skip" and max_length is None:
        raise ValueError(f"too_long = {too_long!r} has no effect without max_length: name the most tokens of a document")
    if too_long == "split" and kind == "preferences":
        raise ValueError("too_long = 'split': a pair cannot be split, as both answers follow one prompt: cut or skip it")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length = {max_length}: must be at least 2")
    if not (math.isfinite(heldout) and heldout >= 0) or (heldout > 1 and heldout != int(heldout)):
        raise ValueError(f"heldout = {heldout}: must be a share from 0 to 1 or a whole number of documents")


def _is_ready(path: Path, inputs: str, overwrite: bool) -> bool:
    """Whether `path` holds a whole dataset of the same inputs. Raises: ValueError if it holds anything else."""
    if not path.name:
        raise ValueError(f"out = '{path}': must name a folder")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    if not (path / REPORT).is_file():
        raise ValueError(f"{path}: exists and is no prepared dataset, so it is never replaced: choose another name")
    try:
        if TokenDataset.open(path).report.get("inputs") == inputs:
            return True
        found = "holds a dataset prepared from other inputs or settings, or by another version of this program"
    except (ValueError, FileNotFoundError) as error:
        found = f"holds a damaged dataset ({error})"
    if not overwrite:
        raise ValueError(f"{path}: {found}: choose another name, or overwrite it")
    return False
