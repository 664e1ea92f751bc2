"""A Japanese vocabulary, or one of other scripts: train pieces on text, merge them into a tokenizer, resize a model to it.

    python -m recipes.vocabulary --text texts/ja --new-pieces 88000 --out runs/vocabulary
    python -m recipes.vocabulary --text texts/ja --new-pieces 88000 --out runs/vocabulary \\
        --model mistralai/Mistral-7B-v0.1 --model-out runs/resized
    python -m recipes.vocabulary --text texts/ja --heldout news.txt english.txt --compare --out runs/comparison
"""

import json
import math
import random
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.checkpoint.state import model_folder
from engine.data.records import Unusable, read_text
from engine.data.sources import SPLITS, TEXT_SUFFIXES, find_sources
from engine.settings.toml import to_table
from model.config import read_config
from model.folder import complete_folder, write_file
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.merge import check_base, extend, merge, unreachable
from model.vocabulary.resize import Method, check_rows, padded_size, resize_model
from model.vocabulary.scripts import JAPANESE, Scripts
from model.vocabulary.tokenizer import CHATML, Tokenizer, mistral_tokenizer_path
from model.vocabulary.train import distinct, sample
from recipes import vocabulary_comparison
from recipes.command import command

HELDOUT_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class VocabularySettings:
    """Merge a Japanese vocabulary into a tokenizer, and resize a model to it."""

    text: tuple[str, ...]
    """Text to learn the pieces from: files, folders or patterns of .txt, .jsonl, .json (or .gz of each), .parquet,
    hub:owner/name. Other languages in it do no harm. A document that stands there twice counts once."""
    weights: tuple[float, ...] = ()
    """Shares of `max_characters` that each of `text` may fill, relative to one another; default: a choice of all documents
    together."""
    script: str = ",".join(JAPANESE)
    """Scripts that new pieces are made of, by their names in ISO 15924, with commas: hira,kata,han or hang or thai ..."""
    chatml: bool = True
    """Add ChatML's <|im_start|> and <|im_end|>, which take rows of the padding."""
    out: str
    """Tokenizer folder to write."""
    new_pieces: int | None = None
    """How many pieces to add."""
    size: int | None = None
    """Or: how many pieces to have in the end."""
    base: str | None = None
    """Tokenizer to extend: a folder with tokenizer.model, or a *.model file; default: the model's, or else Mistral 7B's."""
    heldout: tuple[str, ...] = ()
    """Text to measure on, never trained on; default: 2 % of the documents of `text`, held out."""
    model: str | None = None
    """Model to resize: a run folder (its newest checkpoint), a Hugging Face Mistral folder, or a hub name owner/name."""
    model_out: str | None = None
    """Folder to write the resized model to, with its tokenizer."""
    method: Method | None = None
    """How the new rows begin: weighted (the default), mean, random, or distilled (trained on the text, with the whole model in
    memory). See model/vocabulary/resize.py."""
    split: str = "blank"
    """What ends a document in a text file: blank (a blank line), line or file."""
    text_field: str = "text"
    """The field of a record that holds its text."""
    max_characters: int = 20_000_000
    """Train on a random choice of documents of this size. Training takes about 130 bytes of memory a character."""
    coverage: float = 0.9998
    """Share of the characters of the text that get a piece of their own."""
    seed: int = 0
    """Of the choice of documents, and of new rows."""
    overwrite: bool = False
    """Replace existing folders."""
    compare: bool = False
    """Write no tokenizer: measure vocabularies of several `sizes` on `heldout`, each file apart, beside the tokenizers that
    mistral-common carries; print them, and write comparison.json and comparison.svg to `out`."""
    sizes: tuple[int, ...] = (8_000, 16_000, 32_000, 64_000, 88_000)
    """Of new pieces, to compare."""
    against: tuple[str, ...] = ()
    """Folders of further tokenizers to compare with."""

    def __post_init__(self) -> None:
        if self.compare:
            for name in ("new_pieces", "size", "model", "model_out"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect with compare, which has sizes: leave it out")
            if not self.heldout:
                raise ValueError("compare needs heldout: text of each kind that matters, to measure on")
            if not self.sizes or min(self.sizes) < 1:
                raise ValueError(f"sizes = {self.sizes}: each must be at least 1, and there must be one")
        elif (self.new_pieces is None) == (self.size is None):
            raise ValueError("give either new_pieces (how many to add) or size (how many to have in the end)")
        if self.new_pieces is not None and self.new_pieces < 1:
            raise ValueError(f"new_pieces = {self.new_pieces}: must be at least 1")
        if (self.model is None) != (self.model_out is None):
            raise ValueError("model and model_out go together: the model to resize, and where to write it")
        if self.method is not None and self.model is None:
            raise ValueError(f"method = '{self.method}' has no effect without a model to resize")
        if self.weights and len(self.weights) != len(self.text):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.text)} of text: give one for each")
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ValueError(f"weights = {self.weights}: each must be above 0")
        Scripts(self.script.split(","))
        if self.max_characters < 1:
            raise ValueError(f"max_characters = {self.max_characters}: must be at least 1")
        if self.split not in SPLITS:
            raise ValueError(f"split = '{self.split}': must be one of {', '.join(SPLITS)}")
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage = {self.coverage}: must be above 0 and at most 1")


def run(settings: VocabularySettings) -> dict[str, Any]:
    """Write the tokenizer folder, and the resized model where one is given.

    Returns:
        The report, which is printed too and lies in the tokenizer folder as vocabulary.json (there without times and memory).
        With `compare`, the comparison.
    """
    if settings.compare:
        return _compare(settings)
    clock = _Clock()
    find_sources(settings.text, TEXT_SUFFIXES)
    model = None if settings.model is None else model_folder(settings.model)
    base, base_name = _base(settings, model)
    new_pieces = _new_pieces(settings, check_base(base.model_bytes, base_name))
    if model is not None:
        check_rows(read_config(model), base, model)
    if settings.model_out is not None and Path(settings.model_out).resolve() == Path(settings.out).resolve():
        raise ValueError(f"out and model_out are both {settings.out}: give each a folder of its own")
    with ExitStack() as outputs:
        # Entered before the work, so that a folder that cannot be written is refused at once.
        folder = outputs.enter_context(complete_folder(settings.out, overwrite=settings.overwrite))
        resized_folder = settings.model_out and outputs.enter_context(
            complete_folder(settings.model_out, overwrite=settings.overwrite)
        )
        skipped: Counter[str] = Counter()
        documents = _sampled(settings, skipped)
        trained_on, heldout = _hold_out(documents, settings)
        clock.lap("read")
        scripts = Scripts(settings.script.split(","))
        merged, trained = extend(
            base.model_bytes, trained_on, new_pieces, scripts=scripts, coverage=settings.coverage,
            controls=CHATML if settings.chatml else (), source=base_name, lap=clock.lap,
        )  # fmt: skip
        tokenizer = Tokenizer(merged.model_bytes)
        truncated = Tokenizer(merge(base.model_bytes, trained.pieces, new_pieces).model_bytes)
        report = {
            "pieces": tokenizer.vocab_size,
            "base_pieces": merged.base_size,
            "new_pieces": len(merged.pieces),
            "rows": padded_size(tokenizer.vocab_size),
            "fingerprint": tokenizer.fingerprint,
            "base": base_name,
            "base_fingerprint": base.fingerprint,
            "documents": len(trained_on),
            "characters": trained.characters,
            "records_skipped": dict(skipped),
            "scripts": str(scripts),
            "candidates_dropped": {"nothing of the scripts in it": trained.unwanted, **merged.dropped},
            "unreachable_pieces": len(unreachable(tokenizer.model_bytes)),
            "heldout": {name: _measure(texts, base, tokenizer, truncated) for name, texts in heldout.items()},
            "lines_without_the_scripts": _unchanged([*documents, *chain(*heldout.values())], base, tokenizer, scripts),
            "seed": settings.seed,
        }
        clock.lap("measure")
        write_tokenizer_folder(folder, tokenizer.model_bytes)
        write_file(folder / "vocabulary.json", json.dumps(report, ensure_ascii=False, indent=2) + "\n")
        if model is not None and resized_folder:
            method = settings.method or "weighted"
            texts = trained_on if method == "distilled" else ()
            resize_model(model, resized_folder, base, tokenizer, method=method, seed=settings.seed, texts=texts)
        clock.lap("write")
    for kind, seconds in (("seconds", clock.seconds), ("cpu_seconds", clock.cpu_seconds)):
        report[kind] = {stage: round(taken, 1) for stage, taken in seconds.items()}
    report["memory_peak_rss_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)  # Linux counts in KiB
    print("\n".join(_lines(report, settings)))
    return report


def _compare(settings: VocabularySettings) -> dict[str, Any]:
    """The comparison of sizes and tokenizers; printed, and written as JSON and drawn."""
    base, base_name = _base(settings, None)
    check_base(base.model_bytes, base_name)
    scripts = Scripts(settings.script.split(","))
    others = [*vocabulary_comparison.carried(), *map(vocabulary_comparison.in_folder, settings.against)]
    with complete_folder(settings.out, overwrite=settings.overwrite) as folder:
        documents = _sampled(settings, Counter())
        _, heldout = _hold_out(documents, settings)
        merged = vocabulary_comparison.merged_contenders(base, documents, settings.sizes, scripts, settings.coverage)
        names = [Path(path).name for path in heldout]
        if len(set(names)) == len(names):
            heldout = dict(zip(names, heldout.values(), strict=True))
        comparison = vocabulary_comparison.compare(base, [*merged, *others], heldout, scripts)
        # Names of files alone: their folders say nothing on another machine.
        files = {name: [Path(path).name for path in getattr(settings, name)] for name in ("text", "heldout", "against")}
        comparison["settings"] = to_table(settings) | files | {"out": Path(settings.out).name}
        comparison["trained_on"] = {"documents": len(documents), "characters": sum(map(len, documents))}
        write_file(folder / "comparison.json", json.dumps(comparison, ensure_ascii=False, indent=1) + "\n")
        vocabulary_comparison.draw(comparison, folder / "comparison.svg")
    print("\n".join(vocabulary_comparison.lines(comparison)))
    return comparison


def main(argv: Sequence[str] | None = None) -> None:
    command(VocabularySettings, run, argv, "python -m recipes.vocabulary")


def _base(settings: VocabularySettings, model: Path | None) -> tuple[Tokenizer, str]:
    """The tokenizer to extend, and its name in messages."""
    if settings.base is not None:
        return Tokenizer.load(settings.base), settings.base
    if model is not None and (model / "tokenizer.model").is_file():
        return Tokenizer.load(model), str(settings.model)
    return Tokenizer.load(mistral_tokenizer_path()), "Mistral 7B's tokenizer"


def _new_pieces(settings: VocabularySettings, base_pieces: int) -> int:
    if settings.new_pieces is not None:
        return settings.new_pieces
    assert settings.size is not None
    if settings.size <= base_pieces:
        raise ValueError(f"size = {settings.size:,}: must be above the {base_pieces:,} pieces that the base has already")
    return settings.size - base_pieces


def _documents(paths: Sequence[str], settings: VocabularySettings, skipped: Counter[str]) -> Iterator[str]:
    """The texts of the sources, as a stream; records that are no text are counted by reason."""
    with tqdm(desc="reading", unit=" documents", disable=None) as progress:
        for source in find_sources(paths, TEXT_SUFFIXES):
            usable = 0
            for record in source.records(settings.split):
                progress.update()
                try:
                    text = read_text(record.value, settings.text_field)
                except Unusable as reason:
                    if not skipped[reason.reason]:
                        print(f"skipped, and others like it: {record.place}: {reason}")
                    skipped[reason.reason] += 1
                    continue
                usable += 1
                yield text
            if not usable:
                raise ValueError(f"{source.name}: no usable text in it; text_field = '{settings.text_field}' names the field")


def _sampled(settings: VocabularySettings, skipped: Counter[str]) -> list[str]:
    """A random choice of distinct documents, of all sources together or of each by its weight."""
    if not settings.weights:
        return sample(distinct(_documents(settings.text, settings, skipped)), settings.max_characters, settings.seed)
    chosen = []
    for path, weight in zip(settings.text, settings.weights, strict=True):
        characters = max(1, round(settings.max_characters * weight / sum(settings.weights)))
        chosen += sample(distinct(_documents([path], settings, skipped)), characters, settings.seed)
    return list(distinct(chosen))


def _hold_out(documents: list[str], settings: VocabularySettings) -> tuple[list[str], dict[str, list[str]]]:
    """What to train on, and what to measure on by name."""
    if settings.heldout:
        ignored: Counter[str] = Counter()
        return documents, {path: list(_documents([path], settings, ignored)) for path in settings.heldout}
    if len(documents) == 1:
        return documents, {"the text trained on (one document)": documents}
    order = list(range(len(documents)))
    random.Random(settings.seed).shuffle(order)
    held = set(order[: max(1, round(HELDOUT_SHARE * len(documents)))])
    return (
        [text for index, text in enumerate(documents) if index not in held],
        {"held out of the text": [documents[index] for index in sorted(held)]},
    )


def _measure(texts: list[str], base: Tokenizer, merged: Tokenizer, truncated: Tokenizer) -> dict[str, Any]:
    """Characters per token, whole documents without beginning and end tokens: before, after, and had the first pieces been
    taken instead of those used most widely."""
    characters = sum(map(len, texts))
    before, after, first = (sum(map(len, tokenizer.encode_batch(texts))) for tokenizer in (base, merged, truncated))
    return {
        "characters": characters,
        "characters_per_token_before": round(characters / before, 4),
        "characters_per_token": round(characters / after, 4),
        "ratio": round(before / after, 4),
        "ratio_of_first_pieces": round(before / first, 4),
    }


def _unchanged(texts: list[str], base: Tokenizer, merged: Tokenizer, scripts: Scripts) -> dict[str, int]:
    """How many lines there are that no new piece may touch, and how many have other ids all the same."""
    lines = [line for text in texts for line in text.split("\n") if line and not scripts.occur_in(line)]
    pairs = zip(base.encode_batch(lines), merged.encode_batch(lines), strict=True)
    return {"lines": len(lines), "changed": sum(before != after for before, after in pairs)}


def _lines(report: dict[str, Any], settings: VocabularySettings) -> Iterator[str]:
    """The report for people."""
    yield (
        f"{settings.out}: {report['pieces']:,} pieces, {report['base_pieces']:,} of {report['base']} and "
        f"{report['new_pieces']:,} new; {report['rows']:,} rows with padding"
    )
    if settings.model_out:
        yield f"{settings.model_out}: the model with these rows and this tokenizer"
    yield f"trained on {report['documents']:,} documents, {report['characters']:,} characters"
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in report["candidates_dropped"].items() if count)
    yield f"candidates left out: {dropped or 'none'}; unreachable pieces left: {report['unreachable_pieces']}"
    yield f"{'characters per token':<42}{'before':>8}{'after':>8}{'ratio':>8}{'of the first pieces':>21}"
    for name, row in report["heldout"].items():
        before, after = row["characters_per_token_before"], row["characters_per_token"]
        yield f"  {Path(name).name:<40}{before:>8.3f}{after:>8.3f}{row['ratio']:>8.3f}{row['ratio_of_first_pieces']:>21.3f}"
    other = report["lines_without_the_scripts"]
    yield f"lines without {settings.script}: {other['lines']:,}, of which with changed ids: {other['changed']:,}"
    for kind, name in (("seconds", "seconds"), ("cpu_seconds", "CPU seconds")):
        yield f"{name}: " + ", ".join(f"{stage} {taken}" for stage, taken in report[kind].items())
    yield f"peak memory: {report['memory_peak_rss_gib']} GiB"


class _Clock:
    """Seconds of each stage, and of the processor within them, of all threads together."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cpu_seconds: defaultdict[str, float] = defaultdict(float)
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        """Count the time since the last lap, or since the beginning, to the stage `name`."""
        now, cpu_now = time.perf_counter(), time.process_time()
        self.seconds[name] += now - self._start
        self.cpu_seconds[name] += cpu_now - self._cpu_start
        self._start, self._cpu_start = now, cpu_now


if __name__ == "__main__":
    main()
