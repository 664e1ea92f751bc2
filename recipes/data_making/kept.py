"""The parts of a text that a translation leaves as they are: code, addresses, placeholders, list items."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_URL = re.compile(
    r"(?:https?|ftp)://[^\s<>\"'`）」』】、。\u3040-\u30ff\u4e00-\u9fff]+|www\.[^\s<>\"'`）」』、。]+\.[a-z]{2,}[^\s<>\"'`）」』、。]*"
)
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
# Code between backticks; reStructuredText's roles and links may have a label before their target: :ref:`label <target>`.
_INLINE = re.compile(r"(:[\w:+-]+:)?(?:``(.+?)``|`([^`\n]+(?:\n[^`\n]+)?)`)(_?)", re.DOTALL)
_LABEL = re.compile(r"[^<>]+<([^<>]+)>\s*\Z")
_PLACEHOLDER = re.compile(
    r"\{\{[^{}\n]{0,60}\}\}|\$\{[^{}\n]{1,60}\}|\{[A-Za-z_]\w{0,40}\}|\{\d*\}|%\([A-Za-z_]\w*\)[a-z]|%\d*[sd]\b|"
    r"\[[A-Z][A-Z0-9_ ]{2,30}\]|</?[A-Za-z][\w-]*(?:\s[^<>\n]{0,80})?/?>|"
    r"[\u27e6\u300a\u2983][^\u27e7\u300b\u2984\n]{1,30}[\u27e7\u300b\u2984]"
)
_FORMULA = re.compile(r"\$\$.+?\$\$|\\\(.+?\\\)|\\\[.+?\\\]|\$[^\s$](?:[^$\n]{0,80}[^\s$])?\$(?!\d)", re.DOTALL)
# Every formula, and every placeholder, has one of these.
_FORMULA_MARKS, _PLACEHOLDER_MARKS = re.compile(r"[$\\]"), re.compile("[{%<\\[\u27e6\u300a\u2983]")
_ITEM = re.compile(
    r"^[ \t]*(?:(?:[-*+•]|\d{1,3}[.)]|[(]\d{1,3}[)])[ \t\u3000]+|(?:[・●○]|\d{1,3}[）．]|（\d{1,3}）)\s?)(?=\S)", re.MULTILINE
)
# Words with a sign, digit or inner capital: names in programs.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:[.:/\\#-]+[A-Za-z0-9_]+)*")
_NAMED = re.compile(r"[_\d.:/\\#]|[a-z][A-Z]|[A-Z]{2}")
_WORDS = re.compile(r"[A-Za-z][a-z]*(?:[\s-]+[A-Za-z][a-z]*)*\Z")
_JAPANESE = re.compile("[\u3041-\u30ff\u4e00-\u9fff]")
# What may be translated in a line of code.
_COMMENT = re.compile(r"(?:#|//|--|/\*|<!--|\*).*|\"[^\"]*\"|'[^']*'")
_LANGUAGE = re.compile(r"(?:^|(?<=[/.]))(?:en|ja|jp)(?:[-_](?:us|jp|gb))?(?=[/.]|$)", re.IGNORECASE)
_JAPANESE_SITE = re.compile(r"(?<=[/.])(?:ja|jp)(?:[-_]jp)?(?=[/.]|$)", re.IGNORECASE)
_TRANSLATOR = re.compile(r"[(（\[]\s*-*\s*訳[者]?注.*?(?:[)）\]]|\Z)|<!--.*?-->", re.DOTALL)


@dataclass(frozen=True)
class Kept:
    """fences, spans: code, as it stands between its marks. urls: also mail addresses. placeholders: also tags and formulas.
    names: words of programs in the prose. items: lines that are items of a list. prose: the text without all that."""

    fences: list[str]
    spans: Counter[str]
    urls: Counter[str]
    placeholders: Counter[str]
    names: Counter[str]
    items: int
    prose: str


def without_notes(text: str) -> str:
    """A text without the notes of its translator."""
    return _TRANSLATOR.sub("", text) if "訳" in text or "<!--" in text else text


def kept(text: str) -> Kept:
    """What a translation of the text leaves as it is."""
    fences: list[str] = []
    if "```" in text or "~~~" in text:
        fences = [match[2] for match in _FENCE.finditer(text)]
        text = _FENCE.sub("\n", text)
    items = len(_ITEM.findall(text))
    urls: Counter[str] = Counter()
    if "://" in text or "www." in text or "@" in text:
        urls.update(match[0].rstrip(".,;:!?)]*\\").replace("http:", "https:", 1) for match in _URL.finditer(text))
        urls.update(_MAIL.findall(text))
        text = _MAIL.sub(" ", _URL.sub(" ", text))
    spans: Counter[str] = Counter()
    if "`" in text:
        spans.update(_span(match) for match in _INLINE.finditer(text))
        text = _INLINE.sub(" \u25a1 ", text)
    placeholders: Counter[str] = Counter()
    for pattern, marks in ((_FORMULA, _FORMULA_MARKS), (_PLACEHOLDER, _PLACEHOLDER_MARKS)):
        if marks.search(text):
            placeholders.update(match[0] for match in pattern.finditer(text))
            text = pattern.sub(" ", text)
    names = Counter(filter(_is_name, _NAME.findall(text)))
    return Kept(fences, spans, urls, placeholders, names, items, text)


@lru_cache(maxsize=100_000)
def _is_name(word: str) -> bool:
    return _NAMED.search(word) is not None


def lost_code(source: Kept, target: Kept, source_text: str, target_text: str) -> list[str]:
    """Code of the source that is not in the target as it was, or that the target has and the source has not."""
    if found := _changed_fences(source.fences, target.fences):
        return found
    if source.spans == target.spans and source.names == target.names:
        return []
    gone = [span for span in source.spans if span not in target.spans and not _stands(span, target_text)]
    new = [span for span in target.spans if span not in source.spans and not _JAPANESE.search(span)]
    # "extension modules" becomes `extension module`.
    new = [span for span in new if " " not in span or span + "s" not in source.spans]
    if altered := [span for span in new if _resembles(span, gone)]:
        return altered
    # A span of plain words may be translated, or lose its marks.
    beside = [span.split()[0] for span in target.spans if _JAPANESE.search(span)]
    if gone := [span for span in gone if not _WORDS.match(span) and span.split()[0] not in beside]:
        return gone
    # The marks of a term may be the translator's; a word that resembles one of the source is the source's, altered.
    new = [span for span in new if not _stands(span, source_text)]
    fewer = [*(source.spans - target.spans), *(source.names - target.names)]
    if altered := [span for span in new if _resembles(span, fewer)]:
        return altered
    gone = [name for name in source.names if name not in target_text]
    # As it is, in the plural, or without its hyphens.
    forms = [(name, (name, name + "s", name.replace("-", ""))) for name in target.names]
    new = [name for name, written in forms if not any(_stands(form, source_text) for form in written)]
    return [name for name in new if _resembles(name, gone)]


def lost_urls(source: Kept, target: Kept) -> list[str]:
    """Addresses that the target lacks; the same site in another language's form counts."""
    if not source.urls:
        return []
    gone = list((source.urls - target.urls).elements())
    new = list((target.urls - source.urls).elements())
    found = []
    for url in gone:
        match = next((other for other in new if _site(other) == _site(url) and _localised(url, other)), None)
        if match is not None:
            new.remove(match)
        elif url not in target.urls:
            found.append(url)
    return found


def lost_placeholders(source: Kept, target: Kept, target_text: str) -> list[str]:
    """Placeholders, tags and formulas that the target lacks."""
    if not source.placeholders:
        return []
    gone = source.placeholders - target.placeholders
    return [item for item in gone if target_text.count(item) < source.placeholders[item]]


def _span(match: re.Match[str]) -> str:
    written = match[2] or match[3]
    label = _LABEL.match(written) if match[1] or match[4] else None
    plain = label[1] if label else written
    return " ".join(plain.replace('"', "'").split()).lstrip("!~.").rstrip(".;,").replace("\u200b", "")


def _changed_fences(source: list[str], target: list[str]) -> list[str]:
    if len(source) != len(target):
        return [f"{len(source)} fences of code became {len(target)}"]
    for one, other in zip(source, target, strict=True):
        theirs, ours = _lines(one), _lines(other)
        if len(theirs) != len(ours):
            return [f"{len(theirs)} lines of code became {len(ours)}"]
        for line, new in zip(theirs, ours, strict=True):
            if line != new and not (
                _JAPANESE.search(new) and _COMMENT.sub("", line).rstrip() == _COMMENT.sub("", new).rstrip()
            ):
                return [new.strip()]
    return []


def _lines(code: str) -> list[str]:
    return [line.rstrip() for line in code.strip("\n").splitlines() if line.strip()]


def _stands(name: str, text: str) -> bool:
    """Whether a name stands in a text, not as part of a longer one; case does not matter."""
    name, text = name.lower(), text.lower()
    start = text.find(name)
    while start >= 0:
        end = start + len(name)
        if not (_is_letter(text[start - 1 : start]) or _is_letter(text[end : end + 1])):
            return True
        start = text.find(name, start + 1)
    return False


def _is_letter(character: str) -> bool:
    return character == "_" or (character.isascii() and character.isalnum())


def _resembles(name: str, others: list[str]) -> bool:
    """Whether a name is another one with a few letters changed, or lengthened."""
    for other in others:
        if name.lower() == other.lower():
            continue
        if name.startswith(other) or (
            abs(len(name) - len(other)) <= max(3, len(other) // 2)
            and SequenceMatcher(None, name, other, autojunk=False).ratio() >= 0.6
        ):
            return True
    return False


def _site(url: str) -> str:
    host = re.sub(r"^(?:https?|ftp)://", "", url).split("/")[0].lower()
    return ".".join(host.split(".")[-2:])


def _localised(url: str, other: str) -> bool:
    """Whether an address is the same page, or the page of the same site, in Japanese."""
    return bool(_JAPANESE_SITE.search(other)) or _LANGUAGE.sub("", url).rstrip("/") == _LANGUAGE.sub("", other).rstrip("/")
