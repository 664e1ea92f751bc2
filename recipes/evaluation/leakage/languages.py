"""Which language a text is in, and which languages a prompt asks an answer to be in.

A language is told by its script. Languages that share one (Latin, Han) are told by their most frequent function words, which
decide in a sentence of a few words already; no model, no training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from model.vocabulary.chat import Message
from model.vocabulary.scripts import letters

LATIN = "latn"
# The scripts of each language; the first language of a script is meant where nothing tells it from the others.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "en": (LATIN,),
    **dict.fromkeys(("es", "fr", "de", "pt", "it", "nl", "id", "vi", "pl", "tr", "sv", "la"), (LATIN,)),
    "romaji": (LATIN,),  # Japanese in Latin letters
    "ja": ("hira", "kata", "han"),
    "zh": ("han", "bopo"),
    "ko": ("hang",),
    **dict.fromkeys(("ru", "uk", "bg"), ("cyrl",)),
    **dict.fromkeys(("ar", "fa", "ur"), ("arab",)),
    "th": ("thai",),
    "lo": ("laoo",),
    "km": ("khmr",),
    "my": ("mymr",),
    "bo": ("tibt",),
    "he": ("hebr",),
    "el": ("grek",),
    "hi": ("deva",),
    "bn": ("beng",),
    "pa": ("guru",),
    "gu": ("gujr",),
    "ta": ("taml",),
    "te": ("telu",),
    "kn": ("knda",),
    "ml": ("mlym",),
    "si": ("sinh",),
    "ka": ("geor",),
    "hy": ("armn",),
    "am": ("ethi",),
}
# Names of languages in English, Japanese, Chinese and Korean, as requests write them.
_NAMES = {
    "en": "english 英語 英语 英文 영어",
    "ja": "japanese 日本語 日语 日文 일본어",
    "zh": "chinese mandarin cantonese 中国語 北京語 広東語 中文 汉语 漢語 중국어",
    "ko": "korean 韓国語 朝鮮語 韩语 한국어",
    "es": "spanish スペイン語 西班牙语 스페인어",
    "fr": "french フランス語 仏語 法语 프랑스어",
    "de": "german ドイツ語 独語 德语 독일어",
    "pt": "portuguese ポルトガル語 葡萄牙语 포르투갈어",
    "it": "italian イタリア語 意大利语 이탈리아어",
    "nl": "dutch オランダ語 荷兰语",
    "ru": "russian ロシア語 俄语 러시아어",
    "uk": "ukrainian ウクライナ語",
    "ar": "arabic アラビア語 阿拉伯语",
    "he": "hebrew ヘブライ語",
    "hi": "hindi ヒンディー語",
    "th": "thai タイ語 泰语",
    "vi": "vietnamese ベトナム語 越南语",
    "id": "indonesian インドネシア語",
    "el": "greek ギリシャ語 ギリシア語",
    "tr": "turkish トルコ語",
    "la": "latin ラテン語",
}
# Words that are frequent in one language and rare in the others of its script, "romaji" being Japanese in Latin letters. A line
# "language: words" goes on in indented lines.
_FUNCTION_WORDS = Path(__file__).with_name("function_words.txt")
_CHINESE_WORDS = Path(__file__).with_name("chinese_words.txt")
# Words of traditional Chinese, and some of simplified Chinese beside those of chinese_words.txt, which `word_lists` makes:
# Japanese codes hold their characters, and 16 million characters of Japanese text hold none of them.
_MORE_CHINESE = (
    "[它么从說對妳嗎]|可以|什麼|甚麼|沒有|我們|他們|這個|那個|因為|如果|但是|就是|不是|還是|已經|為了|是的|不會|知道|"
    "我个|一个|首先|其次|以及|價值|當地|那就|看出|只是|而且|並且|并且|只要|只有|也是|一些|很多|那些|由于|對於|能夠|應該|覺得"
)
_LAST_FREQUENT = 0xA0 + 55
_ENDS = 250  # characters
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_MORA = re.compile(
    r"(?:(?:[kgsztdnhbpmrjfw]|ky|gy|sh|ch|ts|ny|hy|by|py|my|ry|y|kk|pp|ss|tt|ssh|tch|cch)?[aiueoāīūēōâîûêô]|n'?)+", re.I
)


@lru_cache
def _script_patterns() -> dict[str, re.Pattern[str]]:
    names = dict.fromkeys(script for scripts in SCRIPTS.values() for script in scripts if script != LATIN)
    return {name: re.compile(f"[{letters((name,))}]+") for name in names} | {LATIN: re.compile(f"[{latin_letters()}]+")}


@lru_cache
def foreign_letters(own: tuple[str, ...]) -> re.Pattern[str]:
    """Runs of letters of other scripts than some. Latin is none of them, and Han none where kana is its own."""
    foreign = {script for scripts in SCRIPTS.values() for script in scripts} - {LATIN, *own}
    if {"hira", "kata"} & set(own):
        foreign -= {"han"}
    return re.compile(f"[{letters(sorted(foreign))}]+")


def latin_letters() -> str:
    """Latin letters with their marks, as the inside of a regular expression's class."""
    return "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0300-\u036f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a"


def letters_by_script(text: str) -> dict[str, int]:
    """Letters of a text by script, the scripts that occur."""
    found = {name: sum(map(len, pattern.findall(text))) for name, pattern in _script_patterns().items()}
    return {name: count for name, count in found.items() if count}


def latin_language(text: str, least: int = 1) -> str | None:
    """The language of text in Latin letters, by function words; "romaji" for Japanese in them. None: too few words tell.

    least: how many words of the language must occur, and more than of English.
    """
    words = [word.lower().replace("’", "'") for word in _WORD.findall(text)]
    counts = {language: sum(word in table for word in words) for language, table in _function_words().items()}
    morae = sum(len(word) > 1 and _MORA.fullmatch(word) is not None for word in words)
    if len(words) < 6 or morae < 0.8 * len(words):
        counts["romaji"] = 0
    best = max(counts, key=lambda language: (counts[language], language == "en"))
    return best if counts[best] >= least and (best == "en" or counts[best] > counts["en"]) else None


@lru_cache
def _function_words() -> dict[str, frozenset[str]]:
    entries = _FUNCTION_WORDS.read_text(encoding="utf-8").replace("\n  ", " ").splitlines()
    return {language: frozenset(words.split()) for language, _, words in (entry.partition(":") for entry in entries)}


def function_words(language: str) -> frozenset[str]:
    """The function words of a language in Latin letters."""
    return _function_words()[language]


def weights_by_script(text: str) -> dict[str, float]:
    """How much of a text is in each script, in characters of a text in Japanese: Latin letters and the like carry less each."""
    dense = ("hira", "kata", "han", "hang")
    return {name: count if name in dense else count / 2.5 for name, count in letters_by_script(text).items()}


def language_of(text: str) -> str | None:
    """The language that most of a text is in; None for a text without letters."""
    weights = weights_by_script(text)
    if not weights:
        return None
    kana = weights.get("hira", 0) + weights.get("kata", 0)
    together = {"ja": kana + weights.get("han", 0)} | {
        name: weight for name, weight in weights.items() if name not in SCRIPTS["ja"]
    }
    best = max(together, key=lambda name: together[name])
    if best == "ja":
        return "zh" if kana < 0.3 * together["ja"] and is_chinese(text) else "ja"
    if best == LATIN:
        return latin_language(text, least=2) or "en"
    return next(language for language, scripts in SCRIPTS.items() if best in scripts)


def is_chinese(text: str) -> bool:
    """Whether a text holds words or characters of Chinese that Japanese does not have."""
    return bool(_only_chinese().search(text)) or bool(simplified(text))


def chinese_words(text: str) -> list[tuple[int, int]]:
    """Places of Chinese words that Japanese does not have."""
    return [match.span() for match in _only_chinese().finditer(text)]


@lru_cache
def _only_chinese() -> re.Pattern[str]:
    listed = _CHINESE_WORDS.read_text(encoding="utf-8").split()
    words = "|".join(word for word in listed if len(word) > 1)
    characters = "".join(word for word in listed if len(word) == 1)
    # Within a run of kanji, the end of one Japanese word and the beginning of the next may look like a Chinese word.
    return re.compile(f"{_MORE_CHINESE}|(?<![\u3005\u3400-\u9fff])(?:{words})|[{characters}]")


@lru_cache(maxsize=65536)
def is_simplified(character: str) -> bool:
    """Whether a kanji is China's alone: in GB 2312 and not in Japan's JIS X 0213 (euc_jis_2004), or among GB 2312's 3,755 most
    frequent ones (its first level, rows 16 to 55) and not in JIS X 0208 (shift_jis), which holds what Japanese text uses."""
    gb = _encoded(character, "gb2312")
    if gb is None:
        return False
    return _encoded(character, "euc_jis_2004") is None or (gb[0] <= _LAST_FREQUENT and _encoded(character, "shift_jis") is None)


def _encoded(character: str, code: str) -> bytes | None:
    try:
        return character.encode(code)
    except UnicodeEncodeError:
        return None


def simplified(text: str) -> list[int]:
    """Places of kanji that only simplified Chinese has."""
    return [place for place, character in enumerate(text) if "\u3400" <= character <= "\u9fff" and is_simplified(character)]


@dataclass(frozen=True)
class Asked:
    """What a conversation says of the answer's language.

    language: the one that it should be in. anywhere: languages that may stand in any part of it, as in a translation.
    whole: languages that a whole answer may be in, because the prompt allows or names them.
    """

    language: str
    anywhere: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()


def asked_language(messages: Sequence[Message | Mapping[str, str]]) -> Asked:
    """The language that the last question asks for (a translation, "answer in English"), else the question's own."""
    question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    # A request stands at the beginning or the end; between them may be a long passage about languages.
    request = question if len(question) <= 2 * _ENDS else f"{question[:_ENDS]}\n{question[-_ENDS:]}"
    system = "\n".join(m["content"] for m in messages if m["role"] == "system")
    own = _prompt_language(_without_material(question)) or _prompt_language(question) or language_of(system) or "en"
    named = frozenset(language for language, pattern in _names().items() if pattern.search(question) or pattern.search(system))
    translated = _found(_TRANSLATION, request)
    if translated:
        return Asked(translated[0], anywhere=named | {own}, whole=named | {own})
    for text in (request, system):
        if len(asked := _found(_ANSWER_IN, text)) == 1:
            return Asked(asked[0], whole=frozenset(asked))
        if asked:
            return Asked(own, whole=frozenset(asked) | {own})
    return Asked(own, anywhere=named | {own} if _WORDS_ASKED.search(request) else frozenset(), whole=named | {own})


def _prompt_language(text: str) -> str | None:
    """The language of a question. Names in Latin letters may be most of a question in Japanese; a sentence is no name."""
    if len(re.findall("[\u3041-\u3096]", text)) >= 2 and latin_language(text, least=2) is None:
        return "ja"
    return language_of(text)


def _without_material(text: str) -> str:
    """A question without the text that it is about: fenced code, and what it quotes."""
    return re.sub(r"```.*?(?:```|\Z)|「[^」]*」|『[^』]*』|“[^”]*”|\"[^\"\n]*\"|https?://\S+", " ", text, flags=re.S)


@lru_cache
def _names() -> dict[str, re.Pattern[str]]:
    return {language: re.compile("|".join(map(_name, names.split())), re.I) for language, names in _NAMES.items()}


def _name(name: str) -> str:
    return rf"\b{name}\b" if name.isascii() else name


# LANGUAGE stands for any language's name.
_TRANSLATION = (
    r"(?:translat|render|localiz)\w*\b[^.!?\n]{0,200}?\b(?:in|into|to)\s+(?:\w+\s+){0,2}?LANGUAGE",
    r"LANGUAGE\s+(?:translation|equivalent|version|word|phrase|term)",
    r"(?:how\s+(?:do|would|can|to)\b[^.?\n]{0,80}?|say|write|spell|called|mean\w*)\b[^.?\n]{0,80}\bin\s+LANGUAGE",
    r"(?:to|into)\s+LANGUAGE\s*[:：]",
    r"LANGUAGE(?:に|へ)?(?:翻訳|訳)",
    r"LANGUAGE(?:に|へ)(?:し|直|変換)",
    r"LANGUAGEで(?:は)?(?:何|なん|どう|どの)",
    r"(?:翻译|翻譯|译|譯)(?:成|为|為|到)?LANGUAGE",
    r"LANGUAGE(?:로|으로)\s*(?:번역|옮)",
)
_ANSWER_IN = (
    r"(?:answer|reply|respond|response|write|speak|explain|talk|summari[sz]e|output|use|describe|compose|say|give)\w*\b"
    r"[^.!?\n]{0,80}?\b(?:in|using)\s+(?:\w+\s+){0,2}?LANGUAGE",
    r"\bin\s+LANGUAGE(?:\s*(?:please|only))?\s*[.!?:]?\s*$",
    r"(?:only|always)\s+(?:use\s+|in\s+)?LANGUAGE",
    r"LANGUAGE(?:のみ|だけ)?で[^。\n]{0,24}?(?:\w(?:て|で)(?:くだ|下さ|ほし|欲し|くれ|もら|いただ|頂|ね|よ|[！!。]|\s*$)|なさい|お願い|願います|\w(?:せよ|ること))",
    r"LANGUAGEを(?:使って|用いて|使用して)",
    r"(?:用|以)\s*LANGUAGE\s*(?:回答|回复|写|說|说|解释)",
    r"LANGUAGE(?:로|으로)",
)
_EITHER = re.compile(r"\b(?:or|and)\b|または|もしくは|或は|あるいは|か|/")
# Requests for words of another language, which an answer must hold.
_WORDS_ASKED = re.compile(r"英訳|和訳|邦訳|漢訳|対訳|翻訳し|訳して|通訳し|\btranslat(?:e|ion of)\b|번역|翻译|翻譯", re.I)


def _found(patterns: tuple[str, ...], text: str) -> list[str]:
    """The languages that requests in a text name, in their order; names joined by "or" all count."""
    found: dict[str, int] = {}
    if "英訳" in text and patterns is _TRANSLATION:
        found["en"] = text.index("英訳")
    if re.search("和訳|邦訳", text) and patterns is _TRANSLATION:
        found["ja"] = 0
    for pattern in _compiled(patterns):
        for match in pattern.finditer(text):
            languages = [language for language, name in _names().items() if name.fullmatch(match["name"])]
            found.setdefault(languages[0], match.start("name"))
            rest = text[match.end("name") : match.end("name") + 24]
            before = text[max(0, match.start("name") - 24) : match.start("name")]
            for language, name in _names().items():
                beside = name.search(rest) or name.search(before)
                if beside and _EITHER.search(rest[: beside.start()] if name.search(rest) else before[beside.end() :]):
                    found.setdefault(language, match.end())
    return sorted(found, key=lambda language: found[language])


@lru_cache
def _compiled(patterns: tuple[str, ...]) -> list[re.Pattern[str]]:
    name = "(?P<name>" + "|".join(_name(name) for names in _NAMES.values() for name in names.split()) + ")"
    # "In Chinese folklore" names no language of the answer.
    alone = name + r"(?!\s+(?!please|only|and|or|with|for|about|using|to|of|that|as|so|but|instead)[a-z])"
    return [re.compile(pattern.replace("LANGUAGE", alone), re.I | re.M) for pattern in patterns]
