"""Makes the word lists of the leakage detector from public text: what real Japanese and English write.

    cd ../shared/data && python -m recipes.evaluation.leakage.word_lists --chinese dict.txt.small \\
        --japanese text/ja_train.txt.gz sft/ja_*.jsonl.gz \\
        --english text/en_train.txt.gz sft/en_*.jsonl.gz pref/en_hh_harmless.jsonl.gz bench/hellaswag_val.jsonl.gz \\
        bench/gsm8k_train.jsonl.gz

The texts are human, or corrected by humans. The detector's labels, and text that its alarms are counted on, are none of them.

english_words.txt             English words that are written in small letters, the ordinary ones before a blank line
latin_terms.txt               English words that Japanese text holds without quotation marks, brackets or code
latin_terms_of_programs.txt   the same, of passages about programs
trade_words.txt               katakana words of passages about programs
chinese_words.txt             frequent Chinese words and characters that Japanese lacks, though its codes hold the characters
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.data.sources import TEXT_SUFFIXES, SourceFile, find_sources
from engine.settings.toml import PathName
from model.folder import write_file
from recipes.command import command
from recipes.evaluation.leakage import reasons
from recipes.evaluation.leakage.languages import is_simplified, latin_letters
from recipes.evaluation.leakage.latin import stems

_WORD = re.compile(f"[{latin_letters()}]+(?:['’][{latin_letters()}]+)*")
_KANJI = re.compile("[\u3005\u3400-\u9fff]+")
# After a word or a comma: a capital there begins no sentence.
_INSIDE = re.compile(r"[^\W\d_][,;]?\s\Z")
_LONGEST = 5000  # characters of a piece of text whose words count once
_PASSAGE = 1000  # characters that are about programs, or not
# Pieces that hold an English word, and how much of its places in sentences is in small letters; the same of an ordinary one.
_TEXTS, _SMALL = 4, 0.6
_ORDINARY, _MOSTLY_SMALL = 30, 0.9
_TERM, _NAME = 2, 3  # documents that hold a term in small letters, or with capitals
_KATAKANA = re.compile("[\u30a1-\u30fa\u30fc]{3,}")
# Documents about programs that hold a word of the trade, and how many times more they are, a text, than other documents.
_TRADE, _TIMES = 20, 20
# Of a Chinese word: its frequency in the dictionary, and how often Japanese text would hold its two characters side by side
# if they came together by chance. It holds them nowhere.
_WORD_COUNT, _CHANCE = 1000, 2
# Of a character: how much more frequent it is in Chinese, and how often Japanese text may hold it.
_RATIO, _STRAY = 300, 2
_LAST_FREQUENT = 0xC8  # first byte of Big5's frequent characters: forms of traditional Chinese, which old Japanese has too


@dataclass(frozen=True, kw_only=True)
class WordListSettings:
    """Word lists for the leakage detector."""

    japanese: tuple[PathName, ...]
    """Japanese text: .txt, .jsonl (all strings of a record), also with .gz."""
    english: tuple[PathName, ...]
    """English text in the same forms."""
    chinese: PathName
    """A dictionary of Chinese with a line `word count` a word, such as jieba's dict.txt.small."""
    out: PathName = str(Path(__file__).parent)
    """Folder of the lists; by default the detector's own."""


@dataclass
class _Japanese:
    """Terms in Latin letters, katakana words of texts about programs, and counts of kanji and pairs of kanji."""

    terms: set[str] = field(default_factory=set)
    program_terms: set[str] = field(default_factory=set)
    trade: set[str] = field(default_factory=set)
    characters: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)


def run(settings: WordListSettings) -> None:
    """Make the lists and write them; nothing is written before all of them are made."""
    japanese = _japanese(settings.japanese)
    ordinary, rare = english_words(_texts(settings.english))
    english = ordinary | rare
    # Words of programs that plain English has not are terms everywhere; words that English has not are never marked.
    plain = {word for word in japanese.program_terms if not ordinary.isdisjoint((word, *stems(word)))}
    known = {word for word in japanese.terms | japanese.program_terms if not english.isdisjoint((word, *stems(word)))}
    terms = known & (japanese.terms | japanese.program_terms - plain)
    programs = known - terms
    chinese = chinese_words(_dictionary(settings.chinese), japanese.characters, japanese.pairs)
    lists = {
        "english_words": (ordinary, rare),
        "latin_terms": (terms,),
        "latin_terms_of_programs": (programs,),
        "trade_words": (japanese.trade,),
        "chinese_words": (chinese,),
    }
    for name, groups in lists.items():
        paragraphs = [textwrap.fill(" ".join(sorted(words)), width=128) + "\n" for words in groups]
        write_file(Path(settings.out) / f"{name}.txt", "\n".join(paragraphs))
        print(f"{name}: {' + '.join(str(len(words)) for words in groups)} words")


def english_words(texts: Iterator[str]) -> tuple[set[str], set[str]]:
    """Ordinary words, and others that are written in small letters, without words that are inflections of others."""
    small, capital, pieces = Counter[str](), Counter[str](), Counter[str]()
    for text in texts:
        for start in range(0, len(text), _LONGEST):
            found = set()
            piece = text[start : start + _LONGEST]
            for match in _WORD.finditer(piece):
                word = match[0]
                if len(word) < 3 or not word.isascii() or not word.isalpha():
                    continue
                if word.islower():
                    small[word] += 1
                    found.add(word)
                elif word.istitle() and _INSIDE.search(piece, max(0, match.start() - 3), match.start()):
                    capital[word.lower()] += 1
            pieces.update(found)
    share = {word: small[word] / (small[word] + capital[word]) for word, count in pieces.items() if count >= _TEXTS}
    ordinary = {word for word in share if pieces[word] >= _ORDINARY and share[word] >= _MOSTLY_SMALL}
    ordinary = {word for word in ordinary if ordinary.isdisjoint(stems(word))}
    words = {word for word in share if share[word] >= _SMALL}
    return ordinary, {word for word in words - ordinary if (words | ordinary).isdisjoint(stems(word))}


def _japanese(paths: Sequence[str]) -> _Japanese:
    found = _Japanese()
    counts: dict[bool, tuple[Counter[str], Counter[str]]] = {flag: (Counter(), Counter()) for flag in (False, True)}
    spoken: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    passages: Counter[bool] = Counter()
    seen: set[str] = set()
    for document in _texts(paths):
        # Questions about the same passage repeat it.
        text = "".join(line for line in document.splitlines(keepends=True) if line not in seen)
        seen.update(document.splitlines(keepends=True))
        words: set[tuple[bool, bool, str]] = set()
        katakana: set[tuple[bool, str]] = set()
        for passage in _passages(text):
            technical = reasons.technical_signs(passage) >= 2
            words |= {(technical, word.islower(), word.lower()) for word in _bare_latin(passage)}
            katakana |= {(technical, word) for word in _KATAKANA.findall(passage)}
            passages[technical] += 1
        for technical, lower, word in words:
            counts[technical][0 if lower else 1][word] += 1
        for technical, word in katakana:
            spoken[technical][word] += 1
        for kanji in _KANJI.findall(text):
            found.characters.update(kanji)
            found.pairs.update(map("".join, pairwise(kanji)))
    for technical, (small, capital) in counts.items():
        small_terms = {word for word, count in small.items() if count >= _TERM}
        names = {word for word, count in capital.items() if count >= _NAME}
        if technical:
            found.program_terms = small_terms | names
            # Names of companies and programs, which stand in all texts.
            found.terms |= {word for word in names if not small[word]}
        else:
            found.terms |= small_terms | names
    scale = passages[False] / max(1, passages[True])
    found.trade = {
        word for word, count in spoken[True].items() if count >= _TRADE and count * scale >= _TIMES * (spoken[False][word] + 1)
    }
    return found


def _bare_latin(text: str) -> Iterator[str]:
    """Latin words of at least three letters outside code, addresses, quotation marks and brackets."""
    excused = bytearray(len(text))
    for start, end in [*reasons.code(text), *reasons.addresses(text), *reasons.quotes(text), *reasons.brackets(text)]:
        excused[start:end] = b"\1" * (end - start)
    return (match[0] for match in _WORD.finditer(text) if len(match[0]) > 2 and not excused[match.start()])


def _passages(text: str) -> Iterator[str]:
    """A text in pieces of whole lines."""
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= _PASSAGE:
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)


def chinese_words(dictionary: dict[str, int], characters: Counter[str], pairs: Counter[str]) -> set[str]:
    """Words of two characters, and single characters, that Chinese uses often and Japanese never, by chance alone it would."""
    total = pairs.total()
    first, second = Counter[str](), Counter[str]()
    for pair, count in pairs.items():
        first[pair[0]] += count
        second[pair[1]] += count
    usage = Counter[str]()
    for word, count in dictionary.items():
        for character in word:
            usage[character] += count
    scale = characters.total() / max(1, usage.total())
    words = {
        character
        for character, count in usage.items()
        if _shared(character)
        and not _traditional(character)
        and characters[character] <= _STRAY
        and count * scale >= _RATIO * (characters[character] + 1)
    }
    for word, count in dictionary.items():
        often = len(word) == 2 and count >= _WORD_COUNT and all(map(_shared, word))
        if often and not pairs[word] and first[word[0]] * second[word[1]] >= _CHANCE * total:
            words.add(word)
    return words


def _shared(character: str) -> bool:
    """Whether Japanese codes hold a kanji, so that the character alone does not tell Chinese from Japanese."""
    return bool(_KANJI.fullmatch(character)) and not is_simplified(character)


def _traditional(character: str) -> bool:
    try:
        return character.encode("big5")[0] <= _LAST_FREQUENT
    except UnicodeEncodeError:
        return False


def _dictionary(path: str) -> dict[str, int]:
    words: dict[str, int] = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if len(fields) < 2 or not fields[1].isdigit():
                raise ValueError(f"{path}:{number}: {line.strip()!r}: expected a word and its count")
            words[fields[0]] = int(fields[1])
    return words


def _texts(paths: Sequence[str]) -> Iterator[str]:
    for source in find_sources(list(paths), TEXT_SUFFIXES):
        assert isinstance(source, SourceFile)
        for record in source.records("blank"):
            yield "\n".join(_strings(record.value))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def main(argv: Sequence[str] | None = None) -> None:
    command(WordListSettings, run, argv, "python -m recipes.evaluation.leakage.word_lists")


if __name__ == "__main__":
    main()
