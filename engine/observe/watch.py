"""The observers of a run, entered once around its steps: watchdog, stragglers, garbage collection, profiler."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from engine.distributed.garbage import GarbageAtLogLines
from engine.distributed.stragglers import RankWaits
from engine.distributed.watchdog import Watchdog
from engine.observe.profile import StepProfiler
from engine.run import Run
from model.mistral import Mistral


class Watch:
    """A context manager around the steps of a run.

    ranks: the run's ranks, with the wait in each sum over them measured.
    """

    def __init__(self, run: Run, model: Mistral) -> None:
        self._log_every, self._last = run.settings.log.every, run.plan.steps
        self._watchdog = Watchdog(run.ranks, run.settings.parallel.timeout)
        self._garbage = GarbageAtLogLines()
        self._profiler = StepProfiler(run.settings.profile, run.out, run.ranks)
        waits = RankWaits(model, run.ranks)
        self.ranks = replace(run.ranks, timed=waits.timed)
        self.seconds_waited = waits.take
        self.alive = self._watchdog.alive
        self._entered = ExitStack()

    def __enter__(self) -> "Watch":
        self._entered.enter_context(self._watchdog)
        self._entered.enter_context(self._garbage)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of this number, from 1: profiled if it was chosen, and a sign of life afterwards."""
        with self._profiler.around(number):
            yield
        self.alive()
        if number % self._log_every == 0 or number == self._last:
            self._garbage.collect()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that may take longer than the watchdog waits."""
        self._watchdog.pause()
        yield
        self.alive()
