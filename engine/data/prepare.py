"""Tokenise sources once into a prepared dataset (`dataset` describes its files)."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from engine.data.dataset import KINDS, REPORT, SHARD_TOKENS, VERSION, DatasetWriter, TokenDataset, read_report
from engine.data.records import READING, Pair, Turn, Unusable, read_conversation, read_pair, read_text
from engine.data.sources import RECORD_SUFFIXES, SPLITS, TEXT_SUFFIXES, HubSource, Record, SourceFile, find_sources
from model.folder import complete_folder
from model.vocabulary.chat import EncodedChat, Message, encode_chat
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
    max_length: int | None = None,
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
        max_length: skip pairs with a side of more tokens than this ("preferences" only).
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
    _check_settings(kind, text_field, split, max_length, heldout)
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
    # The generation block marks training, not text: a dataset does not depend on it.
    template = tokenizer.template.source if tokenizer.template else unmarked(CHAT_TEMPLATE)
    template = "" if kind == "text" else template
    determined_by = [VERSION, kind, settings, tokenizer.fingerprint, template, identities]
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

    reader = _Reader(tokenizer, kind, text_field, max_length, seed, strict)
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
            "sources": [{**counts, **identity} for counts, identity in zip(written, identities, strict=True)],
            "records": reader.records,
            "skipped": reader.skipped,
            "characters": reader.characters,
            "roles": dict(reader.roles),
            "heldout_documents": writers[-1].documents if heldout else 0,
        }
        reports = [writer.finish(**fields) for writer in writers]
    return reports[0]


def _write_sources(
    sources: Sequence[SourceFile | HubSource],
    split: str,
    reader: "_Reader",
    writers: Sequence[DatasetWriter],  # first the dataset, last the held-out part
    limit: int,  # records with a key below this are held out
) -> list[dict[str, Any]]:
    """Write the usable records of all sources.

    Returns: of each source its name, records and documents.
    Raises: ValueError for a source without a usable record.
    """
    written = []
    for source, records in zip(sources, _with_progress(sources, split, writers), strict=True):
        records_before, documents_before = reader.records, sum(writer.documents for writer in writers)
        while batch := list(islice(records, BATCH_RECORDS)):
            for entry in reader.entries(batch):
                writer = writers[-1 if entry.key < limit else 0]
                for document in entry.documents:
                    writer.add(*document)
        seen = reader.records - records_before
        used = sum(writer.documents for writer in writers) - documents_before
        if not used:
            raise ValueError(f"{source.name}: none of its {seen} records can be used; the last: {reader.last_skip}")
        written.append({"name": source.name, "records": seen, "documents": used})
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
    for reason, skip in sorted(report["skipped"].items(), key=lambda item: -item[1]["count"]):
        lines.append(f"skipped {skip['count']:,}: {reason}; first at {skip['first']}: {skip['detail']}")
    return lines


class _Entry(NamedTuple):
    """A usable record."""

    key: int  # decides whether the record is held out
    documents: list[tuple[Any, Any, int]]  # (ids, trained or None, prompt length) of each document to write


class _Reader:
    """Turns records into token documents, and counts records, characters, roles and skipped records."""

    def __init__(self, tokenizer: Tokenizer, kind: str, text_field: str, max_length: int | None, seed: int, strict: bool):
        self.tokenizer, self.kind, self.text_field = tokenizer, kind, text_field
        self.max_length, self.seed, self.strict = max_length, seed, strict
        self.records = 0
        self.characters = 0
        self.roles: Counter[str] = Counter()
        self.skipped: dict[str, dict[str, Any]] = {}
        self.last_skip = ""

    def entries(self, records: Sequence[Record]) -> Iterator[_Entry]:
        """The usable records of a batch, in order."""
        self.records += len(records)
        usable = []
        for record in records:
            try:
                usable.append((record.place, self.content(record.value)))
            except Unusable as unusable:
                self._skip(record.place, unusable)
        if self.kind == "text":
            texts = [content for _, content in usable]
            self.characters += sum(map(len, texts))
            for text, ids in zip(texts, self.tokenizer.encode_batch(texts) if texts else [], strict=True):
                yield _Entry(self.key(text), [([self.tokenizer.bos_id, *ids, self.tokenizer.eos_id], None, 0)])
            return
        for place, content in usable:
            try:
                documents = self._pair(content) if isinstance(content, Pair) else [self._chat(content)]
            except Unusable as unusable:
                self._skip(place, unusable)
                continue
            yield _Entry(self.key(content), documents)

    def content(self, value: Any) -> Any:
        """A record's text, messages or pair. Raises: Unusable."""
        if self.kind == "text":
            return read_text(value, self.text_field)
        return read_conversation(value) if self.kind == "conversations" else read_pair(value)

    def key(self, content: Any) -> int:
        """A hash of the content below 2^64. A pair hashes its prompt alone: no prompt is both trained on and held out."""
        text = content if isinstance(content, str) else json.dumps(content.prompt if isinstance(content, Pair) else content)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=str(self.seed).encode()).digest())

    def _chat(self, messages: list[Turn]) -> tuple[Any, Any, int]:
        self._count(messages)
        encoded = self._encoded(messages)
        trained = np.array(encoded.trained)
        # The trained tokens of an answer are a run of their own: the next segment's beginning token follows.
        answer = np.cumsum(np.diff(trained, prepend=False) & trained) - 1
        weights = [message.get("train", True) for message in messages if message["role"] == "assistant"]
        if all(weights):
            return encoded.ids, trained, 0
        if answer.max() + 1 != len(weights):
            runs = f"{answer.max() + 1} runs of trained tokens, {len(weights)} answers"
            raise Unusable("an answer of weight 0 that the chat template hides", runs)
        return encoded.ids, trained & np.array(weights)[answer], 0

    def _encoded(self, messages: Sequence[Message]) -> EncodedChat:
        try:
            return encode_chat(self.tokenizer, messages)
        except ValueError as error:
            if self.tokenizer.template is None:
                raise
            raise Unusable("the chat template of the tokenizer's folder refuses it", str(error)) from None

    def _pair(self, pair: Pair) -> list[tuple[Any, Any, int]]:
        documents = []
        for answer in (pair.chosen, pair.rejected):
            encoded = self._encoded([*pair.prompt, Message(role="assistant", content=answer)])
            # Everything before the last answer is prompt, earlier answers included.
            trained = np.array(encoded.trained)
            prompt_length = int(np.flatnonzero(~trained)[-1]) + 1
            trained[:prompt_length] = False
            if self.max_length is not None and len(trained) > self.max_length:
                what = "prompt" if prompt_length >= self.max_length else "pair"
                raise Unusable(
                    f"{what} longer than max_length = {self.max_length}",
                    f"{prompt_length} tokens of prompt, {len(trained)} with the answer",
                )
            documents.append((encoded.ids, trained, prompt_length))
        if documents[0][0] == documents[1][0]:
            raise Unusable("identical chosen and rejected", "the same tokens")
        self._count(
            [*pair.prompt, Message(role="assistant", content=pair.chosen), Message(role="assistant", content=pair.rejected)]
        )
        return documents

    def _count(self, messages: Sequence[Message]) -> None:
        self.roles.update(message["role"] for message in messages)
        self.characters += sum(len(message["content"]) for message in messages)

    def _skip(self, place: str, unusable: Unusable) -> None:
        self.last_skip = f"{place}: {unusable}"
        if self.strict:
            raise ValueError(f"{self.last_skip}: mend or remove the record, or prepare without strict to skip such records")
        first = {"count": 0, "first": place, "detail": unusable.detail}
        self.skipped.setdefault(unusable.reason, first)["count"] += 1


def _heldout_limit(sources: Sequence[SourceFile | HubSource], split: str, reader: _Reader, heldout: float) -> int:
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


def _check_settings(kind: str, text_field: str, split: str, max_length: int | None, heldout: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: must be one of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise ValueError(f"split = {split!r}: must be one of {', '.join(SPLITS)}")
    if kind != "text" and (text_field, split) != ("text", "blank"):
        raise ValueError(f"text_field and split have no effect on {kind}: leave them out")
    if max_length is not None and kind != "preferences":
        raise ValueError(f"max_length = {max_length} has no effect on {kind}, whose long documents are split: leave it out")
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
