"""Ranks that see different things: rank 0 decides, and a difference is named with its rank."""

import dataclasses
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import engine.inputs
import engine.run
from engine.distributed import agreement
from engine.distributed.agreement import check_same, difference_in, seen, weights_sample
from engine.distributed.ranks import Ranks
from model.config import read_config
from recipes import pretrain

ALONE = Ranks(torch.device("cpu"))
# A second rank, as far as a rank knows without asking others.
SECOND = dataclasses.replace(ALONE, rank=1, ranks=2)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"seed": 1, "plan": "a"}, "seed: rank 2 has 1, rank 0 has 0; start alike"),
        ({"seed": 0}, "plan: rank 2 has None, rank 0 has 'a'; start alike"),
        ({"seed": 0, "plan": "a", "z": 1}, "z: rank 2 has 1, rank 0 has None; start alike"),
    ],
)
def test_a_difference_is_named_with_its_rank(monkeypatch, theirs, said):
    same = {"seed": 0, "plan": "a"}
    monkeypatch.setattr(Ranks, "gather", lambda *_: [same, same, same])
    check_same(ALONE, same, "start alike")
    monkeypatch.setattr(Ranks, "gather", lambda *_: [same, same, theirs])
    with pytest.raises(ValueError, match="rank 2") as differs:
        check_same(ALONE, same, "start alike")
    assert str(differs.value) == said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({2: {"parallel.replicas": 3}}, "parallel.replicas: rank 2 has 3, rank 0 has 1"),
        ({1: {"device": "cpu"}, 3: {"seed": 1}}, "device: rank 1 has 'cpu', rank 0 has None"),
    ],
)
def test_ranks_without_a_group_compare_through_a_store(changes, said):
    """All ranks learn of the same difference."""
    store, facts = dist.HashStore(), {"parallel.replicas": 1, "seed": 0, "heldout.0": "a"}
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda rank: difference_in(store, rank, 4, facts | changes.get(rank, {})), range(4)))
    assert told == [said] * 4


def test_rank_0_decides_which_checkpoint_of_a_model_is_the_newest(monkeypatch, tmp_path):
    """The second rank's listing is old: it does not show the newest checkpoint yet."""
    for name in ("step-00000001", "step-00000002"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(engine.inputs, "newest_checkpoint", lambda name: tmp_path / "step-00000001")
    monkeypatch.setattr(Ranks, "from_main", lambda self, value: [str(tmp_path / "step-00000002"), None])
    assert engine.inputs.folder_of(str(tmp_path), SECOND, weights=True) == tmp_path / "step-00000002"


def test_an_error_of_rank_0_reaches_every_rank(monkeypatch):
    error = FileNotFoundError("no such folder")
    monkeypatch.setattr(Ranks, "from_main", lambda self, value: [None, error])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        SECOND.decided(lambda: pytest.fail("only rank 0 looks"))


def test_a_rank_waits_until_it_sees_what_rank_0_chose(monkeypatch, tmp_path):
    late = tmp_path / "late"
    thread = threading.Thread(target=lambda: (time.sleep(0.2), late.mkdir()))
    thread.start()
    assert seen(late, SECOND) == late
    thread.join()
    monkeypatch.setattr(agreement, "_PATIENCE", 0.0)
    with pytest.raises(FileNotFoundError, match=r"nowhere: rank 0 sees it, this rank does not; all machines"):
        seen(tmp_path / "nowhere", SECOND)


def test_a_sample_of_the_weights_tells_models_apart(tiny_model, tmp_path):
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    assert weights_sample(other) == weights_sample(tiny_model)
    (file,) = other.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert weights_sample(other) != weights_sample(tiny_model)


def test_plan_data_weights_and_configuration_are_compared(tiny_settings, tmp_path, monkeypatch):
    run = engine.run.open_run(tiny_settings("pretrain", tmp_path / "run"), ("text",))
    several = dataclasses.replace(run, ranks=dataclasses.replace(SECOND, mesh="a mesh"))
    facts = []
    monkeypatch.setattr(engine.run, "check_same", lambda ranks, found, remedy: facts.append(found))
    engine.run._check_same_content(several)
    assert {"plan", "tokenizer", "model configuration", "steps done", f"weights {run.settings.model}"} < facts[0].keys()
    assert facts[0][f"data {run.settings.sources[0].path}"] == run.datasets[0].fingerprint


def test_a_resumed_run_keeps_the_configuration_that_it_began_with(tiny_settings, tiny_model, metric_lines, tmp_path, capsys):
    """A window of another size would change every loss."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    changes = {"model": str(model), "steps": 4, "checkpoint_every": 2, "log": {"tensorboard": False}}
    whole, torn = (tiny_settings("pretrain", tmp_path / name, **changes) for name in ("whole", "torn"))
    for settings in (whole, torn):
        pretrain.run(settings)
    shutil.rmtree(tmp_path / "torn" / "step-00000004")
    table = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(table | {"sliding_window": 3}))
    capsys.readouterr()
    last = pretrain.run(torn)
    said = f"its configuration changed since the run began: sliding_window = 3, was {table['sliding_window']}; the run keeps"
    assert said in capsys.readouterr().out
    assert read_config(last).sliding_window == table["sliding_window"]
    assert metric_lines(tmp_path / "torn") == metric_lines(tmp_path / "whole")
