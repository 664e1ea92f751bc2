"""The example's training and evaluation data: a pure function of its settings.

The split is a Latin square. Training asks for an item (fact or sum) in all phrasings of each language but one, and the omitted
phrasing moves on from item to item. So training sees every phrasing and every item, and never the combination of item,
phrasing and language that the evaluation asks. Two more sets test generalisation: sums that appear nowhere in the training
data, and facts that appear in statements only, never in a question.
"""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.folder import complete_folder
from model.vocabulary.chat import Message
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.tokenizer import mistral_tokenizer_path
from recipes.example.facts import LANGUAGES, PHRASINGS, Item, all_facts, all_sums

PREFIX = {"en": ("Q: ", "\nA:"), "ja": ("問：", "\n答：\n")}  # around a question in plain text
SYSTEM = {"en": "You answer short questions.", "ja": "あなたは短い質問に答えます。"}


@dataclass(frozen=True)
class ExampleSettings:
    """Size of the example. The split and all texts follow from these numbers alone."""

    seed: int = 5
    largest_first: int = 12  # sums of 1..largest_first and 1..largest_second
    largest_second: int = 8
    unseen_sums: int = 12  # appear nowhere in the training data
    unasked_facts: int = 8  # appear in statements, never in a question
    facts: int | None = None  # only the first so many (None: all)
    polite_share: float = 0.35  # of the answers in the conversations
    system_share: float = 0.2  # of the conversations open with a system message
    conversation_rounds: int = 2  # how often the conversations ask each trained question
    preferences: int = 300  # pairs in each language

    def __post_init__(self) -> None:
        for name in ("largest_first", "largest_second", "conversation_rounds", "preferences"):
            if getattr(self, name) < 1:
                raise ValueError(f"example.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("polite_share", "system_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"example.{name} = {getattr(self, name)}: must lie in 0 .. 1")
        facts, sums = len(all_facts()[: self.facts]), self.largest_first * self.largest_second
        for name, most, what in (("unasked_facts", facts, "facts"), ("unseen_sums", sums, "sums")):
            if not 0 <= getattr(self, name) < most:
                raise ValueError(
                    f"example.{name} = {getattr(self, name)}: must lie in 0 .. {most - 1}, as there are {most} {what}, and "
                    "training needs some"
                )


@dataclass(frozen=True)
class Question:
    """An item asked in one phrasing of one language."""

    item: Item
    language: str
    phrasing: int

    @property
    def text(self) -> str:
        return self.item.question(self.language, self.phrasing)

    @property
    def document(self) -> str:
        """Question and answer in the form of the plain text."""
        return self.prompt + self.written_answer

    @property
    def prompt(self) -> str:
        before, after = PREFIX[self.language]
        return before + self.text + after

    @property
    def written_answer(self) -> str:
        """The continuation of the plain text's prompt."""
        value = self.item.value(self.language)
        return f" {self.item.relation.reply} {value}." if self.language == "en" else f"{value}。"

    def answer(self, polite: bool) -> str:
        """The one answer of a register: polite, or curt (English) and plain (Japanese)."""
        value = self.item.value(self.language)
        if self.language == "en":
            return f"{self.item.relation.reply} {value}" + (", thank you for asking." if polite else ".")
        return f"{value}です。" if polite else f"{value}だ。"


@dataclass(frozen=True)
class Example:
    """The split. `trained`, `held_out` and `unseen` hold no common (item, phrasing, language)."""

    settings: ExampleSettings
    trained: list[Question]
    held_out: list[Question]
    unseen: list[Question]  # about sums that appear nowhere, and facts that training never asks
    told: list[Item]  # items with statements


def make_example(settings: ExampleSettings) -> Example:
    """Divide all questions into trained and held-out questions, by the Latin square."""
    facts = all_facts()[: settings.facts]
    sums = all_sums(settings.largest_first, settings.largest_second)
    draw = random.Random(f"split {settings.seed}")
    unasked = {item.name for item in draw.sample(facts, settings.unasked_facts)}
    unseen_sums = {item.name for item in draw.sample(sums, settings.unseen_sums)}

    by_relation: dict[str, list[Item]] = {}
    for item in facts + sums:
        by_relation.setdefault(item.relation.name, []).append(item)
    trained, held_out, unseen = [], [], []
    for items in by_relation.values():
        draw.shuffle(items)
        for language in LANGUAGES:
            first = draw.randrange(PHRASINGS)
            for place, item in enumerate(items):
                left_out = (first + place) % PHRASINGS
                if item.name in unasked or item.name in unseen_sums:
                    unseen.append(Question(item, language, left_out))
                    continue
                held_out.append(Question(item, language, left_out))
                trained += [Question(item, language, p) for p in range(PHRASINGS) if p != left_out]
    told = [item for item in facts + sums if item.name not in unseen_sums]
    return Example(settings, trained, held_out, unseen, told)


def documents(example: Example, language: str) -> list[str]:
    """The plain text of a language: every trained question with its answer, and statements in twos and threes."""
    draw = random.Random(f"documents {language} {example.settings.seed}")
    texts = [question.document for question in example.trained if question.language == language]
    statements = [
        item.statement(language, form) for item in example.told for form in range(len(item.relation.statements[language]))
    ]
    draw.shuffle(statements)
    while statements:
        count = draw.choice((2, 3))
        texts.append("\n".join(statements[:count]))
        del statements[:count]
    draw.shuffle(texts)
    return texts


def conversations(example: Example, language: str) -> list[list[Message]]:
    """Conversations of one to three questions, each trained question asked `conversation_rounds` times.

    A conversation keeps one register; a share of them open with a system message, which asks for nothing special.
    """
    settings = example.settings
    draw = random.Random(f"conversations {language} {settings.seed}")
    result: list[list[Message]] = []
    for _ in range(settings.conversation_rounds):
        questions = [question for question in example.trained if question.language == language]
        draw.shuffle(questions)
        while questions:
            count = draw.choice((1, 1, 1, 2, 2, 3))
            polite = draw.random() < settings.polite_share
            messages: list[Message] = []
            if draw.random() < settings.system_share:
                messages.append(_message("system", SYSTEM[language]))
            for question in questions[:count]:
                messages.append(_message("user", question.text))
                messages.append(_message("assistant", question.answer(polite)))
            del questions[:count]
            result.append(messages)
    return result


def preferences(example: Example, language: str) -> list[tuple[str, str, str]]:
    """(question, polite answer, curt or plain answer); both answers are right and differ in politeness alone."""
    draw = random.Random(f"preferences {language} {example.settings.seed}")
    questions = [question for question in example.trained if question.language == language]
    return [pair(question) for question in draw.sample(questions, min(example.settings.preferences, len(questions)))]


def pair(question: Question) -> tuple[str, str, str]:
    """(question, chosen, rejected)."""
    return question.text, question.answer(polite=True), question.answer(polite=False)


def phrases(example: Example, language: str) -> list[str]:
    """A language's text, cut at the borders of subjects and values as a morphological analyser would cut. For the vocabulary.

    The sentences repeat few words. Pieces of uncut text would join a subject and a whole phrasing, and a held-out combination
    would then need pieces that training never saw.
    """
    texts = [SYSTEM[language], *PREFIX[language]]
    for item in example.told:
        relation, fields = item.relation, item.fields[language]
        for template in relation.questions[language] + relation.statements[language]:
            parts = re.split(r"\{(\w)\}", template)
            texts += [fields[part] if place % 2 else part for place, part in enumerate(parts)]
        question = Question(item, language, 0)
        texts += [question.answer(polite).removeprefix(fields["v"]) for polite in (True, False)]
    return [text.strip() for text in texts if text.strip()]


def write_example(folder: str | Path, example: Example, *, overwrite: bool = False) -> None:
    """Write the whole example into a folder, which appears when complete.

    `mistral` is a tokenizer folder of Mistral 7B's own pieces. Files ending in `_heldout` are never trained on. Together the
    files show several formats that `recipes.prepare` reads: text and JSON Lines, ShareGPT and messages.

    Raises: FileExistsError where the folder exists and `overwrite` is false; FileNotFoundError without mistral-common.
    """
    with complete_folder(folder, overwrite=overwrite) as out:
        write_tokenizer_folder(out / "mistral", mistral_tokenizer_path().read_bytes())
        for language in LANGUAGES:
            asked = [question for question in example.held_out if question.language == language]
            _write_text(out / f"text_{language}.txt", documents(example, language))
            _write_text(out / f"text_{language}_heldout.txt", (question.document for question in asked))
            chats = conversations(example, language)
            answered = [
                [_message("user", question.text), _message("assistant", question.answer(polite))]
                for question in asked
                for polite in (True, False)
            ]
            for name, messages in ((f"chat_{language}", chats), (f"chat_{language}_heldout", answered)):
                _write_records(out / f"{name}.jsonl", (_conversation(chat, language) for chat in messages))
            for name, pairs in (("", preferences(example, language)), ("_heldout", [pair(q) for q in asked])):
                _write_records(out / f"pairs_{language}{name}.jsonl", (_preference(*p, language) for p in pairs))
        (out / "phrases_ja.txt").write_text("\n".join(phrases(example, "ja")) + "\n", encoding="utf-8")


def _write_text(path: Path, texts: Iterable[str]) -> None:
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def _write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _conversation(messages: list[Message], language: str) -> dict[str, Any]:
    """English as messages, Japanese in ShareGPT form."""
    if language == "en":
        return {"messages": messages}
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]}


def _preference(prompt: str, chosen: str, rejected: str, language: str) -> dict[str, Any]:
    """English as strings, Japanese as messages."""
    if language == "en":
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {
        "prompt": [_message("user", prompt)],
        "chosen": [_message("assistant", chosen)],
        "rejected": [_message("assistant", rejected)],
    }
