"""Writes new items: topics of a category, instructions on each topic, an answer to each instruction.

A round asks for what is missing of every quota, in one order whatever the answers' order was: so a run that goes on from its
journal asks the same again, and the result is a function of the settings and the answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from engine.inference.asking import Asker, ChatRequest, Responder, Unanswered
from model.vocabulary.chat import Message
from recipes.data_making.making import ModelSettings, end_fault, without_thoughts
from recipes.data_making.near_duplicates import Benchmarks, NearDuplicates
from recipes.evaluation.leakage.detector import detect
from recipes.evaluation.leakage.languages import LATIN, SCRIPTS, language_of, latin_language

Result = TypeVar("Result")

# More topics in one answer resemble one another.
_MOST_TOPICS = 20
# Topics that a later round is told to leave out.
_TOLD = 60
_MARKER = re.compile(r"^\s*(?:[-*•・]|\(?\d{1,3}[.)．、:：）])\s*")
_DIVIDER = re.compile(r"^\s*#{3,}\s*$", re.MULTILINE)
_TOPICS = (
    'Name {count} topics of the category "{category}"{about} on which people who speak {language} might ask an assistant '
    "something. Make them specific and as different from one another as possible: everyday and rare, easy and hard. "
    "Write in {language}, one topic a line, without numbers and without anything else.{known}"
)
_INSTRUCTIONS = (
    "Category: {category}{about}\nTopic: {topic}\n\n"
    "Write {count} requests on this topic that users might send to an assistant, in {language}. Let them differ in form, "
    "length and difficulty: questions, tasks, texts to work on. A request must hold everything that is needed to answer it, "
    "such as the text or the numbers that it speaks of, and a text must be enough as its answer. Put a line ### between "
    "requests, and write nothing else."
)
_ANSWER = (
    "You are a careful assistant. Answer in {language}, correctly and completely, as long as the request needs and no longer. "
    "Say so where you do not know something."
)


@dataclass(frozen=True, kw_only=True)
class CategorySettings:
    """A kind of items, and how many of them."""

    name: str
    """Name in prompts and in the result."""
    count: int
    """Items in each language."""
    about: str = ""
    """What belongs to it, for the model."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("name is empty: name the category")
        if self.count < 1:
            raise ValueError(f"count = {self.count}: must be at least 1")


@dataclass(frozen=True)
class Writer:
    """A model and how it is asked."""

    responder: Responder
    settings: ModelSettings

    async def ask(self, asker: Asker, prompt: str, *, system: str = "", draw: int = 0) -> tuple[str, str]:
        """(the answer, its fault or nothing)."""
        messages = [Message(role="system", content=system)] if system else []
        messages.append(Message(role="user", content=prompt))
        try:
            answer = await asker.ask(self.responder, ChatRequest(messages, self.settings.parameters(), draw))
        except Unanswered as refused:
            return "", f"not answered: {refused}"
        return without_thoughts(answer.text).strip(), end_fault(answer)


@dataclass
class Cell:
    """A category in a language, and what there is of it. language: (code, name)."""

    category: CategorySettings
    language: tuple[str, str]
    made: int = 0
    topics: list[str] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return self.category.count - self.made

    @property
    def about(self) -> str:
        return f" ({self.category.about})" if self.category.about else ""


@dataclass(frozen=True)
class Item:
    """reasons: why it does not pass; empty where it does."""

    cell: Cell
    topic: str
    instruction: str
    answer: str = ""
    reasons: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        """As `recipes.prepare` reads it, with its origin."""
        messages = [Message(role="user", content=self.instruction), Message(role="assistant", content=self.answer)]
        made = {"category": self.cell.category.name, "topic": self.topic, "language": self.cell.language[0]}
        return {"messages": messages, "made": made}


class Seen:
    """The instructions so far, and the benchmarks that no item may hold a piece of."""

    def __init__(self, known: Iterable[str] = (), benchmarks: Sequence[str] = ()) -> None:
        """Args: known: instructions that were there before. benchmarks: files, folders or patterns.

        Raises: ValueError where a package is missing, or naming a file without an item; FileNotFoundError.
        """
        self._near, self._benchmarks = NearDuplicates(), Benchmarks()
        self._count = 0
        if benchmarks:
            self._benchmarks.add(benchmarks)
        for text in known:
            self._resembled(text)

    def refusal(self, instruction: str) -> str:
        """Why an instruction is refused, as "reason: detail"; else nothing, and it is known from then on."""
        if found := self.contamination(instruction):
            return found
        other = self._resembled(instruction)
        return f"near-duplicate: {other}" if other else ""

    def contamination(self, text: str) -> str:
        """The reason against a text that holds an item of a benchmark; else nothing."""
        place = self._benchmarks.find(text)
        return f"holds an item of a benchmark: {place}" if place else ""

    def _resembled(self, text: str) -> str | None:
        self._count += 1
        return self._near.seen(text, f"{self._count}, {text[:80]!r}")


@dataclass
class Generator:
    """Fills the quotas of cells, round by round."""

    asker: Asker
    writer: Writer
    answerer: Writer
    seen: Seen
    per_topic: int

    def round(self, cells: Sequence[Cell], number: int) -> Iterator[Item]:
        """The items of a round in a fixed order, those that do not pass too; never more than are missing."""
        missing = [cell for cell in cells if cell.missing]
        named = self._run(lambda cell: self._topics(cell, number), missing, "topics")
        topics = [(cell, topic) for cell, names in zip(missing, named, strict=True) for topic in self._new(cell, names)]
        written = self._run(lambda pair: self._instructions(*pair), topics, "instructions")
        wanted: list[Item] = []
        for (cell, topic), instructions in zip(topics, written, strict=True):
            for instruction in instructions:
                if sum(item.cell is cell for item in wanted) == cell.missing:
                    break
                item = Item(cell, topic, instruction)
                if reason := self._objection(cell, instruction):
                    yield replace(item, reasons=(reason,))
                else:
                    wanted.append(item)
        for item in self._run(self._answered, wanted, "answers"):
            item.cell.made += not item.reasons
            yield item

    def _run(self, job: Callable[[Any], Awaitable[Result]], items: Sequence[Any], unit: str) -> list[Result]:
        outcomes = self.asker.run(job, items, total=len(items), unit=unit, ordered=True)
        found = []
        for _, outcome in outcomes:
            assert not isinstance(outcome, Unanswered), "writers take unanswered requests for faults"
            found.append(outcome)
        return found

    async def _topics(self, cell: Cell, number: int) -> list[str]:
        count = min(math.ceil(cell.missing / self.per_topic), _MOST_TOPICS)
        known = "\n\nLeave out these topics, which are taken:\n" + "\n".join(cell.topics[-_TOLD:]) if cell.topics else ""
        prompt = _TOPICS.format(
            count=count, category=cell.category.name, about=cell.about, language=cell.language[1], known=known
        )
        said, _ = await self.writer.ask(self.asker, prompt, draw=number)
        return [topic for line in said.splitlines() if (topic := _MARKER.sub("", line).strip())][:count]

    @staticmethod
    def _new(cell: Cell, topics: Sequence[str]) -> list[str]:
        """The topics that the cell has not had; it has had them then."""
        known = {topic.casefold() for topic in cell.topics}
        new = [topic for topic in dict.fromkeys(topics) if topic.casefold() not in known]
        cell.topics += new
        return new

    async def _instructions(self, cell: Cell, topic: str) -> list[str]:
        prompt = _INSTRUCTIONS.format(
            category=cell.category.name, about=cell.about, topic=topic, count=self.per_topic, language=cell.language[1]
        )
        said, fault = await self.writer.ask(self.asker, prompt)
        found = [text for part in _DIVIDER.split(said) if (text := part.strip())]
        # An answer that was cut off ends with half a request.
        return found[:-1] if fault else found

    def _objection(self, cell: Cell, instruction: str) -> str:
        if other := other_language(instruction, cell.language[0]):
            return f"instruction in a wrong language: {other}"
        return self.seen.refusal(instruction)

    async def _answered(self, item: Item) -> Item:
        system = _ANSWER.format(language=item.cell.language[1])
        answer, fault = await self.answerer.ask(self.asker, item.instruction, system=system)
        item = replace(item, answer=answer)
        if fault or not answer:
            return replace(item, reasons=(fault or "empty answer",))
        if found := self.seen.contamination(answer):
            return replace(item, reasons=(found,))
        verdict = detect([Message(role="user", content=item.instruction)], answer)
        if verdict.leak:
            said = [answer[start:end] for start, end in verdict.spans]
            return replace(item, reasons=(f"answer leaks: {said[0][:60]!r} in {verdict.language}",))
        return item


def other_language(text: str, language: str) -> str | None:
    """The language of a text that is not in the one asked for; None where it is, or where nothing tells."""
    found = language_of(text)
    if language not in SCRIPTS or found in (None, language):
        return None
    if LATIN in SCRIPTS[language] and LATIN in SCRIPTS[found or language]:
        # One script: only function words tell.
        found = latin_language(text, least=3)
    return None if found == language else found
