"""Every training recipe leaves a report, whatever becomes of the run; a report that cannot be written costs nothing else."""

import json

import pytest

from recipes import dpo, pretrain
from tests.recipes.report.test_page import embedded

RECIPES = {"pretrain": pretrain, "dpo": dpo}  # SFT trains as pre-training does


@pytest.mark.parametrize("stage", RECIPES)
def test_a_finished_run_leaves_its_report(tiny_settings, tmp_path, capsys, stage):
    out = tmp_path / "run"
    RECIPES[stage].run(tiny_settings(stage, out))
    assert str(out / "report.html") in capsys.readouterr().out
    (run,) = embedded((out / "report.html").read_text(encoding="utf-8"))["runs"]
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert run["steps"]["x"]["step"] == [1, 2, 3, 4, 5, 6]
    assert run["steps"]["columns"]["loss"]["mean"] == pytest.approx(losses, rel=1e-4)
    assert ("rewards/margins" in run["steps"]["columns"]) == (stage == "dpo")
    assert run["settings"]["schedule.peak"] == "0.003"


def test_a_run_that_fails_leaves_its_report_too(tiny_settings, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError):
        pretrain.run(tiny_settings("pretrain", out, schedule={"peak": 1e30}, log={"every": 1}))
    (run,) = embedded((out / "report.html").read_text(encoding="utf-8"))["runs"]
    assert run["gaps"] or run["spikes"]


def test_a_report_that_cannot_be_written_is_said_and_does_not_fail_the_run(tiny_settings, tmp_path, capsys):
    out = tmp_path / "run"
    (out / "report.html").mkdir(parents=True)
    (out / "report.html" / "kept").touch()
    assert pretrain.run(tiny_settings("pretrain", out, steps=2)).name == "step-00000002"
    assert "report.html was not written" in capsys.readouterr().out


def test_a_dry_run_writes_no_report(tiny_settings, tmp_path):
    pretrain.run(tiny_settings("pretrain", tmp_path / "run", dry_run=True))
    assert not (tmp_path / "run").exists()
