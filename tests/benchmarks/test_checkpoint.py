"""The checkpoint benchmark: every provider brings back what it saved, and one that does not is called wrong."""

import json
import shutil
from concurrent.futures import Future
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import checkpoint as benchmark
from model.config import PRESETS, MistralConfig

CONFIG = MistralConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
SETTINGS = benchmark.CheckpointSettings(device="cpu", dtype="bfloat16", rounds=2)


@pytest.fixture
def small(monkeypatch, tiny_tokenizer):
    """A model of a few thousand parameters, and the tests' tokenizer."""
    monkeypatch.setitem(PRESETS, "small", CONFIG)
    monkeypatch.setattr(benchmark, "mistral_tokenizer_path", lambda: tiny_tokenizer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("provider", benchmark.PROVIDERS)
def test_every_provider_brings_back_what_it_saved(provider, small, tmp_path):
    rows = benchmark.save_and_load(asdict(SETTINGS), provider, str(tmp_path))
    assert json.loads(json.dumps(rows)) == rows
    state = CONFIG.parameters * 12
    for row in rows.values():
        assert "wrong" not in row
        # Names and shapes take room too, and ours holds a tokenizer.
        assert state <= row["gib"] * 2**30 < state + 800_000
        assert row["seconds"]["samples"] == 2
        assert row["gb_per_second"] == pytest.approx(row["gib"] * 2**30 / 1e9 / row["seconds"]["median"])
        assert row["above_gib"] >= 0
    assert rows["save"]["blocked_seconds"]["median"] <= rows["save"]["seconds"]["median"]


def test_the_digest_sees_a_changed_bit_a_swap_and_a_name(small):
    tensors = benchmark.tensors_of(*benchmark.Subject(SETTINGS).filled())
    assert all(len(tensor.unique()) > 1 and tensor.isfinite().all() for tensor in tensors.values())
    before = benchmark.digest(tensors)
    assert before == benchmark.digest(benchmark.tensors_of(*benchmark.Subject(SETTINGS).filled()))
    assert before == benchmark.digest(dict(reversed(tensors.items())))
    name = "layers.0.mlp.down_proj.weight.remainder"
    changed = tensors | {name: tensors[name] ^ (torch.arange(tensors[name].numel()).view_as(tensors[name]) == 5)}
    assert before != benchmark.digest(changed)
    first, second = "layers.0.mlp.down_proj.weight.exp_avg", "layers.1.mlp.down_proj.weight.exp_avg"
    assert before != benchmark.digest(tensors | {first: tensors[second], second: tensors[first]})


def test_a_load_that_brings_back_something_else_is_wrong(small, tmp_path, monkeypatch):
    right = benchmark.PROVIDERS["safetensors save_file"]

    def forgets_moments(folder, subject):
        model, optimizer = right.load(folder, subject)
        optimizer.state["norm.weight.exp_avg"].zero_()
        return model, optimizer

    monkeypatch.setitem(benchmark.PROVIDERS, "forgetful", replace(right, load=forgets_moments))
    rows = benchmark.save_and_load(asdict(SETTINGS), "forgetful", str(tmp_path))
    assert "wrong" not in rows["save"]
    assert rows["load"]["wrong"] == "the loaded state is not the saved one"


def test_a_save_that_runs_on_is_waited_for_and_does_not_block(small, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    right = benchmark.PROVIDERS["safetensors save_file"]

    class Later(Future):
        def result(self, timeout=None):
            now[0] += 10.0

    def prepares(folder, model, optimizer):
        now[0] += 100.0
        save = right.save(folder, model, optimizer)

        def begins():
            now[0] += 1.0
            save()
            return Later()

        return begins

    def loads(folder, subject):
        now[0] += 5.0
        return right.load(folder, subject)

    monkeypatch.setitem(benchmark.PROVIDERS, "slow", replace(right, save=prepares, load=loads))
    row = benchmark.save_and_load(asdict(SETTINGS), "slow", str(tmp_path))["save"]
    assert row["blocked_seconds"]["median"] == 1.0
    assert row["seconds"]["median"] == 11.0


def test_a_run_measures_in_processes_of_its_own_and_failures_are_rows(tmp_path, monkeypatch, capsys):
    out, folder, calls = tmp_path / "result.json", tmp_path / "disk", []
    folder.mkdir()

    def call_apart(module, function, arguments, *, limit):
        calls.append((module, function, json.loads(json.dumps(arguments))["provider"]))
        if len(calls) == 2:
            raise benchmark.processes.ApartError("failed (exit 1): OSError: no space")
        return {"save": {"gib": 1.0}, "load": {"gib": 1.0}}

    monkeypatch.setattr(benchmark.processes, "call_apart", call_apart)
    chosen = ("komainu", "safetensors save_file")
    settings = replace(SETTINGS, preset="tiny", layers=1, providers=chosen, folder=str(folder), out=str(out))
    result = benchmark.run(settings)
    assert json.loads(out.read_text()) == result
    assert calls == [("benchmarks.checkpoint", "save_and_load", provider) for provider in chosen]
    assert [(row["operation"], row.get("missing")) for row in result["rows"]] == [
        ("save", None),
        ("load", None),
        ("save", "failed (exit 1): OSError: no space"),
        ("load", "failed (exit 1): OSError: no space"),
    ]
    assert not any(folder.iterdir())
    assert "safetensors save_file" in capsys.readouterr().out


def test_wrong_settings_and_a_small_disk_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="rounds = 0: must be at least 1"):
        benchmark.CheckpointSettings(rounds=0)
    with pytest.raises(ValueError, match=r"unknown 'pickle'; choose from komainu, torch\.distributed\.checkpoint"):
        benchmark.CheckpointSettings(providers=("pickle",))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(ValueError, match=r"0\.0 GiB free, the state takes .*: choose another folder, or fewer layers"):
        benchmark.run(replace(SETTINGS, folder=str(tmp_path)))
