"""Which stages are finished, which are still to be made, and which are stale, with the reasons."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from recipes.chain.markers import Markers
from recipes.chain.stages import Chain, Stage


@dataclass(frozen=True)
class Verdict:
    """What a stage needs.

    state: "finished"; "unfinished" where it goes on; "to make" from its beginning; "stale" where the chain may not go on.
    reasons: why it is stale, one line each. remarks: what else there is to say.
    """

    stage: Stage
    state: Literal["finished", "unfinished", "to make", "stale"]
    reasons: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def judge(chain: Chain, markers: Markers, among: Collection[Stage]) -> list[Verdict]:
    """The verdict on every stage. among: the stages that are to run now.

    Raises: ValueError or FileNotFoundError for a damaged checkpoint or dataset, naming file and remedy.
    """
    found: dict[str, Verdict] = {}
    for stage in chain.stages:
        reasons = markers.changes(stage)
        makers = [maker.name for maker in chain.makers(stage) if found[maker.name].state == "stale"]
        if makers and markers.has_begun(stage):
            reasons.append(f"it reads the result of {' and '.join(makers)}, which {'are' if makers[1:] else 'is'} stale")
        if reasons:
            found[stage.name] = Verdict(stage, "stale", tuple(reasons))
        elif not markers.has_begun(stage):
            found[stage.name] = Verdict(stage, "to make")
        else:
            marker = markers.of(stage)
            found[stage.name] = Verdict(stage, "finished" if marker and marker.state == "done" else "unfinished")
    # A result that was deleted matters only where a stage is still to read it.
    for stage in chain.stages:
        if found[stage.name].state == "finished" and (gone := markers.gone(stage)):
            readers = [
                other.name
                for other in among
                if stage in chain.makers(other) and found[other.name].state in ("unfinished", "to make")
            ]
            text = f"{' and '.join(gone)} {'are' if gone[1:] else 'is'} gone"
            if readers:
                found[stage.name] = Verdict(stage, "stale", (f"{text}, and {' and '.join(readers)} will read it",))
            else:
                found[stage.name] = Verdict(stage, "finished", remarks=(f"{text}; nothing is still to read it",))
    return list(found.values())


def refusal(verdicts: list[Verdict], start: str) -> str | None:
    """What to say where a stage is stale; None where none is. start: the command that starts the chain."""
    stale = [verdict for verdict in verdicts if verdict.state == "stale"]
    if not stale:
        return None
    lines = [f"  {verdict.stage.name}: {reason}" for verdict in stale for reason in verdict.reasons]
    roots = [verdict for verdict in stale if not all(reason.startswith("it reads the result of") for reason in verdict.reasons)]
    names = " ".join(verdict.stage.name for verdict in roots)
    count = "1 stage is" if len(stale) == 1 else f"{len(stale)} stages are"
    return "\n".join(
        [
            f"{count} stale, and no stale result is used:",
            *lines,
            f"restore what changed, or make {'it' if len(stale) == 1 else 'them'} again: {start} --from {names}",
        ]
    )
