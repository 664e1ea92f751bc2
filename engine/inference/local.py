"""A model's folder as a `Responder`: answers computed in this process, in place of an endpoint.

Requests that wait together are answered together. A request without a seed draws with one of its own, made from its content, so
that the same request always has the same answer.
"""

import asyncio
import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from engine.checkpoint.state import model_folder
from engine.environment import choose_device
from engine.inference.asking import Answer, Asker, ChatRequest, RunStopped, Unanswered
from model.generate import generate
from model.sampling import Sampling
from model.vocabulary.chat import encode_prompt
from model.vocabulary.fitting import fitted_config
from model.vocabulary.tokenizer import Tokenizer
from model.weights import load_model

# The parameters of a request -> the fields of Sampling.
_NAMES = {**{field.name: field.name for field in fields(Sampling)}, "max_tokens": "max_new_tokens"}
_STOP = "stop"
# Rows that are generated together.
ROWS = 32


class LocalModel:
    """A Komainu run (its newest checkpoint), a Hugging Face folder or a hub repository."""

    def __init__(self, name: str, *, device: str = "auto") -> None:
        """Load the model. Raises: FileNotFoundError, ValueError or DeviceError, each naming the fault."""
        folder = model_folder(name)
        chosen = choose_device(device)
        self.tokenizer = Tokenizer.load(folder)
        dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
        config = fitted_config(folder, self.tokenizer)
        self._model = load_model(folder, dtype=dtype, device=chosen, config=config)
        self._ends = {self.tokenizer.eos_id, *config.end_ids}
        # A folder whose weights change is another model to the journal.
        sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
        self.model = f"{folder} {sizes}"
        self._waiting: list[tuple[list[int], Sampling, tuple[str, ...], asyncio.Future[Answer]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()

    def status(self) -> str:
        return ""

    async def answer(self, request: ChatRequest, key: str, asker: Asker) -> Answer:
        """See `Responder`. Raises: Unanswered for a prompt that the model or its chat template cannot take."""
        sampling, stop = read_parameters(request.parameters, int(key[:15], 16))
        try:
            prompt_ids = encode_prompt(self.tokenizer, request.messages)
        except ValueError as error:
            raise Unanswered(str(error)) from None
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt_ids, sampling, stop, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work(asker))
        return await future

    async def _work(self, asker: Asker) -> None:
        while self._waiting:
            # Jobs that start together ask together.
            await asyncio.sleep(0)
            rows, self._waiting = self._waiting[:ROWS], self._waiting[ROWS:]
            try:
                asker.check()
                answers: list[Answer | BaseException] = await asyncio.to_thread(self._generate, [row[:3] for row in rows])
            except BaseException as error:
                # Whoever waits for a row must hear of the end.
                answers = [RunStopped(error) if isinstance(error, ValueError) else error] * len(rows)
            for (*_, future), answer in zip(rows, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, asyncio.CancelledError):
                    future.cancel()
                elif isinstance(answer, BaseException):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def _generate(self, rows: Sequence[tuple[list[int], Sampling, tuple[str, ...]]]) -> list[Answer | BaseException]:
        """The answers to prompts, each with its own settings."""
        return [self._answer(*row) for row in rows]

    def _answer(self, prompt_ids: list[int], sampling: Sampling, stop: tuple[str, ...]) -> Answer | BaseException:
        room = self._model.config.max_position_embeddings - len(prompt_ids)
        if room < 1:
            return Unanswered(f"the prompt has {len(prompt_ids)} tokens, more than the model has positions")
        decoder, text, chosen, reason = self.tokenizer.stream_decoder(), "", 0, "length"
        for token in generate(self._model, prompt_ids, sampling, stop_ids=self._ends):
            chosen += 1
            if token in self._ends:
                reason = "stop"
                break
            text += decoder.push(token)
            if any(word in text for word in stop):
                reason = "stop"
                break
        text += decoder.finish()
        return Answer(cut_at(text, stop).strip(" "), reason, len(prompt_ids), chosen)


def read_parameters(parameters: Any, seed: int) -> tuple[Sampling, tuple[str, ...]]:
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
