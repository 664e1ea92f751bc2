"""Votes between two answers: read from files, ranked, and written as a report with a drawing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.sources import RECORD_SUFFIXES, find_sources
from recipes.drawing import new_figure, save_figure
from recipes.evaluation.ranking import DRAW, LEFT, RIGHT, Estimate, Fit, Votes, bradley_terry, davidson, fittable

WINNERS = {"left": LEFT, "right": RIGHT, "tie": DRAW}


def read_votes(path: str) -> Votes:
    """The votes of a file or folder: records of prompt, left, right, winner and rater.

    A vote without a prompt, or without a rater, is a cluster of its own, as no two of them are known to belong together.
    Raises: ValueError naming file and line of a record that is no vote; FileNotFoundError.
    """
    rows: list[tuple[int, ...]] = []
    models: dict[str, int] = {}
    clusters: tuple[dict[Any, int], dict[Any, int]] = ({}, {})
    for source in find_sources([path], RECORD_SUFFIXES):
        for record in source.records("line"):
            left, right, winner = _vote(record.value, record.place)
            numbers = [models.setdefault(name, len(models)) for name in (left, right)]
            for name, known in zip(("prompt", "rater"), clusters, strict=True):
                given = record.value.get(name)
                key = len(rows) if given is None else json.dumps(given, sort_keys=True)
                numbers.append(known.setdefault(key, len(known)))
            rows.append((*numbers, winner))
    names = sorted(models)
    order = np.array([names.index(name) for name in models])
    left_N, right_N, prompt_N, rater_N, outcome_N = np.array(rows).T
    return Votes(names, order[left_N], order[right_N], outcome_N, prompt_N, rater_N)


def _vote(value: Any, place: str) -> tuple[str, str, int]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: not a vote: must be an object with the fields prompt, left, right, winner and rater")
    for name in ("left", "right", "winner"):
        if not isinstance(value.get(name), str):
            raise ValueError(f"{place}: no text in the field '{name}': a vote has prompt, left, right, winner and rater")
    if value["winner"] not in WINNERS:
        raise ValueError(f"{place}: winner = {value['winner']!r}: must be left, right or tie")
    if value["left"] == value["right"]:
        raise ValueError(f"{place}: the model {value['left']!r} stands on both sides: remove the vote")
    return value["left"], value["right"], WINNERS[value["winner"]]


def report(votes: Votes) -> dict[str, Any]:
    """What the votes say of each model, best first; models that cannot be ranked follow, with the reason.

    score: Bradley and Terry's, a natural logarithm with mean 0 over the ranked models; davidson: the same from a model with
    draws and side. draw: Davidson's nu; side: the logarithm of the left side's odds. All with 95 % intervals. ranked_by: which
    of the two scores the ranks follow, davidson where there are draws.
    """
    kept, reasons = fittable(votes)
    wins = votes.wins()
    counted = [
        {"model": name, "wins": int(wins[number].sum()), "losses": int(wins[:, number].sum()), "draws": int(drawn)}
        for number, (name, drawn) in enumerate(zip(votes.models, votes.draws(), strict=True))
    ]
    ranked: list[dict[str, Any]] = []
    draw = side = None
    ranked_by = "score"
    if kept:
        among = votes.among(kept)
        decided, whole = bradley_terry(among), davidson(among)
        # Draws tell of closeness; where there are some, the model that knows them ranks.
        ranked_by, leading = ("davidson", whole) if whole.draw is not None else ("score", decided)
        scores = [-estimate.value for estimate in leading.scores]
        ranks = 1 + np.argsort(np.argsort(scores, kind="stable"), kind="stable")
        ranked = [
            {**counted[model], "rank": int(ranks[place]), **_ranks(leading, place), **_bounds("score", decided.scores[place])}
            | {"davidson": _bounds("score", whole.scores[place])}
            for place, model in enumerate(kept)
        ]
        draw, side = whole.draw and _odds(whole.draw), whole.side and _bounds("value", whole.side)
    return {
        "votes": len(votes.outcome),
        "draws": int((votes.outcome == DRAW).sum()),
        "prompts": len(set(votes.prompt.tolist())),
        "raters": len(set(votes.rater.tolist())),
        "ranked_by": ranked_by,
        "models": sorted(ranked, key=lambda row: row["rank"]),
        "unranked": [{**counted[model], "reason": reason} for model, reason in sorted(reasons.items())],
        "draw": draw,
        "side": side,
    }


def _bounds(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, "low": estimate.low, "high": estimate.high}


def _odds(estimate: Estimate) -> dict[str, float]:
    # exp of a bound that few draws leave open may exceed a float.
    value, low, high = (math.exp(min(bound, 700)) for bound in (estimate.value, estimate.low, estimate.high))
    return {"value": value, "low": low, "high": high}


def _ranks(fit: Fit, place: int) -> dict[str, int]:
    return dict(zip(("rank_low", "rank_high"), fit.ranks[place], strict=True))


def _leading(found: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, float]:
    """The score that ranks a model, and its bounds."""
    return row["davidson"] if found["ranked_by"] == "davidson" else row


def _named(found: Mapping[str, Any]) -> str:
    return "Davidson score (draws count)" if found["ranked_by"] == "davidson" else "Bradley-Terry score"


def lines(found: Mapping[str, Any]) -> list[str]:
    """The report as text."""
    rows = [*found["models"], *found["unranked"]]
    width = max(len(row["model"]) for row in rows)
    said = [
        f"{found['votes']:,} votes ({found['draws']:,} draws) on {found['prompts']:,} prompts by {found['raters']:,} raters",
        f"{'rank':>4} {'95 %':>7}  {'model':<{width}}{'wins':>7}{'losses':>7}{'draws':>7}{'score':>8}  95 %, {_named(found)}",
    ]
    for row in found["models"]:
        between, shown = f"{row['rank_low']}-{row['rank_high']}", _leading(found, row)
        said.append(
            f"{row['rank']:>4} {between:>7}  {row['model']:<{width}}{row['wins']:>7}{row['losses']:>7}{row['draws']:>7}"
            f"{shown['score']:>8.3f}  [{shown['low']:.3f}, {shown['high']:.3f}]"
        )
    for row in found["unranked"]:
        said.append(
            f"not ranked: {row['model']} {row['reason']} ({row['wins']} won, {row['losses']} lost, {row['draws']} drawn)"
        )
    for name, what in (("draw", "draws (nu)"), ("side", "left side (log-odds)")):
        if found[name] is not None:
            said.append("{}: {value:.3f} [{low:.3f}, {high:.3f}]".format(what, **found[name]))
    if not found["models"]:
        said.append("no two models beat each other, directly or through others: nothing can be ranked yet")
    return said


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The scores with their intervals, best at the top."""
    rows = found["models"]
    figure = new_figure(7, 1.2 + 0.35 * max(1, len(rows))) if rows else None
    if figure is None:
        return
    axes = figure.subplots()
    places = range(len(rows), 0, -1)
    shown = [_leading(found, row) for row in rows]
    values = [each["score"] for each in shown]
    errors = [[each["score"] - each["low"] for each in shown], [each["high"] - each["score"] for each in shown]]
    axes.errorbar(values, places, xerr=errors, fmt="o", color="0.2", capsize=3)
    axes.set_yticks(list(places), [f"{row['rank']}. {row['model']}" for row in rows])
    axes.set(xlabel=f"{_named(found)}, with 95 % interval", title=f"{found['votes']:,} votes", ylim=(0.4, len(rows) + 0.6))
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)
