"""Preference pairs against leakage: of the answers to one prompt, a leaked one rejected and a clean one chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.evaluation.leakage.detector import detect
from recipes.evaluation.leakage.records import Answered


@dataclass
class Found:
    """How many prompts gave what."""

    prompts: int = 0
    leaked: int = 0  # answers
    without_clean: int = 0  # prompts that have leaked answers only


def pairs(answers: Sequence[Answered], most: int, found: Found) -> Iterator[dict[str, Any]]:
    """Pairs as `recipes.prepare --kind preferences` reads them, counted in `found`.

    A leaked answer goes with the clean one, not yet used, whose length is nearest: a difference in length would be learned
    too. most: pairs of a prompt.
    """
    prompts: dict[str, list[Answered]] = {}
    for answer in answers:
        prompts.setdefault(repr([(each["role"], each["content"]) for each in answer.messages]), []).append(answer)
    for group in prompts.values():
        found.prompts += 1
        verdicts = {answer.number: detect(answer.messages, answer.response).leak for answer in group}
        usable = {answer.response: answer for answer in group if answer.response.strip()}.values()
        leaked = [answer for answer in usable if verdicts[answer.number]]
        clean = [answer for answer in usable if not verdicts[answer.number]]
        found.leaked += len(leaked)
        found.without_clean += bool(leaked and not clean)
        left: list[Answered] = []
        for rejected in leaked[:most]:
            left = left or list(clean)
            if not left:
                break
            chosen = min(left, key=lambda answer: abs(len(answer.response) - len(rejected.response)))
            left.remove(chosen)
            yield {"prompt": rejected.messages, "chosen": chosen.response, "rejected": rejected.response}
