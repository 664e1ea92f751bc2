"""Steps whose loss stands out: noted with all that they were made of, so that they can be looked at and replayed.

The losses are looked at when they are logged, so that nothing waits for the device in between.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.data.plan import Plan
from engine.settings.sections import LEAST_HISTORY, GuardSettings

# A scale needs a few losses; below this share of the median, what differs is rounding.
_FLOOR = 1e-3
# The median distance from the median of normal noise, in standard deviations.
_NORMAL = 0.6745


class SpikeLog:
    """Compares each loss with those before it, and writes the steps that stand out to `file`, a line of JSON each:
    step, loss, gradient_norm, median, deviations (both null for a loss that is not finite), documents."""

    def __init__(self, file: Path, settings: GuardSettings, plan: Plan) -> None:
        self.file, self._settings, self._plan = file, settings, plan
        self._losses: deque[float] = deque(maxlen=settings.history)

    def resume(self, losses: Iterable[float]) -> None:
        """Take the losses of the steps before, so that a resumed run sees what one without a break would."""
        self._losses.extend(losses)

    def look(self, line: dict[str, Any]) -> str | None:
        """Take a step's logged values. Returns: a message where it stands out, None otherwise."""
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
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(note, ensure_ascii=False) + "\n")
        return f"step {line['step']}: {what}its documents are in {self.file}, --replay {line['step']} runs it again"

    def _compared(self, loss: float) -> tuple[float | None, float | None]:
        """The median before this loss and how many deviations it is above that; None while too few are known."""
        if len(self._losses) < LEAST_HISTORY:
            return None, None
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(other - median) for other in self._losses) / _NORMAL
        return median, (loss - median) / max(deviation, _FLOOR * abs(median), 1e-30)


def documents_of(plan: Plan, step: int) -> list[dict[str, Any]]:
    """What a global step (from 0) is made of, over all ranks: source folder, document, start (place in it) and tokens of each
    segment; of pairs the source folder, the pair and the tokens of both sides."""
    units = plan.units(step)
    rows = list(zip(*(column.tolist() for column in (units.source, units.document, units.start, units.places)), strict=True))
    if not plan.paired:
        return [
            {"source": plan.sources[source].path, "document": document, "start": start, "tokens": places}
            for source, document, start, places in rows
        ]
    return [
        {"source": plan.sources[source].path, "pair": document // 2, "tokens": [chosen, rejected]}
        for (source, document, _, chosen), (_, _, _, rejected) in zip(rows[::2], rows[1::2], strict=True)
    ]
