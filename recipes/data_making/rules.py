"""The rules that tell a translation from one that went wrong. Each gives a reason from `REASONS` and what it saw.

The limits are set on held-out parallel text: few alarms there, most seeded faults found (`tests/recipes/data_making`).
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from recipes.data_making.evidence import JAPANESE, LIKELY_PART, LIKELY_SENTENCE, Judged, judge, lengths, prose_length, sentences
from recipes.data_making.kept import Kept, kept, lost_code, lost_placeholders, lost_urls, without_notes
from recipes.data_making.lexicon import lexicon, stem
from recipes.data_making.numerals import changed, numbers
from recipes.evaluation.leakage.detector import detect

REASONS = (
    "empty",
    "not translated",
    "answered instead of translated",
    "sentence left out",
    "cut off",
    "repeated",
    "number changed",
    "code altered",
    "URL dropped",
    "placeholder dropped",
    "list items changed",
    "too short",
    "too long",
    "refusal",
    "preamble",
    "wrong language",
    "duplicate",
    "unreadable",
)
# Evidence, in nats.
_LEAST_RELATED = -0.7
_MOST_OMITTED = 2.3
_MOST_PART = 5.5
_MOST_UNCOVERED = 4.0  # standard deviations, about
_DOUBTFUL_UNCOVERED = 2.5
_LEAST_CUT = 0.3
_LEAST_OPEN = 0.8
_ENDS = frozenset(".!?。！？．…‥:：;；)）]」』】》\"'”’`*|>~♪♡☆w}")
_SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’)）\]」』*_`]*\s*\Z")
_COLON_END = re.compile(r"[:：][\s*_]*\Z")
# Endings that a Japanese sentence may have without a full stop.
_COMPLETE = re.compile(
    r"(?:です|ます|ました|ません|でした|である|ない|する|した|こと|もの|ください|でしょう|ましょう|れる|せる|なる|った|いる|ある|か|ね|よ)\Z"
)
# A particle, comma or open word at the end: the sentence goes on.
_OPEN = re.compile(r"(?:[、,，・(（「『\[]|[はがをにへのもとや]|[\u3041-\u3096][\u4e00-\u9fff]|っ|[A-Za-z])\Z")
_FUNCTION = frozenset(
    re.findall(
        r"\w+",
        "the a an is are was were be been of to in on at for with and or but not that this these those it you we they he she i "
        "my your their his her its as by from if when which who what how why can could will would should must may have has had "
        "do does did there",
    )
)
_LATIN = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|「[^」]*」|\*[^*]+\*|[(（][^()（）]*[)）]")
_FOREIGN = re.compile("[\u0400-\u052f\u0590-\u08ff\u0900-\u0fff\u1100-\u11ff\uac00-\ud7a3\ufffd]")
_ASKED = {"ja": "日本語で答えてください。", "en": "Answer in English."}
_KANA = re.compile("[\u3041-\u30ff]")
_HANGUL = re.compile("[\u1100-\u11ff\uac00-\ud7a3]")
_REFUSALS = re.compile(
    r"(?:I'm|I am) (?:really |very )?sorry,? (?:but )?(?:I )?(?:can(?:no|')t|am unable)|"
    r"I can(?:no|')t (?:assist|help|provide|translate|fulfil)|As an AI(?: language model)?|I(?:'m| am) (?:unable|not able) to|"
    r"(?:申し訳|すみません|恐れ入り)[^。\n]{0,40}(?:できません|できかねます|お答えできない|お手伝いできない|対応できない|いたしかねます)|"
    r"(?:AI|人工知能)(?:の)?(?:言語モデル|アシスタント)?(?:として|である私は|ですので)|"
    r"(?:翻訳|お答え|お手伝い|提供)(?:する)?(?:こと)?(?:は|が)?(?:できません|できかねます|いたしかねます)"
)
# What a source may say that its translation repeats.
_REFUSED = re.compile(r"sorry|apolog|\bAI\b|unable|can'?t|cannot")
_PREAMBLES = re.compile(
    r"\A\W*(?:(?:はい|もちろん|承知(?:いたし|し)ました|かしこまりました|了解(?:し)?(?:いたし)?ました)[、。!！\s]{0,3})?"
    r"(?:(?:以下|次|こちら)(?:は|が|に|の)?[^。:：\n]{0,25}(?:翻訳|訳文|日本語訳|和訳|英訳)[^\n]{0,20}|"
    r"(?:翻訳(?:結果|文)?|訳文?|日本語訳?|和訳|英訳|英語)\s*[:：]|"
    r"(?:Japanese(?: translation)?|English(?: translation)?|Translation|Translated text)\s*[:：]|"
    r"(?:Sure|Certainly|Of course|Okay|OK)[!,.]?\s[^\n]{0,40}(?:translat|Japanese|English|here)[^\n]{0,40}|"
    r"Here(?:'s| is| are)[^\n]{0,30}(?:translat|Japanese|English)[^\n]{0,40}|"
    r"(?:承知(?:いたし|し)ました|かしこまりました)[。!！])",
    re.IGNORECASE,
)
_OPENED = re.compile(
    r"\W*(?:yes|sure|certainly|of course|ok|understood|translat|japanese|english|the following|here|below|got it|i understand)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Finding:
    """reason: one of REASONS. detail: what was seen, for a person. certain: False for what a person should look at."""

    reason: str
    detail: str
    certain: bool = True


def check(
    source: str,
    target: str,
    *,
    languages: tuple[str, str] = ("en", "ja"),
    finish_reason: str | None = None,
) -> list[Finding]:
    """What is wrong with a target text as the translation of a source text; empty where nothing is.

    languages: of source and target. The tables are of en and ja, in both directions; other languages are checked by the rules
    that need no table. finish_reason: of the endpoint; anything but `stop` says that the text was cut.
    """
    if not source.strip():
        return [Finding("empty", "the target has text, the source has none")] if target.strip() else []
    if not target.strip():
        return [Finding("empty", "the target has no text")]
    found = []
    if finish_reason not in (None, "", "stop", "eos", "end_turn", "stop_sequence"):
        found.append(Finding("cut off", f"finish_reason is {finish_reason}"))
    bare = without_notes(target) if languages[1] == "ja" else target
    bare = bare if bare.strip() else target
    one, other = kept(source), kept(bare)
    found += _changes(source, bare, one, other)
    found += _said_beside(source, target)
    repeated = repetition(source, bare)
    if repeated:
        found.append(Finding("repeated", repeated))
    wrong = _language(source, bare, one, other, languages)
    if wrong:
        return [*found, wrong]
    found += _leaks(source, bare, other, languages[1])
    if set(languages) != {"en", "ja"} or not _translatable(one.prose):
        return found
    judged = _judge(source, bare, one, other, languages)
    found += _missing(source, bare, one, other, judged, languages, bool(repeated))
    return found


def _changes(source: str, target: str, one: Kept, other: Kept) -> list[Finding]:
    """What a translation must keep, and this one did not."""
    found = []
    if values := changed(numbers(_numbered(source, one)), numbers(_numbered(target, other))):
        found.append(Finding("number changed", ", ".join(values[:6])))
    if code := lost_code(one, other, source, target):
        found.append(Finding("code altered", _cut(code[0])))
    if urls := lost_urls(one, other):
        found.append(Finding("URL dropped", _cut(urls[0])))
    if items := lost_placeholders(one, other, target):
        found.append(Finding("placeholder dropped", _cut(items[0])))
    if one.items != other.items and max(one.items, other.items) > 1:
        found.append(Finding("list items changed", f"{one.items} items became {other.items}"))
    return found


def _numbered(text: str, parts: Kept) -> str:
    """A text without its addresses, whose digits are theirs."""
    for url in parts.urls:
        text = text.replace(url, " ").replace("http" + url[5:], " ")
    return text


def _said_beside(source: str, target: str) -> list[Finding]:
    """What the translator says of its own."""
    found = []
    refused = _REFUSALS.search(target)
    if refused and not _REFUSALS.search(source) and not _REFUSED.search(source):
        found.append(Finding("refusal", _cut(refused[0])))
    opened = _PREAMBLES.search(target)
    if opened and not _PREAMBLES.search(source) and not _OPENED.match(source):
        found.append(Finding("preamble", _cut(opened[0])))
    return found


def repetition(source: str, target: str) -> str:
    """What a target repeats and its source does not; empty for nothing."""
    if run := _tail_run(target):
        unit, times = run
        theirs = _tail_run(source)
        if not theirs or theirs[1] < times - 1:
            return f"{times} times at the end: {_cut(unit)}"
    said = sentences(target)
    parts = Counter(key for part in said if len(key := _key(part)) >= 6) if len(said) > 1 else None
    if parts and (most := max(parts.values())) > 1:
        allowed = max(Counter(key for part in sentences(source) if len(key := _key(part)) >= 6).values(), default=1)
        if most > allowed:
            return f"{most} times: {_cut(max(parts, key=parts.__getitem__))}"
    half = _key(target)
    size = len(half) // 2
    if size >= 8 and half[:size] == half[size : 2 * size] and len(half) - 2 * size <= 1:
        return f"the whole text twice: {_cut(half[:size])}"
    if len(target) > 200:
        ratio = _compression(target) / max(_compression(source), 0.05)
        if ratio < 0.45:
            return f"compresses {1 / ratio:.1f} times as well as the source"
    return ""


def _key(text: str) -> str:
    return re.sub(r"\W+", "", text)


def _compression(text: str) -> float:
    raw = text.encode()
    return len(zlib.compress(raw, 1)) / len(raw)


def _tail_run(text: str) -> tuple[str, int] | None:
    """(unit, times) of what stands at least three times at the end, or twice where it is long."""
    text = text.rstrip()
    for size in range(1, min(200, len(text) // 2) + 1):
        if text[-1 - size] != text[-1] or text[-2 * size : -size] != (unit := text[-size:]):
            continue
        times = 2
        while text[-(times + 1) * size : -times * size] == unit:
            times += 1
        letters = sum(map(str.isalnum, unit))
        if letters and ((times * size >= 12 and times >= 3) or (times == 2 and letters >= 8)) and len(set(unit)) > 1:
            return unit, times
    return None


def _language(source: str, target: str, one: Kept, other: Kept, languages: tuple[str, str]) -> Finding | None:
    """A target that is not in its language, as far as scripts and copied words show."""
    if languages[0] == languages[1] or not _translatable(one.prose):
        return None
    prose = other.prose
    own = len(JAPANESE.findall(prose))
    latin = _LATIN.findall(prose)
    if languages[1] == "ja":
        if _HANGUL.search(prose) and not _HANGUL.search(source):
            return Finding("wrong language", "Hangul")
        letters = sum(map(len, latin))
        if own >= 12 and not _KANA.search(prose) and own > letters:
            return Finding("wrong language", "no kana in the Japanese text") if own > 25 else None
        theirs = len(JAPANESE.findall(one.prose))
        if theirs > 0.3 * max(1, len(one.prose)):
            return None
        if not own or own < 0.12 * (own + letters) * 0.5:
            return Finding("not translated", _cut(target.strip()))
        if run := _copied(one.prose, prose):
            return Finding("not translated", _cut(run))
    elif languages[0] == "ja" and own > 0.3 * (own + sum(map(len, latin))):
        return Finding("not translated", _cut(target.strip()))
    elif _same(source, target):
        return Finding("not translated", "the target is the source")
    return None


def _same(source: str, target: str) -> bool:
    return _key(source) == _key(target)


@lru_cache(maxsize=16)
def _translatable(prose: str) -> bool:
    """Whether a text holds words to translate beside names and code."""
    if JAPANESE.search(prose):
        return True
    words = _LATIN.findall(prose)
    plain = [word for word in words if word.islower() and len(word) > 1]
    if len(plain) >= 2 or (plain and len(words) >= 2) or any(word.lower() in _FUNCTION for word in words):
        return True
    # A title: names of products stay, words of the language do not.
    return len(words) >= 2 and 2 * sum(stem(word) in lexicon() for word in words if not word.isupper()) >= len(words)


def _leaks(source: str, target: str, other: Kept, language: str) -> list[Finding]:
    """Words of a third language, or foreign words that the source does not have. Latin words may be names: a person decides."""
    if language not in _ASKED:
        return []
    # The detector is dear, and most texts hold nothing that it could find.
    low = source.lower()
    foreign = _FOREIGN.search(other.prose) is not None
    if not foreign and language == "ja":
        foreign = any(word.islower() and len(word) > 2 and word not in low for word in _LATIN.findall(other.prose))
    elif not foreign:
        foreign = JAPANESE.search(other.prose) is not None
    if not foreign:
        return []
    verdict = detect([{"role": "system", "content": _ASKED[language]}, {"role": "user", "content": source}], target)
    spans = [target[start:end] for start, end in verdict.spans]
    certain = language != "ja" or any(character.isalpha() and not character.isascii() for span in spans for character in span)
    return [Finding("wrong language", _cut(", ".join(spans)), certain=certain)] if spans else []


def _copied(source: str, target: str) -> str:
    """A run of words of the source that stands in the target as it is: a sentence that was not translated."""
    for match in re.finditer(r"[^\u3000-\u30ff\u4e00-\u9fff\uff01-\uffee]{30,}", target):
        words = _LATIN.findall(_QUOTED.sub(" ", match[0]))
        # Names joined by "and" are no sentence.
        if (
            len(words) >= 7
            and sum(word.islower() for word in words) > 0.65 * len(words)
            and sum(word.lower() in _FUNCTION for word in words) > 2
        ):
            joined = " ".join(words).lower()
            theirs = " ".join(_LATIN.findall(source)).lower()
            if joined in theirs:
                return match[0].strip()
    return ""


def _judge(source: str, target: str, one: Kept, other: Kept, languages: tuple[str, str]) -> Judged:
    if languages == ("en", "ja"):
        return judge(source, target, one.prose, other.prose)
    return judge(target, source, other.prose, one.prose)


def _missing(
    source: str,
    target: str,
    one: Kept,
    other: Kept,
    judged: Judged,
    languages: tuple[str, str],
    repeated: bool,
) -> list[Finding]:
    """What the evidence and the endings say of the whole, of sentences, and of the end."""
    found = []
    english, japanese = (one.prose, other.prose) if languages[0] == "en" else (other.prose, one.prose)
    long, short = prose_length(english), prose_length(japanese)
    outside = lengths().outside(long, short) * (1 if languages[1] == "ja" else -1)
    uncovered = (judged.expected - judged.related) / math.sqrt(judged.expected + 5)
    if judged.related < _LEAST_RELATED:
        found.append(Finding("answered instead of translated", f"{-judged.related:.1f} nats against the words of the source"))
    elif judged.omitted > _MOST_OMITTED:
        found.append(Finding("sentence left out", _cut(judged.sentence)))
    elif judged.part > _MOST_PART:
        found.append(Finding("sentence left out", _cut(judged.clause)))
    elif uncovered > _MOST_UNCOVERED:
        found.append(Finding("sentence left out", f"{uncovered:.1f} standard deviations below the words of a translation"))
    elif judged.omitted > LIKELY_SENTENCE or judged.part > LIKELY_PART or uncovered > _DOUBTFUL_UNCOVERED:
        seen = judged.sentence if judged.omitted > LIKELY_SENTENCE else judged.clause
        found.append(Finding("sentence left out", _cut(seen or "few words of a translation"), certain=False))
    if cut := _cut_off(source, target, one, other, uncovered):
        found.append(Finding("cut off", cut))
    if outside and not repeated:
        found.append(Finding("too short" if outside < 0 else "too long", f"{long} characters of English, {short} of Japanese"))
    return found


def _cut_off(source: str, target: str, one: Kept, other: Kept, uncovered: float) -> str:
    """How a target ends where its source ends otherwise; empty where it ends as it may."""
    end, theirs = target.rstrip(), source.rstrip()
    last = end[-1]
    shown = f"ends with {end[-12:]!r}"
    for opening, closing in ("()", "（）", "「」", "『』", "[]"):
        if (
            opening in end
            and end.count(opening) > end.count(closing)
            and theirs.count("(") <= theirs.count(")")
            and theirs.count("[") <= theirs.count("]")
        ):
            return f"{opening} is never closed"
    if other.spans and end.count("`") % 2 and not theirs.count("`") % 2:
        return "a backtick is never closed"
    if theirs.count("``") % 2 == 0 and end.count("``") % 2:
        return "a backtick is never closed"
    stopped = bool(_SENTENCE_END.search(theirs))
    if _SENTENCE_END.search(end):
        return ""
    if stopped and (last in _ENDS or ("。" in end and _COMPLETE.search(end))):
        # Code, or a verb, may be the end; where words are missing too, the sentence goes on.
        return shown if uncovered > _LEAST_CUT else ""
    if last in _ENDS:
        return ""
    if (stopped or _COLON_END.search(theirs)) and not _COMPLETE.search(end):
        return shown
    if _OPEN.search(end) and uncovered > _LEAST_OPEN and not theirs.endswith(end[-1]):
        return shown
    return ""


def _cut(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
