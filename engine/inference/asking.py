"""Many chat requests, answered once each: by an endpoint or a folder, with a journal, a budget and progress.

A job is an async function of one item; it may ask several times, and each question may depend on the answers before it:

    with Asker("runs/eval/journal.jsonl", max_cost=2.0) as asker:

        async def answer(question: str) -> str:
            first = await asker.ask(endpoint, ChatRequest([user(question)], {"max_tokens": 64}))
            return first.text

        for number, outcome in asker.run(answer, questions):
            ...

Every answer is in the journal before the job sees it. The same command again asks only what has no answer yet. Ctrl-C and
SIGTERM let what is in flight come in, then end the run; a kill loses what is in flight.
"""

import asyncio
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from engine.inference.budget import Budget, BudgetReached
from engine.inference.journal import Journal
from model.vocabulary.chat import Message

Item = TypeVar("Item")
Result = TypeVar("Result")

# Seconds between lines of progress where standard error is a file.
_LINE_EVERY = 30.0


class Unanswered(Exception):
    """A request that the endpoint refuses, or does not answer after all tries. Other requests go on."""


class RunStopped(Exception):
    """No request can be answered any more. `error`: what the user is told."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class ChatRequest:
    """A conversation that ends with a user message, and how the answer is drawn.

    parameters: as the chat completions of OpenAI name them (temperature, top_p, max_tokens, seed, stop, ...), with vLLM's
        top_k, min_p and repetition_penalty. Leave n alone, which many endpoints ignore: ask again with another `draw`.
    draw: tells independent answers to the same request apart; it is not sent.
    """

    messages: Sequence[Message]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    draw: int = 0

    def key(self, model: str) -> str:
        """What the journal knows the answer by."""
        content = [model, list(self.messages), dict(self.parameters), self.draw]
        text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """finish_reason: stop, length (cut off), content_filter, or as the endpoint says. Tokens: None where it does not say."""

    text: str
    finish_reason: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float = 0.0
    answered: int | None = None
    """The budget's ticket; None where nothing was paid for."""
    choices: int = 1
    """Answers in the response. Only the first is kept."""


class Responder(Protocol):
    """An endpoint, or a model in this process."""

    model: str
    """Part of the journal's key."""

    async def answer(self, request: ChatRequest, key: str, asker: "Asker") -> Answer:
        """Raises: Unanswered, RunStopped, BudgetReached."""

    async def close(self) -> None: ...

    def status(self) -> str:
        """What progress says of it."""


class Asker:
    """Asks and keeps the answers. A context manager."""

    def __init__(self, journal: str | Path, *, max_cost: float | None = None, max_requests: int | None = None) -> None:
        """Open the journal; its answers count as given, and its costs as spent.

        Raises: BlockingIOError where another run writes it; ValueError naming the line of a damaged one.
        """
        self.journal = Journal(journal)
        self.budget = Budget(self.journal, max_cost=max_cost, max_requests=max_requests)
        self._places: dict[str, int] = {}  # key -> byte of the answer's line
        self.facts: dict[str, Any] = {}
        """What earlier runs noted by `note`."""
        try:
            for place, entry in self.journal.entries():
                self._read(place, entry)
        except BaseException:
            self.journal.close()
            raise
        self.budget.begin()
        self.given = self.kept = 0
        self._pending: dict[str, asyncio.Task[Answer]] = {}
        self._responders: list[Responder] = []
        self._stop: BaseException | None = None
        self._stopping = asyncio.Event()
        self._loop = asyncio.new_event_loop()

    def _read(self, place: int, entry: dict[str, Any]) -> None:
        try:
            self.budget.read(entry)
            if "text" in entry:
                self._places[entry["key"]] = place
            elif "note" in entry:
                self.facts[entry["note"]] = entry["value"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.journal.path}, byte {place}: not a line of a journal of answers ({error}); name another journal"
            ) from None

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if left := asyncio.all_tasks(self._loop):  # after a second Ctrl-C
                for task in left:
                    task.cancel()
                self._loop.run_until_complete(asyncio.wait(left))
            for responder in self._responders:
                self._loop.run_until_complete(responder.close())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()
            self.journal.close()

    def note(self, name: str, value: Any) -> None:
        """Keep a fact in the journal, such as what a probe found."""
        self.journal.append({"note": name, "value": value})
        self.facts[name] = value

    async def ask(self, responder: Responder, request: ChatRequest) -> Answer:
        """The answer, from the journal or new. Equal requests share one answer.

        Raises: Unanswered.
        """
        key = request.key(responder.model)
        if (place := self._places.get(key)) is not None:
            self.kept += 1
            return _answer_in(self.journal.at(place))
        if key not in self._pending:
            self.check()
            if responder not in self._responders:
                self._responders.append(responder)
            self._pending[key] = asyncio.get_running_loop().create_task(self._obtain(responder, request, key))
        # A job that ends early leaves the request in flight to the others that wait for it, and to the journal.
        return await asyncio.shield(self._pending[key])

    async def _obtain(self, responder: Responder, request: ChatRequest, key: str) -> Answer:
        try:
            answer = await responder.answer(request, key, self)
            self._places[key] = self.journal.append({"key": key, "model": responder.model, **asdict(answer)})
            if answer.answered is not None:
                await self.budget.settle(answer.answered, answer.cost)
            self.given += 1
            return answer
        except RunStopped as stop:
            self.stop(stop.error)
        except BudgetReached as reached:
            self.stop(ValueError(str(reached)))
        except OSError as error:  # the journal's disk
            self.stop(error)
        finally:
            self._pending.pop(key, None)
        raise asyncio.CancelledError

    def stop(self, error: BaseException) -> None:
        """Send nothing more, and raise the error when what is in flight has come in."""
        if self._stop is None:
            self._stop = error
            self._stopping.set()

    @property
    def stopping(self) -> bool:
        """Whether nothing new may be begun."""
        return self._stop is not None

    def check(self) -> None:
        """Leave the job where the run stops. Raises: CancelledError."""
        if self._stop is not None:
            raise asyncio.CancelledError

    async def pause(self, seconds: float) -> None:
        """Wait, unless the run stops. Raises: CancelledError."""
        try:
            await asyncio.wait_for(self._stopping.wait(), max(0.0, seconds))
        except TimeoutError:
            return
        self.check()

    def run(
        self,
        job: Callable[[Item], Awaitable[Result]],
        items: Iterable[Item],
        *,
        total: int | None = None,
        unit: str = "answers",
        ordered: bool = False,
        at_once: int = 256,
    ) -> Iterator[tuple[int, Result | Unanswered]]:
        """Run a job for every item, many at once; yield (the item's number, its result), as they end or in order.

        Args:
            job: an async function that calls `ask`. Unanswered that it lets through is its outcome, and the others go on.
            items: read as needed, never more than `at_once` ahead of what was yielded.
            total: number of items, for the time left.
        Raises: KeyboardInterrupt and SystemExit(143) after Ctrl-C and SIGTERM; ValueError and OSError where no request can be
            answered any more (budget, key, address); what a job raises. Each is raised when what is in flight has come in.
        """
        source = enumerate(items)
        active: dict[asyncio.Future[Result], int] = {}
        ready: dict[int, Result | Unanswered] = {}
        following = 0
        with self._signals(), _Progress(total, unit, lambda: self.status()) as progress:
            try:
                while True:
                    while self._stop is None and len(active) + len(ready) < at_once:
                        try:
                            number, item = next(source)
                        except StopIteration:
                            break
                        active[asyncio.ensure_future(job(item), loop=self._loop)] = number
                    if not active:
                        break
                    for task in self._first_of(active):
                        number = active.pop(task)
                        if task.cancelled():
                            continue
                        failure = task.exception()
                        if failure is not None and not isinstance(failure, Unanswered):
                            raise failure
                        ready[number] = failure if isinstance(failure, Unanswered) else task.result()
                        progress.add()
                        if not ordered:
                            yield number, ready.pop(number)
                    while following in ready:
                        yield following, ready.pop(following)
                        following += 1
            except KeyboardInterrupt:  # the second Ctrl-C: what is in flight is given up
                active.clear()
                self._pending.clear()
                raise
            finally:
                self._drain(active)
        if self._stop is not None:
            raise self._stop

    def ask_all(
        self, responder: Responder, requests: Sequence[ChatRequest], *, unit: str = "answers"
    ) -> list[Answer | Unanswered]:
        """The answers to independent requests, in order. Raises: as `run`."""

        async def job(request: ChatRequest) -> Answer:
            return await self.ask(responder, request)

        outcomes = self.run(job, requests, total=len(requests), unit=unit, ordered=True)
        return [outcome for _, outcome in outcomes]

    def status(self) -> str:
        """One line: money, requests, and what each responder says."""
        budget = self.budget
        parts = []
        if budget.spent or budget.max_cost is not None:
            parts.append(f"spent {budget.spent:.4f}" + (f" of {budget.max_cost:g}" if budget.max_cost is not None else ""))
        if budget.sent:
            limit = f" of {budget.max_requests:,}" if budget.max_requests is not None else ""
            parts.append(f"{budget.sent:,}{limit} requests, {budget.in_flight} in flight")
        return ", ".join([*parts, *(status for each in self._responders if (status := each.status()))])

    def summary(self) -> str:
        """One line for the end of a run."""
        return ", ".join(filter(None, (f"{self.given:,} new answers, {self.kept:,} from the journal", self.status())))

    def _first_of(self, active: Mapping[asyncio.Future[Result], int]) -> list[asyncio.Future[Result]]:
        """The jobs that have ended, at least one, the oldest first."""
        done, _ = self._loop.run_until_complete(asyncio.wait(active, return_when=asyncio.FIRST_COMPLETED))
        return sorted(done, key=active.__getitem__)

    def _drain(self, active: Mapping[asyncio.Future[Result], int]) -> None:
        """End the jobs, but let requests in flight come in."""
        if active or self._pending:
            # A job has failed, or the caller has gone: nothing more is sent for this run. Another run may follow.
            self._stopping.set()
            stopped, self._stop = self._stop, self._stop or asyncio.CancelledError()
            for task in active:
                task.cancel()
            waiting: list[asyncio.Future[Any]] = [*active, *self._pending.values()]
            self._loop.run_until_complete(asyncio.wait(waiting))
            self._stop = stopped
            if stopped is None:
                self._stopping.clear()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside, Ctrl-C and SIGTERM stop the run; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def on_signal(number: int) -> None:
            if number == signal.SIGINT:
                self._loop.remove_signal_handler(signal.SIGINT)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.write(2, b"\nCtrl-C: waiting for the answers in flight; press it again to leave at once\n")
            self.stop(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))

        for number in previous:
            self._loop.add_signal_handler(number, on_signal, number)
        try:
            yield
        finally:
            for number, handler in previous.items():
                self._loop.remove_signal_handler(number)
                signal.signal(number, handler)


def _answer_in(entry: Mapping[str, Any]) -> Answer:
    return Answer(**{name: entry[name] for name in Answer.__dataclass_fields__})


class _Progress:
    """A bar on a terminal, a line now and then in a file."""

    def __init__(self, total: int | None, unit: str, status: Callable[[], str]) -> None:
        self._terminal = sys.stderr.isatty()
        self._status, self._unit = status, unit
        self._bar = tqdm(total=total, unit=f" {unit}", disable=not self._terminal, dynamic_ncols=True)
        self._done, self._total, self._start = 0, total, time.monotonic()
        self._said = self._start

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self) -> None:
        self._done += 1
        if self._terminal:
            self._bar.set_postfix_str(self._status(), refresh=False)
            self._bar.update()
        elif (now := time.monotonic()) - self._said >= _LINE_EVERY:
            self._said = now
            of = left = ""
            if self._total is not None:
                of = f" of {self._total:,}"
                left = f"{tqdm.format_interval((now - self._start) / self._done * (self._total - self._done))} left"
            done = f"{self._done:,}{of} {self._unit}"
            print(", ".join(filter(None, (done, self._status(), left))), file=sys.stderr, flush=True)
