"""Learning-rate schedules: a pure function of the step."""

import math

from engine.settings.sections import ScheduleSettings


def learning_rate(settings: ScheduleSettings, step: int, steps: int) -> float:
    """Learning rate of step `step` (counted from 0) of `steps`. Both are counted from `settings.start` in what follows.

    Step s of the warm-up has peak * (s + 1) / warmup_steps; the first step after the warm-up has the peak. The decay would
    reach final_share * peak one step after the last, so no step is wasted on a rate of 0.
    """
    step, steps = step - settings.start, steps - settings.start
    if step < settings.warmup_steps:
        return settings.peak * (step + 1) / settings.warmup_steps
    if settings.kind == "constant":
        return settings.peak
    progress = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if settings.kind == "cosine" else 1 - progress
    return settings.peak * (settings.final_share + (1 - settings.final_share) * share)
