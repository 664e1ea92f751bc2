"""The numbers of a text, in digits, English words or kanji, as values that two languages share."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

# A translation may count what the text only names: "these classes" as 2 classes.
_FEW = frozenset(("1", "2"))
_NAME = re.compile(r"[a-z]+")
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_UNITS = {name: value for value, name in enumerate(_NAME.findall(_SMALL))}
_UNITS |= {name: 10 * value for value, name in enumerate(_NAME.findall(_TENS), 2)}
_FIRST = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth"
_ORDINALS = {name: value for value, name in enumerate(_NAME.findall(_FIRST), 1)} | {
    "twentieth": 20,
    "thirtieth": 30,
    "hundredth": 100,
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words that a translation may put as a number.
_LOOSE = {
    **dict.fromkeys(("a", "an", "single", "once", "each", "every", "per", "unique", "another", "only"), (1,)),
    **dict.fromkeys(
        ("both", "twice", "double", "doubly", "pair", "pairs", "couple", "either", "binary", "second", "two"), (2,)
    ),
    **dict.fromkeys(("half", "halves", "halved"), (0.5, 2, 1)),
    **dict.fromkeys(("thrice", "triple", "triples", "triply", "ternary", "trio"), (3,)),
    **dict.fromkeys(("quarter", "quarters", "quadruple"), (4, 1)),
    **dict.fromkeys(("dozen", "dozens"), (12, 10)),
    **dict.fromkeys(("decimal", "decade", "decades", "tens"), (10,)),
    **dict.fromkeys(("octal", "hexadecimal", "hex"), (8, 16)),
    "noon": (12,),
    "midnight": (0, 12),
}
_MONTHS = _NAME.findall("january february march april may june july august september october november december")
_MONTH = {name[:size]: number for number, name in enumerate(_MONTHS, 1) for size in (3, len(name))} | {"sept": 9}
_WORDS = _UNITS.keys() | _ORDINALS.keys() | _SCALES.keys() | _LOOSE.keys() | _MONTH.keys()
_DIGITS = re.compile(r"\d{1,3}(?:,\d{3})+(?![\d,])|\d+(?:\.\d+)*")
_ENGLISH = re.compile(r"[A-Za-z]+")
_SCALED = re.compile(r"[\s-]{0,2}(hundred|thousand|million|billion|trillion)s?\b", re.IGNORECASE)
_KANJI_DIGITS = {character: value for value, character in enumerate("〇一二三四五六七八九")} | {"零": 0, "両": 2}
_KANJI_SMALL = {"十": 10, "百": 100, "千": 1000}
_KANJI_LARGE = {"万": 10**4, "億": 10**8, "兆": 10**12}
_COUNTERS = frozenset("つ個回度番種人件本日行文単方桁字")
_KANJI = re.compile("[〇零一二三四五六七八九十百千万億兆]+")
_KANJI_SCALE = re.compile(r"\s?([百千]?[万億兆]|[百千])(?![位])")
# Kanji that count: a numeral before them is a number, elsewhere it may be part of a word (一般, 十分).
_COUNTED = re.compile(
    "(?:第|^|(?<=[^\u4e00-\u9fff]))([〇二三四五六七八九十百千万億]+)"
    "(?=つ|個|回|番|種|人|件|本(?!当)|年|月|日|時間|秒|倍|桁|行|列|文字|要素|段|章|節|項|名|歳|匹|台|枚|冊|点|階|組|通り|者|引数|世紀)"
)


@dataclass(frozen=True)
class Numbers:
    """digits: numbers in digits (and months by name), counted. counted: kanji numerals before a counter. named: in words.
    loose: values that the text's other words may stand for."""

    digits: Counter[str]
    counted: frozenset[str]
    named: frozenset[str]
    loose: frozenset[str]

    @property
    def all(self) -> set[str]:
        return self.digits.keys() | self.counted | self.named | self.loose


def numbers(text: str) -> Numbers:
    """The numbers of a text, English or Japanese: full-width digits are digits, 1,000 is 1000, 3万 is 30000."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    digits: Counter[str] = Counter()
    counted: set[str] = set()
    named: set[str] = set()
    loose: set[str] = set()
    for match in _DIGITS.finditer(text):
        digits[_canonical(match[0], text, match.end())] += 1
    _read_english(text, named, loose)
    if not text.isascii():
        counted |= {str(_kanji_value(match[1])) for match in _COUNTED.finditer(text)}
        for match in _KANJI.finditer(text):
            run = match[0]
            # 一 alone is mostly part of a word: 一般, 一定.
            if run != "一" or text[match.end() : match.end() + 1] in _COUNTERS:
                loose.add(str(_kanji_value(run)))
                loose.update(str(_KANJI_DIGITS[character]) for character in run if character in _KANJI_DIGITS)
        loose |= {
            value for word, value in (("両", "2"), ("半", "0.5"), ("双", "2"), ("ダース", "12"), ("ペア", "2")) if word in text
        }
    return Numbers(digits, frozenset(counted), frozenset(named), frozenset(loose))


def changed(source: Numbers, target: Numbers) -> list[str]:
    """What says that a number of the source has another value in the target; empty where nothing does."""
    known = source.all
    there = target.all
    gone = [value for value in source.digits if value not in there and not _stands_in(value, there)]
    new = [value for value in target.digits if value not in known and value not in _FEW and not _stands_in(value, known)]
    if gone or new:
        return [*(f"-{value}" for value in gone), *(f"+{value}" for value in new)]
    # The same values, one of them more often here and another less often.
    less = (source.digits - target.digits).keys() - target.counted - target.named - target.loose
    more = (target.digits - source.digits).keys() - source.counted - source.named - source.loose - _FEW
    few = [value for value in target.digits if value in _FEW and value not in known]
    if less and (more or few):
        more = more or set(few)
        return [*(f"-{value}" for value in sorted(less)), *(f"+{value}" for value in sorted(more))]
    lost = [value for value in (source.named | source.counted) if value not in there]
    other = [value for value in (*target.counted, *target.named, *target.digits) if value not in known]
    if lost and other:
        return [*(f"-{value}" for value in sorted(lost)), *(f"+{value}" for value in sorted(other))]
    return []


def _canonical(written: str, text: str, end: int) -> str:
    plain = written.replace(",", "")
    scaled = _KANJI_SCALE.match(text, end)
    if scaled and plain.count(".") <= 1:
        factor = 1
        for character in scaled[1]:
            factor *= _KANJI_SMALL.get(character) or _KANJI_LARGE[character]
        return _plain(float(plain) * factor)
    word = _SCALED.match(text, end)
    if word and plain.count(".") <= 1:
        return _plain(float(plain) * _SCALES[word[1].lower()])
    return plain.lstrip("0") or "0" if plain.isdigit() else plain


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _stands_in(value: str, values: set[str]) -> bool:
    """Whether a number is written in another way: 2.10 as 2 and 10, 17 o'clock as 5."""
    parts = value.split(".")
    return len(parts) > 1 and all((part.lstrip("0") or "0") in values for part in parts)


def _read_english(text: str, named: set[str], loose: set[str]) -> None:
    total = current = 0
    running = False
    for word in [*_ENGLISH.findall(text), ""]:
        name = word.lower()
        if name not in _WORDS and not running:
            continue
        unit = _UNITS.get(name)
        if unit is not None:
            current = current + unit if running and (current % 100 == 0 or (current % 10 == 0 and unit < 10)) else unit
            running = True
            loose.add(str(unit))
            continue
        if name in _SCALES:
            value = (current or 1) * _SCALES[name]
            total, current = (total, value) if name == "hundred" else (total + value, 0)
            running = True
            continue
        if running and name == "and":
            continue
        if running:
            named.add(str(total + current))
            total = current = 0
            running = False
        if name in _ORDINALS:
            (loose if name == "second" else named).add(str(_ORDINALS[name]))
        elif name in _LOOSE:
            loose.update(map(_plain, _LOOSE[name]))
        elif name in _MONTH and (word == "May" or (word[0].isupper() and name != "may")):
            loose.add(str(_MONTH[name]))


def _kanji_value(run: str) -> int:
    if all(character in _KANJI_DIGITS for character in run):
        return int("".join(str(_KANJI_DIGITS[character]) for character in run))
    total = section = digit = 0
    for character in run:
        if character in _KANJI_DIGITS:
            digit = _KANJI_DIGITS[character]
        elif character in _KANJI_SMALL:
            section += (digit or 1) * _KANJI_SMALL[character]
            digit = 0
        else:
            total += (section + digit or 1) * _KANJI_LARGE[character]
            section = digit = 0
    return total + section + digit
