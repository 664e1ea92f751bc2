"""MT-Bench's files in FastChat's form: questions, model answers, judgments.

Source: Zheng et al. 2023, https://arxiv.org/abs/2306.05685; lm-sys/FastChat, fastchat/llm_judge. A folder of a benchmark holds
`model_answer/MODEL.jsonl` and `model_judgment/JUDGE_single.jsonl`. Fields that are not ours are kept as they are.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.sources import RECORD_SUFFIXES, find_sources
from model.folder import write_file
from recipes.evaluation.judge_prompts import OWN

# The temperature of each category's answers, as FastChat's; other categories have 0.7.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
# Categories whose answers are judged beside a reference answer.
WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
# FastChat's mark of a judgment without a score.
UNPARSED = -1.0

JsonObject = dict[str, Any]


def read_rows(paths: Sequence[str]) -> list[tuple[str, JsonObject]]:
    """(place, row) of each line of JSON Lines files, folders or patterns, gzip or not.

    Raises: FileNotFoundError; ValueError naming file and line for broken JSON or a row that is no object.
    """
    rows = []
    for source in find_sources(paths, RECORD_SUFFIXES):
        for place, row in source.records("blank"):
            if not isinstance(row, dict):
                raise ValueError(f"{place}: holds a JSON {type(row).__name__}, not an object")
            rows.append((place, row))
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON Lines; the file appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@dataclass(frozen=True)
class Question:
    """One question of one or two turns. references: a reference answer for each turn, or none."""

    id: int | str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]
    temperature: float


def read_questions(path: str) -> list[Question]:
    """Raises: as `read_rows`; ValueError naming the line of a question that is none, or comes twice."""
    found: dict[int | str, Question] = {}
    for place, row in read_rows([path]):
        id, turns, category = _id(row, place), _texts(row, "turns", place), row.get("category", "")
        if len(turns) > 2:
            raise ValueError(f"{place}: question {id} has {len(turns)} turns; MT-Bench's have one or two")
        if id in found:
            raise ValueError(f"{place}: question {id} comes twice")
        references = _texts(row, "reference", place) if row.get("reference") else ()
        temperature = row.get("required_temperature", TEMPERATURES.get(category, 0.7))
        found[id] = Question(id, str(category), turns, references, float(temperature))
    return list(found.values())


@dataclass(frozen=True)
class ModelAnswer:
    """A model's answers to a question: choices[number] holds a text for each turn."""

    question: int | str
    model: str
    choices: dict[int, tuple[str, ...]]
    row: JsonObject


def read_answers(paths: Sequence[str]) -> list[ModelAnswer]:
    """Raises: as `read_rows`; ValueError naming the line of an answer that is none."""
    found = []
    for place, row in read_rows(paths):
        model, choices = row.get("model_id"), row.get("choices")
        if not isinstance(model, str) or not isinstance(choices, list) or not choices:
            raise ValueError(f"{place}: not a model's answer: it needs model_id and a list of choices")
        numbered = {}
        for number, choice in enumerate(choices):
            if not isinstance(choice, dict):
                raise ValueError(f"{place}: choice {number} must be an object with turns")
            numbered[choice.get("index", number)] = _texts(choice, "turns", place)
        found.append(ModelAnswer(_id(row, place), model, numbered, row))
    return found


@dataclass(frozen=True)
class Judgment:
    """A judge's score of one turn of one choice; None where the judge's text has none."""

    question: int | str
    model: str
    judge: str
    prompt: str
    turn: int
    choice: int
    score: float | None
    row: JsonObject

    @property
    def scale(self) -> str:
        """The judge and whose prompts it was given: other prompts make other scores."""
        return f"{self.judge} with our prompts" if self.prompt.startswith(OWN) else self.judge

    @property
    def answer(self) -> tuple[int | str, str, str, int, int]:
        """What was judged, and by whom."""
        return self.question, self.model, self.judge, self.turn, self.choice


def compares_models(row: JsonObject) -> bool:
    """Whether a row of a judgment file is a comparison of two models (FastChat's ..._pair.jsonl)."""
    return "model_1" in row or "g1_winner" in row


def read_judgments(rows: Sequence[tuple[str, JsonObject]]) -> list[Judgment]:
    """Judgments of single answers, in the rows' order. A row without `choice` judges the first one.

    Args: rows: of `read_rows`.
    Raises: ValueError naming the line of a row that is none, such as a comparison of two models.
    """
    found = []
    for place, row in rows:
        if compares_models(row):
            raise ValueError(f"{place}: compares two models; name files of single answers (..._single.jsonl)")
        model, judge, score = row.get("model"), row.get("judge"), row.get("score")
        names = [judge, ""] if isinstance(judge, str) else judge
        turn, choice = row.get("turn", 1), row.get("choice", 0)
        if not isinstance(model, str) or not isinstance(names, list) or not names:
            raise ValueError(f"{place}: not a judgment: it needs model, judge, score and turn")
        if type(turn) is not int or type(choice) is not int or turn < 1:
            raise ValueError(f"{place}: turn = {turn!r}, choice = {choice!r}: must be whole numbers")
        found.append(
            Judgment(_id(row, place), model, str(names[0]), str((*names, "")[1]), turn, choice, _score(score, place), row)
        )
    return found


def _score(score: Any, place: str) -> float | None:
    if score is None or (isinstance(score, float) and math.isnan(score)):
        return None
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"{place}: score = {score!r}: must be a number, -1 for none")
    return float(score) if score >= 0 else None


def _id(row: JsonObject, place: str) -> int | str:
    id = row.get("question_id")
    if type(id) not in (int, str):
        raise ValueError(f"{place}: question_id = {id!r}: must be a number or a text")
    return id  # type: ignore[return-value]


def _texts(row: JsonObject, name: str, place: str) -> tuple[str, ...]:
    texts = row.get(name)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{place}: {name} must be a list of texts, one for each turn")
    return tuple(texts)
