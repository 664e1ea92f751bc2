"""Weights on disk: in and out against safetensors and `transformers`, and every fault of a folder."""

import hashlib
import json
import resource
import struct
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import model.tensor_file as tensor_file
import model.weights as weights
from model.config import read_config
from model.tensor_file import TensorFile, TensorStream, write_tensor_file
from model.weights import (
    TensorFolder,
    convert_folder,
    load_model,
    read_tensors,
    save_model,
    write_tensor_folder,
)

SINGLE = "model.safetensors"


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def index_of(folder: Path) -> dict:
    return json.loads((folder / weights.INDEX_NAME).read_text())


def edit_index(folder: Path, change) -> None:
    index = index_of(folder)
    change(index)
    (folder / weights.INDEX_NAME).write_text(json.dumps(index))


@pytest.fixture
def exported(small_model, tmp_path) -> Path:
    """A model folder of several shards."""
    folder = tmp_path / "exported"
    folder.mkdir()
    save_model(small_model(), folder, max_shard_bytes=8192)
    assert len(shards(folder)) > 2
    return folder


@pytest.fixture
def single(small_model, tmp_path, exported) -> Path:
    """The same weights in one file without an index, as small models are published."""
    folder = tmp_path / "single"
    folder.mkdir()
    tensors = dict(read_tensors(exported))
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_bytes((exported / "config.json").read_bytes())
    return folder


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a single-file folder."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


@pytest.mark.parametrize("limit", [1, 8192, 2**30])
def test_a_saved_model_loads_from_any_number_of_shards(small_model, tmp_path, limit):
    model = small_model(vocab_size=128, unpadded_vocab_size=100)
    save_model(model, tmp_path, max_shard_bytes=limit)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("limit", [1, 8192, 2**30])
def test_shards_and_index_are_as_transformers_expects(small_model, tmp_path, limit):
    model = small_model()
    save_model(model, tmp_path, max_shard_bytes=limit)
    files = shards(tmp_path)
    assert [file.name for file in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    reference, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    index = index_of(tmp_path)
    assert index["weight_map"].keys() == reference.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())
    for file in files:
        with safe_open(file, framework="pt") as handle:
            names = set(handle.keys())
            assert handle.metadata() == {"format": "pt"}
        assert names == {name for name, shard in index["weight_map"].items() if shard == file.name}
        size = sum(tensor.nbytes for tensor in load_file(file).values())
        assert size <= limit or len(names) == 1


def test_shards_of_transformers_are_read(small_model, reference_of, tmp_path):
    model = small_model()
    folder = tmp_path / "theirs"
    reference_of(model).save_pretrained(folder, max_shard_size="10KB")
    assert len(shards(folder)) > 2
    loaded = load_model(folder)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_second_export_is_byte_identical(small_model, tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for folder in (first, second, third):
        folder.mkdir()
    save_model(small_model(), first, max_shard_bytes=8192)
    save_model(small_model(), second, max_shard_bytes=8192)
    save_model(load_model(first), third, max_shard_bytes=8192)
    assert len(content(first)) > 4
    assert content(first) == content(second) == content(third)


def test_weights_are_rounded_once_to_the_declared_dtype(small_model, tmp_path):
    model = small_model()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    stored = dict(read_tensors(tmp_path))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["lm_head.weight"], model.lm_head.weight.to(torch.bfloat16))
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    # Without a dtype, the model's own.
    save_model(model.to(torch.float16), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"


def test_packed_matrices_are_hugging_face_s_matrices_stacked(small_model, tmp_path):
    model = small_model()
    save_model(model, tmp_path)
    stored = dict(read_tensors(tmp_path))
    for layer, block in enumerate(model.layers):
        prefix = f"model.layers.{layer}"
        qkv = [stored[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"]
        assert [len(rows) for rows in qkv] == [32, 16, 16]
        assert torch.equal(torch.cat(qkv), block.self_attn.qkv_proj.weight)
        gate_up = [stored[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(torch.cat(gate_up), block.mlp.gate_up_proj.weight)


def test_tensors_are_read_one_at_a_time_under_their_names(exported, small_model):
    stream = read_tensors(exported)
    name, first = next(stream)
    alive = weakref.ref(first)
    del first
    names = [name] + [name for name, _ in stream]
    assert alive() is None
    assert names == sorted(index_of(exported)["weight_map"])


def test_writing_holds_one_block_at_a_time(tmp_path):
    alive, most = [], []

    def make(name):
        for row in range(4):
            part = torch.full((1, 8), float(name.removeprefix("tensor-")) + row / 4)
            alive.append(weakref.ref(part))
            most.append(sum(reference() is not None for reference in alive))
            yield part

    tensors = {name: TensorStream((4, 8), torch.float32, partial(make, name)) for name in (f"tensor-{i}" for i in range(12))}
    write_tensor_folder(tmp_path, tensors, max_shard_bytes=3 * 4 * 8 * 4)
    assert len(shards(tmp_path)) == 4
    # Two: the writer still holds a block while it asks for the next.
    assert max(most) <= 2
    for name, tensor in read_tensors(tmp_path):
        expected = float(name.removeprefix("tensor-")) + torch.arange(4)[:, None] / 4
        assert torch.equal(tensor, expected.expand(4, 8))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([torch.zeros(1, 3)], r"a: has shape \[1, 3\], \[2, 4\] was announced"),
        ([torch.zeros(4)], r"a: has shape \[4\], \[2, 4\] was announced"),
        ([torch.zeros(1, 4)], r"a: has 1 rows, \[2, 4\] was announced"),
        ([torch.zeros(2, 4)] * 2, r"a: has 4 rows, \[2, 4\] was announced"),
    ],
)
def test_blocks_of_another_shape_than_announced_are_refused(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        write_tensor_folder(tmp_path, {"a": TensorStream((2, 4), torch.float32, lambda: parts)})
    assert not list(tmp_path.iterdir())


def test_files_equal_those_of_the_safetensors_package(tmp_path):
    """Every dtype and rank, theirs read by us and ours by them."""
    tensors = {
        str(dtype): (torch.arange(24) % 2 if dtype == torch.bool else torch.arange(24)).to(dtype).reshape(2, 3, 4)
        for dtype in tensor_file._DTYPES.values()
    } | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 5), "日本": torch.ones(1)}
    save_file(tensors, tmp_path / "theirs")
    with TensorFile(tmp_path / "theirs") as file:
        assert file.names == sorted(tensors)
        for name, tensor in tensors.items():
            assert file.dtype(name) == tensor.dtype
            assert torch.equal(file.tensor(name), tensor)
            if tensor.ndim:
                assert torch.equal(torch.cat([file.rows(name, 0, 1), *file.blocks(name)]), torch.cat([tensor[:1], tensor]))
    for name, tensor in tensors.items():
        write_tensor_file(tmp_path / "one", {name: TensorStream.of(tensor)})
        save_file({name: tensor}, tmp_path / "same", metadata={"format": "pt"})
        assert (tmp_path / "one").read_bytes() == (tmp_path / "same").read_bytes()
    write_tensor_file(tmp_path / "all", {name: TensorStream.of(tensor) for name, tensor in tensors.items()})
    read = load_file(tmp_path / "all")
    assert sorted(read) == sorted(tensors)
    assert all(read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_blocks_are_runs_of_rows_of_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 100)
    wide, tall = torch.randn(3, 200), torch.randn(50, 5)
    save_file({"wide": wide, "tall": tall}, tmp_path / "file")
    with TensorFile(tmp_path / "file") as file:
        assert [len(block) for block in file.blocks("wide")] == [1, 1, 1]
        assert [len(block) for block in file.blocks("tall")] == [5] * 10
        assert torch.equal(torch.cat(list(file.blocks("tall"))), tall)


def test_a_file_cut_while_it_is_read_is_named(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "file")
    with TensorFile(tmp_path / "file") as file:
        cut(tmp_path / "file", 0.5)
        with pytest.raises(ValueError, match="file: became shorter while it was read"):
            file.tensor("a")


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path):
    old = {"a": TensorStream.of(torch.zeros(4))}
    write_tensor_file(tmp_path / "file", old)
    before = (tmp_path / "file").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="/file: could not be written: File too large; free the disk"):
            write_tensor_file(tmp_path / "file", {"a": TensorStream.of(torch.zeros(4000))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": before}


def test_an_unsupported_dtype_is_named(tmp_path):
    save_file({"a": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "file")
    with TensorFile(tmp_path / "file") as file, pytest.raises(ValueError, match="file: a is stored as F8_E4M3"):
        file.tensor("a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converting_a_folder_equals_loading_and_saving(exported, tmp_path, dtype):
    ours, streamed = tmp_path / "saved", tmp_path / "streamed"
    for folder in (ours, streamed):
        folder.mkdir()
    save_model(load_model(exported, dtype=dtype), ours)
    assert convert_folder(exported, streamed, dtype) == read_config(exported)
    assert content(ours) == content(streamed)


def test_a_folder_is_converted_only_if_it_is_whole(single, tmp_path):
    rewrite(single, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        convert_folder(single, tmp_path)


def test_a_single_file_without_index_is_read(single, small_model):
    expected = small_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(single).state_dict().items())


def test_stored_rotary_frequencies_of_old_folders_are_ignored(single, small_model):
    rewrite(single, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert torch.equal(load_model(single).lm_head.weight, small_model().lm_head.weight)


def test_a_missing_weight_is_named(single, exported):
    rewrite(single, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    edit_index(exported, lambda index: index["weight_map"].pop("model.layers.1.mlp.up_proj.weight"))
    for folder in (single, exported):
        with pytest.raises(ValueError, match=rf"{folder}: weight model\.layers\.1\.mlp\.up_proj\.weight is missing"):
            load_model(folder)


def test_a_weight_missing_from_its_shard_is_named(exported):
    name = "model.norm.weight"

    def elsewhere(index):
        wrong = next(file.name for file in shards(exported) if file.name != index["weight_map"][name])
        index["weight_map"][name] = wrong

    edit_index(exported, elsewhere)
    with pytest.raises(ValueError, match=r"model-.*: does not hold model\.norm\.weight, which the index promises"):
        load_model(exported)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.k_proj.weight", (32, 24), [16, 24]),
        ("model.norm.weight", (25,), [24]),
        ("lm_head.weight", (64, 24, 1), [64, 24]),
        ("model.embed_tokens.weight", (63, 24), [64, 24]),
    ],
)
def test_a_wrong_shape_is_named(single, name, shape, expected):
    rewrite(single, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(ValueError) as error:
        load_model(single)
    assert f"{single}: weight {name} has shape {list(shape)}, config.json asks for {expected}" in str(error.value)


def test_a_surplus_weight_is_named(single):
    rewrite(single, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(40, 24)}))
    with pytest.raises(ValueError, match=r"weight model\.layers\.2\.mlp\.up_proj\.weight has no place in this model"):
        load_model(single)


def garbage(path: Path) -> None:
    path.write_bytes(b"not a safetensors file at all")


def cut(path: Path, left: float) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(left * len(raw))])


def claim_a_huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


@pytest.mark.parametrize(
    "damage",
    [garbage, claim_a_huge_header, *(lambda path, left=left: cut(path, left) for left in (0.0, 0.001, 0.1, 0.5, 0.999))],
)
def test_a_truncated_or_foreign_file_is_named(single, exported, damage):
    damage(single / SINGLE)
    damage(shards(exported)[1])
    for folder, file in ((single, SINGLE), (exported, shards(exported)[1].name)):
        with pytest.raises(ValueError, match=rf"{folder / file}: truncated or not a safetensors file"):
            load_model(folder)
        with pytest.raises(ValueError, match=rf"{folder / file}: truncated"):
            list(read_tensors(folder))


def test_a_missing_shard_is_named(exported):
    missing = shards(exported)[1]
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{missing}: named by the index but not there"):
        load_model(exported)


@pytest.mark.parametrize("elsewhere", ["../single/model.safetensors", "/etc/hostname", "sub/../model.safetensors", "", "."])
def test_an_index_cannot_name_a_file_outside_the_folder(exported, single, elsewhere):
    edit_index(exported, lambda index: index["weight_map"].update({"model.norm.weight": elsewhere}))
    with pytest.raises(FileNotFoundError, match="named by the index but not there"):
        load_model(exported)


def test_a_folder_without_weights_is_named(exported):
    for file in [*shards(exported), exported / weights.INDEX_NAME]:
        file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"holds neither {weights.INDEX_NAME} nor {SINGLE}"):
        load_model(exported)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "weight_map": {\n    "a": ,\n', r"index\.json:3: not valid JSON"),
        ("[]", r"index\.json: must hold a JSON object, holds list"),
        ("{}", r"index\.json: holds no weight_map"),
        ('{"weight_map": {}}', r"index\.json: holds no weight_map"),
        ('{"weight_map": ["a"]}', r"index\.json: .*weight_map"),
        ('{"weight_map": {"a": 1}}', r"index\.json: .*weight_map"),
        ("", r"index\.json:1: not valid JSON"),
    ],
)
def test_a_broken_index_is_named_with_its_line(exported, text, message):
    (exported / weights.INDEX_NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(exported)


def test_a_value_beyond_the_dtypes_range_and_nan_are_refused_by_name(exported, tmp_path):
    model = weights.load_model(exported)
    with torch.no_grad():
        model.norm.weight[0] = 1e5
    with pytest.raises(ValueError, match=r"model\.norm\.weight: 100000 is beyond the range of float16 \(at most 65504\)"):
        weights.save_model(model, tmp_path, dtype=torch.float16)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    weights.save_model(model, tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"weight model\.norm\.weight holds NaN or infinite values"):
        weights.load_model(tmp_path)


def test_an_index_that_is_not_text_is_named(exported):
    (exported / weights.INDEX_NAME).write_bytes(b'{"weight_map": "\xff"}')
    with pytest.raises(ValueError, match=r"index\.json: not UTF-8 text"):
        TensorFolder(exported)


def test_exporting_below_a_file_names_the_file(small_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_model(small_model(), tmp_path / "file" / "out")


def test_the_loaded_configuration_equals_that_of_the_folder(exported):
    assert load_model(exported).config == read_config(exported)
