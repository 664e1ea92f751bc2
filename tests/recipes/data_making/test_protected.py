"""Protected spans: found, taken out, put back byte for byte, and missed when they are gone."""

import gzip
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.data.records import Unusable
from recipes.data_making.protected import SpansLost, find_spans, protect
from recipes.data_making.record_texts import read_texts, with_texts

SPANS = {
    "fence": ["```python\nprint('a')\n```", "~~~\na ``` b\n~~~", "````\n```\ninner\n```\n````", "```\nopen to the end"],
    "code": ["`f(x)`", "``a ` b``", "`あ`"],
    "formula": [r"\(a+b\)", r"\[ \frac{a}{b} \]", "$$x^2$$", "$x$", "$a_1 + b$", "\\begin{align}\nx\n\\end{align}"],
    "url": ["https://example.org/a_(b)?c=d&e=%20#f", "www.example.org/x", "http://例え.jp/あ"],
    "mail": ["a.b+c@example.co.jp"],
    "placeholder": ["{name}", "{0}", "{{ user.name }}", "${HOME}", "%s", "%(count)d", "[FIRST_NAME]", "<|im_end|>"],
    "tag": ["<br>", "</div>", '<a href="https://x.org">', "<img src='a' />", "<!-- note -->"],
    "mark": ["<k1/>", "< K 2 />", "＜k3／＞"],
}
PARTS = [span for spans in SPANS.values() for span in spans] + [
    "<k",
    "1/>",
    "`",
    "```",
    "$",
    "\n",
    "\n\n",
    " ",
    "word",
    "語。",
    "<",
    "{",
]


@pytest.mark.parametrize(("kind", "span"), [(kind, span) for kind, spans in SPANS.items() for span in spans])
def test_a_span_in_the_middle_of_a_text_is_found_whole(kind, span):
    end = "" if span.endswith("to the end") else "\n後 after."
    before = "Before it: \n" if kind == "fence" else "Before it: "
    text = f"{before}{span}{end}"
    # An address inside a tag or code is part of it.
    assert [(found.kind, text[found.start : found.end]) for found in find_spans(text)] in (
        [(kind, span)],
        [("tag", span)],
    )


@pytest.mark.parametrize(
    "text",
    [
        "It costs $5 to $10, or $1,000 in all.",
        "2 < 3 and 5 > 4; a<b",
        "``This'' is an old quotation, and ``that'' too.",
        "80% of it, 100%",
        "Use { and } in pairs.",
        "日本の首都は東京です。「引用」も（括弧）も残ります。",
        "a@b, @name, [Note], [link text]",
    ],
)
def test_plain_text_holds_no_span(text):
    assert not find_spans(text)


def test_punctuation_after_an_address_is_not_part_of_it():
    for text in (
        "See https://a.org/b.",
        "(https://a.org/b)",
        "[text](https://a.org/b)",
        "「https://a.org/b」を見る",
        "https://a.org/b。",
    ):
        assert [text[span.start : span.end] for span in find_spans(text)] == ["https://a.org/b"]


@settings(max_examples=300, deadline=None)
@example(["<k1/>", " ", "`<k2/>`", "< k 1 / >"])
@given(st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=5)), max_size=12))
def test_marks_put_back_give_the_text_whatever_it_holds(parts):
    text = "".join(parts)
    marked = protect(text)
    assert marked.restored(marked.text) == text


def test_marks_may_change_their_order_and_their_spelling():
    marked = protect("Call `f(x)`, see https://a.org.")
    assert marked.text == "Call <k1/>, see <k2/>."
    for said in ("<k2/> を見て <k1/> を呼ぶ", "< k2 /> を見て <K1> を呼ぶ", "＜k2/＞ を見て <k1 /> を呼ぶ"):
        assert marked.restored(said) == "https://a.org を見て `f(x)` を呼ぶ"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("<k1/> を呼ぶ", "placeholder dropped"),
        ("`f(x)` と https://a.org", "placeholder dropped"),
        ("<k1/> <k2/> <k1/>", "placeholder repeated"),
        ("<k1/> <k2/> <k3/>", "unknown placeholder"),
        ("<k1/> <k2/> <k0/>", "unknown placeholder"),
    ],
)
def test_a_translation_with_other_marks_is_refused_with_the_reason(said, reason):
    with pytest.raises(SpansLost) as lost:
        protect("Call `f(x)`, see https://a.org.").restored(said)
    assert lost.value.reason == reason


def foreign(marked: str) -> str:
    """What a model might make of a marked text: every word another one, the marks in another order and spelling."""
    marks = re.findall("<k[0-9]+/>", marked)
    words = re.sub(r"<k\d+/>", " ", marked).split()
    return " ".join([*("訳" * len(word) for word in words), *(mark.replace("/", " /") for mark in reversed(marks))])


def test_spans_of_1000_real_conversations_come_back_byte_for_byte(shared_data):
    """Half of them hold spans."""
    checked = {True: 0, False: 0}
    for name in ("en_sharegpt", "ja_sharegpt", "en_alpaca", "en_t0_prompt_completion"):
        with gzip.open(shared_data / "sft" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in file:
                if checked[False] == 500 and not re.search(r"`|://|<|\{[a-z]|[$%@\[]", line[1:]):
                    continue
                record = json.loads(line)
                try:
                    texts = read_texts(record, "conversations")
                except Unusable:
                    continue
                marked = {text: protect(text.text) for text in texts}
                holds = any(each.spans for each in marked.values())
                if checked[holds] == 500:
                    continue
                translated = {text: each.restored(foreign(each.text)) for text, each in marked.items()}
                for text, each in marked.items():
                    check_spans(each.spans, translated[text])
                back = with_texts(record, "conversations", {text: said for text, said in translated.items() if said.strip()})
                assert {text.text for text in read_texts(back, "conversations")} == {*translated.values()}
                checked[holds] += 1
                if checked == {True: 500, False: 500}:
                    return
    pytest.fail(f"only {checked} conversations")


def check_spans(spans: tuple[str, ...], translated: str) -> None:
    """Whether a translation by `foreign` holds the spans in their order, reversed, and nothing else of the original."""
    said = translated
    for span in spans:
        assert said.endswith(span)
        said = said[: len(said) - len(span)].rstrip(" ")
    assert not set(said) - set("訳 ")
