"""The writing systems of new pieces: which pieces belong to a choice of scripts, and where a text must be cut.

Names follow ISO 15924 in lower case. Characters follow Unicode's property Script (Scripts.txt), with the few that two of
Japan's scripts share, such as ー.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

JAPANESE = ("hira", "kata", "han")

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece

_RANGES = {
    "hira": "3031-3035 3041-3096 309D-309F 30FC 1B001-1B11F 1B132 1B150-1B152",
    "kata": "3031-3035 30A1-30FA 30FC-30FF 31F0-31FF FF66-FF9F 1AFF0-1AFFE 1B000 1B120-1B122 1B155 1B164-1B167",
    "han": "3005-3007 3021-3029 3038-303B 3400-4DBF 4E00-9FFF F900-FAD9 20000-3FFFD",
    "bopo": "02EA-02EB 3105-312F 31A0-31BF",
    "hang": "1100-11FF 302E-302F 3131-318E A960-A97C AC00-D7A3 D7B0-D7FB FFA0-FFDC",
    "thai": "0E01-0E3A 0E40-0E5B",
    "laoo": "0E81-0EDF",
    "khmr": "1780-17F9 19E0-19FF",
    "mymr": "1000-109F A9E0-A9FE AA60-AA7F",
    "tibt": "0F00-0FD4 0FD9-0FDA",
    "deva": "0900-0950 0955-0963 0966-097F A8E0-A8FF",
    "beng": "0980-09FE",
    "guru": "0A01-0A76",
    "gujr": "0A81-0AFF",
    "taml": "0B82-0BFA",
    "telu": "0C00-0C7F",
    "knda": "0C80-0CF3",
    "mlym": "0D00-0D7F",
    "sinh": "0D81-0DF4",
    "arab": "0600-0604 0606-060B 060D-061A 061C-061E 0620-063F 0641-064A 0656-066F 0671-06DC 06DE-06FF 0750-077F 0870-08E1 "
    "08E3-08FF FB50-FD3D FD40-FDFF FE70-FEFC",
    "hebr": "0591-05F4 FB1D-FB4F",
    "cyrl": "0400-0484 0487-052F 1C80-1C8A 2DE0-2DFF A640-A69F",
    "grek": "0370-0373 0375-0377 037A-037D 037F 0384 0386 0388-03E1 03F0-03FF 1F00-1FFE",
    "geor": "10A0-10FA 10FC-10FF 1C90-1CBF 2D00-2D2D",
    "armn": "0531-058F FB13-FB17",
    "ethi": "1200-139F 2D80-2DDE AB01-AB2E",
}

SCRIPTS = tuple(_RANGES)

# Signs of the scripts of East Asia. CJK and kana punctuation makes a piece; a full-width form is a piece of one character.
_EAST_ASIAN = frozenset(("hira", "kata", "han", "bopo", "hang"))
_CJK_PUNCTUATION = "\u3001-\u3004\u3008-\u3020\u302a-\u3030\u3036\u3037\u303c-\u303f\u309b\u309c\u30a0\u30fb\uff61-\uff65"
_WIDE = "\u3000\uff01-\uff60\uffe0-\uffe6"


class Scripts:
    """A choice of scripts.

    The scripts allow a piece if it holds one of their letters, marks or signs (CJK punctuation too, where one script is East
    Asian) and no letter or digit of other scripts. Other signs, and spaces, may stand in it. Digits of the scripts, and
    full-width letters and digits, are pieces of one character only, as Mistral's digits are.
    """

    def __init__(self, names: Sequence[str] = JAPANESE):
        """Raises: ValueError for no script or an unknown name."""
        if not names:
            raise ValueError(f"no script: name at least one of {', '.join(_RANGES)}")
        for name in names:
            if name not in _RANGES:
                near = difflib.get_close_matches(name, _RANGES, 1)
                remedy = f"did you mean '{near[0]}'?" if near else f"must be one of {', '.join(_RANGES)}"
                if name == "latn":
                    remedy = "Latin letters stay as the base writes them"
                raise ValueError(f"script '{name}': {remedy}")
        self.names = tuple(dict.fromkeys(names))
        east_asian = not _EAST_ASIAN.isdisjoint(names)
        letters, signs, single = _classes(self.names)
        if east_asian:
            signs += _CJK_PUNCTUATION
            single += _WIDE
        self._letter = re.compile(f"[{letters}]")
        self._own = re.compile(f"[{letters}{signs}]")
        self._single = re.compile(f"[{single}]" if single else "(?!)")
        beside = f"[^\\w{SPACE}\\x00-\\x1f\\x7f-\\x9f\u2028\u2029]|_"
        self._run = re.compile(f"(?:[{letters}]|{beside})+" + (f"|[{single}]" if single else ""))

    def __str__(self) -> str:
        return ",".join(self.names)

    def occur_in(self, text: str) -> bool:
        """Whether a text holds a character that can make a piece; otherwise a merge keeps its ids."""
        return bool(self._own.search(text) or self._single.search(text))

    def allow(self, piece: str) -> bool:
        """Whether the scripts allow a piece, written with U+2581 for a space."""
        if len(piece) == 1 and self._single.match(piece):
            return True
        if not self._own.search(piece) or any(ord(character) < 0x20 for character in piece):
            return False
        return all(self._letter.match(character) for character in piece if character.isalnum())

    def runs(self, text: str) -> Iterator[str]:
        """The stretches of a text that can hold pieces: the text cut at other letters, digits and control characters."""
        return (run for run in self._run.findall(text) if self.occur_in(run))


def letters(names: Sequence[str]) -> str:
    """The letters and marks of scripts, as the inside of a regular expression's class."""
    return _classes(tuple(names))[0]


@lru_cache
def _classes(names: tuple[str, ...]) -> tuple[str, str, str]:
    """(letters and marks, other signs, digits) of the scripts, each as the inside of a regular expression's class."""
    letters: list[list[int]] = []
    signs: list[list[int]] = []
    digits: list[list[int]] = []
    for part in " ".join(_RANGES[name] for name in names).split():
        first, _, last = part.partition("-")
        for code in range(int(first, 16), int(last or first, 16) + 1):
            category = unicodedata.category(chr(code))
            kind = digits if category == "Nd" else signs if category[0] in "PS" or category == "Cf" else letters
            if kind and kind[-1][1] == code - 1:
                kind[-1][1] = code
            else:
                kind.append([code, code])
    letters_class, signs_class, digits_class = (
        "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in kind) for kind in (letters, signs, digits)
    )
    return letters_class, signs_class, digits_class
