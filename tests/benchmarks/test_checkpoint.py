"""The checkpoint benchmark: every provider brings back what it saved, and one that does not is called wrong."""

import json
import shutil
from concurrent.futures import Future
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import checkpoint as benchmark
from benchmarks import measure
from model.config import MistralConfig

CONFIG = MistralConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=4,
)  # fmt: skip
SETTINGS = benchmark.CheckpointSettings(device="cpu", dtype="bfloat16", rounds=2)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "SMALL", CONFIG)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("provider", benchmark.PROVIDERS)
def test_every_provider_brings_back_what_it_saved(provider, dtype, small, tmp_path):
    settings = asdict(replace(SETTINGS, dtype=dtype))
    saved = benchmark.save(settings, provider, str(tmp_path))
    loaded = benchmark.load(settings, provider, str(tmp_path))
    assert saved["digest"] == loaded["digest"]
    state = CONFIG.parameters * 12
    for row in (saved, loaded):
        # Names and shapes take room too, and ours holds a tokenizer.
        assert state <= row["gib"] * 2**30 < state + 800_000
        assert row["seconds"]["samples"] == 2
        assert row["gb_per_second"] == pytest.approx(row["gib"] * 2**30 / 1e9 / row["seconds"]["median"])
        assert row["peak_host_gib"] >= row["above_gib"] >= 0
    assert saved["blocked_seconds"]["median"] <= saved["seconds"]["median"]


def test_the_digest_sees_a_changed_bit_a_swap_and_a_name(small):
    shape = benchmark.Shape.of(SETTINGS)
    tensors = benchmark.tensors_of(*shape.filled())
    before = benchmark.digest(tensors)
    assert before == benchmark.digest(benchmark.tensors_of(*shape.filled()))
    assert before == benchmark.digest(dict(reversed(tensors.items())))
    name = "layers.0.mlp.down_proj.weight.remainder"
    changed = tensors | {name: tensors[name] ^ (torch.arange(tensors[name].numel()).view_as(tensors[name]) == 5)}
    assert before != benchmark.digest(changed)
    flat = tensors[name].flatten().clone()
    flat[[6, 7]] = flat[[7, 6]]
    assert before != benchmark.digest(tensors | {name: flat.view_as(tensors[name])})
    first, second = "layers.0.mlp.down_proj.weight.exp_avg", "layers.1.mlp.down_proj.weight.exp_avg"
    assert before != benchmark.digest(tensors | {first: tensors[second], second: tensors[first]})


def test_saved_state_is_random_everywhere(small):
    for name, tensor in benchmark.tensors_of(*benchmark.Shape.of(SETTINGS).filled()).items():
        assert len(tensor.unique()) > 1, name
        assert tensor.isfinite().all(), name


def in_this_process(module, function, arguments, *, limit):
    assert module == "benchmarks.checkpoint"
    # What a process of its own would be given, and give back.
    return json.loads(json.dumps(getattr(benchmark, function)(**json.loads(json.dumps(arguments)))))


def test_a_load_that_brings_back_something_else_is_wrong(small, tmp_path, monkeypatch):
    def forgets_moments(folder, shape):
        model, optimizer = benchmark._load_raw(folder, shape)
        optimizer.state["norm.weight.exp_avg"].zero_()
        return model, optimizer

    right = benchmark.PROVIDERS["bytes in one file"]
    monkeypatch.setitem(benchmark.PROVIDERS, "forgetful", replace(right, load=forgets_moments))
    monkeypatch.setattr(measure, "call_apart", in_this_process)
    saved, loaded = benchmark.provider_rows(SETTINGS, "forgetful", tmp_path)
    assert "wrong" not in saved
    assert loaded["wrong"] == "what was loaded is not what was saved"
    assert "digest" not in saved
    assert "digest" not in loaded


def test_what_fails_is_a_row_that_says_why(small, tmp_path, monkeypatch):
    def failing(module, function, arguments, *, limit):
        if function == arguments["fails"]:
            raise measure.PartError("failed (exit 1): OSError: no space")
        return in_this_process(module, function, {k: v for k, v in arguments.items() if k != "fails"}, limit=limit)

    for fails, expected in (("save", [True, True]), ("load", [False, True])):
        monkeypatch.setattr(
            measure,
            "call_apart",
            lambda m, f, arguments, limit, fails=fails: failing(m, f, arguments | {"fails": fails}, limit=limit),
        )
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        rows = list(benchmark.provider_rows(SETTINGS, "bytes in one file", tmp_path))
        assert [row["operation"] for row in rows] == ["save", "load"]
        assert ["missing" in row for row in rows] == expected
        assert "failed (exit 1): OSError: no space" in [row.get("missing") for row in rows]


def test_what_runs_on_is_waited_for_and_does_not_block(small, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    class Later(Future):
        def result(self, timeout=None):
            now[0] += 10.0

    def prepares(folder, model, optimizer):
        now[0] += 100.0

        def begins():
            now[0] += 1.0
            (folder / "file").write_text("content")
            return Later()

        return begins

    provider = benchmark.PROVIDERS["bytes in one file"]
    monkeypatch.setitem(benchmark.PROVIDERS, "slow", replace(provider, save=prepares))
    row = benchmark.save(asdict(SETTINGS), "slow", str(tmp_path))
    assert row["blocked_seconds"]["median"] == 1.0
    assert row["seconds"]["median"] == 11.0
    assert row["files"] == 1


def test_a_size_chooses_the_number_of_layers():
    for gib in (1.0, 10.0, 60.0):
        shape = benchmark.Shape.of(replace(SETTINGS, preset="mistral-7b", gib=gib))
        size = benchmark._state_bytes(shape) / 2**30
        layer = 218_112_000 * 12 / 2**30
        # One layer with embedding and head is the least.
        assert abs(size - max(gib, 5.4)) <= layer / 2 + 0.1
    assert benchmark.Shape.of(replace(SETTINGS, preset="mistral-7b")).config.num_hidden_layers == 32
    assert benchmark.Shape.of(replace(SETTINGS, preset="mistral-7b", layers=3)).config.num_hidden_layers == 3


def test_a_run_measures_in_processes_of_its_own(tmp_path, capsys):
    out, folder = tmp_path / "result.json", tmp_path / "disk"
    folder.mkdir()
    settings = benchmark.CheckpointSettings(
        device="cpu", preset="tiny", layers=1, rounds=1, providers=("bytes in one file",), folder=str(folder), out=str(out)
    )
    result = benchmark.run(settings)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert result["complete"]
    assert result["settings"]["layers"] == 1
    assert [(row["operation"], "wrong" in row, "missing" in row) for row in result["rows"]] == [
        ("save", False, False), ("load", False, False),
    ]  # fmt: skip
    assert not any(folder.iterdir())
    assert "gb_per_second" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_named(tmp_path, monkeypatch, small):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    settings = replace(SETTINGS, folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"GiB free, the state takes 0\.0: choose another folder, or fewer layers"):
        benchmark.run(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds = 0: must be at least 1"),
        ({"layers": 2, "gib": 1.0}, "layers = 2 and gib = 1.0 exclude each other"),
        ({"providers": ("pickle",)}, "unknown 'pickle'; there are komainu, torch.distributed.checkpoint"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        benchmark.CheckpointSettings(**change)
