"""Give a tokenizer a Japanese vocabulary, or one of other scripts: train pieces on text, merge them in, resize a model.

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
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.data.records import Unusable, read_text
from engine.data.sources import SPLITS, TEXT_SUFFIXES, find_sources
from engine.settings.toml import PathName, to_table
from kernels import padded_to_tiles
from model.folder import complete_folder, write_file
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.fitting import fitted_config
from model.vocabulary.merge import check_base, extend, merge, unreachable
from model.vocabulary.methods import Method
from model.vocabulary.scripts import JAPANESE, Scripts
from model.vocabulary.tokenizer import CHATML, MODEL_FILE, Tokenizer, mistral_tokenizer_path
from model.vocabulary.tokenizer_json import JSON_FILE
from model.vocabulary.train import distinct, sample
from recipes import vocabulary_comparison as comparison
from recipes.command import command

# Of the characters.
HELDOUT_SHARE = 0.02
# A document is held out whole where it exceeds the share by no more characters than this.
MOST_OVER = 10_000


@dataclass(frozen=True, kw_only=True)
class VocabularySettings:
    """A larger vocabulary for a tokenizer, and a model resized to it."""

    text: tuple[PathName, ...]
    """Text to learn the pieces from: files, folders or patterns of .txt, .jsonl, .json (or .gz of each), .parquet, or
    hub:owner/name. Other languages in it do no harm. A repeated document counts once."""
    weights: tuple[float, ...] = ()
    """Relative shares of `max_characters`, one for each entry of `text`; default: draw from all documents together."""
    script: str = ",".join(JAPANESE)
    """Scripts of the new pieces, by ISO 15924 name, separated by commas: hira,kata,han or hang or thai ..."""
    chatml: bool = True
    """Add ChatML's <|im_start|> and <|im_end|>, which take rows of the padding."""
    out: PathName
    """Tokenizer folder to write."""
    new_pieces: int | None = None
    """Pieces to add."""
    size: int | None = None
    """Instead of new_pieces: pieces in the end."""
    base: PathName | None = None
    """Tokenizer to extend: a folder with tokenizer.model, or a *.model file; default: the model's, or else Mistral 7B's own
    (needs mistral-common)."""
    heldout: tuple[PathName, ...] = ()
    """Text to measure on, never trained on; default: 2 % of the characters of `text`, held out."""
    model: PathName | None = None
    """Model to resize: run folder (its newest checkpoint), Hugging Face folder, or hub repository owner/name."""
    model_out: PathName | None = None
    """Folder for the resized model with its tokenizer."""
    method: Method | None = None
    """Initial rows of new pieces: weighted (default), mean, random, or distilled (trained on the text, with the whole model in
    memory). See model/vocabulary/resize.py."""
    split: str = "blank"
    """A document of a .txt file ends at: blank (a blank line), line (each line), or file (the end of the file)."""
    text_field: str = "text"
    """Field of a record that holds the text."""
    max_characters: int = 20_000_000
    """Train on a random choice of documents of this size. Training takes about 130 bytes of memory per character."""
    coverage: float = 0.9998
    """Share of the text's characters that get a piece of their own."""
    seed: int = 0
    """Seed of the choice of documents, and of new rows."""
    overwrite: bool = False
    """Replace existing folders."""
    compare: bool = False
    """Write no tokenizer: measure vocabularies of several `sizes` on each file of `heldout`, beside the tokenizers in
    the package mistral-common. Prints a table; writes comparison.json and comparison.svg to `out`."""
    sizes: tuple[int, ...] = (8_000, 16_000, 32_000, 64_000, 88_000)
    """Numbers of new pieces to compare."""
    against: tuple[PathName, ...] = ()
    """Folders of further tokenizers to compare with."""

    def __post_init__(self) -> None:
        if self.compare:
            for name in ("new_pieces", "size", "model", "model_out"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect with compare, which measures `sizes`: leave it out")
            if not self.heldout:
                raise ValueError("compare needs heldout: text of each kind that matters, to measure on")
            if not self.sizes or min(self.sizes) < 1:
                raise ValueError(f"sizes = {self.sizes}: name at least one, each at least 1")
        elif (self.new_pieces is None) == (self.size is None):
            raise ValueError("give either new_pieces (how many to add) or size (how many to have in the end)")
        if self.new_pieces is not None and self.new_pieces < 1:
            raise ValueError(f"new_pieces = {self.new_pieces}: must be at least 1")
        if (self.model is None) != (self.model_out is None):
            raise ValueError("model and model_out go together: the model to resize, and where to write it")
        if self.model_out is not None and Path(self.model_out).resolve() == Path(self.out).resolve():
            raise ValueError(f"out and model_out are both {self.out}: give each a folder of its own")
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

    @property
    def scripts(self) -> Scripts:
        return Scripts(self.script.split(","))


def run(settings: VocabularySettings) -> dict[str, Any]:
    """Write the tokenizer folder, and the resized model where a model is named; or compare sizes.

    Returns: the report. It is printed, and lies in the tokenizer folder as vocabulary.json (without times and memory).
        With `compare`: the comparison.
    """
    return _compare(settings) if settings.compare else _extend(settings)


def main(argv: Sequence[str] | None = None) -> None:
    command(VocabularySettings, run, argv, "python -m recipes.vocabulary")


def _extend(settings: VocabularySettings) -> dict[str, Any]:
    from engine.checkpoint.state import model_folder
    from model.vocabulary.resize import resize_model

    stages = _Stages()
    find_sources(settings.text, TEXT_SUFFIXES)
    model = None if settings.model is None else model_folder(settings.model)
    base, base_name = _base(settings, model)
    new_pieces = _new_pieces(settings, check_base(base.model_bytes, base_name))
    if model is not None:
        fitted_config(model, base)
    with ExitStack() as outputs:
        # Opened before the work: an unwritable folder is refused at once.
        folder, resized = (
            None if out is None else outputs.enter_context(complete_folder(out, overwrite=settings.overwrite))
            for out in (settings.out, settings.model_out)
        )
        assert folder is not None
        skipped: Counter[str] = Counter()
        documents = _sampled(settings, skipped)
        trained_on, heldout = _hold_out(documents, settings)
        stages.end("read")
        merged, trained = extend(
            base.model_bytes,
            trained_on,
            new_pieces,
            scripts=settings.scripts,
            coverage=settings.coverage,
            controls=CHATML if settings.chatml else (),
            source=base_name,
            finished=stages.end,
        )
        tokenizer = base.extended(merged.model_bytes)
        first_trained = base.extended(merge(base.model_bytes, trained.pieces, new_pieces).model_bytes)
        without_scripts = comparison.lines_without(settings.scripts, chain(documents, *heldout.values()))
        report: dict[str, Any] = {
            "pieces": tokenizer.vocab_size,
            "base_pieces": merged.base_size,
            "new_pieces": len(merged.pieces),
            "rows": padded_to_tiles(tokenizer.vocab_size),
            "fingerprint": tokenizer.fingerprint,
            "base": base_name,
            "base_fingerprint": base.fingerprint,
            "documents": len(trained_on),
            "characters": trained.characters,
            "records_skipped": dict(skipped),
            "scripts": str(settings.scripts),
            "candidates_dropped": {"without the scripts": trained.unwanted, **merged.dropped},
            "unreachable_pieces": len(unreachable(tokenizer.model_bytes)),
            "heldout": {name: _measure(texts, base, tokenizer, first_trained) for name, texts in heldout.items()},
            "lines_without_the_scripts": comparison.changed_lines(without_scripts, base.encode_batch, tokenizer.encode_batch),
            "seed": settings.seed,
        }
        stages.end("measure")
        write_tokenizer_folder(folder, tokenizer)
        write_file(folder / "vocabulary.json", json.dumps(report, ensure_ascii=False, indent=2) + "\n")
        if model is not None and resized is not None:
            method = settings.method or "weighted"
            texts = trained_on if method == "distilled" else ()
            resize_model(model, resized, base, tokenizer, method=method, seed=settings.seed, texts=texts)
        stages.end("write")
    report |= stages.report()
    report["memory_peak_rss_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)  # Linux counts KiB
    print("\n".join(_lines(report, settings)))
    return report


def _compare(settings: VocabularySettings) -> dict[str, Any]:
    base, base_name = _base(settings, None)
    check_base(base.model_bytes, base_name)
    others = [*comparison.carried(), *map(comparison.in_folder, settings.against)]
    with complete_folder(settings.out, overwrite=settings.overwrite) as folder:
        documents = _sampled(settings, Counter())
        _, heldout = _hold_out(documents, settings)
        names = [Path(path).name for path in heldout]
        if len(set(names)) == len(names):
            heldout = dict(zip(names, heldout.values(), strict=True))
        merged = comparison.merged_contenders(base, documents, settings.sizes, settings.scripts, settings.coverage)
        result = comparison.compare(base, [*merged, *others], heldout, settings.scripts)
        # File names alone: their folders mean nothing on another machine.
        files = {name: [Path(path).name for path in getattr(settings, name)] for name in ("text", "heldout", "against")}
        result["settings"] = to_table(settings) | files | {"out": Path(settings.out).name}
        result["trained_on"] = {"documents": len(documents), "characters": sum(map(len, documents))}
        write_file(folder / "comparison.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        comparison.draw(result, folder / "comparison.svg")
    print("\n".join(comparison.lines(result)))
    return result


def _base(settings: VocabularySettings, model: Path | None) -> tuple[Tokenizer, str]:
    """The tokenizer to extend, and its name in messages."""
    if settings.base is not None:
        return Tokenizer.load(settings.base), settings.base
    if model is not None and any((model / name).is_file() for name in (MODEL_FILE, JSON_FILE)):
        return Tokenizer.load(model), str(settings.model)
    if model is not None:
        return Tokenizer.beside(model, mistral_tokenizer_path()), "Mistral 7B's tokenizer"
    return Tokenizer.load(mistral_tokenizer_path()), "Mistral 7B's tokenizer"


def _new_pieces(settings: VocabularySettings, base_pieces: int) -> int:
    if settings.new_pieces is not None:
        return settings.new_pieces
    assert settings.size is not None
    if settings.size <= base_pieces:
        raise ValueError(f"size = {settings.size:,}: must be above the {base_pieces:,} pieces that the base has already")
    return settings.size - base_pieces


def _documents(paths: Sequence[str], settings: VocabularySettings, skipped: Counter[str]) -> Iterator[str]:
    """Stream the texts of the sources; count unusable records in `skipped`, by reason."""
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
    """A random choice of distinct documents: from all sources together, or from each source by its weight."""
    if not settings.weights:
        return sample(distinct(_documents(settings.text, settings, skipped)), settings.max_characters, settings.seed)
    chosen = []
    for path, weight in zip(settings.text, settings.weights, strict=True):
        characters = max(1, round(settings.max_characters * weight / sum(settings.weights)))
        chosen += sample(distinct(_documents([path], settings, skipped)), characters, settings.seed)
    return list(distinct(chosen))


def _hold_out(documents: list[str], settings: VocabularySettings) -> tuple[list[str], dict[str, list[str]]]:
    """The documents to train on, and the documents to measure on by name."""
    if settings.heldout:
        return documents, {path: list(_documents([path], settings, Counter())) for path in settings.heldout}
    order = list(range(len(documents)))
    random.Random(settings.seed).shuffle(order)
    wanted = max(1, round(HELDOUT_SHARE * sum(map(len, documents))))
    kept, held = dict(enumerate(documents)), {}
    for index in order:
        if wanted <= 0:
            break
        text = kept.pop(index)
        if len(text) > wanted + MOST_OVER:
            # A long document gives its end: whole documents could hold out most of the text, or none of it.
            kept[index], text = text[:-wanted], text[-wanted:]
        held[index] = text
        wanted -= len(text)
    if not kept:
        return documents, {"the text trained on": documents}
    return [kept[index] for index in sorted(kept)], {"held out of the text": [held[index] for index in sorted(held)]}


def _measure(texts: list[str], base: Tokenizer, merged: Tokenizer, first_trained: Tokenizer) -> dict[str, Any]:
    """Characters per token of whole documents, without beginning and end tokens: before and after the merge.

    first_trained: a merge of the pieces that training found first, in place of the most widely used pieces.
    """
    characters = sum(map(len, texts))
    before, after, first = (sum(map(len, tokenizer.encode_batch(texts))) for tokenizer in (base, merged, first_trained))
    return {
        "characters": characters,
        "characters_per_token_before": round(characters / before, 4),
        "characters_per_token": round(characters / after, 4),
        "ratio": round(before / after, 4),
        "ratio_of_first_pieces": round(before / first, 4),
    }


def _lines(report: dict[str, Any], settings: VocabularySettings) -> Iterator[str]:
    """The report as text."""
    yield (
        f"{settings.out}: {report['pieces']:,} pieces, {report['base_pieces']:,} of {report['base']} and "
        f"{report['new_pieces']:,} new; {report['rows']:,} rows with padding"
    )
    if settings.model_out:
        yield f"{settings.model_out}: the model with these rows and this tokenizer"
    yield f"trained on {report['documents']:,} documents, {report['characters']:,} characters"
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in report["candidates_dropped"].items() if count)
    yield f"candidates left out: {dropped or 'none'}; pieces that no text can produce: {report['unreachable_pieces']}"
    yield f"{'characters per token':<42}{'before':>8}{'after':>8}{'ratio':>8}{'if first trained':>18}"
    for name, row in report["heldout"].items():
        before, after = row["characters_per_token_before"], row["characters_per_token"]
        yield f"  {Path(name).name:<40}{before:>8.3f}{after:>8.3f}{row['ratio']:>8.3f}{row['ratio_of_first_pieces']:>18.3f}"
    other = report["lines_without_the_scripts"]
    yield f"lines without {settings.script}: {other['lines']:,}; with other token ids than before: {other['changed']:,}"
    for kind, name in (("seconds", "seconds"), ("cpu_seconds", "CPU seconds")):
        yield f"{name}: " + ", ".join(f"{stage} {taken}" for stage, taken in report[kind].items())
    yield f"peak memory: {report['memory_peak_rss_gib']} GiB"


class _Stages:
    """Wall seconds of each stage, and CPU seconds over all threads."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = {}
        self._began = time.perf_counter(), time.process_time()

    def end(self, name: str) -> None:
        """The stage `name` ends now; it began when the stage before it ended."""
        now = time.perf_counter(), time.process_time()
        before = self._taken.get(name, [0.0, 0.0])
        self._taken[name] = [total + end - begin for total, begin, end in zip(before, self._began, now, strict=True)]
        self._began = now

    def report(self) -> dict[str, dict[str, float]]:
        kinds = enumerate(("seconds", "cpu_seconds"))
        return {kind: {name: round(taken[place], 1) for name, taken in self._taken.items()} for place, kind in kinds}


if __name__ == "__main__":
    main()
