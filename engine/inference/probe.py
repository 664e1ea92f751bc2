"""Which parameters an endpoint follows: a few short questions before a run.

Servers drop parameters without a word. `transformers serve`, for one, ignores n, and the temperature where the model's folder
does not say that it samples.
"""

import asyncio
from typing import Any

from engine.inference.asking import Answer, Asker, ChatRequest, Unanswered
from engine.inference.endpoint import Endpoint
from model.vocabulary.chat import Message

PARAMETERS = ("max_tokens", "temperature", "seed", "n", "stop", "min_p")
FOLLOWED, IGNORED, REFUSED, UNCLEAR = "followed", "ignored", "refused", "unclear"

# The first question that has an answer is asked on: a small model may have none to some.
_QUESTIONS = (
    "Write a sentence of ten words that nobody has written before.",
    "What is the capital of France?",
    "日本の首都は？",
)
_TOKENS = 16
# Endpoints that allow no 2 allow 1.
_HOT = (2.0, 1.0)


def probe(asker: Asker, endpoint: Endpoint) -> dict[str, str]:
    """What the endpoint does with each of `PARAMETERS`: "followed", "ignored", "refused" or "unclear".

    About fifteen requests of up to 16 tokens, paid from the asker's budget. The result is kept in its journal, so that a run
    that goes on does not probe again.
    Raises: as `Asker.run`.
    """
    name = f"probe of {endpoint.settings.url} {endpoint.model}"
    if name not in asker.facts:
        [(_, found)] = asker.run(lambda _: _Probe(asker, endpoint).find(), [None], total=1, unit="probes")
        if isinstance(found, Unanswered):
            raise ValueError(str(found))
        asker.note(name, found)
    return asker.facts[name]


def describe(found: dict[str, str]) -> str:
    """One line, such as "follows max_tokens, stop; ignores n, seed; refuses min_p"."""
    words = {FOLLOWED: "follows", IGNORED: "ignores", REFUSED: "refuses", UNCLEAR: "unclear:"}
    said = {verdict: [name for name in PARAMETERS if found.get(name) == verdict] for verdict in words}
    return "; ".join(f"{words[verdict]} {', '.join(names)}" for verdict, names in said.items() if names)


class _Probe:
    def __init__(self, asker: Asker, endpoint: Endpoint) -> None:
        self._asker, self._endpoint, self._question = asker, endpoint, _QUESTIONS[0]

    async def _text(self, draw: int = 0, **parameters: Any) -> str | None:
        """An answer's text; None where the parameters are refused."""
        answer = await self._answer(draw, **parameters)
        return None if answer is None else answer.text

    async def _answer(self, draw: int = 0, **parameters: Any) -> Answer | None:
        try:
            return await self._ask(draw, **parameters)
        except Unanswered:
            return None

    async def _ask(self, draw: int = 0, **parameters: Any) -> Answer:
        messages = [Message(role="user", content=self._question)]
        return await self._asker.ask(self._endpoint, ChatRequest(messages, {"max_tokens": _TOKENS, **parameters}, draw))

    async def find(self) -> dict[str, str]:
        for self._question in _QUESTIONS:
            plain = await self._ask()
            if len(plain.text) > 3:
                break
        cold = [await self._text(draw, temperature=0) for draw in range(2)]
        hot: dict[str, Any] = {}
        for temperature in _HOT:
            if not hot and await self._text(temperature=temperature) is not None:
                hot = {"temperature": temperature}
        warm = await asyncio.gather(*(self._text(draw, **hot) for draw in range(3)))
        greedy = cold[0] if cold[0] == cold[1] else None
        varies = greedy is not None and any(text != greedy for text in warm)
        found = {"temperature": _temperature(cold, varies)}
        found["max_tokens"], found["n"], found["stop"] = await asyncio.gather(
            self._max_tokens(), self._several(), self._stop(plain.text, greedy)
        )
        found["seed"], found["min_p"] = await asyncio.gather(self._seed(hot), self._min_p(hot, greedy, varies))
        return found

    async def _max_tokens(self) -> str:
        answer = await self._answer(max_tokens=2)
        if answer is None:
            return REFUSED
        if answer.completion_tokens is None:
            return FOLLOWED if answer.finish_reason == "length" else UNCLEAR
        return FOLLOWED if answer.completion_tokens <= 2 else IGNORED

    async def _several(self) -> str:
        answer = await self._answer(n=2)
        return REFUSED if answer is None else FOLLOWED if answer.choices == 2 else IGNORED

    async def _stop(self, plain: str, greedy: str | None) -> str:
        """A character that stands within the answer must end it."""
        text = plain if greedy is None else greedy
        inner = [character for character in text[1:-1] if not character.isspace()]
        if not inner:
            return UNCLEAR
        word = inner[len(inner) // 2]
        stopped = await self._text(stop=[word], **({} if greedy is None else {"temperature": 0}))
        if stopped is None:
            return REFUSED
        return IGNORED if word in stopped else FOLLOWED if greedy is not None else UNCLEAR

    async def _seed(self, hot: dict[str, Any]) -> str:
        one, same, other = [await self._text(draw, seed=seed, **hot) for draw, seed in ((0, 1), (1, 1), (0, 2))]
        if one is None:
            return REFUSED
        if one != same:
            return IGNORED
        return FOLLOWED if one != other else UNCLEAR

    async def _min_p(self, hot: dict[str, Any], greedy: str | None, varies: bool) -> str:
        """min_p = 1 leaves the most likely token alone, at any temperature."""
        texts = [await self._text(draw, min_p=1.0, **hot) for draw in range(2)]
        if None in texts:
            return REFUSED
        if not varies:
            return UNCLEAR
        return FOLLOWED if all(text == greedy for text in texts) else IGNORED


def _temperature(cold: list[str | None], varies: bool) -> str:
    """Followed: answers at 0 are equal, and others are not."""
    return REFUSED if None in cold else FOLLOWED if varies else IGNORED
