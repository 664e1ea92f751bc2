"""Reasons for text in another script or language: code, addresses, quotes, glosses, names, words of the prompt.

Each function gives places of an answer, as [start, end) in characters.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

Span = tuple[int, int]

_FENCE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)", re.S)
_MARKED = re.compile(
    r"(?::[\w:+.-]+:)?(?:``[^`\n]+``|`[^`\n]+`_{0,2})|(?<![\w*])\*[^*\s][^*\n]{0,60}\*(?![\w*])|\$\$.+?\$\$|\\\(.+?\\\)|\\\[.+?\\\]|\$[^$\n]{1,80}\$|</?[A-Za-z][^<>\n]{0,200}>",
    re.S,
)
_ADDRESS = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://[^\s<>\"'、。）」]+|(?:www\.|[\w.+-]+@)[\w-]+(?:\.[\w-]+)+[^\s<>\"'、。（）「」]*|[@#＃][\w.-]+|"
    r"\b[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|jp|io|dev|edu|gov|co|info|ai|app)\b(?:/[^\s、。）」]*)?|(?<![\w.])(?:[~.]{0,2}/)[\w.~-]+(?:/[\w.~-]*)*"
)
# Opening and closing marks. A straight mark opens after a space or bracket and closes before a space or sign.
_QUOTES = re.compile(
    r"「[^「」]*」|『[^『』]*』|《[^《》]*》|〈[^〈〉]*〉|“[^“”]*”|«[^«»]*»|‘[^‘’\n]{1,120}’|＂[^＂]*＂|"
    r"(?<![^\W_])\"(?=\S)[^\"\n]*(?<=\S)\"(?![^\W_]{1,}(?<=[A-Za-z]))|(?<![\w'])'(?=[^\s'])[^'\n]{1,120}'(?![A-Za-z])"
)
_BRACKETS = re.compile(r"\(([^()\n]*)\)|（([^（）\n]*)）|\[([^\[\]\n]*)\]")
_LABEL = re.compile(
    r"(?:(?:[ァ-ヺー]{2,8}|日本|[英中韓独仏露伊西葡蘭羅希梵漢朝外原]国?)語|(?<![\u4e00-\u9fff])[英独仏伊露西葡蘭羅希中韓朝拉梵米](?=\s?[:：])|"
    r"\b(?:Japanese|Chinese|Korean|Russian|Greek|Arabic|Hebrew|Thai|Hindi|kanji|hiragana|katakana|Kanji|Hiragana|Katakana)\b|\bAddress\b|〒[\d-]+)"
    r"(?:[^\n。.]{0,12}?[:：は（(「\s]|[のでをに][^\n。.]{0,16}?)\s*(?P<said>[^\s\u3040-\u30ff、。,，;；()（）][^\n、。,，;；()（）]{0,80})"
)
_ITEM = re.compile(r"^[ \t>]*(?:[-*•・●◆■+]|\(?\d{1,3}[.):、．）]|[①-⑳]|#{1,6})[ \t]*(?P<head>.+)$", re.M)
_HEAD_END = re.compile(r":\s|：|\s[-–—―]\s|。|、")
# Signs of code beside prose: names with underscores or inner capitals, calls, options, dotted and qualified names, operators.
_CODE_LIKE = re.compile(
    r"\b[A-Za-z]\w*_\w+\b|\b(?!i[A-Z])[a-z]+[A-Z][A-Za-z]*\b|\b[A-Za-z]\w+\(\)?|(?<![\w-])--?[a-z][a-z-]+|"
    r"\b[A-Za-z]\w*(?:\.[A-Za-z]\w+)+\b|\b\w+::\w+|[{}]|==|=>|->|<=|\+=",
    re.ASCII,
)
# Words that are less sure signs; `word_lists` makes the list.
_TRADE_WORDS = Path(__file__).with_name("trade_words.txt")
_KATAKANA = re.compile("[\u30a1-\u30fa\u30fc]{3,}")
_TRADE = re.compile(
    "関数|引数|変数|文字列|戻り値|返り値|構文|配列|実装|メソッド|モジュール|オブジェクト|インスタンス|プロパティ|ライブラリ|パッケージ|"
    "サーバ|コマンド|ブラウザ|コンポーネント|デバッグ|デバッガ|スレッド|バイト|ディレクトリ|パラメータ|データベース|"
    "リポジトリ|ファイル|メモリ|インタプリタ|コンソール|バージョン|オプション|コード|開発者|イテレータ|デコード|エンコード|ソケット|トランザクション|コンパイ|ポインタ|マクロ|レジストリ|コンストラクタ|"
    "(?<![A-Za-z])(?:Python|Java|JavaScript|Rust|React|Vue|Unix|Linux|API|URL|HTML|CSS|SQL|UTF|ASCII|HTTP|SDK|DLL|DOM)(?![A-Za-z])"
)

# Consonants as katakana tells them apart. What English writes in two letters comes first; an R that is not spoken goes.
_ENGLISH_SOUNDS = (
    ("[scz]h|tch|th|dg|c(?=[eiy])|g(?=[ey])|[szj]", "S"),
    ("ph|[bfpv]", "P"),
    ("x", "KS"),
    ("ck|[ckgq]", "K"),
    ("[td]", "T"),
    ("r(?![aeiouy])|[aeiouyhw\\W]", ""),
    ("[rl]", "R"),
    ("n", "N"),
    ("m", "M"),
)
_KANA_SOUNDS = {
    "K": "カキクケコ",
    "S": "サシスセソチツ",
    "T": "タテト",
    "N": "ナニヌネノン",
    "P": "ハヒフヘホ",
    "M": "マミムメモ",
    "R": "ラリルレロ",
}
_KANA_CLASSES = {kana: sound for sound, row in _KANA_SOUNDS.items() for kana in row}
_CONSONANTS = 5  # so many tell two names apart
_HEARD = 0.85


def code(text: str) -> list[Span]:
    """Fenced and marked code, formulas and tags."""
    fences = [match.span() for match in _FENCE.finditer(text)]
    return fences + [match.span() for match in _MARKED.finditer(text) if not _inside(match.start(), fences)]


def addresses(text: str) -> list[Span]:
    """URLs, mail addresses, handles, hashtags, domains and paths."""
    return [match.span() for match in _ADDRESS.finditer(text)]


def quotes(text: str) -> list[Span]:
    """Text in quotation marks, with the marks."""
    return [match.span() for match in _QUOTES.finditer(text)]


def brackets(text: str) -> list[Span]:
    """The text inside brackets, without the brackets."""
    return [match.span(match.lastindex or 0) for match in _BRACKETS.finditer(text)]


def labelled(text: str) -> list[Span]:
    """What a language's name announces: "ロシア語: Война", "Japanese: 駅", "英語で mind という"."""
    return [match.span("said") for match in _LABEL.finditer(text)]


def item_heads(text: str) -> list[Span]:
    """What stands in front of the explanation in the items of a list, and in headings."""
    heads = []
    for match in _ITEM.finditer(text):
        start, end = match.span("head")
        cut = _HEAD_END.search(text, start, end)
        heads.append((start, cut.start() if cut else end))
    return heads


def technical_signs(text: str) -> int:
    """How many different signs show that a text in Japanese is about programs: code, and words of the trade."""
    text = re.sub(r"<\|[^|>]*\|>", " ", text)
    return bool(_MARKED.search(text)) + len(set(_CODE_LIKE.findall(text))) + len(set(_TRADE.findall(text)))


def names_programs(text: str) -> bool:
    """Whether words that texts about programs prefer are dense in a text: two different ones, and one in 200 characters."""
    return len(_trade_words() & set(_KATAKANA.findall(text))) >= max(2, len(text) / 200)


@lru_cache
def _trade_words() -> frozenset[str]:
    return frozenset(_TRADE_WORDS.read_text(encoding="utf-8").split())


def folded(text: str) -> str:
    """A text as words are compared: compatible forms and case are the same."""
    return unicodedata.normalize("NFKC", text).casefold()


def writes_in_katakana(text: str, words: str) -> bool:
    """Whether a text writes English words in katakana: both have about the same consonants, at least five."""
    spoken = words.lower()
    for letters, sound in _ENGLISH_SOUNDS:
        spoken = re.sub(letters, sound, spoken)
    spoken = _once(spoken)
    if len(spoken) < _CONSONANTS:
        return False
    for match in re.finditer("[\u30a1-\u30ff・]{4,}", text):
        kana = unicodedata.normalize("NFD", match[0].replace("ヴ", "フ"))
        heard = _once("".join(_KANA_CLASSES.get(character, "") for character in kana))
        if difflib.SequenceMatcher(None, spoken, heard).ratio() >= _HEARD:
            return True
    return False


def _once(sounds: str) -> str:
    return re.sub(r"(.)\1+", r"\1", sounds)


def _inside(place: int, spans: Iterable[Span]) -> bool:
    return any(start <= place < end for start, end in spans)
