"""A model's folder as a `Responder`: answers computed in this process, in place of an endpoint.

Requests are generated side by side (`engine.inference.generation`); new ones enter as others end. A request without a seed has
one made from its content, so that the same request always has the same answer.
"""

import asyncio
import difflib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

from engine.distributed.agreement import weights_sample
from engine.environment import choose_device
from engine.inference import generation
from engine.inference.asking import Answer, Asker, ChatRequest, RunStopped, Unanswered
from engine.inference.opening import open_model
from model.generate import room_for_answer
from model.sampling import Sampling
from model.vocabulary.chat import encode_prompt, ends_of
from model.vocabulary.tokenizer import StreamDecoder

# The parameters of a request -> the fields of Sampling.
_NAMES = {**{field.name: field.name for field in fields(Sampling)}, "max_tokens": "max_new_tokens"}
_STOP = "stop"


@dataclass(eq=False)
class _Row:
    """A request on its way."""

    prompt_ids: list[int]
    sampling: Sampling
    stop: tuple[str, ...]
    decoder: StreamDecoder
    future: asyncio.Future[Answer]
    text: str = ""

    def ends(self, token: int) -> bool:
        """Take a token of the answer. Returns: whether a stop text has come."""
        self.text += self.decoder.push(token)
        return any(word in self.text for word in self.stop)

    def answer(self, given: generation.Answer) -> Answer:
        text = cut_at(self.text + self.decoder.finish(), self.stop)
        # The chat template's spaces around an answer.
        return Answer(text.strip(" "), given.end, len(self.prompt_ids), len(given.ids))


class LocalModel:
    """A Komainu run (its newest checkpoint), a Hugging Face folder or a hub repository."""

    def __init__(self, name: str, *, device: str = "auto") -> None:
        """Load the model. Raises: FileNotFoundError, ValueError or DeviceError, each naming the fault."""
        folder, self.tokenizer, self._model = open_model(name, choose_device(device))
        self._ends = ends_of(self.tokenizer, self._model.config)
        # A folder whose weights or tokenizer change is another model to the journal.
        self.model = f"{folder} {weights_sample(folder)} {self.tokenizer.fingerprint}"
        self._waiting: deque[_Row] = deque()
        self._growing: dict[int, _Row] = {}  # by the numbers that generation knows them by
        self._worker: asyncio.Task[None] | None = None
        self._closing = False

    async def close(self) -> None:
        # The thread ends at its next token; else the process would wait for whole answers after a second Ctrl-C.
        self._closing = True
        if self._worker is not None:
            self._worker.cancel()

    def status(self) -> str:
        return ""

    async def answer(self, request: ChatRequest, key: str, asker: Asker) -> Answer:
        """See `Responder`. Raises: Unanswered for a prompt that the model or its chat template cannot take."""
        sampling, stop = read_parameters(request.parameters, int(key[:15], 16))
        try:
            prompt_ids = encode_prompt(self.tokenizer, request.messages)
            room_for_answer(self._model.config, prompt_ids)
        except ValueError as error:
            raise Unanswered(str(error)) from None
        loop = asyncio.get_running_loop()
        row = _Row(prompt_ids, sampling, stop, self.tokenizer.stream_decoder(), loop.create_future())
        self._closing = False
        self._waiting.append(row)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work(asker))
        return await row.future

    async def _work(self, asker: Asker) -> None:
        """Generate in a thread while requests wait."""
        # Jobs that start together ask together.
        await asyncio.sleep(0)
        try:
            while self._waiting:
                asker.check()
                await asyncio.to_thread(self._generate, asker, asyncio.get_running_loop())
        except BaseException as error:
            # Whoever waits must hear of the end.
            rows = [*self._growing.values(), *self._waiting]
            self._growing.clear()
            self._waiting.clear()
            for row in rows:
                if row.future.done():
                    continue
                if isinstance(error, asyncio.CancelledError):
                    row.future.cancel()
                else:
                    row.future.set_exception(RunStopped(error) if isinstance(error, ValueError) else error)

    def _generate(self, asker: Asker, loop: asyncio.AbstractEventLoop) -> None:
        """Answer what waits and what comes meanwhile, until nothing is left or the run stops."""
        for given in generation.answers(self._model, _Entering(self._prompt_of, self._waiting, self._growing, asker)):
            row = self._growing.pop(given.number)
            loop.call_soon_threadsafe(_set_result, row.future, row.answer(given))

    def _prompt_of(self, row: _Row) -> generation.Prompt:
        def ends(token: int) -> bool:
            if self._closing:
                raise asyncio.CancelledError
            return row.ends(token)

        return generation.Prompt(row.prompt_ids, row.sampling, self._ends, ends)


class _Entering:
    """The prompts that wait. The iterator ends where none does, and goes on when it is asked again."""

    def __init__(
        self,
        prompt_of: Callable[[_Row], generation.Prompt],
        waiting: deque[_Row],
        growing: dict[int, _Row],
        asker: Asker,
    ) -> None:
        self._prompt_of, self._waiting, self._growing, self._asker = prompt_of, waiting, growing, asker
        self._numbers = count()

    def __iter__(self) -> "_Entering":
        return self

    def __next__(self) -> generation.Prompt:
        if not self._waiting or self._asker.stopping:
            raise StopIteration
        row = self._growing[next(self._numbers)] = self._waiting.popleft()
        return self._prompt_of(row)


def _set_result(future: asyncio.Future[Answer], answer: Answer) -> None:
    if not future.done():
        future.set_result(answer)


def read_parameters(parameters: Mapping[str, Any], seed: int) -> tuple[Sampling, tuple[str, ...]]:
    """A request's parameters as sampler settings and the texts that end the answer.

    Raises: RunStopped for a name that has no meaning here, or a value out of range.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    stop = given.pop(_STOP, ())
    for name in given:
        if name not in _NAMES:
            nearest = difflib.get_close_matches(name, [*_NAMES, _STOP], n=1, cutoff=0.0)[0]
            raise RunStopped(ValueError(f"{name}: no parameter of generation in this process; the nearest one is {nearest}"))
    if given.get("temperature") == 0:
        given = {name: value for name, value in given.items() if name not in ("top_p", "top_k", "min_p")}
    try:
        sampling = Sampling(**{"seed": seed, **{_NAMES[name]: value for name, value in given.items()}})
    except ValueError as error:
        raise RunStopped(error) from None
    return sampling, (stop,) if isinstance(stop, str) else tuple(stop)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    return text[: min((text.index(word) for word in stop if word in text), default=len(text))]
