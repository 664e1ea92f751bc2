"""What a report reads from run folders, and how it groups the steps of a long run."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.report.curves import along, curves, with_progress
from recipes.report.reading import read_run
from recipes.report.summary import amount, duration, facts
from tests.recipes.report.runs import EVIL, write_run


def test_a_run_is_read_with_gaps_and_without_the_line_that_is_cut(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert run.steps["step"].tolist() == list(range(1, 41))
    assert np.flatnonzero(np.isnan(run.steps["loss"])).tolist() == [4]
    assert run.evaluations["step"].tolist() == [0, 10, 20, 30, 40]
    assert run.evaluations["scores/sums/exact"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert list(run.samples) == [0, 10, 20, 30, 40]
    assert run.samples[20][0] == {"prompt": EVIL, "answer": f"{EVIL} 20"}
    assert [spike["step"] for spike in run.spikes] == [5, 7]
    assert (run.settings["schedule.peak"], run.settings["sources.0.path"]) == (1e-3, "data/chat")
    (note,) = run.notes
    assert note.startswith("metrics.jsonl: line 51 could not be read")


def test_a_repeated_step_counts_once_as_written_last_and_strange_lines_are_left_out(tmp_path):
    lines = [
        '{"step": 2, "loss": 5.0}',
        '{"step": 1, "loss": 7.0, "late": 1}',
        "[1]",
        '{"loss": 3}',
        "",
        '{"step": 2, "loss": 4}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(
        "\n".join([*lines, '{"step": 3, "loss": "high", "tokens": NaN}']).encode() + b"\n\xff\n"
    )
    run = read_run(tmp_path)
    assert run.steps["step"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(run.steps["loss"], [7, 4, np.nan])
    np.testing.assert_array_equal(run.steps["late"], [1, np.nan, np.nan])
    assert "line 3, 4, 8 could not be read" in run.notes[0]
    assert "config.toml is missing" in run.notes[1]


def test_a_run_before_its_first_step_and_with_broken_settings_is_noted(tmp_path):
    (tmp_path / "config.toml").write_text("steps = = 3\n")
    run = read_run(tmp_path)
    assert run.steps == run.evaluations == {}
    assert run.notes[0] == "metrics.jsonl is missing"
    assert "config.toml: not valid TOML" in run.notes[1]
    assert facts(run, run.steps) == []


def test_folders_that_hold_no_run_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such run folder; name the folder"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file: is a file; name a run folder"):
        read_run(tmp_path / "file")
    run = write_run(tmp_path / "run")
    (run / "step-00000040").mkdir()
    with pytest.raises(ValueError, match=r"step-00000040: holds neither .* its run folder is .*/run$"):
        read_run(run / "step-00000040")


def test_tokens_and_time_of_older_runs_are_sums_and_places_are_those_of_the_last_step_before(tmp_path):
    older = with_progress(read_run(write_run(tmp_path / "older", older=True)).steps)
    assert older["tokens_seen"].tolist() == [100 * step for step in range(1, 41)]
    assert older["wall_seconds"].tolist() == [2 * step for step in range(1, 41)]
    newer = with_progress(read_run(write_run(tmp_path / "newer")).steps)
    found = along(newer, np.array([0.0, 1.0, 10.0, 99.0]))
    assert found["tokens"].tolist() == [0, 100, 1000, 4000]
    assert found["seconds"].tolist() == [0, 3, 30, 120]
    # A run that was continued by a version with these fields begins without them.
    for name in ("tokens_seen", "wall_seconds"):
        newer[name][:20] = np.nan
    mixed = with_progress(newer)
    assert (np.diff(mixed["tokens_seen"]) == 100).all()
    assert (np.diff(mixed["wall_seconds"]) > 0).all()


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=200),
    points=st.integers(1, 60),
)
def test_grouped_curves_keep_mean_and_extremes(values, points):
    column = np.array([*values, 1.0])
    rows = len(column)
    steps = np.arange(1.0, rows + 1)
    found = curves({"loss": column}, {"step": steps}, points)
    group, given = found["group"], found["columns"]["loss"]
    assert len(given["mean"]) == len(found["x"]["step"]) <= points
    assert found["x"]["step"][-1] == rows
    low, high = given.get("low", given["mean"]), given.get("high", given["mean"])
    for place in range(len(given["mean"])):
        part = column[place * group : (place + 1) * group]
        part = part[np.isfinite(part)]
        expected = [part.min(), part.mean(), part.max()] if len(part) else [None] * 3
        shown = [low[place], given["mean"][place], high[place]]
        if len(part):
            np.testing.assert_allclose(shown, expected, rtol=1e-4, atol=1e-9)
        else:
            assert shown == expected


def test_facts_of_a_run(tmp_path):
    run = read_run(write_run(tmp_path / "run", pairs=True))
    found = {name: (value, remark) for name, value, remark in facts(run, with_progress(run.steps))}
    losses = [json.loads(line).get("loss") for line in (run.folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    losses = [loss for loss in losses if loss]
    assert found["Steps"] == ("40", "of 40")
    assert found["Tokens"] == ("4k", "epoch 1")
    assert found["Time"] == ("2 min 0 s", "")
    assert found["Training loss"] == (f"{sum(losses[-2:]) / 2:.4f}", "mean of the last 2 steps")
    assert found["Best held-out loss"] == (f"{2 + 5 * np.exp(-4):.4f}", "chat-heldout, step 40")
    assert found["Peak memory"] == ("0.5 GiB", "process; 0.25 planned")
    assert found["Spikes"] == ("2", "last at step 7")
    assert found["Steps without update"] == ("1", "loss or gradient not finite")
    assert "Share of the ceiling" not in found


def test_amounts_and_durations_in_words():
    assert [amount(value) for value in (7, 950, 12_345, 4_560_000, 2.5e9)] == ["7", "950", "12.3k", "4.56M", "2.5G"]
    assert [duration(value) for value in (4.2, 59.96, 200, 7500, 97_300)] == [
        "4.2 s",
        "60 s",
        "3 min 20 s",
        "2 h 5 min",
        "1 d 3 h",
    ]
