"""The configuration in and out of config.json, against `transformers`, and its refusals."""

import json
from dataclasses import fields, replace

import pytest
import torch
from transformers import AutoConfig, GenerationConfig
from transformers import MistralConfig as ReferenceConfig

from model.config import PRESETS, MistralConfig, generation_table, preset, read_config, write_config

SMALL = MistralConfig(
    vocab_size=128,
    unpadded_vocab_size=100,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-4,
    rope_theta=500.0,
    sliding_window=7,
    max_position_embeddings=99,
    initializer_range=0.3,
    bos_token_id=3,
    eos_token_id=4,
)


def write(folder, **changes) -> None:
    """A config.json of a small model with changes; a value of ... removes the key."""
    write_config(folder, SMALL, torch.float32)
    table = {**json.loads((folder / "config.json").read_text()), **changes}
    table = {key: value for key, value in table.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(table, indent=1))


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, sliding_window=None), *PRESETS.values()])
def test_a_written_configuration_is_read_back_by_both(tmp_path, config):
    write_config(tmp_path, config, torch.bfloat16)
    assert read_config(tmp_path) == config
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    for field in fields(MistralConfig):
        if field.name != "rope_theta":
            assert getattr(theirs, field.name) == getattr(config, field.name), field.name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"num_key_value_heads": 4, "hidden_size": 64, "num_attention_heads": 4},
        {"head_dim": 48},
    ],
)
def test_a_configuration_of_transformers_is_read(tmp_path, settings):
    theirs = ReferenceConfig(**settings)
    theirs.architectures = ["MistralForCausalLM"]
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.unpadded_vocab_size == theirs.vocab_size
    for field in fields(MistralConfig):
        if field.name not in ("rope_theta", "unpadded_vocab_size"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize(
    "absent",
    [
        "head_dim",
        "num_key_value_heads",
        "rms_norm_eps",
        "sliding_window",
        "max_position_embeddings",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "hidden_act",
        "tie_word_embeddings",
    ],
)
def test_an_absent_key_means_what_it_means_to_transformers(tmp_path, absent):
    write(tmp_path, num_attention_heads=16, hidden_size=64, **{absent: ...})
    ours, theirs = read_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    for field in fields(MistralConfig):
        if field.name not in ("rope_theta", "unpadded_vocab_size"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize("ends", [[4, 2], 2, None])
def test_end_tokens_are_read_and_written_as_transformers_does(tmp_path, ends):
    write(tmp_path, eos_token_id=ends)
    config = read_config(tmp_path)
    assert list(config.end_ids) == (ends if isinstance(ends, list) else [] if ends is None else [ends])
    write_config(tmp_path, config, torch.float32)
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id == ends
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == ends


def test_the_older_spelling_of_the_rotary_base_is_read(tmp_path):
    write(tmp_path, rope_parameters=..., rope_scaling=None, rope_theta=1000000.0)
    assert read_config(tmp_path).rope_theta == 1000000.0


def test_the_same_configuration_gives_the_same_bytes(tmp_path):
    written = []
    for _ in range(2):
        write_config(tmp_path, SMALL, torch.float32)
        written.append([(tmp_path / name).read_bytes() for name in ("config.json", "generation_config.json")])
    assert written[0] == written[1]


def test_padding_rows_are_suppressed_for_transformers():
    assert generation_table(SMALL)["suppress_tokens"] == list(range(100, 128))
    assert "suppress_tokens" not in generation_table(replace(SMALL, unpadded_vocab_size=128))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only 'mistral'"),
        ({"model_type": ...}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .*bits.* is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_parameters = .*yarn.* is not supported"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2}}, "linear.* is not supported"),
        ({"hidden_size": ...}, "key 'hidden_size' is missing"),
        ({"vocab_size": ...}, "key 'vocab_size' is missing"),
        ({"vocab_size": 0}, "vocab_size = 0: must be at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1: must be at least 1"),
        ({"num_attention_heads": 0, "head_dim": ...}, "num_attention_heads = 0: must be positive integers"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: must be at least 1"),
        ({"hidden_size": "24", "head_dim": ...}, "hidden_size = '24' and .*must be positive integers"),
        ({"unpadded_vocab_size": True}, "unpadded_vocab_size = True: must be"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 must be a multiple of num_key_value_heads = 3"),
        ({"head_dim": 7}, "head_dim = 7: must be even"),
        ({"sliding_window": 0}, "sliding_window = 0: must be at least 1"),
        ({"unpadded_vocab_size": 129}, "unpadded_vocab_size = 129: must lie in"),
        ({"hidden_size": "24"}, "hidden_size = '24': must be"),
        ({"hidden_size": 24.5}, r"hidden_size = 24\.5: must be"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None: must be"),
        ({"sliding_window": "7"}, "sliding_window = '7': must be"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small': must be"),
        ({"rope_theta": [1], "rope_parameters": ...}, r"rope_theta = \[1\]: must be"),
        ({"rope_parameters": "default"}, "rope_parameters = 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling = .*linear.* is not supported"),
        ({"rope_parameters": {"rope_theta": -1.0}}, r"rope_theta = -1\.0: must be a finite number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: must be a finite number"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>': must be a token id in 0 .. 127"),
        ({"eos_token_id": [2, 128]}, r"eos_token_id = .*128.*: must be a token id"),
        ({"bos_token_id": [1]}, r"bos_token_id = \[1\]: must be a token id"),
    ],
)
def test_an_unsupported_configuration_is_refused_by_file_and_key(tmp_path, changes, message):
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "model_type": "mistral",\n "hidden_size": 24,,\n}', r"config\.json:3: not valid JSON"),
        ('{\n "model_type": "mis', r"config\.json:2: not valid JSON"),
        ("", r"config\.json:1: not valid JSON"),
        ("[1]", r"config\.json: must hold a JSON object, holds list"),
    ],
)
def test_broken_json_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}')
    with pytest.raises(ValueError, match=r"config\.json: not UTF-8 text"):
        read_config(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        read_config(tmp_path)


def test_an_unknown_preset_names_the_nearest():
    assert preset("tiny") is PRESETS["tiny"]
    for wrong, nearest in (("shisa-7B", "shisa-7b"), ("mistral", "mistral-7b"), ("tinny", "tiny")):
        with pytest.raises(ValueError, match=f"unknown preset {wrong!r}; the nearest known one is {nearest!r}"):
            preset(wrong)


def test_the_presets_have_the_papers_sizes():
    assert PRESETS["mistral-7b"].parameters == 7_241_732_096
    shisa = PRESETS["shisa-7b"]
    assert shisa.vocab_size % 128 == 0
    assert shisa.parameters == 7_241_732_096 + 2 * 4096 * (shisa.vocab_size - 32000)
