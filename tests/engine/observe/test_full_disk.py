"""A disk that is full for a while costs a run neither its steps nor their metrics."""

import resource

import pytest

import engine.loop
from engine.observe.line_file import LineFile
from recipes import pretrain

CONSOLE = "metrics could not be written: [Errno 27] File too large; they come with the next ones, once there is room"


@pytest.fixture
def disk():
    """disk(bytes): files may be this large, as on a disk with so much room; disk(None): of any size."""

    def room(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY if size is None else size, resource.RLIM_INFINITY))

    yield room
    room(None)


def test_lines_that_do_not_fit_come_later_and_no_half_line_stays(tmp_path, disk):
    file = LineFile(tmp_path / "lines")
    file.add(["one", "two"])
    disk(10)
    for lines in (["three"], ["four", "\u4e94"], []):
        with pytest.raises(OSError, match="File too large"):
            file.add(lines)
        assert (tmp_path / "lines").read_text() == "one\ntwo\n"
    disk(None)
    file.add()
    assert (tmp_path / "lines").read_text(encoding="utf-8") == "one\ntwo\nthree\nfour\n\u4e94\n"
    file.add()
    assert (tmp_path / "lines").read_text(encoding="utf-8").count("\n") == 5


# TensorBoard's own thread ends with the error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_outlives_a_disk_that_is_full_for_a_step(tiny_settings, metric_lines, tmp_path, monkeypatch, capsys, disk):
    """Metrics and TensorBoard fail after the third step; metrics.jsonl is complete in the end."""
    changes = {"heldout": [], "log": {"every": 1}}
    pretrain.run(tiny_settings("pretrain", tmp_path / "whole", **changes))
    accumulate = engine.loop.accumulate

    def filled(model, objective, step):
        if step.index in (2, 3):
            disk(10 if step.index == 2 else None)
        return accumulate(model, objective, step)

    monkeypatch.setattr(engine.loop, "accumulate", filled)
    capsys.readouterr()
    assert pretrain.run(tiny_settings("pretrain", tmp_path / "run", **changes)).name == "step-00000006"
    assert CONSOLE in capsys.readouterr().out
    assert metric_lines(tmp_path / "run") == metric_lines(tmp_path / "whole")
