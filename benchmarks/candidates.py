"""Candidates train in turns, each in a process of its own that is told how many steps to train and when.

Side by side, all candidates stay in memory and their rounds alternate, so that whatever slows the machine slows all of them.
Otherwise (a GPU's memory holds one) each candidate runs alone from start to end.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import rotated
from benchmarks.processes import end
from benchmarks.results import ROOT

_LOG_LINES = 400


class Gone(Exception):
    """A candidate cannot be measured, has ended, or took too long; the message gives the reason."""


@dataclass(frozen=True)
class Candidate:
    name: str
    arguments: tuple[str, ...]  # of the interpreter; the job's file follows them
    job: Mapping[str, Any]  # content of the job's file
    differs: tuple[str, ...] = ()  # how it differs from ours, in words
    python: str = sys.executable
    of_ours: bool = False  # may import from the checkout; a peer must not: Hugging Face has a package `kernels` too
    orders: tuple[str, ...] = ()  # further orders, given after the rounds


@dataclass
class Outcome:
    facts: dict[str, Any] = field(default_factory=dict)  # the candidate's "ready" message
    warmup: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)  # one answer a round
    answers: dict[str, Any] = field(default_factory=dict)  # to the further orders
    missing: str | None = None

    @property
    def losses(self) -> list[float]:
        return [loss for answer in (self.warmup, *self.rounds) for loss in answer.get("loss", [])]


@dataclass(frozen=True)
class Schedule:
    warmup: int  # steps before the first round
    rounds: int
    steps: int  # of a round
    limit: float  # seconds that one answer may take
    side_by_side: bool


def take_turns(
    candidates: Sequence[Candidate],
    schedule: Schedule,
    scratch: Path,  # existing folder outside the checkout, for jobs and logs
    report: Callable[[Candidate, Outcome], None] = lambda candidate, outcome: None,  # called when a candidate is done
) -> dict[str, Outcome]:
    """Train the warm-up with each candidate, then the rounds in turns."""
    outcomes = {candidate.name: Outcome() for candidate in candidates}
    groups = [list(candidates)] if schedule.side_by_side else [[candidate] for candidate in candidates]
    for group in groups:
        with ExitStack() as stack:
            running: dict[str, Process] = {}
            for candidate in group:
                with _absence_noted(outcomes[candidate.name]):
                    process = stack.enter_context(Process(candidate, scratch, schedule.limit))
                    outcomes[candidate.name].facts = process.answer()["ready"]
                    outcomes[candidate.name].warmup = process.ask({"steps": schedule.warmup}) if schedule.warmup else {}
                    running[candidate.name] = process
            for turn in range(schedule.rounds):
                for name in rotated(list(running), turn):
                    if outcomes[name].missing is None:
                        with _absence_noted(outcomes[name]):
                            outcomes[name].rounds.append(running[name].ask({"steps": schedule.steps}))
            for candidate in group:
                if outcomes[candidate.name].missing is None:
                    _give_orders(candidate, outcomes[candidate.name], running[candidate.name])
        for candidate in group:
            report(candidate, outcomes[candidate.name])
    return outcomes


def _give_orders(candidate: Candidate, outcome: Outcome, process: "Process") -> None:
    for order in candidate.orders:
        try:
            outcome.answers.update(process.ask({order: True}))
        except Gone as error:  # the measured rounds stay valid
            outcome.answers[order] = {"missing": str(error)}
            return


@contextlib.contextmanager
def _absence_noted(outcome: Outcome) -> Iterator[None]:
    try:
        yield
    except Gone as error:
        outcome.missing = str(error)


class Process:
    """A candidate's process. Leaving the context ends it."""

    def __init__(self, candidate: Candidate, scratch: Path, limit: float) -> None:
        self._limit = limit
        slug = "".join(letter if letter.isalnum() else "-" for letter in candidate.name)
        job = scratch / f"{slug}.json"
        job.write_text(json.dumps(dict(candidate.job)), encoding="utf-8")
        self._log = scratch / f"{slug}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [candidate.python, *candidate.arguments, str(job)],
                cwd=ROOT if candidate.of_ours else scratch,
                env=environment(candidate, scratch),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        # The end of its orders ends it. After an error here it may be in a long step, so nobody waits for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20 if kind is None else 0)
        end(self._process)

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Give an order and wait for its answer. Raises: Gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise Gone(self._reason()) from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises: Gone."""
        try:
            line = self._lines.get(timeout=self._limit)
        except queue.Empty:
            end(self._process)
            raise Gone(f"cut off after {self._limit:.0f} s") from None
        if line is None:
            raise Gone(self._reason())
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise Gone(answer["missing"])
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _reason(self) -> str:
        """Why the process ended: out of memory if its log says so, else the last line of the log."""
        code = self._process.wait()
        lines = [line.strip() for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]]
        memory = next((line for line in reversed(lines) if "out of memory" in line.lower()), None)
        return f"exit {code}: {memory or next((line for line in reversed(lines) if line), 'no output')}"[:400]


def environment(candidate: Candidate, scratch: Path) -> dict[str, str]:
    """Variables of a candidate's process: offline, caches in `scratch`, and for a peer nothing of the checkout."""
    variables = dict(os.environ) | {"HF_HOME": str(scratch / "hf"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    variables |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "USE_HUB_KERNELS": "NO"}
    variables |= {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    if threads := candidate.job.get("threads"):
        variables.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    if not candidate.of_ours:
        kept = [path for path in variables.pop("PYTHONPATH", "").split(os.pathsep) if path and Path(path).resolve() != ROOT]
        if kept:
            variables["PYTHONPATH"] = os.pathsep.join(kept)
    return variables
