"""The last lines of a run: what was done, the best loss, where checkpoint and report are."""

import json
import re
from pathlib import Path

from engine.observe.closing import closing_lines
from engine.run import open_run
from recipes import sft


def test_a_run_ends_with_what_it_did_and_where_everything_is(tiny_settings, tmp_path, capsys):
    out = tmp_path / "run"
    settings = tiny_settings("sft", out, evaluate_every=2, steps=4, log={"tensorboard": False})
    last = sft.run(settings)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {
        line["step"]: line["eval/conversations-heldout/loss"] for line in lines if "eval/conversations-heldout/loss" in line
    }
    best = min(losses, key=losses.get)
    said = capsys.readouterr().out.splitlines()[-4:]
    tokens = sum(line["tokens"] for line in lines if "loss" in line)
    assert re.fullmatch(rf"done       4 steps, {tokens:,} tokens in \d\d:\d\d", said[0])
    assert said[1:] == [
        f"held-out   conversations-heldout: best loss {losses[best]:.4f} after step {best}, {losses[4]:.4f} at last",
        f"checkpoint {last}",
        f"report     {out / 'report.html'}",
    ]
    # The best loss is not always the last, and a loss that was not finite is none.
    with (out / "metrics.jsonl").open("a") as file:
        for step, loss in ((5, 0.125), (6, 7.5), (7, None)):
            file.write(json.dumps({"step": step, "eval/conversations-heldout/loss": loss}) + "\n")
    found = closing_lines(open_run(settings, ("conversations",)), last)
    assert found[1] == "held-out   conversations-heldout: best loss 0.1250 after step 5, 7.5000 at last"


def test_a_log_of_an_older_version_has_no_sums(tiny_settings, tmp_path):
    run = open_run(tiny_settings("sft", tmp_path / "run"), ("conversations",))
    assert closing_lines(run, Path("last")) == ["done       6 steps", "checkpoint last"]
    run.out.mkdir()
    (run.out / "metrics.jsonl").write_text('{"step": 6, "loss": 2.0, "tokens": 10}\n{"step": 6, "lo')
    assert closing_lines(run, Path("last")) == ["done       6 steps", "checkpoint last"]
