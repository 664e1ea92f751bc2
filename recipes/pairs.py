"""Make preference pairs: a good answer and a model's own answer to the same prompt, for `recipes.prepare --kind preferences`.

    python -m recipes.pairs recipes/shisa/pairs.toml --chosen.url http://127.0.0.1:8000/v1 --max-cost 20
    python -m recipes.pairs --paths chat.jsonl.gz --rejected.model runs/sft --out pairs.jsonl.gz

The chosen answer comes from an endpoint or from the file, the rejected one from a run folder (many at once) or an endpoint. The
same command again goes on where it was stopped or killed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from engine.data.records import Unusable
from engine.data.sources import Record
from engine.inference.asking import Asker, ChatRequest, Responder, Unanswered
from model.vocabulary.chat import Message
from recipes.command import command
from recipes.data_making.making import (
    CUT,
    MakingSettings,
    ModelSettings,
    Responders,
    Result,
    SampleSettings,
    Tally,
    end_fault,
    find_records,
    opened_asker,
    opened_result,
    without_thoughts,
)
from recipes.data_making.pairing import (
    Prompt,
    describe_lengths,
    length_bounds,
    log_ratio,
    objections,
    read_prompt,
    similarity,
)

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class AnswererSettings(ModelSettings):
    """Who gives an answer."""

    model: str = ""
    """Run folder (its newest checkpoint), Hugging Face folder, hub repository owner/name, or the name of a model at an endpoint
    (url). Empty: the answer that the file holds."""
    system: str = ""
    """System message for this model alone, where a prompt has none: the pair is written without it."""


@dataclass(frozen=True, kw_only=True)
class PairsSettings(MakingSettings, SampleSettings):
    """Preference pairs. The prompts are those of conversations (all before the last answer), of pairs, or of records without an
    answer."""

    chosen: AnswererSettings = field(default_factory=AnswererSettings)
    """The better answer."""
    rejected: AnswererSettings = field(default_factory=AnswererSettings)
    """The worse answer."""
    most_similar: float = 0.9
    """Drop pairs whose answers are at least so alike (1: equal ones alone)."""
    length_deviations: float = 3.0
    """Drop pairs whose lengths' ratio is so many robust standard deviations off the median; 0: keep all."""
    cut: Literal["drop", "keep"] = "drop"
    """Pairs with an answer that max_tokens has cut off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.most_similar <= 1:
            raise ValueError(f"most_similar = {self.most_similar}: must be above 0 and at most 1")
        if not self.length_deviations >= 0:
            raise ValueError(f"length_deviations = {self.length_deviations}: must be at least 0")
        SampleSettings.__post_init__(self)
        for name in SIDES:
            side = getattr(self, name)
            if side.url and not side.model:
                raise ValueError(f"{name}.url needs {name}.model: the name of a model at the endpoint")
        if not self.chosen.model and not self.rejected.model:
            raise ValueError("give chosen.model, rejected.model or both: pairs that a file holds need no models")
        self.check_prices({"chosen": self.chosen, "rejected": self.rejected})


class _Sieve:
    """Takes pairs in order; those that pass wait for the bounds of the lengths, which are known when all are there."""

    def __init__(self, settings: PairsSettings, result: Result, spool: IO[str]) -> None:
        self._settings, self._result, self._spool = settings, result, spool
        self.lengths: list[tuple[int, int]] = []
        self.dropped = Tally()

    def add(self, row: dict[str, Any], reasons: Sequence[str]) -> None:
        if reasons:
            self._drop(row, reasons)
            return
        self.lengths.append((len(row["chosen"]), len(row["rejected"])))
        self._spool.write(json.dumps(row) + "\n")

    def finish(self) -> list[tuple[int, int]]:
        """Write the pairs that waited. Returns: the lengths of those that are kept."""
        bounds = length_bounds([log_ratio(*pair) for pair in self.lengths], self._settings.length_deviations)
        self._spool.seek(0)
        kept = []
        for line, lengths in zip(self._spool, self.lengths, strict=True):
            row = json.loads(line)
            if bounds.hold(log_ratio(*lengths)):
                kept.append(lengths)
                self._result.keep(row)
            else:
                self._drop(row, [f"outlier in length: {lengths[0]:,} characters chosen, {lengths[1]:,} rejected"])
        return kept

    def _drop(self, row: dict[str, Any], reasons: Sequence[str]) -> None:
        place = row["made"]["place"]
        for reason in reasons:
            self.dropped.add(reason.partition(":")[0], f"{place}: {reason}")
        self._result.drop({"place": place, "reasons": list(reasons), "pair": row})


def run(settings: PairsSettings) -> None:
    """Write the pairs, and beside them the dropped ones."""

    def read(value: Any) -> Prompt:
        prompt = read_prompt(value)
        for name in SIDES:
            if not getattr(settings, name).model and getattr(prompt, name) is None:
                raise Unusable(f"no {name} answer in the record", f"name a model in {name}.model")
        return prompt

    records = find_records(settings.paths, read, sample=settings.sample, seed=settings.seed)
    print("\n".join([f"prompts: {records.total:,}", *records.skipped.lines("skipped")]))
    with opened_asker(settings) as asker:
        responders = Responders()
        models = {name: responders.of(side) for name in SIDES if (side := getattr(settings, name)).model}

        async def job(item: tuple[Record, Prompt]) -> tuple[dict[str, Any], list[str]]:
            record, prompt = item
            made: dict[str, Any] = {"place": record.place}
            row: dict[str, Any] = {"prompt": prompt.messages}
            reasons = []
            for name in SIDES:
                side = getattr(settings, name)
                made[name] = side.model or "the file"
                row[name] = getattr(prompt, name)
                if name in models:
                    row[name], fault = await _answer(asker, models[name], side, prompt.messages)
                    reasons += [f"{fault} ({name})"] if fault and not (fault == CUT and settings.cut == "keep") else []
            if not reasons:
                made["similarity"] = round(similarity(row["chosen"], row["rejected"]), 4)
                reasons = [*objections(prompt.messages, row["chosen"], row["rejected"], most_similar=settings.most_similar)]
            return {**row, "made": made}, reasons

        with tempfile.TemporaryFile("w+", encoding="utf-8") as spool, opened_result(settings) as result:
            sieve = _Sieve(settings, result, spool)
            for _, pair in asker.run(job, records, total=records.total, unit="pairs", ordered=True):
                assert not isinstance(pair, Unanswered), "unanswered requests are reasons"
                sieve.add(*pair)
            kept = sieve.finish()
        print(asker.summary())
    print("\n".join([f"{settings.out}: {len(kept):,} pairs of {records.total:,} prompts", *sieve.dropped.lines("dropped")]))
    if not kept:
        raise ValueError(f"{settings.out}: no pair is left; the dropped file beside it holds all, each with its reasons")
    print(describe_lengths(kept))


async def _answer(asker: Asker, model: Responder, settings: AnswererSettings, prompt: list[Message]) -> tuple[str, str]:
    """A model's answer, and its fault or nothing."""
    if settings.system and prompt[0]["role"] != "system":
        prompt = [Message(role="system", content=settings.system), *prompt]
    try:
        answer = await asker.ask(model, ChatRequest(prompt, settings.parameters()))
    except Unanswered as refused:
        return "", f"not answered: {refused}"
    return without_thoughts(answer.text), end_fault(answer)


def main(argv: Sequence[str] | None = None) -> None:
    command(PairsSettings, run, argv, "python -m recipes.pairs")


if __name__ == "__main__":
    main()
