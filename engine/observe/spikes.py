"""Loss spikes: steps whose loss stands out are recorded with their documents, to be looked at and replayed.

Losses are examined when they are logged, so nothing waits for the device between log lines.
"""

import contextlib
import json
import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.data.plan import Plan
from engine.observe.line_file import LineFile
from engine.settings.sections import LEAST_HISTORY, GuardSettings

# Least deviation, as a share of the median: smaller differences are rounding.
_FLOOR = 1e-3
# Median distance from the median of normal noise, in standard deviations.
_NORMAL = 0.6745


class SpikeLog:
    """Compares each loss with the losses before it and appends the steps that stand out to a JSON-lines file.

    A line holds step, loss, gradient_norm, median and deviations (null for a loss that is not finite), and documents.
    """

    def __init__(
        self,
        file: Path,  # spikes.jsonl of the run folder
        settings: GuardSettings,
        plan: Plan,
    ) -> None:
        self.file, self._settings, self._plan = file, settings, plan
        self._lines = LineFile(file)
        self._losses: deque[float] = deque(maxlen=settings.history)

    def resume(self, losses: Iterable[float]) -> None:
        """Take the losses of earlier steps, so that a resumed run sees the spikes that an unbroken one would."""
        self._losses.extend(losses)

    def write(self) -> None:
        """Write the steps that could not be written before. Raises: OSError."""
        self._lines.add()

    def check(self, line: dict[str, Any]) -> str | None:
        """Take a step's logged values. Returns a message if the step stands out, else None."""
        if not self._settings.spike:
            return None
        values = {name: line[name] if math.isfinite(line[name]) else None for name in ("loss", "gradient_norm")}
        median = deviations = None
        what = ""
        if None not in values.values():
            median, deviations = self._compared(line["loss"])
            self._losses.append(line["loss"])
            if deviations is None or deviations < self._settings.spike:
                return None
            what = f"loss {line['loss']:.4f} is {deviations:.1f} deviations above the median {median:.4f} of the steps before; "
        documents = documents_of(self._plan, line["step"] - 1)
        note = {"step": line["step"], **values, "median": median, "deviations": deviations, "documents": documents}
        with contextlib.suppress(OSError):
            # A full disk must not end the run; `write` tries again and says so.
            self._lines.add([json.dumps(note, ensure_ascii=False)])
        return f"step {line['step']}: {what}its documents are in {self.file}, --replay {line['step']} runs it again"

    def _compared(self, loss: float) -> tuple[float | None, float | None]:
        """The median of the losses before, and this loss's distance above it in deviations; None with too few losses."""
        if len(self._losses) < LEAST_HISTORY:
            return None, None
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(other - median) for other in self._losses) / _NORMAL
        return median, (loss - median) / max(deviation, _FLOOR * abs(median), 1e-30)


def documents_of(
    plan: Plan,
    step: int,  # global step, from 0
) -> list[dict[str, Any]]:
    """The documents of a step, over all ranks.

    A document has source (folder), document (number), start (its first token here) and tokens. A preference pair has source,
    pair (number) and tokens of both sides.
    """
    units = plan.units(step)
    rows = list(zip(*(column.tolist() for column in (units.source, units.document, units.start, units.places)), strict=True))
    if not plan.paired:
        return [
            {"source": plan.sources[source].path, "document": document, "start": start, "tokens": tokens}
            for source, document, start, tokens in rows
        ]
    return [
        {"source": plan.sources[source].path, "pair": document // 2, "tokens": [chosen, rejected]}
        for (source, document, _, chosen), (_, _, _, rejected) in zip(rows[::2], rows[1::2], strict=True)
    ]
