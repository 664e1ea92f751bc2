"""Write new conversations with language models: topics, instructions on them, and answers, in the languages asked for.

    python -m recipes.generate recipes/shisa/generate.toml --writer.url http://127.0.0.1:8000/v1 --max-cost 20

Every category has a quota in each language. Instructions that nearly repeat another one, and items of benchmarks, are left out.
The same command again goes on where it was stopped or killed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.settings.toml import PathName
from recipes.command import command
from recipes.data_making.generation import CategorySettings, Cell, Generator, Seen, Writer
from recipes.data_making.making import (
    MakingSettings,
    ModelSettings,
    Responders,
    Tally,
    find_records,
    opened_asker,
    opened_result,
)
from recipes.data_making.pairing import read_prompt
from recipes.data_making.translation import LANGUAGES


@dataclass(frozen=True, kw_only=True)
class AnswererSettings(ModelSettings):
    """Who answers the instructions."""

    model: str = ""
    """As the writer's. Empty: the writer answers, too."""


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(MakingSettings):
    """New conversations of one question and one answer."""

    languages: tuple[str, ...]
    """Languages, each as two letters (ISO 639-1)."""
    categories: tuple[CategorySettings, ...]
    """What to write, and how much of it."""
    writer: ModelSettings
    """Writes topics and instructions."""
    answerer: AnswererSettings = field(default_factory=AnswererSettings)
    """Answers the instructions."""
    per_topic: int = 5
    """Instructions on a topic."""
    rounds: int = 10
    """Most rounds: each asks for what is still missing, by at most 20 topics a category and language."""

    known: tuple[PathName, ...] = ()
    """Conversations or pairs whose questions new instructions must not resemble: files, folders, patterns, a hub data set."""
    benchmarks: tuple[PathName, ...] = ()
    """Benchmarks' files, of which no item may occur in a conversation: 13 words in a row, or 26 characters of Japanese."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for language in self.languages:
            if language not in LANGUAGES:
                raise ValueError(f"languages: {language!r} must be one of {', '.join(LANGUAGES)}")
        if not self.languages or len(set(self.languages)) < len(self.languages):
            raise ValueError(f"languages = {self.languages!r}: name each language once")
        names = [category.name for category in self.categories]
        if not names or len(set(names)) < len(names):
            raise ValueError("categories: name at least one, and each once ([[categories]] name = ..., count = ...)")
        for name in ("per_topic", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.answerer.url and not self.answerer.model:
            raise ValueError("answerer.url needs answerer.model: the name of a model at the endpoint")
        answerer = {"answerer": self.answerer} if self.answerer.model else {}
        self.check_prices({"writer": self.writer, **answerer})


def run(settings: GenerateSettings) -> None:
    """Write the conversations, and beside them what did not pass."""
    cells = [Cell(category, (code, LANGUAGES[code])) for category in settings.categories for code in settings.languages]
    dropped, kept = Tally(), 0
    seen = Seen(_known(settings), settings.benchmarks)
    with opened_asker(settings) as asker:
        responders = Responders()
        writer = Writer(responders.of(settings.writer), settings.writer)
        answers = settings.answerer if settings.answerer.model else settings.writer
        generator = Generator(asker, writer, Writer(responders.of(answers), answers), seen, settings.per_topic)
        with opened_result(settings) as result:
            for number in range(settings.rounds):
                for item in generator.round(cells, number):
                    if not item.reasons:
                        result.keep(item.row())
                        kept += 1
                        continue
                    result.drop({"reasons": list(item.reasons), "record": item.row()})
                    for reason in item.reasons:
                        dropped.add(reason.partition(":")[0], f"{item.instruction}: {reason}")
                print(f"round {number + 1}: {_missing(cells):,} conversations missing")
                if not _missing(cells):
                    break
        print(asker.summary())
    print("\n".join([f"{settings.out}: {kept:,} conversations", *dropped.lines("dropped")]))
    for cell in cells:
        if cell.missing:
            print(f"missing {cell.missing:,} of {cell.category.count:,}: {cell.category.name} in {cell.language[1]}")
    if not kept:
        raise ValueError(f"{settings.out}: no conversation passed; the dropped file beside it holds the reasons")


def _known(settings: GenerateSettings) -> Iterator[str]:
    """The questions of the records that are there."""
    if settings.known:
        for _, prompt in find_records(settings.known, read_prompt, sample=None, seed=0):
            yield from (message["content"] for message in prompt.messages if message["role"] == "user")


def _missing(cells: Iterable[Cell]) -> int:
    return sum(cell.missing for cell in cells)


def main(argv: Sequence[str] | None = None) -> None:
    command(GenerateSettings, run, argv, "python -m recipes.generate")


if __name__ == "__main__":
    main()
