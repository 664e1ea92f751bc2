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


def test_a_short_run_by_the_clock_is_not_warned_of_checkpoints_that_it_will_not_write(run_of, monkeypatch):
    """A fresh run does not know how long it takes; a run that goes on does."""
    run = run_of(heldout=[])
    size = checkpoint_bytes(run)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: Disk(10 * size, 0, 2 * size))
    (line,) = check_room(run)
    assert line.startswith("checkpoint 0.5 MiB each, up to 3 more to keep at once")
    assert "not all of them fit if the run takes longer than 60 minutes; then free the disk" in line
    (line,) = check_room(run_of(heldout=[], steps=2))
    assert "up to 2 more to keep at once" in line
    assert "not all of them fit" not in line
    pretrain.run(run_of(checkpoint_every=2, keep_checkpoints=8, heldout=[]).settings)
    shutil.rmtree(run.out / "step-00000006")
    shutil.rmtree(run.out / "step-00000004")
    (line,) = check_room(run_of(heldout=[], keep_checkpoints=8))
    assert line.startswith("checkpoint 0.5 MiB each, 1 more to keep at once")
    # After each of the four steps that are left; one checkpoint is there.
    (line,) = check_room(run_of(heldout=[], keep_checkpoints=8, checkpoint_minutes=1e-9))
    assert line.startswith("warning    checkpoint 0.5 MiB each, 4 more to keep at once")
    (line,) = check_room(run_of(heldout=[], keep_checkpoints=1, checkpoint_minutes=1e-9))
    assert line.startswith("checkpoint 0.5 MiB each, 1 more to keep at once")


def test_too_little_memory_for_copies_and_training_is_refused_or_warned_of(run_of, monkeypatch):
    run = run_of()
    size, training = checkpoint_bytes(run), run.planned.peak
    monkeypatch.setattr(room, "host_memory", lambda: (size, size + training))
    assert len(check_room(run)) == 1
    monkeypatch.setattr(room, "host_memory", lambda: (size, size + training - 1))
    assert check_room(run)[-1].startswith("warning    the copies (0.5 MiB) and training (")
    monkeypatch.setattr(room, "host_memory", lambda: (size - 1, size - 1))
    with pytest.raises(OSError, match=r"the copies \(0.5 MiB\) of 1 ranks take 0.5 MiB of the host's memory, which has"):
        check_room(run)
    monkeypatch.setattr(room, "host_memory", lambda: (0, 0))
    assert len(check_room(run)) == 1


def test_moments_in_the_hosts_memory_count_beside_their_copies(run_of, monkeypatch):
    """In float32 they are two thirds of a checkpoint."""
    run = run_of(optimizer={"offload": "moments"})
    size = checkpoint_bytes(run)
    needed = size + size * 2 // 3
    monkeypatch.setattr(room, "host_memory", lambda: (needed, 10 * needed))
    assert len(check_room(run)) == 1
    monkeypatch.setattr(room, "host_memory", lambda: (needed - 1, 10 * needed))
    with pytest.raises(OSError, match=r"the copies \(0.5 MiB\) and the moments \(0.3 MiB\) of 1 ranks take 0.8 MiB"):
        check_room(run)


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
