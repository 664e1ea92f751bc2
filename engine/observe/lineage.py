"""The first line of a branch's log names its parent, so that a report can draw both."""

import json
import shutil

from engine.run import Run
from model.folder import write_file

PARENT = "parent"


def begin_log(run: Run) -> None:
    """Begin the log of a fresh run: nothing of an earlier attempt, and a branch's parent. Rank 0 calls this."""
    for name in ("metrics.jsonl", "spikes.jsonl"):
        (run.out / name).unlink(missing_ok=True)
    shutil.rmtree(run.out / "tensorboard", ignore_errors=True)
    if run.parent is not None:
        write_file(run.out / "metrics.jsonl", json.dumps({"step": run.start, PARENT: run.parent.checkpoint}) + "\n")
