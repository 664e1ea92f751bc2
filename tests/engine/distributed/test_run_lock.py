"""A run folder has one writer, also where flock's locks do not reach other machines; a launcher of strangers is refused."""

import errno
import fcntl
import json
import os
import threading
import time
import warnings

import pytest
import torch

import model.folder
from engine.distributed import run_lock as lock_file
from engine.distributed.joining import join
from engine.distributed.run_lock import run_lock
from engine.settings.sections import ParallelSettings
from recipes import pretrain

DEAD = 2**22 + 1  # above the largest process id of Linux


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(lock_file, "REFRESH", 0.02)
    monkeypatch.setattr(lock_file, "ABANDONED", 0.3)


def held(folder, host, process):
    (folder / ".lock").write_text(json.dumps({"host": host, "process": process, "time": 0.0}))


def test_the_lock_names_its_holder_is_refreshed_and_goes(tmp_path):
    with run_lock(tmp_path):
        first = json.loads((tmp_path / ".lock").read_text())
        assert (first["host"], first["process"]) == (lock_file.socket.gethostname(), os.getpid())
        end = time.monotonic() + 60
        while json.loads((tmp_path / ".lock").read_text())["time"] == first["time"]:
            assert time.monotonic() < end
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_lets_the_lock_be_refreshed_in_its_place(tmp_path, monkeypatch):
    with run_lock(tmp_path):
        monkeypatch.setattr(lock_file, "write_file", _full)
        first = (tmp_path / ".lock").read_text()
        end = time.monotonic() + 60
        while (now := (tmp_path / ".lock").read_text()) == first:
            assert time.monotonic() < end
        assert json.loads(now).keys() == json.loads(first).keys()
        assert len(now) == len(first)


def _full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_living_holder_on_another_machine_is_named(tmp_path):
    held(tmp_path, "elsewhere", 7)
    ended = threading.Event()
    other = threading.Thread(target=lock_file._refresh, args=(tmp_path / ".lock", {"host": "elsewhere", "process": 7}, ended))
    other.start()
    try:
        message = rf"{tmp_path}: process 7 on elsewhere is writing it now; wait for it or"
        with pytest.raises(BlockingIOError, match=message), run_lock(tmp_path):
            pass
    finally:
        ended.set()
        other.join()
    assert json.loads((tmp_path / ".lock").read_text())["host"] == "elsewhere"


def test_a_holder_that_gives_no_sign_of_life_is_followed(tmp_path, capsys):
    held(tmp_path, "elsewhere", 7)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    assert "process 7 on elsewhere held this folder; waiting" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "half of a re", "[]"])
def test_a_dead_holder_on_this_machine_or_a_broken_file_is_followed_at_once(tmp_path, capsys, content):
    if content is None:
        held(tmp_path, lock_file.socket.gethostname(), DEAD)
    else:
        (tmp_path / ".lock").write_text(content)
    with run_lock(tmp_path):
        pass
    assert capsys.readouterr().out == ""


def lacking(number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_run_trains_on_a_file_system_without_locks_and_says_so_once(tiny_settings, tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", lacking(number))
    monkeypatch.setattr(model.folder, "_said", set())
    log = {"tensorboard": False}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settings = tiny_settings("pretrain", tmp_path / "run", steps=1, heldout=[], log=log)
        assert pretrain.run(settings).name == "step-00000001"
    found = [str(warning.message) for warning in said if "has no locks" in str(warning.message)]
    assert len(found) == 1
    assert f"({os.strerror(number)})" in found[0]
    # Without locks the process id tells whether a holder on this machine lives.
    held(tmp_path, lock_file.socket.gethostname(), DEAD)
    with run_lock(tmp_path):
        pass


def test_a_file_system_that_cannot_flush_folders_is_said_once_and_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(model.folder, "_said", set())
    monkeypatch.setattr(os, "fsync", lacking(errno.EINVAL))
    with pytest.warns(UserWarning, match="cannot flush folders"):
        model.folder.sync(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.folder.sync(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Invalid argument: '.*/file'"):
        model.folder.sync(tmp_path / "file")
    monkeypatch.setattr(os, "fsync", lacking(errno.EIO))
    with pytest.raises(OSError, match=rf"error: '{tmp_path}'"):
        model.folder.sync(tmp_path)


@pytest.mark.parametrize(("variable", "start"), [("SLURM_NTASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")])
def test_processes_that_do_not_know_one_another_are_refused(monkeypatch, variable, start):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(variable, "8")
    with pytest.raises(ValueError, match=rf"{variable} = 8: {start} started 8 processes") as refused:
        join(torch.device("cpu"), ParallelSettings(), {})
    assert f"{start} " in str(refused.value)
    assert "torchrun --nnodes MACHINES --nproc-per-node GPUS --shutdown-timeout 600" in str(refused.value)
    monkeypatch.setenv(variable, "1")
    assert join(torch.device("cpu"), ParallelSettings(), {}).ranks == 1
    # torchrun under srun sets both.
    monkeypatch.setenv(variable, "8")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join(torch.device("cpu"), ParallelSettings(), {}).ranks == 1
