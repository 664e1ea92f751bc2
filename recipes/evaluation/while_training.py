"""Benchmark scores of a model in training: the tasks of `recipes.evaluate`, computed by all ranks together."""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate

from engine.distributed.ranks import Ranks, first_line
from engine.inference.samples import ROWS
from engine.observe.evaluating import Signs
from engine.run import Run
from model.mistral import Mistral
from recipes.evaluation.benchmarks import Suite, load_suite, reset_examples
from recipes.evaluation.harness import KomainuLM
from recipes.evaluation.llm_jp_tasks import NAME, item_scores, means

_FAILED = -1


class _Stopped(Exception):
    """A signal asked the run to stop."""


class TaskScores:
    """Scores the tasks of `evaluate.tasks`: an `engine.observe.evaluating.Scorer`."""

    def __init__(self, run: Run) -> None:
        """Load the tasks and their data. Raises: ValueError or FileNotFoundError as `load_suite` does."""
        settings = run.settings.evaluate
        self._run, self._settings = run, settings
        self._suite = load_suite(settings.tasks, Path(settings.task_data) if settings.task_data else None)

    def __call__(self, model: Mistral, signs: Signs) -> dict[str, float] | None:
        """{"scores/TASK/METRIC": score}; empty, after a message, where the tasks failed; None where a signal stopped them."""
        shares = _Shares(self._run.ranks, signs)
        lm = KomainuLM(
            model,
            self._run.tokenizer,
            shares,
            pack_tokens=self._run.pack_tokens,
            rows=ROWS,
            chat=self._settings.task_chat,
        )
        reset_examples(self._suite)
        try:
            # The harness draws progress bars across the run's own.
            with contextlib.redirect_stderr(io.StringIO()):
                found: dict[str, Any] = evaluate(
                    lm=lm,
                    task_dict=self._suite.loaded,
                    limit=self._settings.task_limit or None,
                    bootstrap_iters=0,
                    apply_chat_template=self._settings.task_chat,
                    fewshot_as_multiturn=self._settings.task_chat,
                )
        except _Stopped:
            return None
        except ValueError as error:
            try:
                shares.fail(error)
            except _Stopped:
                return None
            signs.say(f"no scores: {first_line(error)}")
            return {}
        return _scores(self._suite, found)


class _Shares:
    """What all ranks compute of an evaluation: each rank every n-th pack, beginning with its own number. In memory.

    Ranks ask for a stop after each of their packs; a rank with one pack less asks once more at the end.
    """

    def __init__(self, ranks: Ranks, signs: Signs) -> None:
        self._ranks, self._signs = ranks, signs
        self._own: dict[int, Any] = {}
        self._left: int | None = None  # packs that this rank has still to compute or to wait for; None between kinds

    def plan(self, kind: str, requests: Iterable[Any], packs: int) -> Mapping[int, Any]:
        """Begin with a kind of request. Returns: the packs of other ranks, by number.

        Raises: ValueError where the ranks ask different requests.
        """
        digest = hashlib.sha256(json.dumps([*requests], default=str).encode()).hexdigest()
        if len({*self._ranks.gather([digest])}) > 1:
            raise ValueError("evaluate.tasks: the ranks read different files of data; copy the same to all machines")
        self._own, self._left = {}, -(-packs // self._ranks.ranks)
        return {number: None for number in range(packs) if number % self._ranks.ranks != self._ranks.rank}

    def add(self, kind: str, pack: int, results: Any) -> None:
        """Keep the results of a pack. Raises: _Stopped."""
        self._own[pack] = results
        self._passed()

    def results(self, kind: str) -> Iterator[Any]:
        """The results of all packs, in the packs' order. Raises: ValueError where another rank failed; _Stopped."""
        for _, results in self._gathered([*self._own.items()]):
            yield from results

    def fail(self, error: ValueError) -> None:
        """Tell the ranks that wait for this one's packs that there will be none. Raises: _Stopped."""
        if self._left is not None:
            with contextlib.suppress(ValueError):
                self._gathered([(_FAILED, str(error))])

    def _gathered(self, mine: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        while self._left:
            self._passed()
        self._left = None
        found = sorted(self._ranks.gather(mine), key=lambda entry: entry[0])
        if found and found[0][0] == _FAILED:
            raise ValueError(found[0][1])
        return found

    def _passed(self) -> None:
        assert self._left
        self._left -= 1
        self._signs.alive()
        if self._signs.stopping():
            raise _Stopped


def _scores(suite: Suite, found: Mapping[str, Any]) -> dict[str, float]:
    """Each metric of each group, and of each task in no group; the name of a filter follows its metric's."""
    groups = found.get("groups", {})
    grouped = {task.task_name for name in groups for task in suite.loaded["groups"][name].get_all_tasks()}
    tables = {**groups, **{name: found["results"][name] for name in suite.loaded["tasks"] if name not in grouped}}
    scores = {}
    for task, table in tables.items():
        for key, score in table.items():
            metric, _, filter = key.partition(",")
            if filter and not metric.endswith("_stderr") and isinstance(score, int | float):
                scores[f"scores/{task}/{metric}" if filter == "none" else f"scores/{task}/{metric}.{filter}"] = float(score)
    own = {name: sum(values) / len(values) for name, values in item_scores(found["samples"]).items()}
    return scores | {f"scores/{NAME}/{mean}": score for mean, score in means(own).items()}
