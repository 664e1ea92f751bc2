"""Which two answers a rater sees next, and the file that the votes go to."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from engine.data.sources import RECORD_SUFFIXES, find_sources
from engine.inference.journal import Journal
from recipes.evaluation.votes import WINNERS

LONGEST_NAME = 60  # characters of a rater's name


@dataclass(frozen=True)
class Contender:
    """An answer. key: of its prompt, the same in all votes on it. question: the conversation as text."""

    key: str
    question: str
    model: str
    response: str


@dataclass(frozen=True)
class Pairing:
    """Two answers as a rater sees them. key: names the pairing without its models."""

    key: str
    number: int  # from 1
    total: int
    left: Contender
    right: Contender


def read_contenders(paths: Sequence[str]) -> list[Contender]:
    """The answers of files and folders: records of messages or prompt, response and model.

    A prompt's votes name it by `prompt_id`, or else by its text.
    Raises: ValueError naming file and line of a record that is no answer, or where no prompt has answers of two models.
    """
    found = []
    for source in find_sources(paths, RECORD_SUFFIXES):
        for record in source.records("line"):
            found.append(_read(record.value, record.place))
    models: dict[str, set[str]] = {}
    for contender in found:
        models.setdefault(contender.key, set()).add(contender.model)
    if all(len(names) < 2 for names in models.values()):
        raise ValueError(f"{', '.join(paths)}: no prompt has answers of two models: there is nothing to compare")
    return found


def _read(value: Any, place: str) -> Contender:
    if not isinstance(value, Mapping) or not all(isinstance(value.get(name), str) for name in ("response", "model")):
        raise ValueError(f"{place}: not an answer: must be an object with messages (or prompt), response and model")
    if isinstance(messages := value.get("messages"), list) and all(_is_turn(turn) for turn in messages):
        several = len(messages) > 1
        question = "\n\n".join(f"{turn['role']}: {turn['content']}" if several else turn["content"] for turn in messages)
    elif isinstance(value.get("prompt"), str):
        question = value["prompt"]
    else:
        raise ValueError(f"{place}: neither 'messages' (a list of {{role, content}}) nor a text in 'prompt'")
    key = value.get("prompt_id")
    return Contender(question if key is None else str(key), question, value["model"], value["response"])


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(isinstance(turn.get(name), str) for name in ("role", "content"))


class Ballot:
    """All pairs of models on each prompt, in an order of each rater's own, and the votes. A context manager.

    Order and sides follow from the seed and the rater's name alone, so that a page that is opened again goes on.
    """

    def __init__(self, contenders: Sequence[Contender], votes: str | Path, *, seed: int = 0, most: int = 0) -> None:
        """Open the votes. Raises: ValueError for a file that holds something else; OSError naming the file."""
        answers: dict[str, dict[str, list[Contender]]] = {}
        for contender in contenders:
            answers.setdefault(contender.key, {}).setdefault(contender.model, []).append(contender)
        self._answers = answers
        self._pairs = [(key, *pair) for key, models in answers.items() for pair in combinations(sorted(models), 2)]
        self._seed, self._most = seed, most
        self._lock = threading.Lock()
        self._orders: dict[str, list[Pairing]] = {}
        self._journal = Journal(votes)
        try:
            self._done = {self._name_of(vote) for _, vote in self._journal.entries()}
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> Ballot:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    @property
    def size(self) -> int:
        """Pairs that each rater is asked for."""
        return min(len(self._pairs), self._most or len(self._pairs))

    def next(self, rater: str) -> Pairing | None:
        """The first pair that a rater has not voted on; None at the end. Raises: ValueError for a name that is none."""
        with self._lock:
            return self._next(checked_name(rater))

    def vote(self, rater: str, key: str, winner: str) -> Pairing | None:
        """Write a vote, on the disk when this returns, and give the next pair. A pair's second vote is not written.

        Raises: ValueError for a name, key or winner that is none; OSError naming the file that cannot be written.
        """
        rater = checked_name(rater)
        if not isinstance(winner, str) or winner not in WINNERS:
            raise ValueError(f"winner = {winner!r}: must be one of {', '.join(WINNERS)}")
        with self._lock:
            pairing = next((each for each in self._order(rater) if each.key == key), None)
            if pairing is None:
                raise ValueError(f"no pair of this page has the key {key!r}: load the page again")
            models = {"left": pairing.left.model, "right": pairing.right.model}
            vote = {"prompt": pairing.left.key, **models, "winner": winner, "rater": rater}
            if self._name_of(vote) not in self._done:
                self._journal.append(vote)
                self._done.add(self._name_of(vote))
            return self._next(rater)

    def _next(self, rater: str) -> Pairing | None:
        for pairing in self._order(rater):
            names = {"prompt": pairing.left.key, "left": pairing.left.model, "right": pairing.right.model, "rater": rater}
            if self._name_of(names) not in self._done:
                return pairing
        return None

    def _name_of(self, vote: Mapping[str, Any]) -> tuple[Any, ...]:
        try:
            return (vote["rater"], vote["prompt"], *sorted((vote["left"], vote["right"])))
        except (KeyError, TypeError):
            raise ValueError(f"{self._journal.path}: holds something else than votes: name another file for them") from None

    def _order(self, rater: str) -> list[Pairing]:
        """A rater's pairs in order."""
        if rater not in self._orders:
            draw = random.Random(json.dumps([self._seed, rater]))
            chosen = draw.sample(self._pairs, self.size)
            order = []
            for number, (key, *models) in enumerate(chosen, 1):
                draw.shuffle(models)
                left, right = (draw.choice(self._answers[key][model]) for model in models)
                secret = hashlib.sha256(json.dumps([self._seed, rater, key, *models]).encode()).hexdigest()[:24]
                order.append(Pairing(secret, number, len(chosen), left, right))
            self._orders[rater] = order
        return self._orders[rater]


def checked_name(rater: Any) -> str:
    """A rater's name without outer spaces. Raises: ValueError for an empty, long or unprintable one."""
    name = unicodedata.normalize("NFC", rater).strip() if isinstance(rater, str) else ""
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError(f"a rater's name must have 1 to {LONGEST_NAME} printable characters")
    return name
