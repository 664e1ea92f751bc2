"""precision = fp8 as a setting of a run: what it refuses, and what it leaves as it is."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from engine.checkpoint.state import checkpoints, read_state
from engine.precision import check_fp8, fp8_layers
from engine.run import open_run
from engine.settings.sections import Fp8Settings
from model.config import PRESETS
from recipes import dpo, pretrain

FP8 = {"precision": "fp8", "fp8": {"bf16_first": 0}}


def test_all_layers_but_the_first_and_the_last_multiply_in_fp8(tiny_settings, tmp_path):
    settings = tiny_settings("pretrain", tmp_path, precision="fp8")
    assert fp8_layers(settings, PRESETS["shisa-7b"]) == range(1, 31)
    assert fp8_layers(tiny_settings("pretrain", tmp_path), PRESETS["shisa-7b"]) == range(0)
    assert Fp8Settings(bf16_first=0, bf16_last=0).layers(4) == range(4)
    assert not Fp8Settings(bf16_first=3, bf16_last=3).layers(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "fp8.bf16_first = 1 and fp8.bf16_last = 1 leave none of the model's 2 layers to FP8; lower them"),
        ({"fp8": {"bf16_first": 2, "bf16_last": 0}}, "leave none of the model's 2 layers"),
    ],
)
def test_a_run_without_a_layer_in_fp8_is_refused(changes, message, tiny_settings, tmp_path):
    with pytest.raises(ValueError, match=r"^precision = fp8: ") as error:
        open_run(tiny_settings("pretrain", tmp_path, precision="fp8", **changes), ("text",))
    assert message in str(error.value)


def test_sizes_that_are_no_multiple_of_16_are_refused(tiny_settings, tmp_path):
    settings = tiny_settings("pretrain", tmp_path, precision="fp8")
    few_heads = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 2}
    for changes in ({"hidden_size": 4104}, {"intermediate_size": 14328}, {"head_dim": 2}, few_heads):
        config = replace(PRESETS["shisa-7b"], **{"num_attention_heads": 4, "num_key_value_heads": 2} | changes)
        with pytest.raises(ValueError, match=r"is not a multiple of 16; use precision = dtype"):
            fp8_layers(settings, config)


def test_a_negative_number_of_layers_is_refused():
    with pytest.raises(ValueError, match=r"fp8\.bf16_last = -1: must be 0 or more layers"):
        Fp8Settings(bf16_last=-1)


def test_gpus_without_fp8_and_float32_on_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    cuda = torch.device("cuda")
    for capability, refused in (((8, 0), True), ((8, 9), False), ((9, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if refused:
            with pytest.raises(ValueError, match=r"compute capability 8\.9 or newer .* NVIDIA A100 has 8\.0"):
                check_fp8(cuda, torch.bfloat16)
        else:
            check_fp8(cuda, torch.bfloat16)
    with pytest.raises(ValueError, match="needs dtype = bfloat16 on CUDA, this is float32"):
        check_fp8(cuda, torch.float32)
    check_fp8(torch.device("cpu"), torch.float32)


def test_a_run_of_an_earlier_version_goes_on_and_cannot_change_its_precision(tiny_settings, tmp_path, monkeypatch):
    """Its state knows neither setting."""
    settings = tiny_settings("pretrain", tmp_path / "run", steps=4, checkpoint_every=2)
    pretrain.run(settings)
    *_, last = checkpoints(settings.out)
    shutil.rmtree(last)

    def without(folder):
        state = read_state(folder)
        return replace(state, settings={name: value for name, value in state.settings.items() if name not in FP8})

    monkeypatch.setattr("engine.run.read_state", without)
    with pytest.raises(ValueError, match=r"holds a run with fp8.bf16_first = 1, the settings now say 0"):
        pretrain.run(tiny_settings("pretrain", tmp_path / "run", steps=4, checkpoint_every=2, **FP8))
    changes = {"precision": "fp8", "fp8": {"bf16_last": 0}}
    with pytest.raises(ValueError, match=r"holds a run with fp8.bf16_last = 1, the settings now say 0"):
        pretrain.run(tiny_settings("pretrain", tmp_path / "run", steps=4, checkpoint_every=2, **changes))
    assert pretrain.run(settings) == last


def test_the_reference_of_preference_tuning_knows_nothing_of_fp8(tiny_settings, tmp_path):
    """Runs with and without FP8 share their tables of log-probabilities to the bit, and differ in what they train."""
    cache, losses, tables = tmp_path / "cache", [], []
    for name, changes in (("plain", {}), ("fp8", FP8)):
        settings = tiny_settings("dpo", tmp_path / name, reference_cache=str(cache), steps=2, **changes)
        dpo.run(settings)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        tables.append({path.name: path.stat().st_mtime_ns for path in cache.iterdir()})
    assert tables[0] == tables[1]
    assert losses[0] != losses[1]


def test_validation_before_the_first_step_is_that_of_a_run_without_fp8(tiny_settings, tmp_path):
    found = []
    for name, changes in (("plain", {}), ("fp8", FP8)):
        settings = tiny_settings("pretrain", tmp_path / name, steps=2, **changes)
        run = open_run(settings, ("text",))
        model = run.load_model()
        assert model.fp8_layers == (range(1) if changes else range(0))
        pretrain.run(settings)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append([{key: value for key, value in line.items() if key.startswith("eval/")} for line in lines])
    first = [next(line for line in lines if line) for lines in found]
    assert first[0] == first[1]
    assert found[0] != found[1]


def test_a_run_in_fp8_follows_a_run_without(tiny_settings, tmp_path):
    losses = []
    for name, changes in (("plain", {}), ("fp8", FP8)):
        settings = tiny_settings("pretrain", tmp_path / name, **changes)
        pretrain.run(settings)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
