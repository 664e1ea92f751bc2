"""A replayed step computes the logged values to the bit, and tells its micro-batches and documents apart."""

import dataclasses
import json
import re

import pytest
import torch

import engine.loop
from engine.observe.replay import _Document, _worst
from engine.observe.spikes import documents_of
from engine.run import open_run
from recipes import dpo, pretrain, sft

STAGES = {"pretrain": (pretrain, "text"), "sft": (sft, "conversations"), "dpo": (dpo, "preferences")}


def spikes_in(out):
    return [json.loads(line) for line in (out / "spikes.jsonl").read_text().splitlines()]


def test_documents_of_nan_loss_are_the_worst():
    losses = (2.0, float("nan"), 9.0, float("inf"), 1.0, float("nan"), -3.0)
    worst = _worst([_Document(loss, number, 0) for number, loss in enumerate(losses)])
    assert [document.number for document in worst] == [1, 5, 3, 2, 0]


def loss_in(said):
    return float(re.search(r"loss +(\S+) \(logged", said)[1])


@pytest.mark.parametrize("stage", STAGES)
def test_a_spike_is_replayed_to_the_bit(tiny_settings, tmp_path, monkeypatch, capsys, stage):
    """A spike is recorded although it comes before the last log line, and a replay writes nothing."""
    recipe, kind = STAGES[stage]
    out = tmp_path / "run"
    settings = tiny_settings(
        stage, out, steps=14, checkpoint_every=12, heldout=[], log={"every": 4, "tensorboard": False}, guard={"spike": 1.0}
    )
    if stage != "pretrain":
        settings = dataclasses.replace(settings, neftune_alpha=5.0)
    accumulate = engine.loop.accumulate

    def spiking(model, objective, step):
        if step.index == 12:
            with torch.no_grad():
                model.norm.weight.mul_(-3.0)
        return accumulate(model, objective, step)

    with monkeypatch.context() as patch:
        patch.setattr(engine.loop, "accumulate", spiking)
        recipe.run(settings)
    spike = next(note for note in spikes_in(out) if note["step"] == 13)
    assert spike["deviations"] > 1
    assert "step 13: loss" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def replayed(step):
        assert recipe.run(dataclasses.replace(settings, replay=step)) is None
        return capsys.readouterr().out

    said = replayed(12)
    assert "with the weights of" in said
    assert "11 steps older than the step's own" in said
    said = replayed(13)
    assert f"step 13 with the weights of {out / 'step-00000012'}\n" in said
    found = loss_in(said)
    # The fault spoilt the weights after the checkpoint; the replayed step has good weights.
    assert found < spike["loss"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    # Resumed without the fault, the run logs another step 13. The replay equals it to the bit, and its old spike is forgotten.
    (out / "step-00000014").rename(tmp_path / "lost")
    recipe.run(settings)
    assert all(note["step"] != 13 or note["loss"] == found for note in spikes_in(out))
    capsys.readouterr()
    said = replayed(13)
    assert said.count("the same") >= 2
    assert loss_in(said) == found
    assert sum(float(part) for part in re.findall(r"adds (\S+)", said)) == pytest.approx(found, abs=1e-5)
    losses = [float(text) for text in re.findall(r"^loss (\d\S+) in", said, flags=re.MULTILINE)]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == min(5, len(documents_of(open_run(settings, (kind,)).plan, 12)))


def test_a_step_beyond_the_run_cannot_be_replayed(tiny_settings, tmp_path):
    with pytest.raises(ValueError, match=r"replay = 9: the run has the steps 1 to 6"):
        pretrain.run(tiny_settings("pretrain", tmp_path / "run", replay=9))
