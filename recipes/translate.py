"""Translate conversations or preference pairs with language models: the same records out, in the same form.

    python -m recipes.translate recipes/shisa/translate_airoboros.toml --attempts.0.url http://127.0.0.1:8000/v1 --max-cost 20
    python -m recipes.translate recipes/shisa/translate_airoboros.toml --dry-run

Code, formulas, addresses and placeholders are taken out before and put back after. Each translation is validated; what does not
pass goes to the next attempt: another way, another model. The same command again goes on where it was stopped or killed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.data.records import Unusable
from engine.data.sources import Record
from engine.inference.asking import Asker, Unanswered
from recipes.command import command
from recipes.data_making import rules
from recipes.data_making.making import (
    MakingSettings,
    Responders,
    Result,
    SampleSettings,
    Tally,
    find_records,
    opened_asker,
    opened_result,
)
from recipes.data_making.protected import find_spans, protect
from recipes.data_making.record_texts import Kind, Text, read_texts, with_texts
from recipes.data_making.rules import Finding
from recipes.data_making.translation import (
    ALL,
    LANGUAGES,
    ONE,
    Attempt,
    AttemptSettings,
    Outcome,
    Translator,
    Verdict,
    all_messages,
    one_message,
    prompt,
)


@dataclass(frozen=True, kw_only=True)
class TranslateSettings(MakingSettings, SampleSettings):
    """Translation of records."""

    kind: Kind
    """conversations: ShareGPT, messages, Alpaca, or prompt and completion; preferences: prompt, chosen, rejected."""
    source: str
    """Language of the records, as two letters (ISO 639-1)."""
    target: str
    """Language to write, as two letters (ISO 639-1)."""
    attempts: tuple[AttemptSettings, ...]
    """What is tried in turn, until every message of a record passes."""
    style: str = ""
    """Instruction on style, such as "Polite form (です・ます)"."""
    validate: bool = True
    """Check translations by the rules of recipes.validate, beside marks and the ends of answers."""
    failed: Literal["drop", "keep"] = "drop"
    """A record with a message that passes in no attempt: drop (leave it out), or keep (with the last translation, or
    the original where there is none)."""
    field: str = "translation"
    """Field of a record that is given the languages and all verdicts."""
    dry_run: bool = False
    """Count records, messages and characters, print the first request of each attempt, and ask nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("source", "target"):
            if getattr(self, name) not in LANGUAGES:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(LANGUAGES)}")
        if self.source == self.target:
            raise ValueError(f"source and target are both {self.source!r}: there is nothing to translate")
        if not self.attempts:
            raise ValueError("attempts: name at least one model ([[attempts]] model = ...)")
        SampleSettings.__post_init__(self)
        self.check_prices({f"attempts.{number}": attempt for number, attempt in enumerate(self.attempts)})


class _Count:
    """What a run has done."""

    def __init__(self) -> None:
        self.records = self.kept = self.messages = self.passed_messages = 0
        self.passed: Counter[int] = Counter()  # by attempt
        self.failures: dict[int, Tally] = {}
        self.doubts = Tally()

    def add(self, place: str, outcome: Outcome) -> None:
        self.records += 1
        self.messages += len({verdict.message for verdict in outcome.verdicts})
        self.passed_messages += len(outcome.texts)
        for verdict in outcome.verdicts:
            if not verdict.reasons:
                self.passed[verdict.attempt] += 1
            for doubt in verdict.doubts if not verdict.reasons else ():
                self.doubts.add(doubt.partition(":")[0], f"{place}, message {verdict.message}: {doubt}")
            for reason in verdict.reasons:
                example = f"{place}, message {verdict.message}: {reason}"
                self.failures.setdefault(verdict.attempt, Tally()).add(reason.partition(":")[0], example)


def run(settings: TranslateSettings) -> None:
    """Write the translated records, and beside them the dropped ones."""

    def read(value: Any) -> list[Text]:
        texts = read_texts(value, settings.kind)
        if settings.field in value:
            raise Unusable(f"field '{settings.field}' is taken", "name another one in the setting 'field'")
        try:
            json.dumps(value, allow_nan=False, default=str)
        except ValueError:
            raise Unusable("a number that JSON lacks", "NaN or Infinity in a field") from None
        return texts

    records = find_records(settings.paths, read, sample=settings.sample, seed=settings.seed)
    print("\n".join([f"records to translate: {records.total:,}", *records.skipped.lines("skipped")]))
    if settings.dry_run:
        _preview(settings, records)
        return
    count = _Count()
    with opened_asker(settings) as asker:
        translator = _translator(settings, asker)

        async def job(item: tuple[Record, list[Text]]) -> tuple[Record, list[Text], Outcome]:
            return *item, await translator.translate(item[1])

        with opened_result(settings) as result:
            for _, done in asker.run(job, records, total=records.total, unit="records", ordered=True):
                assert not isinstance(done, Unanswered), "the translator takes unanswered requests for failed attempts"
                _write(settings, result, count, *done)
        print(asker.summary())
    for line in _lines(settings, count):
        print(line)
    if not count.kept:
        raise ValueError(f"{settings.out}: no record passed; the dropped file beside it holds all, each with its reasons")


def _translator(settings: TranslateSettings, asker: Asker) -> Translator:
    responders = Responders()
    attempts = [
        Attempt(attempt, responders.of(attempt), attempt.style or settings.style)  # all opened before the first request
        for attempt in settings.attempts
    ]

    def check(text: str, translated: str) -> list[Finding]:
        return rules.check(text, translated, languages=(settings.source, settings.target)) if settings.validate else []

    return Translator(asker, attempts, LANGUAGES[settings.source], LANGUAGES[settings.target], check)


def _write(
    settings: TranslateSettings, result: Result, count: _Count, record: Record, texts: Sequence[Text], outcome: Outcome
) -> None:
    """Add a record to what is kept, or to what is dropped."""
    count.add(record.place, outcome)
    noted = {
        "from": settings.source,
        "to": settings.target,
        "verdicts": [_as_json(verdict) for verdict in outcome.verdicts],
    }
    last = {texts[verdict.message - 1]: verdict for verdict in outcome.verdicts}
    failed = [verdict for text, verdict in last.items() if text not in outcome.texts]
    reasons = [f"message {verdict.message}: {reason}" for verdict in failed for reason in verdict.reasons]
    translated = dict(outcome.texts)
    if settings.failed == "keep":
        translated |= {text: said for text, verdict in last.items() if text not in translated and (said := verdict.text)}
    if not failed or settings.failed == "keep":
        try:
            kept = with_texts(record.value, settings.kind, translated)
        except Unusable as unusable:
            reasons.append(str(unusable))
        else:
            count.kept += 1
            result.keep({**kept, settings.field: noted})
            return
    result.drop({"place": record.place, "reasons": reasons, "record": record.value, settings.field: noted})


def _as_json(verdict: Verdict) -> dict[str, Any]:
    found = {"message": verdict.message, "attempt": verdict.attempt, "model": verdict.model, "ok": not verdict.reasons}
    failed = {"reasons": list(verdict.reasons), "text": verdict.text} if verdict.reasons else {}
    return {**found, **failed, **({"doubts": list(verdict.doubts)} if verdict.doubts else {})}


def _lines(settings: TranslateSettings, count: _Count) -> list[str]:
    """What is printed at the end."""
    passed = f"{count.passed_messages:,} of {count.messages:,} messages passed"
    lines = [f"{settings.out}: {count.kept:,} of {count.records:,} records; {passed}"]
    for number, attempt in enumerate(settings.attempts, 1):
        tried = count.failures.get(number, Tally())
        lines.append(f"attempt {number} ({attempt.model}, {attempt.unit}): {count.passed[number]:,} messages passed")
        lines += [f"  {line}" for line in tried.lines("failed")]
    lines += count.doubts.lines("for a person to look at")
    if dropped := count.records - count.kept:
        lines.append(f"dropped {dropped:,}, each with its reasons in the dropped file beside it")
    return lines


def _preview(settings: TranslateSettings, items: Iterable[tuple[Record, list[Text]]]) -> None:
    """Print how much there is to translate, and the first record's request in each attempt's way."""
    messages = characters = spans = 0
    first: list[Text] = []
    for _, texts in items:
        first = first or [Text(text.role, protect(text.text.strip()).text) for text in texts]
        messages += len(texts)
        characters += sum(len(text.text) for text in texts)
        spans += sum(len(find_spans(text.text)) for text in texts)
    print(f"{messages:,} messages, {characters:,} characters, {spans:,} protected spans")
    for number, attempt in enumerate(settings.attempts, 1):
        whole = attempt.unit == "conversation"
        content = all_messages(first) if whole else one_message(*first[0])
        languages = LANGUAGES[settings.source], LANGUAGES[settings.target]
        print(f"\n--- attempt {number}: {attempt.model}, {attempt.unit}, {attempt.parameters()}")
        for message in prompt(*languages, attempt.style or settings.style, ALL if whole else ONE, content):
            print(f"{message['role']}: {message['content']}")


def main(argv: Sequence[str] | None = None) -> None:
    command(TranslateSettings, run, argv, "python -m recipes.translate")


if __name__ == "__main__":
    main()
