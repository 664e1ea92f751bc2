"""Checkpoints are complete, load in `transformers`, are checked before use, and hold no pickles."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.checkpoint.staging import Staging
from engine.checkpoint.state import checkpoints, load_optimizer, model_folder, newest_checkpoint, read_state
from engine.distributed.ranks import Ranks
from engine.optim.adamw import AdamW
from engine.settings.sections import OptimizerSettings
from model.mistral import packed_attention
from model.vocabulary.tokenizer import Tokenizer
from model.weights import load_model
from recipes import dpo, pretrain
from tests.engine.checkpoint.saving_memory import FILE_BYTES

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = "model-00001-of-00001.safetensors"
OPTIMIZER = "training/optimizer/shard-00001-model-00001-of-00001.safetensors"
ALONE = Ranks(torch.device("cpu"))
FILES = {
    "config.json",
    "generation_config.json",
    WEIGHTS,
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    OPTIMIZER,
    "training/state.json",
}


@pytest.fixture(scope="module")
def settings_of(tiny_settings):
    def make(out, **changes):
        return tiny_settings("pretrain", out, steps=4, checkpoint_every=1, keep_checkpoints=1, keep_every=2, **changes)

    return make


@pytest.fixture(scope="module")
def original(settings_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "run"
    pretrain.run(settings_of(folder))
    return folder


@pytest.fixture
def run_folder(original, tmp_path):
    """A run of four steps that keeps every second checkpoint."""
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def settings(settings_of, run_folder):
    return settings_of(run_folder)


def files_of(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_loads_in_transformers(settings_of, original, tmp_path, dtype):
    if dtype == "float32":
        last = newest_checkpoint(original)
    else:
        last = pretrain.run(settings_of(tmp_path / "run", dtype=dtype, heldout=[]))
    assert files_of(last) == FILES
    reference = AutoModelForCausalLM.from_pretrained(last, attn_implementation="eager").eval()
    assert reference.dtype == getattr(torch, dtype)
    # Both compute in float32, so that only the weights are compared.
    reference, model = reference.float(), load_model(last)
    tokenizer, theirs = Tokenizer.load(last), AutoTokenizer.from_pretrained(last)
    text = "the red dog sees ねこ and runs, は 赤い いぬ を 見る です. It runs home 🐕"
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    assert theirs(text).input_ids == ids
    assert len(ids) > model.config.sliding_window
    tokens = torch.tensor(ids)
    with torch.no_grad():
        expected = reference(tokens[None]).logits[0, :, :340]
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        found = model.logits(model(tokens, torch.arange(len(ids)), packed_attention(bounds, 16)))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_newest_and_every_second_checkpoint_are_kept_and_latest_names_the_newest(run_folder):
    assert [path.name for path in checkpoints(run_folder)] == ["step-00000002", "step-00000004"]
    assert newest_checkpoint(run_folder).name == "step-00000004"
    assert (run_folder / "latest").read_text() == "step-00000004\n"
    assert {path.name for path in run_folder.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "tensorboard",
        "report.html",
        "latest",
        "step-00000002",
        "step-00000004",
    }
    assert [read_state(path).step for path in checkpoints(run_folder)] == [2, 4]


def test_keep_every_must_be_a_multiple_of_checkpoint_every(tiny_settings, tmp_path):
    for changes in ({"keep_every": 3}, {"keep_every": 3, "checkpoint_every": 2}):
        with pytest.raises(ValueError, match=r"keep_every = 3: must be a multiple of checkpoint_every = "):
            tiny_settings("pretrain", tmp_path, **changes)


def test_a_run_folder_names_its_newest_model(run_folder, tiny_model):
    assert model_folder(str(run_folder)) == run_folder / "step-00000004"
    assert model_folder(str(run_folder / "step-00000002")) == run_folder / "step-00000002"
    assert model_folder(str(tiny_model)) == tiny_model


def test_folders_with_other_names_are_not_checkpoints(run_folder):
    for name in (".step-00000009.partial", ".step-00000001.old", "step-9", "step-000000010", "step-last"):
        (run_folder / name).mkdir()
    assert newest_checkpoint(run_folder).name == "step-00000004"
    assert newest_checkpoint(run_folder / "nowhere") is None


@pytest.mark.parametrize("name", sorted(FILES - {"training/state.json"}))
def test_a_file_that_is_missing_or_cut_is_named_with_the_remedy(settings, run_folder, name):
    newest = run_folder / "step-00000004"
    file = newest / name
    whole = file.read_bytes()
    remedy = rf"; delete {newest} to resume from the checkpoint before it"
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file}: missing from the checkpoint{remedy}"):
        pretrain.run(settings)
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{file}: {len(whole) - 1} bytes, {len(whole)} were written{remedy}"):
        pretrain.run(settings)


@pytest.mark.parametrize("change", ["missing", "cut", "key", "no object"])
def test_a_state_that_cannot_be_read_is_named_with_the_remedy(run_folder, change):
    newest = run_folder / "step-00000004"
    state = newest / "training" / "state.json"
    table = json.loads(state.read_text())
    if change == "missing":
        state.unlink()
    elif change == "cut":
        os.truncate(state, 100)
    else:
        del table["plan"]
        state.write_text(json.dumps(table if change == "key" else [table]))
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        read_state(newest)
    assert str(state) in str(error.value)
    assert f"delete {newest} to resume from the checkpoint before it" in str(error.value)
    assert "\n" not in str(error.value)


def test_deleting_a_damaged_checkpoint_resumes_from_the_one_before(settings, run_folder, metric_lines):
    lines = metric_lines(run_folder)
    weights = (run_folder / "step-00000004" / WEIGHTS).read_bytes()
    for file in (run_folder / "step-00000004").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(FileNotFoundError):
        pretrain.run(settings)
    shutil.rmtree(run_folder / "step-00000004")
    pretrain.run(settings)
    assert (run_folder / "step-00000004" / WEIGHTS).read_bytes() == weights
    assert metric_lines(run_folder) == lines


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
def test_a_flipped_bit_stops_a_run_before_it_goes_on(settings, run_folder, name):
    shutil.rmtree(run_folder / "step-00000004")
    newest = run_folder / "step-00000002"
    content = bytearray((newest / name).read_bytes())
    content[-5] ^= 1
    (newest / name).write_bytes(content)
    lines = (run_folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"{newest / name}: damaged: .*SHA-256 .*; delete {newest} to resume"):
        pretrain.run(settings)
    assert (run_folder / "metrics.jsonl").read_bytes() == lines


def test_optimizer_state_comes_back(run_folder):
    newest = run_folder / "step-00000004"
    optimizer = AdamW(load_model(newest).named_parameters(), OptimizerSettings())
    load_optimizer(newest, optimizer, ALONE)
    assert optimizer.updates == 4
    with safe_open(newest / OPTIMIZER, framework="pt") as file:
        assert set(file.keys()) == set(optimizer.state)
        for name, tensor in optimizer.state.items():
            assert torch.equal(tensor, file.get_tensor(name))
            assert tensor.any()


def test_large_state_is_split_into_several_files_and_reads_back_the_same(settings_of, original, tmp_path, monkeypatch):
    """A file holds as many tensors as fit the limit, and at least one."""
    monkeypatch.setattr("engine.checkpoint.writing.MAX_SHARD_BYTES", 60_000)
    split = pretrain.run(settings_of(tmp_path / "split"))
    files = sorted(split.rglob("*.safetensors"))
    assert len(files) > 6
    assert sum(file.stat().st_size > 60_000 + 4096 for file in files) == 0
    states = []
    for folder in (newest_checkpoint(original), split):
        optimizer = AdamW(load_model(folder).named_parameters(), OptimizerSettings())
        load_optimizer(folder, optimizer, ALONE)
        states.append(optimizer.state)
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_copies_hold_the_values_before_the_update(device):
    tensors = {"weight": torch.randn(700, 300, device=device).bfloat16(), "moment": torch.randn(5, device=device)}
    expected = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    staging = Staging(tensors, device)
    copies = staging.copy()
    staging.before_update()
    for tensor in tensors.values():
        tensor.zero_()
    staging.wait()
    for name, copy in copies.items():
        assert torch.equal(copy, expected[name])
        assert copy.device.type == "cpu"
        assert copy.untyped_storage().nbytes() == copy.nbytes
    staging.close()


@pytest.mark.slow
def test_saving_takes_the_copies_and_one_file_of_memory(tiny_tokenizer, tmp_path):
    """The state fills more than 16 files."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.checkpoint.saving_memory", tmp_path / "out", tiny_tokenizer],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    state, above = map(int, done.stdout.split())
    assert state > 16 * FILE_BYTES
    assert 0.9 * state < above < state + 1.25 * FILE_BYTES


def test_nothing_that_a_run_writes_is_a_pickle(tiny_settings, tmp_path):
    """Pickles of protocol 2 and later begin with \\x80; torch's files are zip archives or begin with a pickle."""
    dpo.run(tiny_settings("dpo", tmp_path / "run", steps=2, checkpoint_every=1))
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    suffixes = {file.suffix for file in files if not file.name.startswith("events.out.tfevents")}
    assert suffixes == {".json", ".jsonl", ".toml", ".safetensors", ".jinja", ".model", ".html", ""}
    assert [file.name for file in files if not file.suffix] == ["latest"]
    for file in files:
        head = file.read_bytes()[:4]
        assert not head.startswith((b"\x80", b"PK", b"\x1f\x8b")), file
        if file.suffix == ".safetensors":
            # The file holds tensors and a little text, and no bytes to be interpreted.
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
                assert metadata.pop("format") == "pt"
                if file.parent.name == "optimizer":
                    assert metadata.pop("DCP_VERSION") == "1.0"
                    shards = json.loads(metadata.pop("DCP_SHARDING_INFO"))
                    assert shards == {name: {"saved_offsets": [0] * len(opened.get_slice(name).get_shape())} for name in shards}
                assert metadata == {}
