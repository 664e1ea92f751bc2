"""What a run says at its end: how much it did, how well, and where its last checkpoint is."""

from pathlib import Path

from tqdm import tqdm

from engine.observe.logged import evaluation_lines, logged_steps
from engine.run import Run


def closing_lines(run: Run, last: Path) -> list[str]:
    """Steps, tokens and time; the best loss of each held-out set; the last checkpoint."""
    file = run.out / "metrics.jsonl"
    *_, line = ({}, *logged_steps(file))
    done = f"done       {run.plan.steps:,} steps"
    if "tokens_seen" in line:
        done += f", {line['tokens_seen']:,} tokens"
    if "wall_seconds" in line:
        done += f" in {tqdm.format_interval(line['wall_seconds'])}"
    lines = [done]
    evaluations = list(evaluation_lines(file))
    for name in run.heldout:
        # A loss that was not finite is null in the log.
        losses = [(loss, found["step"]) for found in evaluations if (loss := found.get(f"eval/{name}/loss")) is not None]
        if losses:
            loss, step = min(losses)
            lines.append(f"held-out   {name}: best loss {loss:.4f} after step {step:,}, {losses[-1][0]:.4f} at last")
    return [*lines, f"checkpoint {last}"]
