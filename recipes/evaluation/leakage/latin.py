"""Latin words in an answer of another script: which of them are terms and names, and which are leaks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from recipes.evaluation.leakage import reasons
from recipes.evaluation.leakage.languages import function_words, latin_language, latin_letters
from recipes.evaluation.leakage.reasons import Span

# English words that Japanese text writes in Latin letters, and those of texts about programs; English words in small letters,
# without most inflections, the ordinary ones in the first paragraph. `word_lists` makes all three.
_TERMS = Path(__file__).with_name("latin_terms.txt")
_PROGRAM_TERMS = Path(__file__).with_name("latin_terms_of_programs.txt")
_WORDS = Path(__file__).with_name("english_words.txt")
_UNITS = re.compile(
    "[mcdk]m|[mk]g|[mdk]l|k?wh?|[kmg]?hz|[dkmgt]b|bits?|bytes?|[bf]ps|rpm|px|pt|em|sec|min|hr|[mn]s|k?cal|pp[mb]|mol|atm|[hkm]?pa|"
    "ev|nm|ha|oz|lb|ft|in|[ap]m|th|st|nd|rd|dpi"
)
# Names of functions and values in formulas and programs.
_SYMBOLS = re.compile(
    "log|ln|exp|sin|cos|tan|sinh|cosh|tanh|lim|max|min|maximum|minimum|mod|dim|deg|det|dev|arg|gcd|lcm|sum|num|"
    "null|true|false|nil|int|str|float|double|bool|char|void|var|func|foo|bar|baz"
)
_ENDINGS = (
    ("ies", ("y",)),
    ("es", ("", "e")),
    ("s", ("",)),
    ("ied", ("y",)),
    ("ed", ("", "e")),
    ("ing", ("", "e")),
    ("ly", ("", "le")),
    ("er", ("", "e")),
    ("est", ("", "e")),
    ("ness", ("",)),
    ("ment", ("",)),
)
# A command with its options.
_COMMAND = re.compile(r"(?:^|\s)--?[A-Za-z]|\s[|>&]{1,2}\s|\bgit \w+|[A-Za-z]/[A-Za-z]+/")
_SMALL = re.compile("of|the|and|in|for|to|an?|on|at|by|de|la|le|du|von|van|der|und|et|y|e|with|from|vs|or|as|is")
# "と" and a verb of saying, which quote what stands before them, and what is said of songs, groups and games, which have names.
_SAID = re.compile(
    r"[?!.]?\s?(?:と(?:いう|いった|いって|いい|言|表示|呼|書|入力|記|名付)|って(?:いう|言|曲|歌|人|ゲーム|アプリ|店|お店|映画|バンド)|が(?:大?好き)|のファン)"
)
# Signs of a statement of code.
_STATEMENT = re.compile(r"[=(){};_←]|\bimport\b|\w\.\w+\.\w")
# A reading in brackets, which a name or a title has, and a translation, which an example of English has.
_READING = re.compile(r"[.!?]?\s?[（(][\u30a1-\u30ff・=＝\s]+[)）]")
_TRANSLATED = re.compile(r"[.!?]?\s?[（(][^()（）\n]*[\u3041-\u30ff][^()（）\n]*[)）]")
_OF_ENGLISH = re.compile("英語|英単語|英文|英会話|英熟語|英訳|和訳")
_JAPANESE = re.compile("[\u3041-\u30ff\u3400-\u9fff]")
_LABEL = re.compile(r"^[A-Z][a-z]+(?:[:：,]|\s?\[|\s*$)", re.M)  # a word alone in a line, or before what it announces
_HALF = 4  # letters of half a word
_GLOSS = 200  # characters of a bracket
_NAME_WORDS = 4  # of a name that a text gives
_CHAPTER = 6000  # characters
_FEW = 0.01  # of the characters


def foreign_latin(text: str, prompt: str, language: str) -> list[Span]:
    """Latin words and passages without a reason."""
    excused = [*reasons.code(text), *reasons.addresses(text), *reasons.labelled(text)]
    excused += [span for span in _short(reasons.quotes(text), text) + _bracketed(text) if _is_latin(text[slice(*span)])]
    known = set(re.findall(r"[^\W\d_]+", reasons.folded(prompt)))
    known = {piece for word in known for piece in re.findall(f"[{latin_letters()}]+", word)} | known
    signs = reasons.technical_signs(text)
    if signs or reasons.names_programs(text):
        known |= _program_terms()
    explained = _TRANSLATED if _OF_ENGLISH.search(prompt) or _OF_ENGLISH.search(text) else _READING
    heads = reasons.item_heads(text)
    phrases = []
    for match in _phrases().finditer(text):
        if explained.match(text, match.end()) or (_SAID.match(text, match.end()) and match[0].count(" ") < _NAME_WORDS):
            known |= {reasons.folded(word) for word in _word().findall(match[0])}
        else:
            phrases.append(match)
    spans: list[Span] = []
    for match in phrases:
        for start, end in _outside(match.span(), excused):
            found = _leaks(text, start, end, known, signs >= 2)
            if not found and not signs:
                found = _capitals(text, start, end, known, prompt, heads)
            spans += found
    # In a text as long as a chapter, a few English words are a quotation.
    few = len(text) > _CHAPTER and sum(end - start for start, end in spans) < _FEW * len(text)
    return [] if few else spans


@lru_cache
def _phrases() -> re.Pattern[str]:
    word = f"[{latin_letters()}]+(?:['’][{latin_letters()}]+)*"
    return re.compile(f"{word}(?:[ ,.&/:;!?\"'()-]{{1,3}}{word})*")


@lru_cache
def _word() -> re.Pattern[str]:
    return re.compile(f"[{latin_letters()}]+(?:['’][{latin_letters()}]+)*")


def _is_latin(text: str) -> bool:
    """Whether a quotation or bracket holds a Latin term and little else."""
    latin = sum(map(len, _word().findall(text)))
    return latin >= 0.5 * sum(character.isalpha() for character in text)


def _leaks(text: str, start: int, end: int, known: set[str], technical: bool) -> list[Span]:
    words = [match.span() for match in _word().finditer(text, start, end)]
    if not words:
        return []
    if _SAID.match(text, end):
        return []
    said = [text[first:last] for first, last in words]
    if len(said) < 8 and _COMMAND.search(text[start : end + 12].partition("\n")[0]):
        return []
    if _is_passage(said, known) and not (technical and _STATEMENT.search(text[start : end + 2])):
        return [(words[0][0], words[-1][1])]
    if technical or _is_name(said):
        return []
    return [span for span, word in zip(words, said, strict=True) if _is_leak(text, *span, word, known)]


def _is_passage(words: list[str], known: set[str]) -> bool:
    """Whether words are of a sentence: at least four, some of them function words, not a title, not the prompt's."""
    if len(words) < 4 or sum(reasons.folded(word) in known for word in words) > 0.7 * len(words):
        return False
    content = [word for word in words if not _SMALL.fullmatch(word.lower())]
    if sum(word[0].islower() for word in content) < 2 and sum(word[0].isupper() for word in words) >= 0.5 * len(words):
        return False
    return is_sentence(" ".join(words))


def is_sentence(text: str) -> bool:
    """Whether Latin words hold function words as a sentence does: two different ones, or one among at most eight words."""
    language = latin_language(text)
    if language is None:
        return False
    words = [word for word in _word().findall(text) if len(word) > 1]
    used = {word.lower().replace("’", "'") for word in words} & function_words(language)
    return len(used) >= 2 or (len(used) == 1 and len(words) <= 8)


def _is_name(words: list[str]) -> bool:
    """Whether words look like a name: capitals, with small words between them."""
    if not words[0][0].isupper():
        return False
    return all(word[0].isupper() or _SMALL.fullmatch(word.lower()) for word in words) or len(words) == 2


def _capitals(text: str, start: int, end: int, known: set[str], prompt: str, heads: list[Span]) -> list[Span]:
    """Words with capitals that are no name: ordinary English ones, alone or as a sentence begins, and half a word.

    A name in the head of an item, or one that the prompt writes so, stays. One that the prompt writes in katakana does not.
    """
    words = [match.span() for match in _word().finditer(text, start, end)]
    if not words:
        return []
    said = [text[first:last] for first, last in words]
    whole = [(words[0][0], words[-1][1])]
    ordinary = all(is_english(reasons.folded(word)) for word in said if not _SMALL.fullmatch(word.lower()))
    if said[0].istitle() and ordinary and reasons.writes_in_katakana(prompt, " ".join(said)):
        return whole
    if any(first <= start < last for first, last in heads) or re.match(r"[\w&＆/’'+-]", text[end : end + 1], re.A):
        return []
    plain = [_is_plain(word, known) for word in said]
    if len(said) == 2 and said[0].istitle() and said[1].islower() and plain[1] and _is_plain(said[0], known, ordinary=False):
        return whole
    if len(said) == 1 and said[0].istitle() and all(plain) and (_LABEL.match(text, start) or _amid_japanese(text, start, end)):
        return whole
    return [
        (first, last) for (first, last), word in zip(words, said, strict=True) if _is_half(text[first - 1 : first], word, known)
    ]


def _amid_japanese(text: str, start: int, end: int) -> bool:
    """Whether Japanese letters touch both ends of a word."""
    return bool(_JAPANESE.match(text[start - 1 : start]) and _JAPANESE.match(text[end : end + 1]))


def _is_plain(word: str, known: set[str], *, ordinary: bool = True) -> bool:
    """Whether an English word is ordinary (or any), and no term that Japanese text writes in Latin letters."""
    small = reasons.folded(word)
    return (
        len(word) > 3
        and is_english(small, ordinary=ordinary)
        and not any(small in words for words in (known, _terms(), _program_terms(), function_words("en")))
    )


def _is_half(before: str, word: str, known: set[str]) -> bool:
    """Whether Latin letters after a Japanese one are the end of an English word that Japanese began."""
    small = reasons.folded(word)
    if (
        not _JAPANESE.match(before)
        or len(word) < (_HALF if word.islower() else _HALF + 2)
        or not (word.islower() or word.isupper())
    ):
        return False
    return (
        small in _ends() and not is_english(small) and not any(small in words for words in (known, _terms(), _program_terms()))
    )


def _is_leak(text: str, start: int, end: int, word: str, known: set[str]) -> bool:
    """Whether a word alone is one: in small letters, no term, no unit, no word of the prompt, no part of code."""
    small = reasons.folded(word)
    if (
        not word.islower()
        or len(word) < 3
        or small in known
        or small in _terms()
        or not is_english(small)
        or small in function_words("en")
        or _SYMBOLS.fullmatch(small)
    ):
        return False
    before, after = text[start - 1 : start], text[end : end + 1]
    if re.match(r"[\d_./\\=<>{}$%#@*^+~-]", before) or re.match(r"[\d_/\\=<>{}(*^+~]|[.-]\w", text[end : end + 2]):
        return False
    return not (_UNITS.fullmatch(small) and re.search(r"\d\s?$", text[max(0, start - 3) : start])) and (before, after) != (
        "(",
        ")",
    )


def _short(spans: list[Span], text: str) -> list[Span]:
    return [(start, end) for start, end in spans if end - start <= max(100, 0.5 * len(text))]


def _bracketed(text: str) -> list[Span]:
    return [(start, end) for start, end in reasons.brackets(text) if end - start <= _GLOSS]


def _outside(span: Span, excused: list[Span]) -> list[Span]:
    """The parts of a span outside the excused ones."""
    parts = [span]
    for first, last in excused:
        parts = [
            part for start, end in parts for part in ((start, min(end, first)), (max(start, last), end)) if part[0] < part[1]
        ]
    return parts


def is_english(word: str, *, ordinary: bool = False) -> bool:
    """Whether a word in small letters is an English word, or an inflection of one. ordinary: of one that is no name."""
    words = _words()[0 if ordinary else 1]
    return word in words or any(stem in words for stem in stems(word))


def stems(word: str) -> Iterator[str]:
    for ending, others in _ENDINGS:
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= 3:
            yield from (stem + other for other in others)
            if stem[-1] == stem[-2]:
                yield stem[:-1]


@lru_cache
def _ends() -> frozenset[str]:
    """The ends of frequent English words, which lack a letter or more."""
    return frozenset(word[place:] for word in _words()[1] for place in range(1, len(word) - _HALF + 1))


@lru_cache
def _terms() -> frozenset[str]:
    return frozenset(_TERMS.read_text(encoding="utf-8").split())


@lru_cache
def _program_terms() -> frozenset[str]:
    return frozenset(_PROGRAM_TERMS.read_text(encoding="utf-8").split())


@lru_cache
def _words() -> tuple[frozenset[str], frozenset[str]]:
    """Ordinary English words, and all English words."""
    ordinary, rare = (frozenset(paragraph.split()) for paragraph in _WORDS.read_text(encoding="utf-8").split("\n\n"))
    return ordinary, ordinary | rare
