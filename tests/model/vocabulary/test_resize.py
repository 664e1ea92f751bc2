"""New rows against their formula in float64, and resized folders against the model that they came from."""

import gc
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernels import padded_to_tiles
from model.config import MistralConfig, read_config, write_config
from model.mistral import Mistral, initialize
from model.tensor_file import TensorStream
from model.vocabulary import resize
from model.vocabulary.distill import Distillation
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.fitting import check_rows
from model.vocabulary.merge import extend, split_pieces
from model.vocabulary.resize import resize_model
from model.vocabulary.tokenizer import Tokenizer
from model.weights import (
    TensorFolder,
    convert_folder,
    hugging_face_shapes,
    load_model,
    read_tensors,
    save_model,
    write_tensor_folder,
)

SIDES = ("input", "head")
SMALL_SHAPE = MistralConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    initializer_range=0.2,
)
SUBPIECES = [[3, 4], [4, 3], [5], [6, 7, 8, 9], [9, 8, 7, 6], [10] * 16, [11, 12, 13] * 5]


def new_rows(base, subpieces, side, **options):
    return torch.cat(list(resize.new_rows(base, subpieces, side, **options)))


def resize_rows(base, subpieces, side, **options):
    return torch.cat([part.to(base.dtype) for part in resize.resized_rows(base, subpieces, side, **options)])


@pytest.fixture(scope="module")
def base_rows():
    """50 rows of width 96 whose lengths and offsets differ, as in a real embedding."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.01, 0.03, 50)[:, None]
    return torch.randn(50, 96, generator=generator) * scale + 0.002


@pytest.fixture(scope="module")
def small_base(train_model):
    return Tokenizer(train_model())


@pytest.fixture(scope="module")
def small_merged(small_base, written_texts):
    return Tokenizer(extend(small_base.model_bytes, written_texts, 120)[0].model_bytes)


@pytest.fixture
def base_folder(small_model, small_base, tmp_path):
    model = small_model(vocab_size=small_base.vocab_size)
    folder = tmp_path / "base"
    folder.mkdir()
    save_model(model, folder, max_shard_bytes=40_000)
    write_tokenizer_folder(folder, small_base.model_bytes)
    return folder


@pytest.mark.parametrize(("pieces", "rows"), [(1, 128), (128, 128), (129, 256), (32000, 32000), (120000, 120064)])
def test_rows_are_padded_to_tiles(pieces, rows):
    assert padded_to_tiles(pieces) == rows


@pytest.mark.parametrize("side", SIDES)
def test_weighted_rows_follow_the_formula_but_for_one_percent(base_rows, side):
    rows = new_rows(base_rows, SUBPIECES, side).double().numpy()
    base = base_rows.double().numpy()
    lengths = np.linalg.norm(base, axis=1)
    for row, ids in zip(rows, SUBPIECES, strict=True):
        order = ids if side == "head" else ids[::-1]
        weights = np.array([0.8**place for place in range(len(ids))])
        weights /= weights.sum()
        mean = weights @ base[order]
        expected = mean * (weights @ lengths[order]) / np.linalg.norm(mean)
        error = np.linalg.norm(row - expected) / np.median(lengths)
        assert 0.005 < error < 0.015


def test_mean_rows_are_the_plain_mean(base_rows):
    rows = new_rows(base_rows, SUBPIECES, "head", method="mean")
    expected = torch.stack([base_rows[ids].double().mean(0) for ids in SUBPIECES])
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(rows, new_rows(base_rows, SUBPIECES, "input", method="mean"))


def test_random_rows_have_the_moments_of_the_columns(base_rows):
    rows = new_rows(base_rows, [[3]] * 4000, "input", method="random")
    assert (rows.mean(0) - base_rows.mean(0)).abs().max() < 0.08 * base_rows.std()
    assert (rows.std(0) / base_rows.std(0) - 1).abs().max() < 0.08


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", SIDES)
def test_no_two_rows_are_equal_whatever_the_order_and_repetition(base_rows, side, dtype):
    subpieces = [list(ids) for length in range(1, 5) for ids in itertools.product((7, 8, 9), repeat=length)]
    subpieces += [[7] * length for length in range(5, 17)]
    subpieces += [[*range(10, 25), last] for last in (7, 8, 9)]
    base = base_rows.to(dtype)
    rows = resize_rows(base, subpieces, side)[: 50 + len(subpieces)]
    assert rows.dtype == dtype
    assert len(torch.unique(rows.float(), dim=0)) == len(rows)
    plain = resize_rows(base, subpieces, side, method="mean")[: len(rows)]
    assert len(torch.unique(plain.float(), dim=0)) < len(rows)


def test_the_head_leans_to_the_first_subpiece_and_the_input_to_the_last(base_rows):
    first, last = base_rows[20], base_rows[21]
    head, embedding = (new_rows(base_rows, [[20, 21]], side)[0] for side in SIDES[::-1])
    similarity = torch.nn.functional.cosine_similarity
    assert similarity(head, first, dim=0) > similarity(head, last, dim=0) + 0.05
    assert similarity(embedding, last, dim=0) > similarity(embedding, first, dim=0) + 0.05


def test_lengths_stay_in_the_range_of_the_base(base_rows):
    lengths = new_rows(base_rows, SUBPIECES, "head").norm(dim=1)
    assert lengths.min() > 0.98 * base_rows.norm(dim=1).min()
    assert lengths.max() < 1.02 * base_rows.norm(dim=1).max()


@pytest.mark.parametrize("method", ["weighted", "mean", "random"])
def test_rows_repeat_between_the_base_and_mean_padding(base_rows, method):
    base = base_rows.bfloat16()
    rows = resize_rows(base, SUBPIECES, "input", method=method, seed=3)
    assert rows.shape == (128, 96)
    assert torch.equal(rows, resize_rows(base, SUBPIECES, "input", method=method, seed=3))
    assert torch.equal(rows[:50].view(torch.int16), base.view(torch.int16))
    mean = base.double().mean(0).bfloat16()
    assert torch.equal(rows[50 + len(SUBPIECES) :], mean.expand(128 - 50 - len(SUBPIECES), -1))
    if method != "mean":
        other = resize_rows(base, SUBPIECES, "input", method=method, seed=4)
        assert not torch.equal(rows[50:57], other[50:57])


def test_a_zero_base_gives_finite_rows():
    assert torch.isfinite(resize_rows(torch.zeros(20, 8), [[3, 4], [5, 5]], "head")).all()


def test_an_unknown_method_is_named(base_rows):
    with pytest.raises(ValueError, match="method = 'best': must be one of weighted, mean, random, distilled"):
        new_rows(base_rows, SUBPIECES, "input", method="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resized_model_is_the_old_one_on_old_pieces(small_model, small_base, small_merged, tmp_path, dtype):
    source, out = tmp_path / "base", tmp_path / "resized"
    for folder in (source, out):
        folder.mkdir()
    save_model(small_model(vocab_size=small_base.vocab_size), source, dtype=dtype, max_shard_bytes=30_000)
    config = resize_model(source, out, small_base, small_merged)
    assert (config.vocab_size, config.unpadded_vocab_size) == (padded_to_tiles(820), 820)
    assert read_config(out) == config
    before, after = dict(read_tensors(source)), dict(read_tensors(out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        rows = config.vocab_size if name in ("model.embed_tokens.weight", "lm_head.weight") else len(tensor)
        assert (after[name].dtype, len(after[name])) == (dtype, rows)
        assert torch.equal(after[name][: len(tensor)], tensor)
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, out))
    tokens = torch.tensor([small_base.encode("def encode(text): return ids")])
    with torch.no_grad():
        torch.testing.assert_close(new(tokens).logits[..., :700], old(tokens).logits, rtol=0, atol=1e-6)
    assert json.loads((out / "generation_config.json").read_text())["suppress_tokens"] == list(range(820, config.vocab_size))


def test_a_resized_folder_is_whole(base_folder, small_base, small_merged, tmp_path):
    out = tmp_path / "resized"
    out.mkdir()
    resize_model(base_folder, out, small_base, small_merged, method="random", seed=1)
    ids = AutoTokenizer.from_pretrained(out)("私は「雨月物語」を読んでいます。", add_special_tokens=False)["input_ids"]
    assert ids == small_merged.encode("私は「雨月物語」を読んでいます。")
    assert max(ids) >= small_base.vocab_size
    model = load_model(out)
    assert model.config.unpadded_vocab_size == small_merged.vocab_size
    embedding, head = model.embed_tokens.weight[700:820], model.lm_head.weight[700:820]
    assert not torch.equal(embedding, head)
    again = tmp_path / "again"
    again.mkdir()
    resize_model(base_folder, again, small_base, small_merged, method="random", seed=1)
    for file in out.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_a_padded_model_can_be_resized_again(base_folder, small_base, small_merged, written_texts, tmp_path):
    larger = Tokenizer(extend(small_merged.model_bytes, written_texts, 60)[0].model_bytes)
    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        folder.mkdir()
    resize_model(base_folder, once, small_base, small_merged)
    config = resize_model(once, twice, small_merged, larger)
    assert config.unpadded_vocab_size == 880
    first, second = dict(read_tensors(once)), dict(read_tensors(twice))
    assert torch.equal(second["lm_head.weight"][:820], first["lm_head.weight"][:820])
    expected = new_rows(first["lm_head.weight"][:820], split_pieces(small_merged, larger), "head")
    torch.testing.assert_close(second["lm_head.weight"][820:880], expected)


def peak_growth(work) -> int:
    """Largest growth in bytes of the process's resident set, mapped files included, during a call."""

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def test_resizing_and_converting_take_little_memory(small_base, small_merged, tmp_path, monkeypatch):
    monkeypatch.setattr("model.tensor_file.BLOCK_BYTES", 2**20)
    config = MistralConfig(
        vocab_size=small_base.vocab_size,
        hidden_size=512,
        intermediate_size=13000,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    source, resized, exported = (tmp_path / name for name in ("source", "resized", "exported"))
    for folder in (source, resized, exported):
        folder.mkdir()
    shapes = hugging_face_shapes(config)
    values = torch.randn(13000 * 512).bfloat16()
    write_config(source, config, torch.bfloat16)
    tensors = {name: TensorStream.of(values[: math.prod(shape)].view(shape)) for name, shape in shapes.items()}
    write_tensor_folder(source, tensors)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size > 80e6
    assert peak_growth(lambda: resize_model(source, resized, small_base, small_merged)) < 30e6
    assert peak_growth(lambda: convert_folder(resized, exported, torch.float16)) < 30e6
    last = "model.layers.1.mlp.down_proj.weight"
    with TensorFolder(source) as before, TensorFolder(resized) as after, TensorFolder(exported) as other:
        assert torch.equal(after.tensor(last), before.tensor(last))
        assert torch.equal(other.tensor(last), before.tensor(last).half())


def test_models_of_another_tokenizer_are_refused(base_folder, small_base, small_merged, tmp_path):
    with pytest.raises(ValueError, match=r"base: the model has rows for 700 pieces, the tokenizer has 820"):
        resize_model(base_folder, tmp_path, small_merged, small_merged)
    config = read_config(base_folder)
    check_rows(replace(config, vocab_size=768), small_base, "padded")
    check_rows(replace(config, vocab_size=768, unpadded_vocab_size=700), small_base, "padded and said so")
    for wrong in ({"vocab_size": 699}, {"vocab_size": 829}, {"vocab_size": 768, "unpadded_vocab_size": 701}):
        with pytest.raises(ValueError, match="give the tokenizer that the model was trained with"):
            check_rows(replace(config, **({"unpadded_vocab_size": 0} | wrong)), small_base, "other")


def rewrite(folder, name, change):
    """Replace one tensor of a sharded folder."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file(tensors | {name: change(tensors[name])}, file, metadata={"format": "pt"})
            return
    raise AssertionError(f"no {name} in {folder}")


def test_weights_of_several_dtypes_are_refused(base_folder, small_base, small_merged, tmp_path):
    rewrite(base_folder, "model.norm.weight", torch.Tensor.bfloat16)
    with pytest.raises(ValueError, match=r"is torch\.float32 where other weights are torch\.bfloat16"):
        resize_model(base_folder, tmp_path, small_base, small_merged)


def test_a_head_of_the_wrong_shape_is_refused(base_folder, small_base, small_merged, tmp_path):
    rewrite(base_folder, "lm_head.weight", lambda head: head[:-1].clone())
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \[699, 24\], config\.json asks for \[700, 24\]"):
        resize_model(base_folder, tmp_path, small_base, small_merged)


@pytest.fixture(scope="module")
def bf16_base(small_base, tmp_path_factory):
    """A model in bfloat16 with distinct rows for its pieces."""
    model = Mistral(replace(SMALL_SHAPE, vocab_size=small_base.vocab_size, unpadded_vocab_size=0))
    initialize(model, 0)
    folder = tmp_path_factory.mktemp("bf16")
    save_model(model, folder, dtype=torch.bfloat16)
    return folder


def test_distilled_rows_come_closer_to_the_base_model(bf16_base, small_base, small_merged, written_texts, tmp_path):
    """An independent measure: hidden states after whole texts, and the likelihood of held-out texts."""
    learnt, heldout = written_texts[::2], written_texts[1:400:40]
    found = {}
    for method in ("weighted", "distilled"):
        folder = tmp_path / method
        folder.mkdir()
        distillation = Distillation(tokens=3_000, step_tokens=250, rate=0.1)
        given = {"texts": learnt, "distillation": distillation} if method == "distilled" else {}
        resize_model(bf16_base, folder, small_base, small_merged, method=method, **given)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        far, nll = [], []
        with torch.no_grad():
            for text in heldout:
                states = [
                    model.model(torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])).last_hidden_state[0, -1]
                    for tokenizer in (small_base, small_merged)
                ]
                far.append(float((states[0] - states[1]).norm() / states[0].norm()))
                ids = torch.tensor([[small_merged.bos_id, *small_merged.encode(text)]])
                nll.append(float(model(ids, labels=ids).loss))
        found[method] = (np.mean(far), np.mean(nll))
    assert found["distilled"][0] < 0.8 * found["weighted"][0]
    assert found["distilled"][1] < found["weighted"][1] - 0.5
    before, after = (dict(read_tensors(tmp_path / method)) for method in ("weighted", "distilled"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    for name in changed:
        same = (before[name] == after[name]).all(1)
        assert same[:700].all()
        assert same[820:].all()


def test_wrong_distillations_are_refused(bf16_base, small_base, small_merged, tmp_path):
    with pytest.raises(ValueError, match="method = 'mean' learns from no text: leave texts and distillation out"):
        resize_model(bf16_base, tmp_path, small_base, small_merged, method="mean", texts=["私"])
    with pytest.raises(ValueError, match="holds none of the new pieces: give text of their language"):
        resize_model(bf16_base, tmp_path, small_base, small_merged, method="distilled", texts=["English only."])
    for wrong in ({"tokens": 0}, {"context_length": 0}, {"step_tokens": 0}, {"rate": 0.0}):
        with pytest.raises(ValueError, match=rf"distillation\.{next(iter(wrong))} = 0"):
            Distillation(**wrong)
