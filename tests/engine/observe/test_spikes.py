"""Loss spikes: which steps stand out, and which documents are recorded with them."""

import json
import re

import pytest
import torch

from engine.data.batch import make_step
from engine.observe.spikes import SpikeLog, documents_of
from engine.run import open_run
from engine.settings.sections import GuardSettings
from recipes import pretrain

KINDS = {"pretrain": "text", "sft": "conversations", "dpo": "preferences"}


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def logged(step, loss, gradient_norm=1.0):
    return {"step": step, "loss": loss, "gradient_norm": gradient_norm}


@pytest.fixture
def spikes_of(tiny_settings, tmp_path):
    """spikes_of(**guard settings) -> a spike log over a pre-training plan."""
    plan = open_run(tiny_settings("pretrain", tmp_path / "run", steps=200), ("text",)).plan
    return lambda **guard: SpikeLog(tmp_path / "spikes.jsonl", GuardSettings(**guard), plan)


def test_a_spike_lies_a_number_of_deviations_above_the_median_of_the_steps_before(spikes_of, tmp_path):
    """The losses lie around 2; their median distance from it is 0.1, so a deviation is 0.1 / 0.6745."""
    log = spikes_of(spike=6.0, history=20)
    losses = [1.9, 2.0, 2.1] * 4
    assert not any(log.check(logged(1 + i, loss)) for i, loss in enumerate(losses))
    edge = 2.0 + 6 * 0.1 / 0.6745
    assert log.check(logged(13, edge - 0.01)) is None
    assert log.check(logged(14, 0.0)) is None
    said = log.check(logged(15, 2 * edge, gradient_norm=7.0))
    assert re.search(r"step 15: loss 5.77.. is \d\d\.\d deviations above the median 2.0000", said)
    assert "--replay 15 runs it again" in said
    (note,) = lines_of(tmp_path / "spikes.jsonl")
    assert (note["step"], note["loss"], note["gradient_norm"], note["median"]) == (15, 2 * edge, 7.0, 2.0)
    assert note["documents"] == documents_of(log._plan, 14)


def test_a_resumed_log_finds_the_spikes_of_an_unbroken_one(spikes_of):
    losses = [2.0 + i % 7 / 10 for i in range(30)]
    whole, resumed, fresh = spikes_of(history=12), spikes_of(history=12), spikes_of(history=12)
    assert not any(whole.check(logged(1 + i, loss)) for i, loss in enumerate(losses))
    resumed.resume(losses)
    assert fresh.check(logged(31, 90.0)) is None
    assert resumed.check(logged(31, 90.0)) == whole.check(logged(31, 90.0)) is not None


def test_a_spike_that_cannot_be_written_waits(spikes_of, tmp_path):
    log, file = spikes_of(), tmp_path / "spikes.jsonl"
    file.mkdir()
    assert log.check(logged(1, float("nan")))
    with pytest.raises(IsADirectoryError):
        log.write()
    file.rmdir()
    log.write()
    (note,) = lines_of(file)
    assert (note["step"], note["loss"]) == (1, None)


def test_spike_0_looks_for_none(spikes_of):
    log = spikes_of(spike=0.0)
    assert not any(log.check(logged(1 + i, 10.0**i)) for i in range(20))


@pytest.mark.parametrize("stage", KINDS)
def test_the_recorded_documents_are_in_the_steps_micro_batches(tiny_settings, tmp_path, stage):
    run = open_run(tiny_settings(stage, tmp_path / "run", pack_tokens=64), (KINDS[stage],))
    found = []
    for batch in make_step(run.plan, 2, run.packing).batches:
        length_B = torch.bincount(batch.document_T)
        for index, number in enumerate(batch.document_B.tolist()):
            found.append((number, int(batch.document_start_B[index]), int(length_B[index])))
    recorded = documents_of(run.plan, 2)
    assert {note["source"] for note in recorded} == {run.settings.sources[0].path}
    if stage == "dpo":
        assert sorted(note["pair"] for note in recorded) == sorted(number // 2 for number, *_ in found[::2])
        lengths = run.datasets[0].lengths
        assert all(note["tokens"] == [lengths[2 * note["pair"]] - 1, lengths[2 * note["pair"] + 1] - 1] for note in recorded)
    else:
        assert sorted((note["document"], note["start"], note["tokens"]) for note in recorded) == sorted(found)


def test_a_step_that_is_not_finite_is_recorded(tiny_settings, tmp_path, capsys):
    """The learning rate makes the loss explode, between two log lines and with no checkpoint asked for."""
    out = tmp_path / "run"
    settings = tiny_settings(
        "pretrain", out, schedule={"peak": 1e20}, heldout=[], checkpoint_every=0, log={"every": 100, "tensorboard": False}
    )
    with pytest.raises(FloatingPointError, match=r"step 2: loss .*, gradient norm (nan|inf): training stopped"):
        pretrain.run(settings)
    assert not list(out.glob("step-*"))
    note = lines_of(out / "spikes.jsonl")[-1]
    assert note["step"] == 2
    assert note["deviations"] is None
    assert note["documents"]
    assert "step 2: its documents are in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"spike": -1.0}, r"guard.spike = -1.0: must be a number that is 0 or more"),
        ({"lag": -1.0}, r"guard.lag = -1.0: must be a number that is 0 or more"),
        ({"history": 2}, r"guard.history = 2: must be at least 10 steps"),
    ],
)
def test_guard_settings_out_of_range_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        GuardSettings(**settings)
