"""Validate translations: which records of a file went wrong on the way from one language to the other, and why.

python -m recipes.validate pairs.jsonl --source-field en --target-field ja --json checked.jsonl
python -m recipes.validate before.jsonl.gz --after after.jsonl.gz --json checked.jsonl --report runs/checked
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

from engine.settings.toml import PathName
from model.folder import complete_folder
from recipes.command import command, with_first
from recipes.data_making.rows import check_name, row_writer
from recipes.data_making.validation import Checked, Summary, check_pairs, read_pairs
from recipes.data_making.validation_report import describe, write_report


@dataclass(frozen=True, kw_only=True)
class ValidateSettings:
    """Checks of a file of translations, or of the same conversations before and after translation: each record gets reasons."""

    file: PathName
    """Records (.jsonl, .json, each also .gz; .parquet). May be given without the option's name."""
    source_field: str | None = None
    """Field of the source: a text, or a conversation in any form that recipes.prepare reads. Default: source; with --after
    the whole record."""
    target_field: str | None = None
    """Field of the target, in the same form as the source. Default: target; with --after as source_field."""
    after: PathName | None = None
    """File with the targets, whose records are those of `file` in the same order."""
    source_language: Literal["en", "ja", "other"] | None = None
    """Language of the sources; found from the first records by default."""
    target_language: Literal["en", "ja", "other"] | None = None
    """Language of the targets; by default the other one of en and ja."""
    finish_field: str = "finish_reason"
    """Field beside the target that says how its generation ended; anything but stop means that the text was cut off."""
    json: PathName | None = None
    """Write a line of JSON for each record: number, ok, reasons, and details: text, reason, what was seen, and certain: false
    where only a person can tell. The name ends in .jsonl, .jsonl.gz or .parquet."""
    report: PathName | None = None
    """Write a folder with report.md (counts by reason, examples, what a person should look at), a drawing and
    look.jsonl, the records behind it."""
    show: int = 3
    """Examples of each reason in the report."""
    processes: int = 0
    """Processes that share the work; 0: as many as the machine has cores."""
    overwrite: bool = False
    """Replace an existing folder of a report."""

    def __post_init__(self) -> None:
        for name, least in (("show", 0), ("processes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if self.json is not None:
            check_name(self.json)


def run(settings: ValidateSettings) -> Summary:
    """Check every record; write the lines and the report; print the counts. Raises: ValueError naming the place of a fault."""
    if settings.after is None:
        fields = (settings.source_field or "source", settings.target_field or "target")
    else:
        fields = (settings.source_field or "", settings.target_field or settings.source_field or "")
    pairs = read_pairs(settings.file, settings.after, fields, settings.finish_field)
    processes = settings.processes or len(os.sched_getaffinity(0))
    checked = check_pairs(pairs, (settings.source_language, settings.target_language), processes)
    with ExitStack() as opened:
        folder = None
        if settings.report is not None:
            folder = opened.enter_context(complete_folder(settings.report, overwrite=settings.overwrite))
        add = opened.enter_context(row_writer(settings.json)) if settings.json is not None else None
        summary = Summary()
        with tqdm(checked, desc="checking", unit=" records", disable=None) as progress:
            for one in progress:
                summary.add(one, settings.show)
                if add is not None:
                    add(_line(one))
        if folder is not None:
            write_report(folder, summary, settings.file)
    print("\n".join(describe(summary)))
    return summary


def _line(checked: Checked) -> dict[str, Any]:
    """A record's line of the result."""
    details = [
        {"text": number, "reason": finding.reason, "detail": finding.detail, "certain": finding.certain}
        for number, finding in checked.findings
    ]
    return {"number": checked.pair.number, "ok": not checked.reasons, "reasons": checked.reasons, "details": details}


def main(argv: Sequence[str] | None = None) -> None:
    command(ValidateSettings, run, with_first(argv, "file"), "python -m recipes.validate")


if __name__ == "__main__":
    main()
