"""Learn the tables of the rules from parallel text: the lexicon and the lengths of English and Japanese.

    git clone https://github.com/python/python-docs-ja
    python -m recipes.data_making.learn --pairs python-docs-ja --without heldout.jsonl

The committed tables come from that repository at 7eb90aaa6d3395bcfe01801ceb5e620eedf2356a. The texts left out are those of
`eval/parallel_docs.jsonl.gz` whose English side has an odd MD5: the tests judge them.
"""

from __future__ import annotations

import json
import math
import re
from ast import literal_eval
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine.data.sources import RECORD_SUFFIXES, find_sources
from engine.settings.toml import PathName
from model.folder import write_file
from recipes.command import command
from recipes.data_making.evidence import JAPANESE, LENGTHS, Lengths, prose_length, sentences
from recipes.data_making.kept import kept, without_notes
from recipes.data_making.lexicon import FILE, learn, lines

EDGES = (12, 20, 30, 45, 65, 90, 130, 180, 260, 10**6)  # characters of English
_ENTRY = re.compile(r'^(msgid|msgstr) ((?:"(?:[^"\\\n]|\\.)*"\n?)+)', re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """Tables for the validation of translations, from pairs of texts that translate each other."""

    pairs: tuple[PathName, ...]
    """Records with a text in each language (.jsonl, .json, each also .gz; .parquet), or folders of gettext's .po files."""
    source_field: str = "en"
    """Field of the English text."""
    target_field: str = "ja"
    """Field of the Japanese text."""
    without: tuple[PathName, ...] = ()
    """Records whose English texts are left out, for a later test."""
    least: int = 8
    """Leave out words of fewer pairs."""
    lexicon: PathName = str(FILE)
    """Where to write the lexicon."""
    lengths: PathName = str(LENGTHS)
    """Where to write the table of lengths."""


def run(settings: LearnSettings) -> None:
    """Learn and write both tables. Raises: ValueError for too few pairs."""
    left_out = {text for path in settings.without for text, _ in _records(path, settings)}
    found = {source: target for path in settings.pairs for source, target in _pairs(path, settings)}
    pairs = [(source, without_notes(target)) for source, target in found.items() if source not in left_out]
    if len(pairs) < 1000:
        raise ValueError(f"{', '.join(settings.pairs)}: {len(pairs)} usable pairs, at least 1000 are needed to learn from")
    words = learn(pairs, least=settings.least)
    write_file(settings.lexicon, "".join(f"{line}\n" for line in lines(words)))
    table = asdict(learn_lengths(pairs))
    write_file(
        settings.lengths, "{\n" + ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in table.items()) + "\n}\n"
    )
    print(f"{len(pairs):,} pairs: {len(words):,} words in {settings.lexicon}, lengths in {settings.lengths}")


def learn_lengths(pairs: Sequence[tuple[str, str]]) -> Lengths:
    """The table of lengths of pairs (English text, Japanese text)."""
    counts = np.array([[prose_length(kept(text).prose) for text in pair] for pair in pairs]).clip(1)
    ratios = np.log(counts[:, 1] / counts[:, 0])
    classes = np.searchsorted(EDGES, counts[:, 0])
    centre, spread, quantiles = [], [], []
    for number in range(len(EDGES)):
        own = ratios[classes == number]
        own = own if len(own) >= 20 else ratios
        low, mid, high = np.quantile(own, (0.16, 0.5, 0.84)).tolist()
        centre.append(round(mid, 3))
        spread.append(round((high - low) / 2, 3))
        quantiles.append((round(float(np.quantile(own, 0.001)), 3), round(float(np.quantile(own, 0.999)), 3)))
    fewer = np.zeros(3)
    for source, target in pairs:
        if (count := len(sentences(source))) > 1:
            fewer[min(2, max(0, count - len(sentences(target))))] += 1
    # As if five pairs more were in each class: none has the probability 0.
    shares = [round(math.log((count + 5) / (fewer.sum() + 15)), 2) for count in fewer.tolist()]
    return Lengths(list(EDGES), centre, spread, quantiles, shares)


def _pairs(path: str, settings: LearnSettings) -> Iterator[tuple[str, str]]:
    files = sorted(Path(path).rglob("*.po")) if Path(path).is_dir() else []
    for source, target in (pair for file in files for pair in read_po(file)) if files else _records(path, settings):
        known = len(JAPANESE.findall(target)) >= 0.15 * len(target) and not JAPANESE.search(source)
        if known and 10 <= len(source) <= 600 and 10 <= len(target) <= 600:
            yield source, target


def _records(path: str, settings: LearnSettings) -> Iterator[tuple[str, str]]:
    for source in find_sources((path,), RECORD_SUFFIXES):
        for record in source.records("line"):
            texts = [record.value.get(name) for name in (settings.source_field, settings.target_field)]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{record.place}: no text in '{settings.source_field}' or '{settings.target_field}'")
            yield texts[0], texts[1]


def read_po(path: Path) -> Iterator[tuple[str, str]]:
    """The finished (source, translation) of a gettext file, without fuzzy, obsolete and plural entries."""
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        if re.search(r"^#,.*fuzzy|^#~|^msgid_plural", block, re.MULTILINE):
            continue
        found = {name: "".join(map(literal_eval, quoted.splitlines())) for name, quoted in _ENTRY.findall(block + "\n")}
        if found.get("msgid") and found.get("msgstr"):
            yield found["msgid"], found["msgstr"]


def main(argv: Sequence[str] | None = None) -> None:
    command(LearnSettings, run, argv, "python -m recipes.data_making.learn")


if __name__ == "__main__":
    main()
