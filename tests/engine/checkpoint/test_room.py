"""Room for checkpoints is checked before a run starts."""

import shutil
from collections import namedtuple

import pytest

from engine.checkpoint import room
from engine.checkpoint.room import check_room, checkpoint_bytes
from engine.run import open_run
from recipes import pretrain

Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def run_of(tiny_settings, tmp_path):
    return lambda **changes: open_run(tiny_settings("pretrain", tmp_path / "run", **changes), ("text",))


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "optimizer": {"moments": "bfloat16"}}], ids=str
)
def test_the_size_of_a_checkpoint_is_known_before_it_is_written(tiny_settings, tmp_path, changes):
    settings = tiny_settings("pretrain", tmp_path / "run", steps=1, heldout=[], **changes)
    last = pretrain.run(settings)
    written = sum(path.stat().st_size for path in last.rglob("*.safetensors"))
    assert written == pytest.approx(checkpoint_bytes(open_run(settings, ("text",))), rel=0.06)


def test_a_disk_without_room_for_one_checkpoint_is_refused_and_for_all_is_warned_of(run_of, tmp_path, monkeypatch):
    run = run_of(checkpoint_every=2)
    size = checkpoint_bytes(run)
    for free, said in [(size * 3, "checkpoint "), (size * 3 - 1, "warning    ")]:
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path, free=free: Disk(10 * size, 0, free))
        (line,) = check_room(run)
        assert line.startswith(said)
        assert "0.5 MiB each, 3 more to keep at once" in line
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: Disk(10 * size, 0, size - 1))
    with pytest.raises(OSError, match=rf"{tmp_path / 'run'}: a checkpoint takes 0.5 MiB, the disk has 0.5 MiB free; free the"):
        check_room(run)
    # The only checkpoint of a run that saves at its end.
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: Disk(10 * size, 0, size))
    assert "1 more to keep" in check_room(run_of(checkpoint_minutes=0.0))[0]


def test_too_little_memory_for_the_copies_is_refused_or_warned_of(run_of, monkeypatch):
    run = run_of()
    size = checkpoint_bytes(run)
    monkeypatch.setattr(room, "_host_memory", lambda: (size, size - 1))
    assert check_room(run)[-1].startswith("warning    saving copies 0.5 MiB to the host's memory")
    monkeypatch.setattr(room, "_host_memory", lambda: (size - 1, size - 1))
    with pytest.raises(OSError, match=r"the copies of 1 ranks take 0.5 MiB of the host's memory"):
        check_room(run)
    monkeypatch.setattr(room, "_host_memory", lambda: (0, 0))
    assert len(check_room(run)) == 1


def test_torchruns_timeout_is_compared_with_the_last_checkpoint(run_of, monkeypatch):
    pretrain.run(run_of(steps=4, checkpoint_every=2, heldout=[]).settings)
    run = run_of(steps=4, checkpoint_every=2, heldout=[])
    shutil.rmtree(run.out / "step-00000004")
    run = run_of(steps=4, checkpoint_every=2, heldout=[])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not any("SIGTERM" in line for line in check_room(run))
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")
    monkeypatch.setattr("engine.distributed.torchrun._command_line", lambda process: [])
    monkeypatch.setattr(room, "seconds_to_save", lambda folder: 77.0)
    assert "kills its workers 0 s after SIGTERM, saving takes 77 s (the last one took so long)" in check_room(run)[-1]
