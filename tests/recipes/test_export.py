"""Export writes a folder that `transformers` loads, with the same bytes every time."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.data.prepare import prepare
from model.mistral import packed_attention
from model.sampling import Sampling
from model.vocabulary.chat import encode_chat
from model.vocabulary.tokenizer import Tokenizer
from model.weights import load_model, read_tensors
from recipes import export, sft
from recipes.export import ExportSettings

FILES = {
    "config.json",
    "generation_config.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
}
MESSAGES = [
    {"role": "system", "content": "the red dog"},
    {"role": "user", "content": "ねこ は 赤い です"},
    {"role": "assistant", "content": "it runs 🐕"},
    {"role": "user", "content": "and the cat"},
    {"role": "assistant", "content": "sees it"},
]


@pytest.fixture(scope="module")
def trained(tiny_settings, tmp_path_factory):
    """A run folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    sft.run(tiny_settings("sft", folder, checkpoint_every=3))
    return folder


def test_a_float32_export_gives_the_same_logits_and_tokens(trained, tmp_path):
    out = export.run(ExportSettings(source=str(trained), out=str(tmp_path / "exported"), dtype="float32"))
    assert {file.name for file in out.iterdir()} == FILES
    tokenizer, theirs = Tokenizer.load(trained / "step-00000006"), AutoTokenizer.from_pretrained(out)
    ids = encode_chat(tokenizer, MESSAGES).ids
    assert theirs.apply_chat_template(MESSAGES, return_dict=False) == ids
    assert theirs("the cat sees ねこ").input_ids == [tokenizer.bos_id, *tokenizer.encode("the cat sees ねこ")]
    model = load_model(trained / "step-00000006")
    reference = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert reference.dtype == torch.float32
    assert (reference.config.sliding_window, len(ids) > 16) == (16, True)
    tokens = torch.tensor(ids)
    with torch.no_grad():
        expected = reference(tokens[None]).logits[0, :, :340]
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        found = model.logits(model(tokens, torch.arange(len(ids)), packed_attention(bounds, 16)))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_servers_of_an_export_sample_as_its_settings_say(trained, tmp_path):
    """transformers reads the file as its own defaults; the card's temperature, top-p and penalty are ours."""
    out = export.run(ExportSettings(source=str(trained), out=str(tmp_path / "card")))
    chosen = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert (chosen.do_sample, chosen.temperature, chosen.top_p, chosen.repetition_penalty) == (True, 0.5, 0.95, 1.15)
    assert chosen.top_k == 0, "transformers' own default would keep 50 tokens"
    assert chosen.suppress_tokens == list(range(340, 384))
    greedy = export.run(ExportSettings(source=str(trained), out=str(tmp_path / "greedy"), sampling=Sampling(temperature=0.0)))
    table = json.loads((greedy / "generation_config.json").read_text(encoding="utf-8"))
    assert table["do_sample"] is False
    assert table["repetition_penalty"] == 1
    assert "temperature" not in table


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_export_is_the_rounded_weights(trained, tmp_path, dtype):
    settings = {} if dtype == "bfloat16" else {"dtype": dtype}
    out = export.run(ExportSettings(source=str(trained), out=str(tmp_path / "exported"), **settings))
    whole = dict(read_tensors(trained / "step-00000006"))
    narrow = dict(read_tensors(out))
    assert whole.keys() == narrow.keys()
    for name, tensor in narrow.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, whole[name].to(tensor.dtype))
    assert AutoModelForCausalLM.from_pretrained(out).dtype == getattr(torch, dtype)


def test_exporting_again_gives_the_same_bytes(trained, tmp_path):
    folders = []
    for name in "ab":
        export.main(["--source", str(trained), "--out", str(tmp_path / name)])
        folders.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    export.main(["--source", str(trained / "step-00000006"), "--out", str(tmp_path / "a"), "--overwrite"])
    folders.append({file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()})
    assert folders[0].keys() == FILES
    assert folders[0] == folders[1] == folders[2]


def test_an_exported_folder_can_be_exported_again(trained, tmp_path):
    """Any Mistral folder with its tokenizer.model."""
    first = export.run(ExportSettings(source=str(trained), out=str(tmp_path / "a")))
    second = export.run(ExportSettings(source=str(first), out=str(tmp_path / "b")))
    assert all((second / name).read_bytes() == (first / name).read_bytes() for name in FILES)


def test_the_newest_checkpoint_of_a_run_is_taken(trained, tmp_path, capsys):
    older = export.run(ExportSettings(source=str(trained / "step-00000003"), out=str(tmp_path / "older")))
    newest = export.run(ExportSettings(source=str(trained), out=str(tmp_path / "newest")))
    name = "model-00001-of-00001.safetensors"
    assert (older / name).read_bytes() != (newest / name).read_bytes()
    shown = capsys.readouterr().out.splitlines()
    assert f"from {trained / 'step-00000003'};" in shown[-2]
    assert f"from {trained / 'step-00000006'};" in shown[-1]


def refused(arguments):
    with pytest.raises(SystemExit) as ended:
        export.main(arguments)
    assert "\n" not in ended.value.code
    return ended.value.code


def test_after_training_generation_ends_where_answers_end(tiny_model, tiny_settings, tmp_path):
    """A ChatML model whose configuration still names </s> alone: its answers end with <|im_end|>."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    fast = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    for content in ("<|im_end|>", "<|im_start|>"):
        fast.add_special_tokens([tokenizers.AddedToken(content, normalized=False, special=True)])
    fast.save(str(model / "tokenizer.json"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"unpadded_vocab_size": 342}))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    data = tmp_path / "data"
    prepare([str(tmp_path / "in.jsonl")], data, tokenizer=Tokenizer.load(model), kind="conversations")
    changes = {"model": str(model), "sources": [{"path": str(data)}], "heldout": [], "steps": 1, "context_length": 128}
    sft.run(tiny_settings("sft", tmp_path / "run", **changes, schedule={"peak": 1e-3}))
    out = export.run(ExportSettings(source=str(tmp_path / "run"), out=str(tmp_path / "exported")))
    for folder in (tmp_path / "run" / "step-00000001", out):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [340, 2]
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [340, 2]
    assert AutoTokenizer.from_pretrained(out).convert_ids_to_tokens(340) == "<|im_end|>"


def test_the_exported_template_masks_what_training_trains_on(trained, tmp_path):
    """What TRL's assistant_only_loss reads."""
    out = export.run(ExportSettings(source=str(trained), out=str(tmp_path / "exported")))
    tokenizer, theirs = Tokenizer.load(out), AutoTokenizer.from_pretrained(out)
    for messages in (
        MESSAGES,
        MESSAGES[1:],
        MESSAGES[1:3],
        [*MESSAGES[1:2], {"role": "assistant", "content": " 犬 \n\n the  "}],
    ):
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ours = encode_chat(tokenizer, messages)
        assert (found["input_ids"], [bool(mask) for mask in found["assistant_masks"]]) == (ours.ids, ours.trained)
        assert ours.trained[-1]


def test_a_source_without_a_model_is_refused(trained, tiny_model, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    assert refused(["--source", "nowhere", *out]) == "error: nowhere: no such run, checkpoint or model folder"
    (tmp_path / "empty").mkdir()
    message = refused(["--source", str(tmp_path / "empty"), *out])
    assert message == f"error: {tmp_path / 'empty'}: holds neither a complete checkpoint (step-...) nor a config.json"
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    assert "tokenizer.model" in refused(["--source", str(tmp_path / "bare"), *out])
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(trained, tmp_path):
    broken = tmp_path / "run" / "step-00000001"
    for file in (trained / "step-00000006").rglob("*"):
        if file.is_file():
            copy = broken / file.relative_to(trained / "step-00000006")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    weights = broken / "model-00001-of-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    message = refused(["--source", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert str(weights) in message
    assert f"delete {broken}" in message
    assert not (tmp_path / "out").exists()


def test_an_unwritable_target_is_refused(trained, tmp_path):
    source = ["--source", str(trained)]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").write_text("kept")
    assert "exists already" in refused([*source, "--out", str(tmp_path / "there")])
    assert (tmp_path / "there" / "kept").read_text() == "kept"
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused([*source, "--out", str(tmp_path / "file" / "out")])


@pytest.mark.parametrize("which", ["run", "checkpoint", "parent"])
def test_overwriting_the_source_is_refused(trained, which):
    before = sorted(trained.rglob("*"))
    out = {"run": trained, "checkpoint": trained / "step-00000006", "parent": trained.parent}[which]
    source = trained / "step-00000006" if which == "checkpoint" else trained
    message = refused(["--source", str(source), "--out", str(out), "--overwrite"])
    assert message == f"error: {out}: is or holds the source, and overwriting would delete it; name another folder"
    assert sorted(trained.rglob("*")) == before


def test_export_reads_a_configuration_file(trained, tmp_path):
    toml = tmp_path / "export.toml"
    toml.write_text(f"source = {json.dumps(str(trained))}\nout = 'unused'\ndtype = 'float16'\n")
    export.main([str(toml), "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert not Path("unused").exists()
