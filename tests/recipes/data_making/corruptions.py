"""Eight ways to spoil a translation, each done by several hands, seeded."""

import random
import re
from collections.abc import Callable, Sequence

KANJI = "一二三四五六七八九"
URL = re.compile(r"https?://[^\s<>\"'`）」、。\u3041-\u30ff\u4e00-\u9fff]+")
SPAN = re.compile(r"(`+)([^`\n]+)(`+)")
FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)
SENTENCE = re.compile(r"[^。！？]+[。！？]+[」』）)]*|[^。！？]+\Z")
ENGLISH_SENTENCE = re.compile(r".+?[.!?](?=\s|\Z)\s*|.+\Z", re.DOTALL)

Corruption = Callable[[str, str, random.Random, Sequence[str]], str | None]


def number_changed(source: str, target: str, draw: random.Random, others: Sequence[str]) -> str | None:
    """Another value for any number in digits; or for a kanji numeral before a counter."""
    digits = list(re.finditer(r"\d+", target))
    kanji = list(re.finditer(f"[{KANJI[2:]}](?=つ|個|回|番目|種類|人|年|倍|行|文字)", target))
    if not digits and not kanji:
        return None
    chosen = draw.choice(digits or kanji)
    if chosen[0] in KANJI:
        new = draw.choice([one for one in KANJI[1:] if one != chosen[0]])
    else:
        value = int(chosen[0])
        new = str(
            draw.choice([value + 1, value + draw.randint(2, 90), value * 10 + draw.randint(1, 9), int(chosen[0][::-1]) + 11])
        )
    return target[: chosen.start()] + new + target[chosen.end() :]


def code_altered(source: str, target: str, draw: random.Random, others: Sequence[str]) -> str | None:
    """In code: a letter exchanged, dropped or doubled, two letters swapped, a name extended, a line dropped."""
    fences = [match.span(1) for match in FENCE.finditer(target)]
    spans = [
        match.span(2) for match in SPAN.finditer(target) if re.fullmatch(r"[!-~ ]+", match[2]) and len(match[2].strip()) > 2
    ]
    spans = [(start, end) for start, end in fences or spans if re.search(r"[A-Za-z]{2}", target[start:end])]
    if not spans:
        return None
    start, end = draw.choice(spans)
    code = target[start:end]
    way = draw.randrange(6)
    if fences and way == 5 and code.count("\n") > 1:
        lines = code.splitlines(keepends=True)
        lines.pop(draw.choice([number for number, line in enumerate(lines) if line.strip()]))
        return target[:start] + "".join(lines) + target[end:]
    letters = [number for number, letter in enumerate(code) if letter.isalpha()]
    place = draw.choice(letters)
    if way == 0:
        code = code[:place] + draw.choice("qzxvkw") + code[place + 1 :]
    elif way == 1:
        code = code[:place] + code[place + 1 :]
    elif way == 2:
        code = code[:place] + code[place] + code[place:]
    elif way == 3:
        code = code[:place] + code[place + 1 : place + 2] + code[place] + code[place + 2 :]
    else:
        code = code.rstrip() + draw.choice(["_x", "2", "s", "()", ".new"])
    altered = target[:start] + code + target[end:]
    return altered if altered != target else None


def url_dropped(source: str, target: str, draw: random.Random, others: Sequence[str]) -> str | None:
    """An address of the source removed, or put in words."""
    urls = [match for match in URL.finditer(target) if match[0] in source]
    if not urls:
        return None
    chosen = draw.choice(urls)
    return target[: chosen.start()] + draw.choice(["", "こちら", "リンク"]) + target[chosen.end() :]


def sentences(text: str) -> list[str]:
    pattern = SENTENCE if re.search("[\u3041-\u30ff]", text) else ENGLISH_SENTENCE
    return [match[0] for match in pattern.finditer(text) if match[0].strip()]


def sentence_left_out(source: str, target: str, draw: random.Random, others: Sequence[str]) -> str | None:
    """Any one sentence, also a short one."""
    parts = sentences(target)
    if len(parts) < 2:
        return None
    # A bracket is no sentence.
    choices = [
        number
        for number, part in enumerate(parts)
        if len(re.findall("[\u3041-\u30ff\u4e00-\u9fffA-Za-z]", re.sub("`[^`]*`", "", part))) >= 4
    ]
    if not choices:
        return None
    parts.pop(draw.choice(choices))
    return "".join(parts).strip()


def not_translated(source: str, target: str, draw: random.Random, others: Sequence[str]) -> str | None:
    """The source itself, whole, or with white space or marks changed."""
    if len(re.findall(r"[A-Za-z]{2,}", re.sub(r"`[^`]*`", "", source))) < 3:
        return None
    return draw.choice([source, source.replace(".", "。"), " ".join(source.split()), source + "\n"])


def answered_instead(source: str, target: str, draw: random.Random, others: Sequence[str]) -> str | None:
    """Another real text of the target language in its place."""
    other = draw.choice(others)
    return other if other != target else None


def repeated(source: str, target: str, draw: random.Random, others: Sequence[str]) -> str | None:
    """A sentence several times, the tail several times, or all of it again."""
    way = draw.randrange(3)
    if way == 0:
        parts = sentences(target)
        number = draw.randrange(len(parts))
        return "".join([*parts[:number], *[parts[number]] * draw.randint(2, 5), *parts[number + 1 :]])
    if way == 1:
        size = draw.randint(4, 20)
        return target + target[-size:] * draw.randint(3, 8)
    return target + draw.choice(["", "\n", "\n\n"]) + target


def cut_off(source: str, target: str, draw: random.Random, others: Sequence[str]) -> str | None:
    """Ended within a sentence."""
    if len(target) < 20:
        return None
    end = draw.randint(int(0.3 * len(target)), int(0.9 * len(target)))
    cut = target[:end].rstrip()
    return None if re.search(r"[。！？.!?:：]\Z", cut) else cut


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        number_changed,
        code_altered,
        url_dropped,
        sentence_left_out,
        not_translated,
        answered_instead,
        repeated,
        cut_off,
    )
}
