"""A client of OpenAI-compatible endpoints: chat completions with retries, and as many at once as the endpoint bears.

The library `openai` sends; its own retries are off. Tried again, at most 8 times in all: statuses 408, 409, 429 and 5xx, lost
connections, timeouts and answers that are cut or no JSON. A refused request (400, 413, 422, ...) fails alone; a wrong key,
address or model (401, 402, 403, 404) ends the run. An answer 429 halves the number of requests at once (once for all that were
sent before it); as many successes as are sent at once add one: TCP's rule (Chiu and Jain 1989).

The key comes from an environment variable. It is in no setting, file, log or message: error texts and answers are searched
for it.
"""

import asyncio
import email.utils
import json
import math
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from engine.inference.asking import Answer, Asker, ChatRequest, Responder, RunStopped, Unanswered
from engine.inference.budget import Prices
from engine.settings.toml import PathName
from model.vocabulary.chat import Message

TRIES = 8
# Seconds: the first wait, doubled from try to try; the longest of these; the longest that an endpoint may ask for.
FIRST_WAIT, LONGEST_WAIT, LONGEST_ASKED = 0.5, 60.0, 3600.0
# A request that has failed in all tries ends the run where so many tries before it, of all requests, have failed in a row.
HOPELESS = 40
# Tries to reach an endpoint that has not answered anything yet.
FIRST_TRIES = 3

_FATAL = {
    401: "does not accept the key",
    402: "asks for payment: the account has no credit left",
    403: "does not allow this key to do that",
    404: "does not know this address or model",
}
_NO_KEY = "; no key was sent: set key_variable to the name of the environment variable that holds it"
_OPENAI = "api.openai.com"


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """An OpenAI-compatible endpoint, or a model's folder."""

    model: PathName
    """Name of the model at the endpoint; without url: run folder, Hugging Face folder or hub repository owner/name, which then
    answers in this process."""
    url: str = ""
    """Address up to and with /v1, such as http://127.0.0.1:8000/v1 or https://api.openai.com/v1."""
    key_variable: str = ""
    """Environment variable that holds the key. Default: OPENAI_API_KEY for api.openai.com, no key elsewhere."""
    price_in: float | None = None
    """Money for a million tokens of prompts."""
    price_out: float | None = None
    """Money for a million tokens of answers."""
    concurrency: int = 8
    """Most requests at once."""
    timeout: float = 600.0
    """Seconds after which a request without its whole answer is tried again."""
    max_tokens_name: str = "max_tokens"
    """The endpoint's name for the longest answer: max_completion_tokens for OpenAI's reasoning models."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Without url. auto: CUDA if there is a GPU."""

    def __post_init__(self) -> None:
        for name in ("price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} = {value}: must be a price for a million tokens, at least 0")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in and price_out: give both, or neither")
        if self.concurrency < 1:
            raise ValueError(f"concurrency = {self.concurrency}: must be at least 1")
        if not self.timeout > 0:
            raise ValueError(f"timeout = {self.timeout}: must be a number of seconds above 0")
        if not self.url:
            return
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url = {self.url!r}: must begin with http:// or https:// and name a host")
        if parts.username or parts.password or parts.query or parts.fragment:
            # Not repeated in the message: a key may stand in it.
            raise ValueError(
                "url: must hold no user, password or query; put the key into an environment variable (key_variable)"
            )


def read_key(settings: EndpointSettings) -> str | None:
    """The endpoint's key; None where it needs none. Raises: ValueError naming the variable that is not set."""
    variable = _key_variable(settings)
    if not variable:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"the environment variable {variable} is not set: it must hold the key of {settings.url}")
    return key


def _key_variable(settings: EndpointSettings) -> str:
    """The environment variable that holds the endpoint's key; empty where it needs none."""
    return settings.key_variable or ("OPENAI_API_KEY" if urlsplit(settings.url).hostname == _OPENAI else "")


class _Fault(Exception):
    """A try that failed, and may be repeated.

    billed: whether the endpoint may count the answer. wait: seconds that it asks for.
    """

    def __init__(self, reason: str, *, billed: bool, wait: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.billed, self.wait, self.unreachable = billed, wait, unreachable
        self.too_many = reason == "429"


class Endpoint:
    """An endpoint, a `Responder` of one `Asker`."""

    def __init__(self, settings: EndpointSettings) -> None:
        """Raises: ValueError without the library `openai`, or without the key."""
        try:
            import openai
        except ImportError:
            raise ValueError(
                "an endpoint needs the package openai: pip install 'komainu[eval]', or pip install openai"
            ) from None
        self.settings, self.model = settings, settings.model
        self.prices = Prices(settings.price_in or 0.0, settings.price_out or 0.0)
        self._key = read_key(settings)
        self._openai = openai
        # Whatever keys the environment holds for OpenAI's own service stay here: an empty organization or project sends none.
        self._client: Any = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=settings.url,
            max_retries=0,
            timeout=settings.timeout,
            organization="",
            project="",
        )
        self.gate = Gate(settings.concurrency)
        self.retried: dict[str, int] = {}
        # A request that waits for its next try leaves its place to another one, but not to all that follow.
        self._begun = asyncio.Semaphore(2 * settings.concurrency)
        self._reached = False
        self._failed_in_a_row = 0

    async def close(self) -> None:
        await self._client.close()

    def status(self) -> str:
        again = sum(self.retried.values())
        kinds = ", ".join(f"{count} x {reason}" for reason, count in sorted(self.retried.items()))
        return f"{self.gate.limit} at once" + (f", {again} tried again ({kinds})" if again else "")

    async def answer(self, request: ChatRequest, key: str, asker: Asker) -> Answer:
        """See `Responder`."""
        if asker.budget.max_cost is not None:
            self._check_bounded(request)
        parameters = self._sent_parameters(request)
        worst = self.prices.worst(request.messages, request.parameters.get("max_tokens")) * request.parameters.get("n", 1)
        if not math.isfinite(worst):
            worst = 0.0  # no limit is set: only what the endpoint says counts
        async with self._begun:
            for tried in range(1, TRIES + 1):
                outcome = await self._try(request.messages, parameters, key, worst, asker)
                if isinstance(outcome, Answer):
                    return outcome
                fault = outcome
                if tried < TRIES:
                    self._check_hope(fault, tried)
                    self.retried[str(fault)] = self.retried.get(str(fault), 0) + 1
                    await asker.pause(max(fault.wait, backoff(tried)))
        text = f"{self.settings.url}: no answer in {TRIES} tries, the last one: {fault}"
        if self._failed_in_a_row >= HOPELESS:
            raise RunStopped(
                ConnectionError(
                    f"{text}; nor in the last {self._failed_in_a_row}. Run the command again when the endpoint works"
                )
            )
        raise Unanswered(text)

    async def _try(
        self,
        messages: Sequence[Message],
        parameters: Mapping[str, Any],
        key: str,
        worst: float,  # money
        asker: Asker,
    ) -> "Answer | _Fault":
        """Send a request once. Raises: Unanswered, RunStopped, BudgetReached."""
        async with self.gate.turn(asker) as turn:
            ticket = await asker.budget.send(key, worst, asker.check)
            try:
                answer = self._read(await self._post(messages, parameters), worst, ticket)
            except _Fault as fault:
                await asker.budget.fail(ticket, worst if fault.billed else 0.0, str(fault))
                self._reached = self._reached or not fault.unreachable
                self._failed_in_a_row += 1
                if fault.too_many:
                    turn.too_many(fault.wait)
                return fault
            except (Unanswered, RunStopped):
                await asker.budget.fail(ticket, 0.0, "refused")
                self._reached = True
                raise
            turn.succeeded()
            self._reached, self._failed_in_a_row = True, 0
            return answer

    def _check_hope(self, fault: "_Fault", tried: int) -> None:
        """Raises: RunStopped where waiting is no use."""
        url = self.settings.url
        if not self._reached and tried >= FIRST_TRIES:
            raise RunStopped(ConnectionError(f"{url}: cannot be reached ({fault}); is the server running?"))
        if fault.wait > LONGEST_ASKED:
            raise RunStopped(ValueError(f"{url}: asks to wait {fault.wait:,.0f} seconds; run the command again then"))

    def _sent_parameters(self, request: ChatRequest) -> dict[str, Any]:
        taken = {"model", "messages", "stream"} & request.parameters.keys()
        assert not taken, f"{taken} cannot be parameters of a request"
        names = {"max_tokens": self.settings.max_tokens_name}
        return {names.get(name, name): value for name, value in request.parameters.items()}

    def _check_bounded(self, request: ChatRequest) -> None:
        if self.settings.price_in is None:
            raise RunStopped(ValueError("max_cost needs the prices of a million tokens: give price_in and price_out"))
        if request.parameters.get("max_tokens") is None:
            raise RunStopped(ValueError("max_cost needs max_tokens: an answer of any length may cost anything"))

    async def _post(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Any:
        """One try: the response's JSON. Raises: _Fault, Unanswered, RunStopped."""
        openai = self._openai
        try:
            async with asyncio.timeout(self.settings.timeout):
                raw = await self._client.chat.completions.with_raw_response.create(
                    model=self.model, messages=list(messages), extra_body=dict(parameters)
                )
                return json.loads(raw.http_response.text)
        except (TimeoutError, openai.APITimeoutError):
            raise _Fault("timeout", billed=True) from None
        except openai.APIStatusError as error:
            raise self._status_fault(error) from None
        except openai.APIConnectionError as error:
            unreachable = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
            reason = "connection refused" if unreachable else "connection lost"
            if unreachable and isinstance(_first_cause(error), socket.gaierror):
                reason = "no such host"
            raise _Fault(reason, billed=not unreachable, unreachable=unreachable) from None
        except UnicodeEncodeError:
            raise Unanswered("a message holds half of a character (a lone surrogate), which cannot be sent") from None
        except (openai.APIError, json.JSONDecodeError, UnicodeDecodeError):
            raise _Fault("cut or broken answer", billed=True) from None

    def _status_fault(self, error: Any) -> Exception:
        """What an HTTP status means for the request."""
        status, headers = error.status_code, error.response.headers
        url = self.settings.url
        if status == 429 and error.code == "insufficient_quota":
            status = 402
        if status in _FATAL:
            remedy = ""
            if status in (401, 403):
                variable = _key_variable(self.settings)
                remedy = f"; see the variable {variable}" if variable else _NO_KEY
            elif status == 404:
                remedy = f"; it is asked for {self.model!r}: {self._said(error)}"
            return RunStopped(ValueError(f"{url}: {_FATAL[status]} (status {status}){remedy}"))
        if status in (408, 409, 429) or status >= 500:
            return _Fault(str(status), billed=False, wait=retry_after(headers))
        return Unanswered(f"{url}: refuses the request (status {status}): {self._said(error)}")

    def _read(self, body: Any, worst: float, ticket: int) -> Answer:
        """The answer in a response. Raises: _Fault where it is none."""
        try:
            choice = body["choices"][0]
            content = choice["message"]["content"] or ""
            if not isinstance(content, str):
                content = "".join(part["text"] for part in content)
        except (KeyError, IndexError, TypeError):
            raise _Fault("cut or broken answer", billed=True) from None
        usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
        prompt, completion = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        return Answer(
            text=self._without_key(content),
            finish_reason=str(choice.get("finish_reason") or "stop"),
            prompt_tokens=prompt,
            completion_tokens=completion,
            cost=worst if prompt is None or completion is None else self.prices.of(prompt, completion),
            answered=ticket,
            choices=len(body["choices"]),
        )

    def _said(self, error: Any) -> str:
        """What the endpoint says of a status, in one line without the key."""
        body = error.body if isinstance(error.body, dict) else {}
        text = str(body.get("message") or body.get("detail") or error.response.text)
        return self._without_key(" ".join(text.split()))[:300]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[the key]") if self._key else text


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def open_responder(settings: EndpointSettings) -> Responder:
    """The endpoint at `url`, else the model's folder. Raises: ValueError, OSError or DeviceError, naming the fault."""
    if settings.url:
        return Endpoint(settings)
    from engine.inference.local import LocalModel  # here, as only a folder needs torch

    return LocalModel(settings.model, device=settings.device)


def _first_cause(error: BaseException) -> BaseException:
    """The error that the others were raised for."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


def backoff(tried: int) -> float:
    """Seconds to wait after a number of tries: doubled each time, and drawn from the upper half, so that clients part."""
    return random.uniform(0.5, 1.0) * min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tried - 1))


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait: the header Retry-After in seconds or as a date (RFC 9110, 10.2.3); else 0."""
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        asked = headers.get("retry-after", "")
        if asked.strip().replace(".", "", 1).isdigit():
            return float(asked)
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


class _Turn:
    """One request's place among those at once."""

    def __init__(self, gate: "Gate") -> None:
        self._gate, self._round = gate, gate.round

    def succeeded(self) -> None:
        self._gate.grow()

    def too_many(self, wait: float) -> None:
        self._gate.halve(self._round, wait)


class Gate:
    """How many requests are at once: at most `limit`, which follows the endpoint's answers."""

    def __init__(self, most: int) -> None:
        self.most = self.limit = most
        self.round = 0
        """Number of halvings: requests that were sent before one do not cause another."""
        self._now = self._successes = 0
        self._closed_until = 0.0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def turn(self, asker: Asker) -> AsyncIterator[_Turn]:
        """Wait for a place, and hold it. Raises: CancelledError where the run stops."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._now < self.limit)
            self._now += 1
        try:
            while (closed := self._closed_until - time.monotonic()) > 0:
                await asker.pause(closed)
            asker.check()
            yield _Turn(self)
        finally:
            async with self._changed:
                self._now -= 1
                self._changed.notify_all()

    def grow(self) -> None:
        self._successes += 1
        if self._successes >= self.limit:
            self._successes = 0
            self.limit = min(self.most, self.limit + 1)

    def halve(self, round: int, wait: float) -> None:
        self._closed_until = max(self._closed_until, time.monotonic() + min(wait, LONGEST_ASKED))
        if round == self.round:
            self.round += 1
            self._successes = 0
            self.limit = max(1, self.limit // 2)
