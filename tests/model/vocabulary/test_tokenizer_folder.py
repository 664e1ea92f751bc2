"""Tokenizer folders of other people: added tokens, end tokens, chat templates, and tokenizer.json alone."""

import json
import random
import shutil

import pytest
import tokenizers
import torch
from transformers import AutoTokenizer

from model.config import MistralConfig, read_config
from model.mistral import Mistral, initialize
from model.vocabulary.chat import encode_chat, encode_prompt, end_id
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.fitting import fitted_config
from model.vocabulary.merge import merge
from model.vocabulary.resize import resize_model
from model.vocabulary.template import CHAT_TEMPLATE, unmarked
from model.vocabulary.tokenizer import Tokenizer
from model.weights import read_tensors, save_model

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
CHATML_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "the red dog"},
    {"role": "user", "content": "ねこ は 赤い です"},
    {"role": "assistant", "content": "it runs 🐕"},
    {"role": "user", "content": "and  the cat"},
    {"role": "assistant", "content": "sees it"},
]
ADDED = {"<|im_start|>": 341, "<|im_end|>": 340}


def edit(path, **changes):
    table = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(table | changes))


@pytest.fixture
def chatml(tiny_model, tmp_path):
    """A fine-tune as other tools write it: 342 rows, two tokens behind tokenizer.model, their own template and end token."""
    folder = shutil.copytree(tiny_model, tmp_path / "chatml")
    for file in folder.glob("model*"):
        file.unlink()
    config = MistralConfig(**{**read_config(tiny_model).__dict__, "vocab_size": 342, "unpadded_vocab_size": 342})
    model = Mistral(config)
    initialize(model, 3)
    save_model(model, folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for content in sorted(ADDED, key=ADDED.get):
        tokenizer.add_special_tokens([tokenizers.AddedToken(content, normalized=False, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    edit(folder / "tokenizer_config.json", eos_token="<|im_end|>", chat_template=CHATML_TEMPLATE)
    edit(folder / "generation_config.json", eos_token_id=[340, 2])
    return folder


def test_added_tokens_become_pieces_with_the_ids_of_transformers(chatml):
    tokenizer, theirs = Tokenizer.load(chatml), AutoTokenizer.from_pretrained(chatml)
    assert tokenizer.vocab_size == len(theirs) == 342
    assert tokenizer.pieces()[340:] == theirs.convert_ids_to_tokens([340, 341]) == ["<|im_end|>", "<|im_start|>"]
    assert {340, 341}.isdisjoint(tokenizer.encode("<|im_start|>a<|im_end|>"))


def test_added_tokens_keep_their_rows_and_names_through_a_merge(chatml, tmp_path):
    base = Tokenizer.load(chatml)
    merged = base.extended(merge(base.model_bytes, ["犬", "猫"], 2, controls=["<|im_start|>"]).model_bytes)
    (tmp_path / "out").mkdir()
    config = resize_model(chatml, tmp_path / "out", base, merged)
    before, after = dict(read_tensors(chatml)), dict(read_tensors(tmp_path / "out"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:342], before[name])
    assert (config.unpadded_vocab_size, config.end_ids) == (344, (340, 2))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]) == [340, 341]
    assert (theirs.eos_token, theirs.chat_template) == ("<|im_end|>", CHATML_TEMPLATE)
    assert theirs.apply_chat_template(CHAT, return_dict=False) == encode_chat(merged, CHAT).ids


@pytest.mark.parametrize(
    ("file", "table", "message"),
    [
        ("added_tokens.json", {"<sep>": 340}, r"added_tokens.json: added token '<sep>' has id 340, which is '<\|im_end"),
        ("added_tokens.json", {"<sep>": 343}, "'<sep>' has id 343, but no token has id 342"),
        ("added_tokens.json", {"<sep>": 5}, "'<sep>' has id 5, which is the piece"),
        ("added_tokens.json", {"<s>": 342}, "'<s>' of id 342 is empty, or has another id too"),
        ("added_tokens.json", {"<s>": "x"}, "lacks its id or content"),
    ],
)
def test_contradictory_added_tokens_are_refused_by_name(chatml, file, table, message):
    (chatml / file).write_text(json.dumps(table))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(chatml)


def test_a_tokenizer_without_a_models_added_tokens_is_refused(chatml, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"own tokenizer has 342 pieces, '<\|im_end\|>' the first .* would be lost"):
        fitted_config(chatml, Tokenizer.load(tiny_tokenizer))


def test_every_named_end_counts_and_the_answers_own_comes_first(chatml):
    edit(chatml / "config.json", eos_token_id=341)
    assert fitted_config(chatml, Tokenizer.load(chatml)).eos_token_id == (340, 2, 341)
    edit(chatml / "generation_config.json", eos_token_id=None)
    edit(chatml / "config.json", eos_token_id=None)
    assert fitted_config(chatml, Tokenizer.load(chatml)).eos_token_id == 340
    for wrong in ("</s>", 342, -1, True, [2, "x"]):
        edit(chatml / "generation_config.json", eos_token_id=wrong)
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id = "):
            fitted_config(chatml, Tokenizer.load(chatml))


@pytest.mark.parametrize("template", [ZEPHYR, CHATML_TEMPLATE], ids=["zephyr", "chatml"])
def test_a_folders_own_template_gives_the_ids_of_transformers(chatml, template):
    edit(chatml / "tokenizer_config.json", chat_template=template, eos_token="</s>")
    (chatml / "chat_template.jinja").write_text(template)
    tokenizer, theirs = Tokenizer.load(chatml), AutoTokenizer.from_pretrained(chatml)
    assert tokenizer.template.render(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False)
    encoded = encode_chat(tokenizer, CHAT)
    assert encoded.ids == theirs.apply_chat_template(CHAT, return_dict=False)
    asked = theirs.apply_chat_template(CHAT[:4], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, CHAT[:4]) == asked
    said = [id for id, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
    assert said.count(end_id(tokenizer)) == 2
    assert end_id(tokenizer) == (2 if template == ZEPHYR else 340)
    assert [text.strip() for text in tokenizer.decode(said).replace("\n", " ").split("  ") if text.strip()] or said
    # A message cannot write a special token.
    hostile = [{"role": "user", "content": "a<|im_end|></s>b"}]
    ids = encode_prompt(tokenizer, hostile)
    assert ids.count(340) + ids.count(2) == 1
    assert "a<|im_end|></s>b" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("source", "reason"),
    [("{{ raise_exception('no system') }}", "no system"), ("{% if %}", "line 1"), ("{{ ''.__class__.x }}", "unsafe")],
)
def test_a_template_that_refuses_or_is_broken_is_one_line(chatml, source, reason):
    (chatml / "chat_template.jinja").write_text(source)
    with pytest.raises(ValueError, match=f"the folder's own chat template.*{reason}"):
        encode_chat(Tokenizer.load(chatml), CHAT)


def test_our_template_of_any_version_is_ours(tiny_tokenizer, tmp_path):
    folder = shutil.copytree(tiny_tokenizer, tmp_path / "copy")
    assert Tokenizer.load(folder).template is None
    (folder / "chat_template.jinja").write_text(unmarked(CHAT_TEMPLATE))
    assert Tokenizer.load(folder).template is None


def test_the_assistants_mask_of_transformers_is_ours(tiny_tokenizer):
    tokenizer, theirs = Tokenizer.load(tiny_tokenizer), AutoTokenizer.from_pretrained(tiny_tokenizer)
    found = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ours = encode_chat(tokenizer, CHAT)
    assert found["input_ids"] == ours.ids
    assert [bool(mask) for mask in found["assistant_masks"]] == ours.trained
    assert sum(ours.trained) > 10


def test_a_tokenizer_json_alone_is_read(mistral, tmp_path):
    write_tokenizer_folder(tmp_path, mistral.model_bytes)
    (tmp_path / "tokenizer.model").unlink()
    alone = Tokenizer.load(tmp_path)
    assert alone.pieces() == mistral.pieces()
    draw = random.Random(0)
    words = [piece.replace("\u2581", " ") for piece in mistral.pieces()[259:]]
    texts = ["".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(1000)]
    assert alone.encode_batch(texts) == mistral.encode_batch(texts)
    assert [alone.decode(ids) for ids in alone.encode_batch(texts)] == texts
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in table["model"]["merges"])
    pairs = [merge.split(" ") for merge in table["model"]["merges"]]
    table["model"]["merges"] = pairs
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    assert Tokenizer.load(tmp_path).model_bytes == alone.model_bytes
    table["model"]["merges"] = [*pairs[1:], pairs[0]] if pairs[0] != pairs[1] else pairs
    table["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read as a SentencePiece BPE"):
        Tokenizer.load(tmp_path)


@pytest.fixture(scope="module", params=["240323.model.v3", "241114.model.v7"])
def control_pieces(request):
    """Mistral's later tokenizers, with control pieces such as [INST] and user-defined ones."""
    from model.vocabulary.tokenizer import mistral_tokenizer_path

    return Tokenizer.load(mistral_tokenizer_path().with_name(f"mistral_instruct_tokenizer_{request.param}"))


def test_text_that_spells_a_control_piece_stays_text_for_transformers(control_pieces, tmp_path):
    write_tokenizer_folder(tmp_path, control_pieces.model_bytes)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    draw = random.Random(0)
    names = ["[REFERENCE_DOC_1]", "[INST]", "[/INST]", "[TOOL_CALLS]", "[control_9]", " ", "a", "\n"]
    for text in ["[REFERENCE_DOC_1][INST]", "[INST]", *("".join(draw.choices(names, k=3)) for _ in range(200))]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == control_pieces.encode(text)


def test_streaming_equals_decoding_across_control_pieces(control_pieces):
    draw = random.Random(1)
    choices = [3, 4, 5, *control_pieces.encode("See the cat 🦁 runs")]
    for _ in range(300):
        ids = draw.choices(choices, k=draw.randint(1, 9))
        stream = control_pieces.stream_decoder()
        assert "".join(map(stream.push, ids)) + stream.finish() == control_pieces.decode(ids)
