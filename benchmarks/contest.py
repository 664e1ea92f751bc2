"""Candidates measured in turns: each trains in a process of its own, told how many steps to train and when.

Where all fit side by side they stay, and rounds alternate between them, so that what slows the machine slows all of them. Where
they do not (a GPU's memory), each runs alone from start to end.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT

PEERS = ROOT / "benchmarks" / "peers"
_LOG_LINES = 400


class Gone(Exception):
    """A candidate's process said that it cannot be measured, ended, or took too long; the message says which."""


@dataclass(frozen=True)
class Candidate:
    """arguments: of the interpreter `python`, before the job's file. job: what the process reads. of_ours: it may import from
    the checkout; a peer must not, as Hugging Face has packages of the same names. orders: answered after the rounds."""

    name: str
    arguments: tuple[str, ...]
    job: Mapping[str, Any]
    differs: tuple[str, ...] = ()
    python: str = sys.executable
    of_ours: bool = False
    orders: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What a candidate did: `facts` when it was ready, an answer a round (the first ones `warmup`), answers to its orders."""

    facts: dict[str, Any] = field(default_factory=dict)
    warmup: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None


def contest(
    candidates: Sequence[Candidate],
    scratch: Path,
    *,
    warmup: int,
    rounds: int,
    steps: int,
    side_by_side: bool,
    limit: float,
    watch: Callable[[], AbstractContextManager[dict[str, Any]]] = lambda: contextlib.nullcontext({}),
    report: Callable[[Candidate, Outcome], None] = lambda candidate, outcome: None,
) -> dict[str, Outcome]:
    """Train `warmup` steps with each candidate, then `rounds` times `steps` steps in turns.

    Args: scratch: an existing folder outside the checkout for jobs and logs; limit: seconds that one answer may take; watch:
        entered around each measured round, what it yields is added to the round; report: told of each candidate that is done.
    """
    outcomes = {candidate.name: Outcome() for candidate in candidates}
    groups = [list(candidates)] if side_by_side else [[candidate] for candidate in candidates]
    for group in groups:
        with contextlib.ExitStack() as stack:
            running: dict[str, Process] = {}
            for candidate in group:
                with _noting_absence(outcomes[candidate.name]):
                    process = stack.enter_context(Process(candidate, scratch, limit))
                    outcomes[candidate.name].facts = process.answer()["ready"]
                    if warmup:
                        outcomes[candidate.name].warmup = process.ask({"steps": warmup})
                    running[candidate.name] = process
            names = list(running)
            for turn in range(rounds):
                # Another one first each round: the first after a pause is not always the same.
                shift = turn % len(names) if names else 0
                for name in names[shift:] + names[:shift]:
                    outcome = outcomes[name]
                    if outcome.missing is not None:
                        continue
                    with _noting_absence(outcome):
                        with watch() as seen:
                            answer = running[name].ask({"steps": steps})
                        outcome.rounds.append({**answer, **seen})
            for candidate in group:
                outcome = outcomes[candidate.name]
                for order in candidate.orders if outcome.missing is None else ():
                    try:
                        outcome.answers.update(running[candidate.name].ask({order: True}))
                    except Gone as error:  # what was measured before stands
                        outcome.answers[order] = {"missing": str(error)}
                        break
        for candidate in group:
            report(candidate, outcomes[candidate.name])
    return outcomes


@contextlib.contextmanager
def _noting_absence(outcome: Outcome):
    try:
        yield
    except Gone as error:
        outcome.missing = str(error)


class Process:
    """A candidate's process. A context manager: it has ended when the block is left."""

    def __init__(self, candidate: Candidate, scratch: Path, limit: float) -> None:
        self.name, self.limit = candidate.name, limit
        slug = "".join(letter if letter.isalnum() else "-" for letter in candidate.name)
        job = scratch / f"{slug}.json"
        job.write_text(json.dumps(dict(candidate.job)), encoding="utf-8")
        self.log = scratch / f"{slug}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [candidate.python, *candidate.arguments, str(job)], cwd=ROOT if candidate.of_ours else scratch,
                env=environment(candidate, scratch), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, encoding="utf-8", start_new_session=True,
            )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            # One that is asked for nothing more ends by itself; when this process is interrupted, it may be in a long step.
            self._process.wait(timeout=20 if kind is None else 0)
        except subprocess.TimeoutExpired:
            self._kill()

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
            line = self._lines.get(timeout=self.limit)
        except queue.Empty:
            self._kill()
            raise Gone(f"cut off after {self.limit:.0f} s") from None
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

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _reason(self) -> str:
        """Why a process ended by itself: out of memory, or the last line that it left."""
        code = self._process.wait()
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]]
        wanted = next((line for line in reversed(lines) if "out of memory" in line.lower()), None)
        return f"exit {code}: {wanted or next((line for line in reversed(lines) if line), 'no output')}"[:400]


def environment(candidate: Candidate, scratch: Path) -> dict[str, str]:
    """The variables of a candidate's process: offline, its caches in `scratch`, and for a peer nothing of the checkout."""
    variables = dict(os.environ)
    variables.update(
        HF_HOME=str(scratch / "hf"), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false",
        TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1", PYTHONUNBUFFERED="1", USE_HUB_KERNELS="NO",
    )  # fmt: skip
    if threads := candidate.job.get("threads"):
        variables.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    if not candidate.of_ours:
        kept = [path for path in variables.pop("PYTHONPATH", "").split(os.pathsep) if path and Path(path).resolve() != ROOT]
        if kept:
            variables["PYTHONPATH"] = os.pathsep.join(kept)
    return variables
