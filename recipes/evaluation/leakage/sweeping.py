"""The commands `recipes.leakage hazard` and `sweep`: models, files, tables and the drawing around `samplers`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.environment import choose_device
from engine.inference.journal import Journal
from engine.inference.opening import open_model
from model.folder import write_file
from model.mistral import Mistral
from model.sampling import Sampling
from model.vocabulary.tokenizer import Tokenizer
from recipes.drawing import new_figure, save_figure
from recipes.evaluation.leakage.detector import detect
from recipes.evaluation.leakage.records import Answered, rate, read_answers
from recipes.evaluation.leakage.samplers import Foreseen, Reference, distinct, foreign_pieces, foresee, generated
from recipes.evaluation.statistics import bootstrap_mean

_NAMES = ("temperature", "min_p", "top_p", "repetition_penalty")


@dataclass(frozen=True)
class Plan:
    """What a sweep generates. limit: prompts, 0 for all."""

    samplers: list[Sampling]
    samples: int
    limit: int
    rows: int
    seed: int


def _references(answers: Sequence[Answered]) -> list[Reference]:
    """The answers without leaks that say something."""
    verdicts = [(answer, detect(answer.messages, answer.response)) for answer in answers if answer.response.strip()]
    return [Reference(each.messages, each.response, found.language) for each, found in verdicts if not found.leak]


def _foreseen(
    model: Mistral, tokenizer: Tokenizer, references: Sequence[Reference], samplers: Sequence[Sampling]
) -> list[list[Foreseen]]:
    """Of each reference, each sampler."""
    foreign = {language: foreign_pieces(tokenizer, language) for language in {each.language for each in references}}
    return [
        foresee(model, tokenizer, each, samplers, foreign[each.language])
        for each in tqdm(references, desc="references", disable=None)
    ]


def _named(sampler: Sampling) -> dict[str, float]:
    return {name: value for name, value in asdict(sampler).items() if name in _NAMES}


def _share(rows: Sequence[Foreseen]) -> float:
    return sum(row.kept for row in rows) / max(1, sum(row.tokens for row in rows))


def hazard(name: str, path: str, out: str, samplers: Sequence[Sampling], limit: int, device: str) -> None:
    """Write and print the hazard of each sampler. Raises: ValueError where no reference is without leaks."""
    answers = read_answers(path)[: limit or None]
    references = _references(answers)
    if not references:
        raise ValueError(f"{path}: no answer without leaks: references must be clean")
    _, tokenizer, model = open_model(name, choose_device(device))
    foreseen = _foreseen(model, tokenizer, references, samplers)
    table = []
    for sampler, rows in zip(samplers, zip(*foreseen, strict=True), strict=True):
        leak = bootstrap_mean([row.leak for row in rows])
        tokens = max(1, sum(row.tokens for row in rows))
        table.append(
            {
                **_named(sampler),
                "hazard_per_token": sum(row.hazard for row in rows) / tokens,
                "leak": sum(row.leak for row in rows) / len(rows),
                "low": _finite(leak.low),
                "high": _finite(leak.high),
                "kept": _share(rows),
            }
        )
    found = {"references": len(references), "left_out": len(answers) - len(references), "samplers": table}
    write_file(out, json.dumps(found, indent=1) + "\n")
    print(f"{len(references):,} references; {len(answers) - len(references):,} left out, as empty or leaking")
    print(f"{_heading()}{'per token':>12}{'answer':>9}{'kept':>8}")
    for row in table:
        print(f"{_cells(row)}{row['hazard_per_token']:>12.2e}{row['leak']:>9.2%}{row['kept']:>8.1%}")


def _finite(bound: float) -> float:
    """A probability's bound: one reference alone says nothing."""
    return min(1.0, max(0.0, bound))


def _heading() -> str:
    return f"{'temperature':>12}{'min-p':>8}{'top-p':>8}{'penalty':>9}"


def _cells(row: dict[str, Any]) -> str:
    return f"{row['temperature']:>12g}{row['min_p']:>8g}{row['top_p']:>8g}{row['repetition_penalty']:>9g}"


def sweep(name: str, path: str, out: str, plan: Plan, device: str) -> None:
    """Generate what the journal lacks, then write and print the table. Raises: ValueError for a journal of another sweep."""
    prompts = _prompts(path, plan.limit)
    folder = Path(out)
    _, tokenizer, model = open_model(name, choose_device(device))
    wanted = [
        (sampler, prompt, sample)
        for sampler in range(len(plan.samplers))
        for prompt in range(len(prompts))
        for sample in range(plan.samples)
    ]
    header = {
        "model": name,
        "prompts": [answer.messages for answer in prompts],
        "samplers": [asdict(sampler) for sampler in plan.samplers],
        "samples": plan.samples,
        "seed": plan.seed,
    }
    done: dict[tuple[int, int, int], dict[str, Any]] = {}
    with Journal(folder / "answers.jsonl") as journal:
        _check_same(folder / "settings.json", header, journal)
        done = {(entry["sampler"], entry["prompt"], entry["sample"]): entry for _, entry in journal.entries()}
        missing = [which for which in wanted if which not in done]
        conversations = [answer.messages for answer in prompts]
        answers = generated(model, tokenizer, conversations, plan.samplers, missing, seed=plan.seed, rows=plan.rows)
        for which, ids, text in tqdm(answers, total=len(missing), desc="answers", disable=None):
            verdict = detect(prompts[which[1]].messages, text)
            entry = {
                **dict(zip(("sampler", "prompt", "sample"), which, strict=True)),
                "messages": prompts[which[1]].messages,
                "response": text,
                "ids": ids,
                "leak": verdict.leak,
                "spans": [list(span) for span in verdict.spans],
            }
            journal.append(entry, synced=False)
            done[which] = entry
    references = _references([answer for answer in prompts if answer.response])
    foreseen = _foreseen(model, tokenizer, references, plan.samplers) if references else []
    table = []
    for number, sampler in enumerate(plan.samplers):
        own = [done[which] for which in wanted if which[0] == number]
        found = rate([entry["leak"] for entry in own], [str(entry["prompt"]) for entry in own])
        texts = [entry["ids"] for entry in own]
        table.append(
            {
                **_named(sampler),
                "answers": found.answers,
                "leaks": found.leaks,
                "rate": found.share,
                "low": _finite(found.interval.low),
                "high": _finite(found.interval.high),
                "kept": _share([row[number] for row in foreseen]) if foreseen else None,
                "distinct_1": distinct(texts, 1),
                "distinct_2": distinct(texts, 2),
            }
        )
    write_file(folder / "sweep.json", json.dumps({"references": len(references), "samplers": table}, indent=1) + "\n")
    _draw(table, folder / "sweep.svg")
    print(f"{_heading()}{'leaks':>9}  {'95 %':<16}{'kept':>8}{'distinct-2':>12}")
    for row in table:
        kept = "-" if row["kept"] is None else f"{row['kept']:.1%}"
        between = f"[{row['low']:.1%}, {row['high']:.1%}]"
        print(f"{_cells(row)}{row['rate']:>9.1%}  {between:<16}{kept:>8}{row['distinct_2']:>12.3f}")


def _check_same(path: Path, header: dict[str, Any], journal: Journal) -> None:
    """Write what a sweep is, or compare it with what the folder holds. Raises: ValueError for another sweep's folder."""
    text = json.dumps(header, ensure_ascii=False, indent=1) + "\n"
    held = path.read_text(encoding="utf-8") if path.exists() else None
    if held is None and next(journal.entries(), None) is None:
        write_file(path, text)
    elif held != text:
        raise ValueError(f"{path.parent}: holds another sweep: name another folder, or the same model, prompts and samplers")


def _prompts(path: str, limit: int) -> list[Answered]:
    """The conversations of a file, each once."""
    found = {json.dumps(answer.messages): answer for answer in read_answers(path, prompts=True)}
    return list(found.values())[: limit or None]


def _draw(table: Sequence[dict[str, Any]], path: Path) -> None:
    """A line a sampler, those that leak least at the top: its rate, beside the tokens that it keeps and distinct bigrams."""
    figure = new_figure(11, 1.2 + 0.28 * len(table))
    if figure is None:
        return
    rows = sorted(table, key=lambda row: (row["rate"], -(row["kept"] or 0), -row["distinct_2"]))
    places = list(range(len(rows), 0, -1))
    leaks, kept, distinct_2 = figure.subplots(1, 3, sharey=True)
    rates = [100 * row["rate"] for row in rows]
    below = [max(0.0, up - 100 * row["low"]) for up, row in zip(rates, rows, strict=True)]
    above = [max(0.0, 100 * row["high"] - up) for up, row in zip(rates, rows, strict=True)]
    leaks.errorbar(rates, places, xerr=[below, above], fmt="o", color="0.2", capsize=3)
    leaks.set_yticks(places, [_label(row) for row in rows], fontsize=8)
    if all(row["kept"] is not None for row in rows):
        kept.plot([100 * row["kept"] for row in rows], places, "o", color="tab:blue")
    distinct_2.plot([row["distinct_2"] for row in rows], places, "o", color="tab:green")
    titles = ("answers that leak, %, with 95 % interval", "reference tokens kept, %", "distinct bigrams")
    for axes, title in zip((leaks, kept, distinct_2), titles, strict=True):
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_ylim(0.4, len(rows) + 0.6)
    save_figure(figure, path)


def _label(row: dict[str, Any]) -> str:
    return f"T {row['temperature']:g}, min-p {row['min_p']:g}, top-p {row['top_p']:g}, penalty {row['repetition_penalty']:g}"
