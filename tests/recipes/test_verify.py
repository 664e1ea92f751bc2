"""recipes.verify finds every kind of damage to a checkpoint, and names the file."""

import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.state import Fingerprint
from recipes import pretrain, verify

STATE = "training/state.json"
OPTIMIZER = "training/optimizer/shard-00001-model-00001-of-00001.safetensors"
WEIGHTS = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tiny_settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("verify") / "run"
    return pretrain.run(tiny_settings("pretrain", out, steps=2, checkpoint_every=1, heldout=None, dtype="bfloat16"))


@pytest.fixture
def checkpoint(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / original.name))


def verdict(folder, capsys):
    """Exit status and printed text."""
    try:
        verify.main([str(folder)])
        status = 0
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


def attest(checkpoint):
    """Make the fingerprints agree with the files: only the content is wrong then."""
    state = json.loads((checkpoint / STATE).read_text())
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / STATE]
    state["files"] = {str(path.relative_to(checkpoint)): asdict(Fingerprint.of(path)) for path in files}
    (checkpoint / STATE).write_text(json.dumps(state))


def test_whole_checkpoints_are_reported_whole(original, capsys):
    status, said = verdict(original.parent, capsys)
    assert status == 0
    names = [line.split(":")[0] for line in said.splitlines()]
    assert names == [str(original.parent / f"step-0000000{step}") for step in (1, 2)]
    assert all(": whole, 11 files, " in line for line in said.splitlines())


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, INDEX, "config.json", "tokenizer.model"])
def test_one_flipped_bit_is_found_and_named(checkpoint, capsys, name):
    content = bytearray((checkpoint / name).read_bytes())
    content[-9] ^= 16
    (checkpoint / name).write_bytes(content)
    status, said = verdict(checkpoint, capsys)
    assert status == 1
    assert f"error: {checkpoint / name}: damaged: its content has changed since it was written (SHA-256 " in said


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), f"/{WEIGHTS}: missing from the checkpoint"),
        (lambda folder: os.truncate(folder / OPTIMIZER, 1000), f"/{OPTIMIZER}: 1000 bytes, "),
        (lambda folder: (folder / STATE).unlink(), f"/{STATE}"),
        (lambda folder: (folder / STATE).write_text("{}"), f"/{STATE}: key 'step' is missing"),
        (lambda folder: (folder / "notes.json").write_text("{}"), "/notes.json: is not one of the files that were written"),
        (lambda folder: (folder / "link").symlink_to(folder / "config.json"), "/link: is neither a file nor a folder"),
    ],
)
def test_changed_missing_and_extra_files_are_named(checkpoint, capsys, damage, said):
    damage(checkpoint)
    status, found = verdict(checkpoint, capsys)
    assert status == 1
    assert said in found


def rewrite(file, change):
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit(file, change):
    table = json.loads(file.read_text())
    change(table)
    file.write_text(json.dumps(table))


def second_shard(folder):
    """Add a shard that repeats the last rows of a tensor."""
    tensors = load_file(folder / OPTIMIZER)
    note = {"norm.weight.exp_avg": {"saved_offsets": [30]}}
    part = {"norm.weight.exp_avg": tensors["norm.weight.exp_avg"][30:].clone()}
    save_file(part, folder / "training/optimizer/more.safetensors", metadata={"DCP_SHARDING_INFO": json.dumps(note)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "extra.json").write_bytes(pickle.dumps([1])), "/extra.json: begins like a pickle or"),
        (lambda folder: torch.save([1], folder / "extra.model"), "/extra.model: begins like a pickle or an archive"),
        (
            lambda folder: (folder / OPTIMIZER).write_bytes(pickle.dumps(0) + (folder / OPTIMIZER).read_bytes()),
            f"/{OPTIMIZER}: begins like a pickle",
        ),
        (
            lambda folder: (folder / "extra.pt").write_bytes(b"1"),
            "/extra.pt: is not one of .jinja, .json, .model, .safetensors",
        ),
        (lambda folder: (folder / "extra.json").write_bytes(b"{"), "/extra.json: is not a valid .json file"),
        (
            lambda folder: save_file({"x": torch.ones(1)}, folder / "extra.safetensors", metadata={"code": "x"}),
            "/extra.safetensors: is not a valid .safetensors file: its header holds code",
        ),
        (
            lambda folder: edit(folder / INDEX, lambda table: table["weight_map"].pop("lm_head.weight")),
            "weight lm_head.weight is missing",
        ),
        (
            lambda folder: rewrite(folder / WEIGHTS, lambda tensors: tensors.pop("lm_head.weight")),
            f"/{WEIGHTS}: does not hold lm_head.weight",
        ),
        (
            lambda folder: rewrite(folder / WEIGHTS, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)})),
            "weight model.norm.weight has shape [3], config.json asks for [32]",
        ),
        (
            lambda folder: rewrite(folder / OPTIMIZER, lambda tensors: tensors.pop("norm.weight.remainder")),
            "training/optimizer: norm.weight.remainder is missing",
        ),
        (
            lambda folder: rewrite(folder / OPTIMIZER, lambda tensors: tensors.update(other=torch.ones(1))),
            "training/optimizer: other belongs to no parameter",
        ),
        (second_shard, "training/optimizer: norm.weight.exp_avg: row 30 is in no shard, or in more than one"),
        (lambda folder: edit(folder / STATE, lambda table: table.update(step=7)), f"/{STATE}: belongs to step 7"),
    ],
)
def test_wrong_content_is_found_although_the_fingerprints_agree(checkpoint, capsys, change, said):
    change(checkpoint)
    attest(checkpoint)
    status, found = verdict(checkpoint, capsys)
    assert status == 1
    assert said in found


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere: no such folder"):
        verify.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"is neither a checkpoint nor a run folder"):
        verify.main([str(tmp_path)])
