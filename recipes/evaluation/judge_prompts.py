"""What a judge of MT-Bench is asked: our own words, or FastChat's, from a file that the user names.

A prompt has a name. Which one judges an answer follows from its turn and from whether there is a reference answer; FastChat's
names for the four cases are `NAMES`. A template has the fields {question} and {answer}, in a second turn {question_1},
{answer_1}, {question_2} and {answer_2}, and with a reference answer {ref_answer_1}, in a second turn {ref_answer_2} too.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# FastChat's names: (second turn, with a reference answer) -> name.
NAMES = {
    (False, False): "single-v1",
    (False, True): "single-math-v1",
    (True, False): "single-v1-multi-turn",
    (True, True): "single-math-v1-multi-turn",
}
OWN = "komainu-"  # before the names of our own prompts
HIGHEST = 10.0

# As FastChat searches: a number in double brackets, else in single ones. Words may stand beside the number.
_SCORES = tuple(
    re.compile(rf"{opening}\s*(?:[^\[\]\d]*[:=]\s*)?(\d+(?:\.\d*)?)\s*(?:/\s*10\s*)?{closing}")
    for opening, closing in ((r"\[\[", r"\]\]"), (r"\[", r"\]"))
)
_FIELD = re.compile(r"\{(question|answer|(?:question|answer|ref_answer)_[12])\}")


@dataclass(frozen=True)
class JudgePrompt:
    """A judge's system message and template."""

    name: str
    system: str
    template: str

    def fill(self, questions: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> str:
        """The judge's user message for the last turn of a conversation of one or two turns.

        Texts that spell a field stay as they are. Raises: ValueError where the template needs what is not there.
        """
        values = {"question": questions[0], "answer": answers[0]}
        for name, texts in (("question", questions), ("answer", answers), ("ref_answer", references)):
            values |= {f"{name}_{number}": text for number, text in enumerate(texts, 1)}
        for field in _FIELD.findall(self.template):
            if field not in values:
                raise ValueError(f"judge prompt {self.name!r} has the field {{{field}}}, and there is no text for it")
        return _FIELD.sub(lambda match: values[match[1]], self.template)


def read_prompts(rows: Sequence[tuple[str, Any]]) -> dict[str, JudgePrompt]:
    """Prompts in FastChat's form, by name. rows: (place, a line's value). Raises: ValueError naming the line."""
    found = {}
    for place, row in rows:
        texts = [row.get(key) if isinstance(row, Mapping) else None for key in ("name", "system_prompt", "prompt_template")]
        name, system, template = texts
        if not isinstance(name, str) or not isinstance(system, str) or not isinstance(template, str):
            raise ValueError(f"{place}: a judge prompt needs the texts name, system_prompt and prompt_template")
        found[name] = JudgePrompt(name, system, template)
    return found


def read_score(judgment: str) -> float | None:
    """The score in a judge's text: its first number in double square brackets, else in single ones; None outside 0 .. 10."""
    text = unicodedata.normalize("NFKC", judgment).replace("【", "[").replace("】", "]")
    for pattern in _SCORES:
        if match := pattern.search(text):
            score = float(match[1])
            return score if score <= HIGHEST else None
    return None


_RULE = {
    "en": (
        "Write a short explanation first. Then end with your score, a number from 1 (useless) to 10 (nothing to improve), "
        "in double square brackets on a line of its own, in exactly this form: Rating: [[7]]"
    ),
    "ja": (
        "まず理由を短く述べてください。最後に、1（役に立たない）から10（改善の余地がない）までの点数を、"
        "二重の角括弧で囲み、単独の行に、必ず次の形で書いてください：評価：[[7]]"
    ),
}
_TASK = {
    "en": (
        "You grade one answer of an assistant. Judge how well it does what the user asked: whether it is correct, relevant and "
        "complete, follows every instruction, and is written in the user's language. A longer answer is no better for being "
        "long. Mark down mistakes, inventions and words of another language that nobody asked for."
    ),
    "ja": (
        "アシスタントの回答を一つ採点してください。ユーザーの求めにどれだけ応えているか、すなわち、正確さ、関連性、過不足のなさ、"
        "すべての指示に従っているか、ユーザーと同じ言語で書かれているかを評価します。長いというだけで高く評価しないでください。"
        "誤り、作り話、求められていない他言語の混入は減点してください。"
    ),
}
_SECOND = {
    "en": "The conversation has two turns. Grade the second answer alone; the first turn only shows what it refers to.",
    "ja": "会話は二回のやり取りからなります。二つ目の回答だけを採点し、一つ目のやり取りは文脈としてのみ使ってください。",
}
_REFERENCE = {
    "en": "A correct answer is given for comparison. Work out where the assistant's answer differs from it before you grade.",
    "ja": "比較のための正解例があります。採点の前に、アシスタントの回答が正解例とどこで異なるかを確かめてください。",
}
_TITLES = {
    "en": {"question": "User", "answer": "Assistant", "ref_answer": "Correct answer"},
    "ja": {"question": "ユーザー", "answer": "アシスタント", "ref_answer": "正解例"},
}
_SYSTEM = {"en": "You are a careful and impartial examiner.", "ja": "あなたは注意深く公平な採点者です。"}


def own_prompts(language: str) -> dict[str, JudgePrompt]:
    """Our own prompts, under FastChat's names behind `OWN`.

    Args: language: en or ja.
    """
    found = {}
    for (second, reference), name in NAMES.items():
        parts = [_TASK[language], *([_SECOND[language]] if second else []), *([_REFERENCE[language]] if reference else [])]
        fields = [f"{kind}_{turn}" for turn in (1, 2) for kind in _TITLES[language]] if second else list(_TITLES[language])
        blocks = []
        for field in fields:
            kind, _, turn = field.rpartition("_") if second else (field, "", "")
            if kind == "ref_answer" and not reference:
                continue
            slot = "ref_answer_1" if field == "ref_answer" else field
            title = " ".join(filter(None, (_TITLES[language][kind], turn)))
            blocks.append(f"<<< {title} >>>\n{{{slot}}}")
        template = "\n\n".join([*parts, _RULE[language], *blocks])
        found[OWN + name] = JudgePrompt(OWN + name, _SYSTEM[language], template)
    return found


def prompt_for(prompts: Mapping[str, JudgePrompt], *, second: bool, reference: bool, place: str) -> JudgePrompt:
    """The prompt of a case. Raises: ValueError naming the place and the prompt that is missing there."""
    name = NAMES[second, reference]
    for candidate in (name, OWN + name):
        if candidate in prompts:
            return prompts[candidate]
    remedy = "; judge the first turn alone (--turns 1)" if second else ""
    raise ValueError(f"{place}: has no judge prompt {name!r} (it has {', '.join(prompts)}); name another file{remedy}")
