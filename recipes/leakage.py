"""Language leakage: text in another language than the answer's, without a reason.

python -m recipes.leakage detect answers.jsonl --json found.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.settings.toml import PathName
from model.folder import write_file
from model.sampling import Sampling
from recipes.command import commands, with_name


@dataclass(frozen=True, kw_only=True)
class DetectSettings:
    """Mark, span by span, text in another language than the answer's without a reason: code, addresses, quotes, words of the
    prompt, acronyms, names, units and glosses are reasons."""

    answers: PathName
    """Records with `messages` and `response` (.jsonl, .json, or .gz of them), or a folder of such files. May be given without
    the option's name."""
    json: PathName | None = None
    """Write a line of JSON for each record: its number, its id where it has one, language, leak, and spans: [start, end) in
    characters of the response."""
    by: tuple[str, ...] = ()
    """Print the rate for each value of these fields of the records, such as model temperature."""
    show: int = 5
    """Print so many of the leaks."""


def detect(settings: DetectSettings) -> None:
    from recipes.evaluation.leakage.detector import detect as detect_leaks
    from recipes.evaluation.leakage.records import rate, rates_by, read_answers

    answers = read_answers(settings.answers)
    verdicts = [detect_leaks(answer.messages, answer.response) for answer in answers]
    leaks = [verdict.leak for verdict in verdicts]
    by = list(rates_by(answers, leaks, settings.by)) if settings.by else []
    if settings.json is not None:
        lines = []
        for answer, verdict in zip(answers, verdicts, strict=True):
            name = {"id": answer.fields["id"]} if "id" in answer.fields else {}
            found = {"language": verdict.language, "leak": verdict.leak, "spans": verdict.spans}
            lines.append(json.dumps({"number": answer.number, **name, **found}, ensure_ascii=False) + "\n")
        write_file(settings.json, "".join(lines))
    for answer, verdict in [pair for pair in zip(answers, verdicts, strict=True) if pair[1].leak][: settings.show]:
        texts = [answer.response[start:end][:60] for start, end in verdict.spans]
        print(f"{answer.place}: {json.dumps(texts, ensure_ascii=False)}")
    for key, group in [(("all",), rate(leaks, [answer.prompt for answer in answers])), *by]:
        low, high = group.interval.low, group.interval.high
        print(f"{' '.join(key)}: {group.leaks:,} of {group.answers:,} answers leak, {group.share:.1%} [{low:.1%}, {high:.1%}]")


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """The samplers to compare: every combination."""

    temperature: tuple[float, ...] = (0.5, 0.7, 1.0)
    """Temperatures; 0 is greedy."""
    min_p: tuple[float, ...] = (0.0, 0.05)
    """min-p; 0 keeps all."""
    top_p: tuple[float, ...] = (1.0, 0.95)
    """top-p; 1 keeps all."""
    repetition_penalty: tuple[float, ...] = (1.0, 1.15)
    """Repetition penalties; 1 changes nothing."""

    def samplers(self, max_new_tokens: int) -> list[Sampling]:
        from recipes.evaluation.leakage.samplers import grid

        return grid(self.temperature, self.min_p, self.top_p, self.repetition_penalty, max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class HazardSettings:
    """The probability that each sampler gives to foreign script along reference answers, from one pass over them."""

    model: PathName
    """Run folder (its newest checkpoint), Hugging Face folder, or hub repository owner/name. May be given without the option's
    name."""
    references: PathName
    """Answers without leaks: records with messages and response. Those that leak are left out, and counted."""
    json: PathName
    """Write the table here."""
    limit: int = 0
    """Use the first so many references; 0: all."""
    samplers: SamplerSettings = field(default_factory=SamplerSettings)
    """The samplers to compare."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Generate answers under each sampler, and measure how many leak beside what the sampler costs."""

    model: PathName
    """Run folder (its newest checkpoint), Hugging Face folder, or hub repository owner/name. May be given without the option's
    name."""
    prompts: PathName
    """Records with messages. Where they have a response too, clean ones are the references for the share of tokens kept."""
    out: PathName
    """Folder for answers.jsonl (from which a stopped sweep goes on), sweep.json and sweep.svg."""
    samples: int = 1
    """Answers to each prompt under each sampler."""
    max_new_tokens: int = 256
    """Maximal length of an answer."""
    limit: int = 0
    """Use the first so many prompts; 0: all."""
    rows: int = 32
    """Answers generated side by side."""
    seed: int = 0
    """Seed of the random draws."""
    samplers: SamplerSettings = field(default_factory=SamplerSettings)
    """The samplers to compare."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""

    def __post_init__(self) -> None:
        for name in ("samples", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PairsSettings:
    """Make preference pairs of the answers to one prompt: a leaked one rejected, a clean one chosen."""

    answers: PathName
    """Records with `messages` and `response`, several for a prompt, or a folder of such files. May be given without the
    option's name."""
    out: PathName
    """Write the pairs here (.jsonl), as recipes.prepare --kind preferences reads them."""
    most: int = 4
    """Pairs of a prompt, at most."""


def hazard(settings: HazardSettings) -> None:
    from recipes.evaluation.leakage.sweeping import hazard as foresee_all

    foresee_all(
        settings.model, settings.references, settings.json, settings.samplers.samplers(1), settings.limit, settings.device
    )


def sweep(settings: SweepSettings) -> None:
    from recipes.evaluation.leakage.sweeping import Plan
    from recipes.evaluation.leakage.sweeping import sweep as sweep_all

    samplers = settings.samplers.samplers(settings.max_new_tokens)
    plan = Plan(samplers, settings.samples, settings.limit, settings.rows, settings.seed)
    sweep_all(settings.model, settings.prompts, settings.out, plan, settings.device)


def pairs(settings: PairsSettings) -> None:
    from recipes.evaluation.leakage.pairing import Found
    from recipes.evaluation.leakage.pairing import pairs as pairs_of
    from recipes.evaluation.leakage.records import read_answers

    found = Found()
    made = list(pairs_of(read_answers(settings.answers), settings.most, found))
    print(
        f"{len(made):,} pairs of {found.prompts:,} prompts; {found.leaked:,} answers leak; {found.without_clean:,} prompts "
        "have leaked answers and no clean one"
    )
    if not made:
        raise ValueError(
            f"{settings.answers}: no prompt has a leaked and a clean answer: sample several answers to each prompt"
        )
    write_file(settings.out, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in made))


PARTS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "detect": (DetectSettings, detect),
    "hazard": (HazardSettings, hazard),
    "sweep": (SweepSettings, sweep),
    "pairs": (PairsSettings, pairs),
}
# The option whose name may be left out.
_FIRST = {"detect": "answers", "hazard": "model", "sweep": "model", "pairs": "answers"}


def main(argv: Sequence[str] | None = None) -> None:
    commands(PARTS, with_name(argv, _FIRST), "python -m recipes.leakage", __doc__ or "")


if __name__ == "__main__":
    main()
