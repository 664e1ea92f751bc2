"""The language of a text by its script, to filter records by."""

import difflib
import re
from functools import lru_cache

from model.vocabulary.scripts import JAPANESE, SCRIPTS, letters

# Languages that their script alone does not name: their letters, and what must occur or must not.
_LANGUAGES = {
    "ja": (letters(JAPANESE), "some", letters(("hira", "kata"))),
    "zh": (letters(("han", "bopo")), "no", letters(("hira", "kata"))),
    "ko": (letters(("hang", "han")), "some", letters(("hang",))),
    "latin": ("A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a", "", ""),
}
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


def without_code(text: str) -> str:
    """A text with a space for each piece of fenced code; a fence that is never closed reaches to the end."""
    return _CODE.sub(" ", text)


def check_language(name: str) -> None:
    """Raises: ValueError for a name that is neither a language known here nor a script."""
    known = (*_LANGUAGES, *SCRIPTS)
    if name and name not in known:
        near = difflib.get_close_matches(name, known, 1)
        remedy = f"did you mean '{near[0]}'?" if near else f"must be one of {', '.join(known)}"
        raise ValueError(f"language = {name!r}: {'letters tell latin, not English' if name == 'en' else remedy}")


def share(text: str, language: str) -> float:
    """Share of a text's letters that are of the language's script, 0 to 1; 0 without letters."""
    found = sum(map(str.isalpha, text))
    return sum(map(str.isalpha, "".join(_pattern(language).findall(text)))) / found if found else 0.0


def is_in(text: str, language: str) -> bool:
    """Whether at least half of a text's letters, fenced code aside, are of the language's script.

    Japanese also needs kana, Chinese has none, and Korean needs Hangul.
    """
    text = without_code(text)
    if language in _LANGUAGES:
        _, needs, marks = _LANGUAGES[language]
        if needs and bool(re.search(f"[{marks}]", text)) != (needs == "some"):
            return False
    return share(text, language) >= 0.5


@lru_cache
def _pattern(language: str) -> re.Pattern[str]:
    return re.compile(f"[{_LANGUAGES[language][0] if language in _LANGUAGES else letters((language,))}]+")
