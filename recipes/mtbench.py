"""MT-Bench in English and Japanese: a model answers, a judge scores, and the scores are shown with what they are worth.

    python -m recipes.mtbench answer --questions mt_bench_ja.jsonl --model runs/dpo --name dpo --choices 4 --out runs/mtbench/ja
    python -m recipes.mtbench judge --questions mt_bench_ja.jsonl --language ja --out runs/mtbench/ja \\
        --model gpt-4.1 --url https://api.openai.com/v1 --price-in 2 --price-out 8 --max-cost 5
    python -m recipes.mtbench show --judgments runs/mtbench/ja/model_judgment --questions mt_bench_ja.jsonl

Files have FastChat's form, in and out. Every part goes on where it was stopped or killed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.inference.asking import Asker, ChatRequest, Responder, Unanswered
from engine.inference.endpoint import Endpoint, EndpointSettings, open_responder
from engine.inference.probe import IGNORED, REFUSED, describe, probe
from engine.settings.toml import PathName
from model.folder import write_file
from model.vocabulary.chat import Message
from recipes.command import commands
from recipes.evaluation import judge_prompts
from recipes.evaluation.judge_prompts import OWN
from recipes.evaluation.mt_bench import (
    UNPARSED,
    WITH_REFERENCE,
    JsonObject,
    Judgment,
    ModelAnswer,
    Question,
    compares_models,
    read_answers,
    read_judgments,
    read_questions,
    read_rows,
    write_rows,
)

if TYPE_CHECKING:
    from recipes.evaluation.judge_scores import ModelScore

# A judgment without a score is asked for again so often, at this temperature: at 0 it might come again.
AGAIN, AGAIN_TEMPERATURE = 2, 0.5
# An empty answer of the first turn, as the second turn shows it: chat templates refuse an empty message.
EMPTY = "..."
# Without a baseline, more models than this are not compared pair by pair.
PAIRED = 6


@dataclass(frozen=True, kw_only=True)
class PaidSettings(EndpointSettings):
    """What both answering and judging need."""

    questions: PathName
    """FastChat's question file (.jsonl, .jsonl.gz)."""
    out: PathName
    """Folder of the benchmark: model_answer/, model_judgment/ and journal/ are in it."""
    max_cost: float | None = None
    """Stop before more money than this could be spent, over all runs with the same journal."""
    max_requests: int | None = None
    """Stop before more requests than this are sent, tries included, over all runs with the same journal."""
    probe: bool = True
    """Find out first which parameters the endpoint ignores (about 15 short requests)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_cost", "max_requests"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} = {value}: must be at least 0")
        if self.max_cost is not None and self.url and self.price_in is None:
            raise ValueError("max_cost needs the prices of a million tokens: give price_in and price_out")


@dataclass(frozen=True, kw_only=True)
class AnswerSettings(PaidSettings):
    """Answers of a model to MT-Bench's questions. Run folder (its newest checkpoint), Hugging Face folder, hub repository
    owner/name, or the name of a model at an endpoint (--url)."""

    name: str = ""
    """Name of the model in the files; default: the last part of `model`."""
    system: str | None = None
    """System message."""
    choices: int = 1
    """Answers to each question."""
    temperature: float | None = None
    """Default: each category's own, as FastChat's: 0.7, 0.1 or 0."""
    max_tokens: int = 1024
    """Longest answer."""
    seed: int | None = None
    """Sent with each request, plus the choice's number. Default: none; a folder then draws by a seed made from the request."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "/" in self.name:
            raise ValueError(f"name = {self.name!r}: becomes a file's name; leave the / out")
        for name in ("choices", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(PaidSettings):
    """Scores of answers by a judge: all choices and both turns."""

    answers: tuple[PathName, ...] = ()
    """FastChat's answer files; default: those in model_answer/ of the folder `out`."""
    references: PathName | None = None
    """FastChat's answer file of reference answers, for mathematics, reasoning and coding; default: those in the questions."""
    prompts: PathName | None = None
    """FastChat's file of judge prompts; default: our own."""
    language: Literal["en", "ja"] = "en"
    """Language of our own judge prompts."""
    judgments: int = 1
    """Judgments of each answer; 2 or more measure how far the judge agrees with itself."""
    turns: Literal[1, 2] = 2
    """1: judge the first turn alone."""
    legacy: bool = False
    """As FastChat's `--num-choices` really worked: judge the first choice and the first turn alone."""
    temperature: float = 0.0
    """The judge's temperature."""
    max_tokens: int = 2048
    """Longest judgment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("judgments", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ShowSettings:
    """Scores with intervals, their spread, and paired differences of models."""

    judgments: tuple[PathName, ...]
    """FastChat's judgment files, or folders of them."""
    questions: PathName | None = None
    """FastChat's question file, for scores by category."""
    baseline: str | None = None
    """Compare the other models with this one. Default: every pair of up to 6 models."""
    legacy: bool = False
    """First choices and first turns alone."""
    json: PathName | None = None
    """Write a line of JSON a model, then one a difference."""


def answer(settings: AnswerSettings) -> None:
    """Write OUT/model_answer/NAME.jsonl."""
    questions = read_questions(settings.questions)
    name = settings.name or Path(settings.model).resolve().name
    file = Path(settings.out) / "model_answer" / f"{name}.jsonl"
    with _asker(settings, f"answer-{name}") as asker:
        if file.exists() and "started" not in asker.facts:
            raise ValueError(f"{file}: exists, and another program wrote it; choose another --name, or remove it")
        responder = open_responder(settings)
        refused = _refused(asker, responder, settings)
        started = _started(asker)

        async def job(asked: tuple[Question, int]) -> tuple[str, ...]:
            question, choice = asked
            temperature = question.temperature if settings.temperature is None else settings.temperature
            parameters: dict[str, Any] = {"temperature": temperature, "max_tokens": settings.max_tokens}
            if settings.seed is not None:
                parameters["seed"] = settings.seed + choice
            parameters = {name: value for name, value in parameters.items() if name not in refused}
            messages = [] if settings.system is None else [Message(role="system", content=settings.system)]
            turns: list[str] = []
            for turn in question.turns:
                messages.append(Message(role="user", content=turn))
                given = await asker.ask(responder, ChatRequest(tuple(messages), parameters, choice))
                turns.append(given.text)
                messages.append(Message(role="assistant", content=given.text if given.text.strip() else EMPTY))
            return tuple(turns)

        asked = [(question, choice) for question in questions for choice in range(settings.choices)]
        outcomes = dict(asker.run(job, asked, total=len(asked), unit="conversations"))
        print(asker.summary())
    complete: dict[tuple[int | str, int], tuple[str, ...]] = {}
    for number, (question, choice) in enumerate(asked):
        if not isinstance(given := outcomes[number], Unanswered):
            complete[question.id, choice] = given
    rows = []
    for question in questions:
        choices = [
            {"index": choice, "turns": list(complete[question.id, choice])}
            for choice in range(settings.choices)
            if (question.id, choice) in complete
        ]
        if choices:
            row = {"question_id": question.id, "answer_id": "", "model_id": name, "choices": choices, "tstamp": started}
            rows.append(row | {"answer_id": _short_id(row)})
    write_rows(file, rows)
    print(f"{file}: {len(complete)} answers to {len(rows)} questions")
    _report_missing([each for each in outcomes.values() if isinstance(each, Unanswered)], "conversations")


@dataclass(frozen=True)
class _Task:
    """One answer to judge, for the `repeat`-th time."""

    given: ModelAnswer
    question: Question
    choice: int
    turn: int
    repeat: int
    prompt: judge_prompts.JudgePrompt
    user: str = field(repr=False)

    def row(self, judge: str, judgment: str, score: float | None, started: float) -> JsonObject:
        value = UNPARSED if score is None else score
        return {
            "question_id": self.question.id,
            "model": self.given.model,
            "judge": [judge, self.prompt.name],
            "user_prompt": self.user,
            "judgment": judgment,
            "score": int(value) if value == int(value) else value,
            "turn": self.turn,
            "tstamp": started,
            "choice": self.choice,
        }


def judge(settings: JudgeSettings) -> None:
    """Add to OUT/model_judgment/JUDGE_single.jsonl what it lacks. Its other rows stay as they are."""
    judge_name = Path(settings.model).resolve().name
    file = Path(settings.out) / "model_judgment" / f"{judge_name}_single.jsonl"
    tasks = _tasks(settings)
    kept = read_judgments(read_rows([str(file)])) if file.is_file() else []
    todo, stale = _missing(tasks, kept, judge_name)
    with _asker(settings, f"judge-{judge_name}") as asker:
        responder = open_responder(settings)
        refused = _refused(asker, responder, settings) if todo else set()
        started = _started(asker)

        async def job(task: _Task) -> JsonObject:
            messages = (Message(role="system", content=task.prompt.system), Message(role="user", content=task.user))
            for again in range(AGAIN + 1):
                temperature = settings.temperature if again == 0 else max(settings.temperature, AGAIN_TEMPERATURE)
                parameters: dict[str, Any] = {"max_tokens": settings.max_tokens}
                if "temperature" not in refused:
                    parameters["temperature"] = temperature
                draw = task.repeat * (AGAIN + 1) + again
                judgment = (await asker.ask(responder, ChatRequest(messages, parameters, draw))).text
                if (score := judge_prompts.read_score(judgment)) is not None:
                    break
            return task.row(judge_name, judgment, score, started)

        outcomes = [outcome for _, outcome in asker.run(job, todo, total=len(todo), unit="judgments", ordered=True)]
        print(asker.summary())
    rows = [outcome for outcome in outcomes if not isinstance(outcome, Unanswered)]
    replaced = {id(each) for each in stale}
    write_rows(file, [*(each.row for each in kept if id(each) not in replaced), *rows])
    unparsed = sum(row["score"] == UNPARSED for row in rows)
    outdated = f", {len(stale)} without a score or of other answers are replaced" if stale else ""
    print(f"{file}: {len(rows)} new judgments, {len(tasks) - len(todo)} were there{outdated}")
    if unparsed:
        print(f"{unparsed} judgments have no score after {AGAIN + 1} tries; they are marked -1 and left out of all means")
    _report_missing([each for each in outcomes if isinstance(each, Unanswered)], "judgments")


def _tasks(settings: JudgeSettings) -> list[_Task]:
    """What is to be judged, model by model in the order of questions. Raises: ValueError naming a file's fault."""
    questions = {question.id: question for question in read_questions(settings.questions)}
    if settings.prompts is None:
        prompts, place = judge_prompts.own_prompts(settings.language), "our own prompts"
    else:
        prompts, place = judge_prompts.read_prompts(read_rows([settings.prompts])), settings.prompts
    folder = Path(settings.out) / "model_answer"
    answers = read_answers(settings.answers or [str(folder)])
    references = {id: question.references for id, question in questions.items()}
    if settings.references is not None:
        references |= {given.question: given.choices[min(given.choices)] for given in read_answers([settings.references])}
    tasks, unknown, without = [], set(), set()
    for given in answers:
        question = questions.get(given.question)
        if question is None:
            unknown.add(given.question)
            continue
        for choice in sorted(given.choices)[: 1 if settings.legacy else None]:
            turns = given.choices[choice]
            for turn in range(1, min(len(turns), len(question.turns), 1 if settings.legacy else settings.turns) + 1):
                needed = question.category in WITH_REFERENCE
                reference = references.get(question.id, ())
                if needed and len(reference) < turn:
                    without.add(question.id)
                known = reference if needed and len(reference) >= turn else ()
                prompt = judge_prompts.prompt_for(prompts, second=turn == 2, reference=bool(known), place=place)
                user = prompt.fill(question.turns[:turn], turns[:turn], known)
                tasks += [_Task(given, question, choice, turn, repeat, prompt, user) for repeat in range(settings.judgments)]
    if unknown:
        print(f"{len(unknown)} questions that have answers are not in {settings.questions}: their answers are not judged")
    if without:
        print(
            f"{len(without)} questions of {', '.join(WITH_REFERENCE[:3])} have no reference answer, and are judged without "
            "(--references names a file of them)"
        )
    if not tasks:
        raise ValueError(f"{', '.join(settings.answers) or folder}: no answer to a question of {settings.questions}")
    return tasks


def _missing(tasks: Sequence[_Task], kept: Sequence[Judgment], judge_name: str) -> tuple[list[_Task], list[Judgment]]:
    """(the tasks that have no judgment yet, judgments of other texts than the answers are now and such without a score).

    Raises: ValueError where the answers were judged by prompts of another origin, whose scores do not mix with ours.
    """
    given: dict[tuple[Any, ...], list[Judgment]] = {}
    for each in kept:
        given.setdefault(each.answer, []).append(each)
    todo, stale = [], {}
    for task in tasks:
        same = given.get((task.question.id, task.given.model, judge_name, task.turn, task.choice), [])
        for each in same:
            if each.prompt and each.prompt.startswith(OWN) != task.prompt.name.startswith(OWN):
                raise ValueError(
                    f"{judge_name} has judged answers of {each.model} with the prompt {each.prompt!r} already; this run would "
                    f"use {task.prompt.name!r}: name the same --prompts, or another --out"
                )
            # A trimmed file has no user_prompt.
            asked = each.row.get("user_prompt") or task.user
            if each.score is None or (each.prompt == task.prompt.name and asked != task.user):
                stale[id(each)] = each
        if task.repeat >= sum(id(each) not in stale for each in same):
            todo.append(task)
    return todo, list(stale.values())


def show(settings: ShowSettings) -> None:
    """Print the scores and, on request, write them as JSON Lines."""
    from recipes.evaluation.judge_scores import compare_models, of_legacy, pairs_of, score_models  # here, as they need scipy

    rows = read_rows(settings.judgments)
    judgments = read_judgments([(place, row) for place, row in rows if not compares_models(row)])
    if len(judgments) < len(rows):
        print(f"{len(rows) - len(judgments)} comparisons of two models are left out")
    if settings.legacy:
        judgments = of_legacy(judgments)
    categories = {} if settings.questions is None else {each.id: each.category for each in read_questions(settings.questions)}
    scores = score_models(judgments, categories)
    if not scores:
        raise ValueError(f"{', '.join(settings.judgments)}: no judgment has a score")
    if settings.baseline is not None and all(each.model != settings.baseline for each in scores):
        known = ", ".join(sorted({each.model for each in scores}))
        raise ValueError(f"baseline {settings.baseline!r}: has no score; these have: {known}")
    differences = []
    for judge_name in dict.fromkeys(each.judge for each in scores):
        models = [each.model for each in scores if each.judge == judge_name]
        if settings.baseline is None or settings.baseline in models:
            differences += compare_models(judgments, pairs_of(models, settings.baseline, PAIRED), judge_name)
    if settings.json is not None:
        lines = [_plain(asdict(each)) for each in scores] + [_plain(asdict(each)) for each in differences]
        write_file(settings.json, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    several = len({each.judge for each in scores}) > 1
    width = max(len(each.model) for each in scores)
    for each in scores:
        turns = ", ".join(f"turn {turn} {value:.2f}" for turn, value in each.turns.items())
        by = f" by {each.judge}" if several else ""
        again = f", {each.again} of them of an answer judged before" if each.again else ""
        notes = again + (f"; {each.excluded} without a score left out" if each.excluded else "")
        print(
            f"{each.model:{width}}{by}  {each.score:6.3f}  95 % [{each.interval.low:.2f}, {each.interval.high:.2f}]  "
            f"{turns}; {each.judged} judgments of {each.questions} questions{notes}"
        )
    for each in scores:
        _print_spread(each)
    for difference in differences:
        print(
            f"{difference.second} - {difference.first}: {difference.mean:+.3f}, 95 % [{difference.interval.low:+.2f}, "
            f"{difference.interval.high:+.2f}], p = {difference.p_value:.4f} ({difference.adjusted:.4f} for {len(differences)} "
            f"tests), {difference.questions} questions; a difference of {difference.detectable:.2f} would be seen 4 times of 5"
        )
    if not differences and len(scores) > 1:
        print(f"{len(scores)} models: name a --baseline to compare them with")


def _print_spread(each: ModelScore) -> None:
    """Where the spread of a model's scores comes from. A level that was not measured stands in the level before it."""
    parts = [f"{level} {variance:.2f}" for level, variance in each.components.variances.items() if variance is not None]
    missing = [level for level, variance in each.components.variances.items() if variance is None]
    apart = f" (with {', '.join(missing)}, not repeated and so not measured apart)" if missing else ""
    print(f"{each.model}: variance of {', '.join(parts) or 'scores 0'}{apart}; standard error {each.components.error:.3f}")


def _plain(value: Any) -> Any:
    """A value as JSON has it: no infinity."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _asker(settings: PaidSettings, part: str) -> Asker:
    journal = Path(settings.out) / "journal" / f"{part}.jsonl"
    return Asker(journal, max_cost=settings.max_cost, max_requests=settings.max_requests)


def _refused(asker: Asker, responder: Responder, settings: PaidSettings) -> set[str]:
    """Say what the endpoint does with parameters. Returns: those that must be left out.

    Raises: ValueError where the endpoint ignores the bound of an answer's cost.
    """
    if not isinstance(responder, Endpoint) or not settings.probe:
        return set()
    found = probe(asker, responder)
    print(f"{settings.url}: {describe(found)}")
    if settings.max_cost is not None and found["max_tokens"] == IGNORED:
        raise ValueError(f"{settings.url}: ignores max_tokens, so that no answer's cost is bounded; leave max_cost out")
    if found["temperature"] == IGNORED:
        print("the temperature is ignored: the answers are drawn as the endpoint likes")
    refused = {name for name in ("temperature", "seed") if found[name] == REFUSED}
    if refused:
        print(f"sent without {' and '.join(sorted(refused))}, which the endpoint refuses")
    return refused


def _started(asker: Asker) -> float:
    """When the first run began: the files' time, so that a run that goes on writes the same bytes."""
    if "started" not in asker.facts:
        asker.note("started", time.time())
    return asker.facts["started"]


def _short_id(row: JsonObject) -> str:
    """22 characters, as FastChat's answer ids have, made from the answer."""
    digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()
    return base64.urlsafe_b64encode(digest)[:22].decode().replace("-", "A").replace("_", "B")


def _report_missing(failures: Sequence[Unanswered], unit: str) -> None:
    """Raises: ValueError where requests had no answer."""
    if failures:
        raise ValueError(
            f"{len(failures)} {unit} are missing, the first one: {failures[0]}; run the command again to ask for them"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parts: dict[str, tuple[type, Any]] = {
        "answer": (AnswerSettings, answer),
        "judge": (JudgeSettings, judge),
        "show": (ShowSettings, show),
    }
    commands(parts, argv, "python -m recipes.mtbench", "MT-Bench: a model answers, a judge scores, the scores are shown.")


if __name__ == "__main__":
    main()
