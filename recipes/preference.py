"""Human preference: a page on which people choose the better of two answers, and a ranking of the models from their votes.

python -m recipes.preference serve --answers answers.jsonl --votes votes.jsonl
python -m recipes.preference rank votes.jsonl --json ranking.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.settings.toml import PathName
from model.folder import write_file
from recipes.command import commands, with_name


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """Rank models by votes: Bradley-Terry, draws (Davidson), the side, with intervals clustered by prompt and rater."""

    votes: PathName
    """Votes (.jsonl, .json, or .gz of them): prompt, left, right, winner (left, right or tie), rater. May be given without the
    option's name."""
    json: PathName
    """Write the ranking here."""
    drawing: PathName | None = None
    """Draw the scores here (.svg, .png, .pdf); default: beside the ranking, with the suffix .svg."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Serve a page on this machine alone, on which people choose the better of two answers."""

    answers: tuple[PathName, ...]
    """Answers (.jsonl, .json, or .gz of them, or folders): records with messages (or prompt), response and model."""
    votes: PathName
    """Append the votes to this file; the page goes on where the file stops."""
    port: int = 8765
    """Port on 127.0.0.1; 0 takes a free one."""
    seed: int = 0
    """Seed of the order of the pairs, and of which answer stands left."""
    most: int = 0
    """Ask each rater for at most so many votes; 0: for all pairs."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port = {self.port}: must lie in 0 .. 65535")
        if self.most < 0:
            raise ValueError(f"most = {self.most}: must be positive, or 0 for all pairs")


def rank(settings: RankSettings) -> None:
    from recipes.evaluation.votes import draw, lines, read_votes, report

    found = report(read_votes(settings.votes))
    write_file(settings.json, json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    draw(found, Path(settings.drawing or Path(settings.json).with_suffix(".svg")))
    print("\n".join(lines(found)))


def serve(settings: ServeSettings) -> None:
    from recipes.evaluation.ballot import Ballot, read_contenders
    from recipes.evaluation.vote_page import vote_server

    contenders = read_contenders(settings.answers)
    with Ballot(contenders, settings.votes, seed=settings.seed, most=settings.most) as ballot:
        server = vote_server(ballot, settings.port)
        print(f"{ballot.size:,} pairs; votes go to {settings.votes}")
        print(f"open http://127.0.0.1:{server.server_port}/ (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        finally:
            server.server_close()


PARTS: dict[str, tuple[type, Callable[[Any], Any]]] = {"serve": (ServeSettings, serve), "rank": (RankSettings, rank)}


def main(argv: Sequence[str] | None = None) -> None:
    commands(PARTS, with_name(argv, {"rank": "votes", "serve": "answers"}), "python -m recipes.preference", __doc__ or "")


if __name__ == "__main__":
    main()
