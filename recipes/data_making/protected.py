"""Spans of a text that a translation must leave as they are: code, formulas, addresses, tags, placeholders.

    marked = protect("Call `f(x)`, see https://example.org/a.")     marked.text: "Call <k1/>, see <k2/>."
    marked.restored("<k2/> を見て、<k1/> を呼びます。")               "https://example.org/a を見て、`f(x)` を呼びます。"

A span is taken out and a mark stands in its place, so that no model can change it. Everything that looks like a mark is itself
such a span, so that a text that spells one is safe too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# The order decides where two begin at the same place. Each kind is a group of its name.
_KINDS = {
    "fence": r"^[ \t]*(?P<_fence>`{3,}|~{3,})[^\n]*\n(?:.*?\n)??[ \t]*(?P=_fence)[`~]*[ \t]*$"
    r"|```.*?```|^[ \t]*(?:```|~~~).*\Z",
    # On one line, without outer spaces: old texts write ``quotations'' with the same sign.
    "code": r"(?<!`)(?P<_ticks>`{1,2})(?![`\s])[^\n]{1,200}?(?<![`\s])(?P=_ticks)(?!`)",
    "formula": r"\$\$(?:(?!\n\s*\n).)+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)"
    r"|\\begin\{(?P<_environment>\w+\*?)\}.*?\\end\{(?P=_environment)\}"
    # In dollars: one letter, or something with a sign of mathematics. "$5 and $10" is money.
    r"|(?<![\\$\w])\$(?=[^$\n]{0,300}?[\\^_={}+*/<>|-])(?=[^\s${])[^$\n\"]{0,300}?[^\s$\\\"]\$(?![\w$])"
    r"|(?<![\\$\w])\$[A-Za-z]\$(?![\w$])",
    "url": r"\b(?:(?:https?|ftps?|file)://|www\.)(?:\([^\s()<>]*\)|[^\s()<>\"'`、。，「」『』（）])*"
    r"(?:\([^\s()<>]*\)|[^\s()<>\"'`、。，「」『』（）.,;:!?*_\]}])",
    "mail": r"(?a:\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+)",
    "placeholder": r"\{\{[^{}\n]{1,80}\}\}|\$?\{(?a:\w)[\w.:!\[\]-]{0,60}\}|\{\}|%\(\w+\)[sdifr]|%[sdifr](?!\w)"
    r"|\[[A-Z][A-Z0-9_]+\](?!\()|<\|[^|<>\s]{1,60}\|>",
    "tag": r"</?[A-Za-z][\w:.-]*(?:\s+[\w:@.-]+(?:\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"'<>]+))?)*\s*/?>|<!--.*?-->",
    "mark": r"[<＜]\s*[kKｋ]\s*\d+\s*[/／]?\s*[>＞]",
}
_SPANS = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _KINDS.items()), re.DOTALL | re.MULTILINE)
# Every span holds one of these.
_SIGNS = re.compile(r"[`$\\{%<＜\[@]|~~~|://|www\.")
# As models write it back: with spaces, full-width, without the slash.
_MARK = re.compile(r"[<＜]\s*[kKｋ]\s*(\d+)\s*[/／]?\s*[>＞]")


class SpansLost(ValueError):
    """A translation whose marks are not those of its text. reason: one of few, to be counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Span:
    """kind: a name of `_KINDS`. start, end: characters of the text."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Marked:
    """text: with a mark in the place of each span. spans: what the marks 1, 2, ... stand for."""

    text: str
    spans: tuple[str, ...]

    def restored(self, translated: str) -> str:
        """A translation with the spans in the places of their marks, byte for byte.

        Raises: SpansLost where a mark is missing, comes twice, or is none of this text.
        """
        numbers = [int(number) for number in _MARK.findall(translated)]
        for number in numbers:
            if not 1 <= number <= len(self.spans):
                raise SpansLost("unknown placeholder", f"<k{number}/> is none of {len(self.spans)}")
            if numbers.count(number) > 1:
                raise SpansLost("placeholder repeated", f"<k{number}/>, {self.spans[number - 1][:60]!r}")
        for number, span in enumerate(self.spans, 1):
            if number not in numbers:
                raise SpansLost("placeholder dropped", f"<k{number}/>, {span[:60]!r}")
        return _MARK.sub(lambda match: self.spans[int(match[1]) - 1], translated)

    def without_marks(self) -> str:
        """The words between the spans: what there is to translate."""
        return _MARK.sub(" ", self.text)


def find_spans(text: str) -> list[Span]:
    """The spans of a text, in order; no two overlap."""
    if not _SIGNS.search(text):
        return []
    return [Span(match.lastgroup or "", *match.span()) for match in _SPANS.finditer(text)]


def protect(text: str) -> Marked:
    """A text with its spans replaced by marks."""
    parts, spans, end = [], [], 0
    for span in find_spans(text):
        spans.append(text[span.start : span.end])
        parts += [text[end : span.start], f"<k{len(spans)}/>"]
        end = span.end
    return Marked("".join([*parts, text[end:]]), tuple(spans))
