"""What requests cost, and whether the next one may still be sent.

Before a request is sent its worst case is reserved, in the journal too: a killed run may have been billed for what it had in
flight, so that counts in full when the run goes on.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.inference.journal import Journal

# Tokens that a chat template may add to a message, beside the message's own bytes.
_TEMPLATE_TOKENS = 32


class BudgetReached(Exception):
    """The next request could pass the budget. The text says which limit, and the remedy."""


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens of prompts and of answers."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The cost of a request, in the prices' currency."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

    def worst(self, messages: Sequence[Any], max_tokens: int | None) -> float:
        """The most that a request can cost: no token is shorter than a byte. Infinite where the answer may have any length."""
        if max_tokens is None and self.completion > 0:
            return math.inf
        size = sum(len(message["content"].encode("utf-8", "replace")) + _TEMPLATE_TOKENS for message in messages)
        return self.of(size + _TEMPLATE_TOKENS, max_tokens or 0)


class Budget:
    """The account of a journal, over all runs that wrote it.

    spent: money, with the worst case of requests whose end is not known. sent: requests, each try counted.
    """

    def __init__(self, journal: Journal, *, max_cost: float | None = None, max_requests: int | None = None) -> None:
        self._journal, self.max_cost, self.max_requests = journal, max_cost, max_requests
        self.spent, self.sent = 0.0, 0
        self._open: dict[int, float] = {}  # ticket -> worst case, of requests in flight
        self._settled = asyncio.Condition()

    def read(self, entry: dict[str, Any]) -> None:
        """Count a line of an earlier run."""
        if "sent" in entry:
            self.sent += 1
            self._open[entry["sent"]] = entry["worst"]
            self.spent += entry["worst"]
        elif (ticket := entry.get("failed", entry.get("answered"))) is not None:
            self.spent += entry["cost"] - self._open.pop(ticket, 0.0)

    def begin(self) -> None:
        """All lines are read: what is open now was in flight when an earlier run died, and stays spent."""
        self._open.clear()

    @property
    def in_flight(self) -> int:
        return len(self._open)

    async def send(self, key: str, worst: float, check: Callable[[], None]) -> int:
        """Reserve the worst case of a request that is sent at once. Waits where the end of another request may free enough.

        Args: check: called after each wait; it raises where nothing may be sent any more.
        Returns: the request's ticket. Raises: BudgetReached; what `check` raises.
        """
        async with self._settled:
            while True:
                if self.max_requests is not None and self.sent >= self.max_requests:
                    raise BudgetReached(
                        f"the budget of {self.max_requests:,} requests is used up (each try counts); the answers so far are "
                        "kept: raise --max-requests and run the command again"
                    )
                if self.max_cost is None or self.spent + worst <= self.max_cost:
                    break
                if not self._open:
                    raise BudgetReached(
                        f"the next request could cost {worst:.6g}, and {self.spent:.6g} of {self.max_cost:g} is spent; the "
                        "answers so far are kept: raise --max-cost and run the command again"
                    )
                await self._settled.wait()
                check()
            ticket = self.sent
            self.sent += 1
            # Not flushed to the disk: the line outlives a killed process, which is what can happen between here and the answer.
            self._journal.append({"sent": ticket, "key": key, "worst": worst}, synced=False)
            self._open[ticket] = worst
            self.spent += worst
            return ticket

    async def settle(self, ticket: int, cost: float) -> None:
        """A request has ended, and its line is written: its cost takes the place of its worst case."""
        async with self._settled:
            self.spent += cost - self._open.pop(ticket)
            self._settled.notify_all()

    async def fail(self, ticket: int, cost: float, reason: str) -> None:
        """A request has ended without an answer."""
        self._journal.append({"failed": ticket, "cost": cost, "reason": reason}, synced=False)
        await self.settle(ticket, cost)
