"""Finds text in another language than the answer's, where nothing in the conversation is a reason for it.

The steps: what language should the answer be in (`languages.asked_language`); is the whole answer in another one; else which
runs of another script, words of another language, or broken bytes stand in it without a reason (`reasons`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from model.vocabulary.chat import Message
from recipes.evaluation.leakage import reasons
from recipes.evaluation.leakage.languages import (
    LATIN,
    SCRIPTS,
    Asked,
    asked_language,
    chinese_words,
    foreign_letters,
    language_of,
    latin_language,
    simplified,
    weights_by_script,
)
from recipes.evaluation.leakage.latin import foreign_latin, is_sentence
from recipes.evaluation.leakage.reasons import Span

# Of the letters of an answer that is in another language as a whole.
_WHOLE = 0.9
_BROKEN = re.compile(
    # At the very end it is a character that the answer's last token began.
    "\ufffd+(?!\ufffd*\\s*\\Z)|(?:<0x[0-9A-Fa-f]{2}>)+|<\\|extra_\\d+\\|>|[\u0080-\u009f\ue000-\uf8ff]+|"
    "(?:[\u00c2\u00c3\u00e2\u00e3\u00e5\u00e6\u00e7][\u0080-\u00bf\u2018-\u2122]{1,2}){2,}"
)
# Japanese function words are part of a sentence, and no name or gloss.
_PARTICLES = re.compile("と|など|もしくは|または|は|が|を|の|に|で|も|から|まで|や|より|へ|です|ます|では|には")
_STATEMENT = re.compile(r"[=(){};_<>]|\w\.\w")  # of code
_KANA = re.compile("[\u3041-\u30ff]")
# Between two runs of a script: signs, digits and spaces that do not end a foreign passage.
_JOINS = re.compile(r"[\s\d、。，．・･！？!?,.:;：；「」『』（）()～〜\-–—…%％々゛゜“”\"']{0,6}")
_KAOMOJI = re.compile(r"[(（][^\w\s()（）]{0,6}[^()（）]{0,4}[^\w\s()（）]{0,6}[)）]")


@dataclass(frozen=True)
class Verdict:
    """spans: foreign text without a reason, [start, end) in characters of the answer, in order. language: the answer's own."""

    language: str
    spans: list[Span]

    @property
    def leak(self) -> bool:
        return bool(self.spans)


def detect(messages: Sequence[Message | Mapping[str, str]], response: str) -> Verdict:
    """What an answer to a conversation says in another language than its own without a reason."""
    asked = asked_language(messages)
    language = _answer_language(asked, response)
    broken = [match.span() for match in _BROKEN.finditer(response)]
    if language is None:
        start = len(response) - len(response.lstrip())
        return Verdict(asked.language, _merged([(start, len(response.rstrip()))]))
    prompt = "\n".join(message["content"] for message in messages)
    own = {script for name in (language, *asked.anywhere) for script in SCRIPTS[name]}
    found = _foreign_runs(response, prompt, own)
    if "han" in own and "zh" not in (language, *asked.anywhere):
        found += _chinese(response, prompt)
    if LATIN not in own:
        found += foreign_latin(response, prompt, language)
    elif not asked.anywhere:
        found += _foreign_sentences(response, prompt, language)
    return Verdict(language, _merged(broken + found))


def _answer_language(asked: Asked, response: str) -> str | None:
    """The language to hold an answer to: the one asked for, or an allowed one that the whole answer is in; else None."""
    prose = _without(response, reasons.code(response) + reasons.addresses(response))
    unquoted = _without(prose, reasons.quotes(prose))
    # An answer that is one long quotation is judged by the quotation.
    judged = unquoted if len(unquoted.split()) > 3 or len(unquoted.strip()) > 0.5 * len(prose.strip()) else prose
    weights = weights_by_script(judged)
    total = sum(weights.values())
    other = language_of(judged)
    if not total or other is None or other == asked.language:
        return asked.language
    own = sum(weights.get(script, 0) for script in SCRIPTS[asked.language])
    if set(SCRIPTS[other]) & set(SCRIPTS[asked.language]):
        return _same_script(asked, other, judged)
    if other in asked.whole or other in asked.anywhere:
        return other if own <= 0.3 * total else asked.language
    # Latin words may stand in an answer of another script; an answer in Latin letters may hold nothing of another script.
    most = 1 - _WHOLE if LATIN in SCRIPTS[other] else 0
    return asked.language if own > most * total or not _is_prose(judged, other) else None


def _same_script(asked: Asked, other: str, text: str) -> str | None:
    """As `_answer_language`, for a language that shares its script with the asked one."""
    if other in asked.whole or other in asked.anywhere:
        return other
    if other == "romaji" and "ja" in asked.anywhere:
        return asked.language
    if LATIN not in SCRIPTS[asked.language]:
        return asked.language if {asked.language, other} == {"ja", "zh"} and not _is_prose(text, other) else None
    found = {
        latin_language(text[start:end], least=3) for start, end in _sentences(text) if not _STATEMENT.search(text, start, end)
    }
    return asked.language if asked.language in found or other not in found else None


def _is_prose(text: str, language: str) -> bool:
    """Whether text is sentences: in Latin letters at least three words, one of them a function word."""
    if LATIN not in SCRIPTS.get(language, (LATIN,)):
        return True
    return len(text.split()) >= 3 and is_sentence(text)


def _foreign_runs(text: str, prompt: str, own: set[str]) -> list[Span]:
    """Runs of letters of other scripts than the answer's, without those that have a reason. Latin is `foreign_latin`'s."""
    pattern = foreign_letters(tuple(sorted(own)))
    quotes = _kept_quotes(text, pattern)
    excused = [*reasons.addresses(text), *_glosses(text, pattern), *_names(text, pattern, own)]
    excused += [match.span() for match in _KAOMOJI.finditer(text)] + reasons.labelled(text)
    known = reasons.folded(prompt)
    found = []
    for match in pattern.finditer(text):
        start, end = match.span()
        if any(first <= start and end <= last for first, last in quotes):
            continue
        inside = any(first <= start and end <= last for first, last in excused)
        if inside and not _PARTICLES.fullmatch(match[0]):
            continue
        if reasons.folded(match[0]) not in known and not _is_sign(text, start, end):
            found.append((start, end))
    return _joined(text, found)


def _is_sign(text: str, start: int, end: int) -> bool:
    """Whether a run is a sign of formulas or faces: one Greek letter, or letters that stand among signs."""
    run = text[start:end]
    return len(run) <= 2 and all("\u0370" <= character <= "\u03ff" or character in "ーﾟﾞ々〆ツシノд益" for character in run)


def _kept_quotes(text: str, pattern: re.Pattern[str]) -> list[Span]:
    """Quotations of foreign text, but one that makes up most of a longer answer."""
    kept = []
    for start, end in reasons.quotes(text):
        inside = text[start:end]
        foreign = sum(map(len, pattern.findall(inside)))
        if end - start <= max(80, 0.5 * len(text)) and foreign >= 0.4 * sum(map(str.isalpha, inside)):
            kept.append((start, end))
    return kept


def _glosses(text: str, pattern: re.Pattern[str]) -> list[Span]:
    """Brackets that hold a foreign term and little else."""
    spans = []
    for start, end in reasons.brackets(text):
        inside = text[start:end]
        rest = pattern.sub(" ", inside)
        if pattern.search(inside) and len(re.findall(r"[^\W\d_]+", rest)) <= 4 and end - start <= 80:
            spans.append((start, end))
    return spans


def _names(text: str, pattern: re.Pattern[str], own: set[str]) -> list[Span]:
    """Names in their own script: in the head of an item beside capitals or alone, or explained by a name in brackets."""
    spans = []
    heads = reasons.item_heads(text) if LATIN in own else []
    for match in pattern.finditer(text):
        start, end = match.span()
        while end < len(text) and (pattern.match(text, end) or text[end] in "☆★・!！?？×"):
            end += 1
        before, after = text[:start], text[end:]
        glued = re.search(r"[^\W\d_]$", before) or re.match(r"[^\W\d_]", after)
        if LATIN not in own or glued:
            continue
        if re.match(r"\s?[(（][A-Z]", after) or any(
            first <= start and end <= last and _is_title(text[first:last], pattern) for first, last in heads
        ):
            spans.append((match.start(), end))
    return spans


def _is_title(head: str, pattern: re.Pattern[str]) -> bool:
    """Whether the words beside foreign ones in an item's head are capitalised, as in a title."""
    words = re.findall(r"[^\W\d_]+", pattern.sub(" ", head))
    return sum(word[0].isupper() for word in words) >= 0.5 * len(words)


def _foreign_sentences(text: str, prompt: str, language: str) -> list[Span]:
    """Sentences of another language in the answer's script."""
    prose = _without(text, reasons.code(text) + reasons.addresses(text) + reasons.quotes(text) + reasons.brackets(text))
    spans = []
    for start, end in _sentences(prose):
        other = latin_language(prose[start:end], least=3)
        if other in (None, language) or _STATEMENT.search(prose, start, end):
            continue
        if prose[start:end].strip() not in prompt:
            spans.append((start, end))
    return spans


def _sentences(text: str) -> list[Span]:
    return [match.span() for match in re.finditer(r"[^\s.!?\n][^.!?\n]*", text)]


def _chinese(text: str, prompt: str) -> list[Span]:
    """Chinese characters and words in Japanese, each widened to the kanji between its first and last."""
    # Kana in a quotation or bracket show that it is no Chinese one.
    quoted = [span for span in [*reasons.quotes(text), *reasons.brackets(text)] if not _KANA.search(text[slice(*span)])]
    quoted += reasons.addresses(text) + reasons.labelled(text)
    places = [(place, place + 1) for place in simplified(text)] + chinese_words(text)
    known = reasons.folded(prompt)
    runs: dict[Span, list[Span]] = {}
    for run in re.finditer("[\u3005\u3400-\u9fff]+", text):
        for start, end in places:
            if run.start() <= start < run.end():
                runs.setdefault(run.span(), []).append((start, end))
    return [
        (min(start for start, _ in inside), max(end for _, end in inside))
        for (first, last), inside in runs.items()
        if not any(start <= first and last <= end for start, end in quoted) and reasons.folded(text[first:last]) not in known
    ]


def _joined(text: str, spans: Sequence[Span]) -> list[Span]:
    """Spans in order, those with only signs and digits between them as one."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and _JOINS.fullmatch(text, joined[-1][1], start):
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Spans in order, overlapping ones as one, empty ones left out."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _without(text: str, spans: Iterable[Span]) -> str:
    """The text with spaces in place of spans, so that places stay."""
    characters = list(text)
    for start, end in spans:
        characters[start:end] = " " * (end - start)
    return "".join(characters)
