"""Language leakage: text in another language than the answer's, without a reason.

python -m recipes.leakage detect answers.jsonl --json found.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from engine.settings.toml import PathName
from model.folder import write_file
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


PARTS = {"detect": (DetectSettings, detect)}


def main(argv: Sequence[str] | None = None) -> None:
    commands(PARTS, with_name(argv, {"detect": "answers"}), "python -m recipes.leakage", __doc__ or "")


if __name__ == "__main__":
    main()
