"""A run outlives a checkpoint that fails, saves by the clock, and saves once when it is told to stop."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import engine.checkpoint.writing
import engine.loop
from engine.checkpoint.state import checkpoints, newest_checkpoint
from engine.distributed.torchrun import shutdown_timeout, shutdown_warning
from recipes import pretrain

QUIET = {"heldout": [], "log": {"every": 1, "tensorboard": False}}


@pytest.fixture
def failing(monkeypatch):
    """failing(numbers) -> makes these writes of a run, counted from 1, fail as on a full disk. Returns the steps written."""

    def arrange(numbers):
        tried, original = [], engine.checkpoint.writing.Checkpointer._write

        def write(self, folder, table, copies):
            tried.append(table["step"])
            if len(tried) in numbers:
                copies.clear()
                raise OSError(28, "No space left on device")
            original(self, folder, table, copies)

        monkeypatch.setattr(engine.checkpoint.writing.Checkpointer, "_write", write)
        monkeypatch.setattr(engine.loop, "PATIENCE", (0.0, 0.0))
        return tried

    return arrange


def settle_each_step(monkeypatch):
    """Let each background checkpoint end before the step after it does, so that the order of events is certain."""
    original, accumulate = engine.checkpoint.writing.Checkpointer.save, engine.loop.accumulate
    jobs = []

    def save(self, state):
        folder = original(self, state)
        jobs.append(self._job)
        return folder

    def waiting(*arguments):
        for job in jobs:
            job.exception()
        return accumulate(*arguments)

    monkeypatch.setattr(engine.checkpoint.writing.Checkpointer, "save", save)
    monkeypatch.setattr(engine.loop, "accumulate", waiting)


@pytest.mark.parametrize(
    ("failures", "tried"),
    [
        ({1}, [2, 3, 4, 6]),  # again after the next step
        ({1, 2}, [2, 3, 4, 6]),  # then when the next one is due
        ({4}, [2, 4, 6, 6]),  # the last one, again at once
    ],
)
def test_a_failed_checkpoint_is_tried_again_and_the_run_goes_on(
    tiny_settings, tmp_path, monkeypatch, capsys, failing, failures, tried
):
    settle_each_step(monkeypatch)
    found = failing({3} if failures == {4} else failures)
    last = pretrain.run(tiny_settings("pretrain", tmp_path / "run", checkpoint_every=2, **QUIET))
    assert found == tried
    assert last == newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "step-00000006"
    said = capsys.readouterr().out
    assert said.count("a checkpoint could not be written: [Errno 28] No space left on device; ") == len(failures)
    assert ("the next try comes with the next checkpoint that is due" in said) == (failures == {1, 2})


def test_the_run_ends_with_an_error_when_the_last_checkpoint_fails_for_good(tiny_settings, tmp_path, failing):
    tried = failing(set(range(1, 9)))
    with pytest.raises(OSError, match="No space left on device"):
        pretrain.run(tiny_settings("pretrain", tmp_path / "run", steps=2, **QUIET))
    assert tried == [2, 2, 2]


def test_checkpoints_come_by_the_clock_unless_steps_are_given(tiny_settings, tmp_path):
    assert tiny_settings("pretrain", tmp_path).checkpoint_seconds == 30 * 60
    assert tiny_settings("pretrain", tmp_path, checkpoint_every=5).checkpoint_seconds == 0
    assert tiny_settings("pretrain", tmp_path, checkpoint_every=5, checkpoint_minutes=1.0).checkpoint_seconds == 60
    with pytest.raises(ValueError, match=r"checkpoint_minutes = -1.0: must be a number that is 0 or more"):
        tiny_settings("pretrain", tmp_path, checkpoint_minutes=-1.0)
    pretrain.run(tiny_settings("pretrain", tmp_path / "run", steps=3, keep_checkpoints=9, checkpoint_minutes=1e-9, **QUIET))
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-{step:08d}" for step in (1, 2, 3)]


@pytest.mark.parametrize(("number", "status", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_saves_once_and_the_run_can_go_on(tiny_settings, tmp_path, monkeypatch, capsys, number, status, name):
    settings, accumulate = tiny_settings("pretrain", tmp_path / "run", **QUIET), engine.loop.accumulate
    handler = []

    def told(model, objective, step):
        if step.index == 2:
            os.kill(os.getpid(), number)
            handler.append(signal.getsignal(signal.SIGINT))
        return accumulate(model, objective, step)

    monkeypatch.setattr(engine.loop, "accumulate", told)
    with pytest.raises(SystemExit) as ended:
        pretrain.run(settings)
    assert ended.value.code == status
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000003"]
    assert f"stopped by {name} after step 3; start again to continue" in capsys.readouterr().out
    # A second Ctrl-C is the system's own: it ends the process at once.
    assert (handler == [signal.SIG_DFL]) == (number == signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(engine.loop, "accumulate", accumulate)
    assert pretrain.run(settings).name == "step-00000006"


def test_a_signal_is_seen_between_the_batches_of_an_evaluation(tiny_settings, metric_lines, tmp_path, monkeypatch):
    """The evaluation that was cut off is made up for by the run that continues."""
    settings = tiny_settings("pretrain", tmp_path / "run", evaluate_every=2, log={"every": 1, "tensorboard": False})
    begin = engine.loop.Watch.__init__

    def told(self, run, model):
        begin(self, run, model)
        life, folder = self.alive, tmp_path / "run" / "metrics.jsonl"

        def between():
            if folder.is_file() and '"step": 2' in folder.read_text():
                os.kill(os.getpid(), signal.SIGTERM)
            life()

        self.alive = between

    with monkeypatch.context() as patch:
        patch.setattr(engine.loop.Watch, "__init__", told)
        with pytest.raises(SystemExit) as ended:
            pretrain.run(settings)
    assert ended.value.code == 143
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert not any("eval" in name for line in metric_lines(tmp_path / "run") if line["step"] == 2 for name in line)
    pretrain.run(settings)
    pretrain.run(tiny_settings("pretrain", tmp_path / "whole", evaluate_every=2, log={"every": 1, "tensorboard": False}))
    assert metric_lines(tmp_path / "run") == metric_lines(tmp_path / "whole")


def test_an_old_checkpoint_that_cannot_be_removed_is_reported_and_tried_again(tiny_settings, tmp_path, monkeypatch, capsys):
    out, rmtree, refused = tmp_path / "run", shutil.rmtree, []

    def stubborn(path, *arguments, **named):
        if Path(path).name == ".step-00000001.old" and Path(path).exists() and len(refused) < 2:
            refused.append(path)
            raise OSError(39, "Directory not empty")
        rmtree(path, *arguments, **named)

    monkeypatch.setattr(engine.checkpoint.writing.shutil, "rmtree", stubborn)
    pretrain.run(tiny_settings("pretrain", out, steps=4, checkpoint_every=1, keep_checkpoints=1, **QUIET))
    assert (
        "step-00000001: could not be removed (Directory not empty); the next checkpoint tries again" in capsys.readouterr().out
    )
    assert len(refused) == 2
    assert [path.name for path in out.glob("*step-*")] == ["step-00000004"]


def test_a_checkpoint_that_is_a_link_stays_with_what_it_points_to(tiny_settings, tmp_path):
    out, archive = tmp_path / "run", tmp_path / "archive"
    settings = tiny_settings("pretrain", out, steps=3, checkpoint_every=1, keep_checkpoints=9, **QUIET)
    pretrain.run(settings)
    shutil.rmtree(out / "step-00000003")
    (out / "step-00000001").rename(archive)
    (out / "step-00000001").symlink_to(archive)
    before = {path: path.stat().st_mtime_ns for path in archive.rglob("*")}
    pretrain.run(tiny_settings("pretrain", out, steps=3, checkpoint_every=1, keep_checkpoints=1, **QUIET))
    assert {path: path.stat().st_mtime_ns for path in archive.rglob("*")} == before
    assert (out / "step-00000001").is_symlink()
    assert sorted(path.name for path in out.glob("*step-*")) == ["step-00000001", "step-00000003"]


def test_torchruns_timeout_is_read_where_it_can_be_seen(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert shutdown_timeout() is None
    assert shutdown_warning(1e6, "estimated") is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for arguments, variable, expected in [
        (["torchrun", "--nproc-per-node", "8"], None, 30.0),
        (["torchrun", "--shutdown-timeout", "600", "-m", "x"], "90", 600.0),
        (["torchrun", "--shutdown_timeout=45"], None, 45.0),
        (["torchrun"], "90", 90.0),
    ]:
        monkeypatch.setattr("engine.distributed.torchrun._command_line", lambda _, arguments=arguments: arguments)
        if variable:
            monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", variable)
        assert shutdown_timeout() == expected
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert shutdown_warning(30, "the last one") is None
    monkeypatch.setattr("torch.distributed.launcher.api.LaunchConfig", lambda min_nodes, shutdown_timeout: None)
    warning = shutdown_warning(400, "the last one")
    assert "kills its workers 30 s after SIGTERM, saving takes 400 s (the last one)" in warning
    assert "--shutdown-timeout 840" in warning
    monkeypatch.setattr("torch.distributed.launcher.api.LaunchConfig", lambda min_nodes: None)
    assert f"torch {torch.__version__}'s torchrun cannot wait longer: set checkpoint_minutes" in shutdown_warning(400, "x")
