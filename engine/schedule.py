"""Learning-rate schedules: a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleSettings:
    """kind: shape after the warm-up. peak: learning rate at the end of the warm-up. warmup_steps: linear rise from 0.
    final_share: of the peak, where cosine and linear end."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    peak: float = 1e-5
    warmup_steps: int = 0
    final_share: float = 0.0

    def __post_init__(self) -> None:
        if not self.peak > 0:
            raise ValueError(f"schedule.peak = {self.peak}: the learning rate must be above 0")
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps = {self.warmup_steps}: must be 0 or more")
        if not 0 <= self.final_share <= 1:
            raise ValueError(f"schedule.final_share = {self.final_share}: must lie in 0 .. 1")
        if self.kind == "constant" and self.final_share:
            raise ValueError("schedule.final_share has no effect with a constant schedule; leave it out")


def learning_rate(settings: ScheduleSettings, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    Step s of the warm-up has peak * (s + 1) / warmup_steps, the first step after it the peak; the decay would reach
    final_share * peak at step `steps`, one after the last, so that no step is wasted on a rate of 0.
    """
    if step < settings.warmup_steps:
        return settings.peak * (step + 1) / settings.warmup_steps
    if settings.kind == "constant":
        return settings.peak
    progress = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if settings.kind == "cosine" else 1 - progress
    return settings.peak * (settings.final_share + (1 - settings.final_share) * share)
