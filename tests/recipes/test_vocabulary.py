"""The vocabulary recipe, from text to a tokenizer and a resized model, and its refusals."""

import gzip
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.config import MistralConfig
from model.mistral import Mistral, initialize
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.merge import unreachable
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from model.weights import read_tensors, save_model
from recipes import vocabulary
from recipes.vocabulary import VocabularySettings, main, run

NOUNS = ["私", "先生", "東京の学生", "コンピューター", "図書館"]
DOCUMENTS = [
    f"{noun}は{number}番目の{other}を見ました。\nそれから、{other}へ行きました！"
    for noun in NOUNS
    for other in NOUNS
    for number in range(4)
]


@pytest.fixture
def text(tmp_path):
    """A hundred documents, half of them plain and half JSONL, compressed, with a record that holds no text."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(DOCUMENTS[:50]) + "\n", encoding="utf-8")
    records = [json.dumps({"body": document}, ensure_ascii=False) for document in DOCUMENTS[50:]]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join([*records, '{"body": 3}']).encode()))
    return folder


@pytest.fixture
def english(tmp_path):
    path = tmp_path / "english.txt"
    path.write_text('The library is open.\n\nWe read two books; "Größe" was one.\n', encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = MistralConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4
    )
    mistral = Mistral(config)
    initialize(mistral, 0)
    save_model(mistral, folder, dtype=torch.bfloat16)
    write_tokenizer_folder(folder, mistral_tokenizer_path().read_bytes())
    return folder


def test_text_gives_a_tokenizer_and_a_resized_model(text, english, model, tmp_path, capsys):
    out, resized = tmp_path / "vocabulary", tmp_path / "resized"
    report = run(
        VocabularySettings(
            text=(str(text),),
            text_field="body",
            new_pieces=40,
            heldout=(str(english),),
            out=str(out),
            model=str(model),
            model_out=str(resized),
        )
    )
    tokenizer = Tokenizer.load(out)
    assert tokenizer.vocab_size == report["pieces"] == 32042
    assert unreachable(tokenizer.model_bytes) == []
    assert (report["unreachable_pieces"], report["rows"], report["documents"]) == (0, 32128, 100)
    assert report["characters"] == sum(map(len, DOCUMENTS))
    assert sum(report["records_skipped"].values()) == 1
    measured = report["heldout"][str(english)]
    assert measured["ratio"] == 1
    lines = [line for line in english.read_text(encoding="utf-8").split("\n") if line]
    base = Tokenizer.load(mistral_tokenizer_path())
    documents = english.read_text(encoding="utf-8").strip().split("\n\n")
    tokens = sum(map(len, base.encode_batch(documents)))
    assert measured["characters_per_token"] == round(sum(map(len, documents)) / tokens, 4)
    assert report["lines_without_the_scripts"] == {"lines": len(lines), "changed": 0}
    assert json.loads((out / "vocabulary.json").read_text(encoding="utf-8"))["fingerprint"] == tokenizer.fingerprint
    printed = capsys.readouterr().out
    assert "32,042 pieces" in printed
    assert "skipped, and others like it: " in printed

    ids = AutoTokenizer.from_pretrained(resized)(DOCUMENTS[0], add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.encode(DOCUMENTS[0])
    assert len(ids) < len(base.encode(DOCUMENTS[0]))
    assert AutoModelForCausalLM.from_pretrained(resized).config.vocab_size == 32128
    before, after = dict(read_tensors(model)), dict(read_tensors(resized))
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor)


def test_documents_are_held_out_and_a_second_run_gives_the_same_bytes(text, tmp_path):
    settings = {"text": (str(text),), "text_field": "body", "size": 32030, "seed": 5}
    first = run(VocabularySettings(out=str(tmp_path / "first"), **settings))
    assert list(first["heldout"]) == ["held out of the text"]
    assert first["documents"] == 97
    assert first["heldout"]["held out of the text"]["ratio"] > 1.3
    run(VocabularySettings(out=str(tmp_path / "second"), **settings))
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_max_characters_bounds_the_training_text(text, tmp_path):
    report = run(
        VocabularySettings(text=(str(text),), text_field="body", new_pieces=20, max_characters=800, out=str(tmp_path / "out"))
    )
    assert report["characters"] < 900


def test_the_command_reads_options_and_refuses_in_one_line(text, tmp_path):
    out = tmp_path / "out"
    main(["--text", str(text / "a.txt"), "--new-pieces", "20", "--out", str(out)])
    assert Tokenizer.load(out).vocab_size == 32022
    with pytest.raises(SystemExit, match=r"^error: .*out: exists already"):
        main(["--text", str(text / "a.txt"), "--new-pieces", "20", "--out", str(out)])
    main(["--text", str(text / "a.txt"), "--new-pieces", "21", "--out", str(out), "--overwrite"])
    assert Tokenizer.load(out).vocab_size == 32023


def test_weights_mix_sources_and_repeated_documents_count_once(text, tmp_path):
    given = {"text": (str(text / "a.txt"), str(text / "b.jsonl.gz")), "text_field": "body", "new_pieces": 20}
    (text / "a.txt").write_text("\n\n".join(DOCUMENTS[:50] * 3) + "\n", encoding="utf-8")
    assert run(VocabularySettings(**given, heldout=(str(text / "a.txt"),), out=str(tmp_path / "all")))["documents"] == 100
    lengths = [len(document) for document in DOCUMENTS]
    mixed = run(
        VocabularySettings(
            **given, heldout=(str(text / "a.txt"),), out=str(tmp_path / "mixed"), max_characters=1200, weights=(3.0, 1.0)
        )
    )
    assert 1200 <= mixed["characters"] < 1200 + 2 * max(lengths)


@pytest.mark.slow
def test_a_comparison_agrees_with_our_own_count(text, english, tmp_path, capsys):
    """Two sizes, another folder, and the tokenizers of mistral-common."""
    other = tmp_path / "other"
    run(VocabularySettings(text=(str(text / "a.txt"),), new_pieces=30, out=str(other)))
    (tmp_path / "heldout.txt").write_text("\n\n".join(DOCUMENTS[60:70]), encoding="utf-8")
    held = (str(tmp_path / "heldout.txt"), str(english))
    main(
        [
            "--text",
            str(text / "a.txt"),
            "--heldout",
            *held,
            "--compare",
            "--sizes",
            "10",
            "30",
            "--against",
            str(other),
            "--out",
            str(tmp_path / "comparison"),
        ]
    )
    printed = capsys.readouterr().out
    comparison = json.loads((tmp_path / "comparison" / "comparison.json").read_text(encoding="utf-8"))
    assert "<svg" in (tmp_path / "comparison" / "comparison.svg").read_text(encoding="utf-8")
    rows = {row["name"]: row for row in comparison["tokenizers"]}
    assert list(rows)[:6] == [
        "base",
        "10 by use",
        "10 first trained",
        "30 by use",
        "30 first trained",
        "mistral_instruct_tokenizer_240216.model.v2",
    ]
    assert all(name in printed for name in rows)
    tokens = sum(map(len, Tokenizer.load(other).encode_batch(DOCUMENTS[60:70])))
    characters = sum(map(len, DOCUMENTS[60:70]))
    assert rows["other"]["characters_per_token"]["heldout.txt"] == round(characters / tokens, 4)
    languages = {name: about["language"] for name, about in comparison["texts"].items()}
    assert languages == {"heldout.txt": "hira,kata,han", "english.txt": "other"}
    for name, count in (("10 by use", 10), ("30 by use", 30)):
        row = rows[name]
        assert (row["new_pieces"], row["unreachable"]) == (count, {"new": 0, "base": 0})
        assert row["lines_without_the_scripts"] == {"lines": 2, "changed": 0}
        assert row["parameters_added"] == 128 * 2 * 4096  # rows come in multiples of 128
        assert row["languages"]["other"]["ratio"] == 1
    before, after = rows["base"]["languages"]["hira,kata,han"], rows["30 by use"]["languages"]["hira,kata,han"]
    assert after["ratio"] > 1.3
    # A million characters through the head and blocks of Mistral 7B: at least 6 operations a parameter and token.
    assert before["training_pflop"] > 6 * 7.1e9 * 1e6 / before["characters_per_token"] / 1e15
    assert after["training_pflop"] < before["training_pflop"] / 1.3


def settings_for(folder, tmp_path, **changes):
    given = {"text": (str(folder / "a.txt"),), "new_pieces": 20, "out": str(tmp_path / "out")}
    return VocabularySettings(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 33000}, "either new_pieces .* or size"),
        ({"new_pieces": None}, "either new_pieces .* or size"),
        ({"new_pieces": 0}, "new_pieces = 0"),
        ({"model": "somewhere"}, "model and model_out go together"),
        ({"method": "mean"}, "method = 'mean' has no effect without a model"),
        ({"max_characters": 0}, "max_characters = 0"),
        ({"coverage": 1.5}, r"coverage = 1\.5"),
        ({"compare": True}, "new_pieces has no effect with compare"),
        ({"compare": True, "new_pieces": None}, "compare needs heldout"),
        ({"compare": True, "new_pieces": None, "heldout": ("x",), "sizes": (0,)}, r"sizes = \(0,\)"),
        ({"weights": (1.0, 2.0)}, "weights: 2 for 1 of text"),
        ({"weights": (0.0,)}, r"weights = \(0\.0,\): each must be above 0"),
        ({"script": "hira,kanji"}, "script 'kanji'"),
        ({"split": "paragraph"}, "split = 'paragraph': must be one of"),
    ],
)
def test_contradicting_settings_are_refused(text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings_for(text, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_pieces": 90_000}, r"90,000 new pieces asked for, but the text gives \d+"),
        ({"new_pieces": None, "size": 32_000}, "size = 32,000: must be above the 32,000 pieces"),
        ({"text": ("missing.txt",)}, r"missing\.txt: no such file"),
        ({"base": "missing"}, "no tokenizer at missing"),
    ],
)
def test_bad_requests_leave_nothing_behind(text, tmp_path, changes, message):
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(settings_for(text, tmp_path, **changes))
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt: empty"),
        ("broken.jsonl", b'{"text": "\xe6\x97\xa5"}\n{"text": \n', r"broken\.jsonl:2: broken JSON"),
        ("fields.jsonl", b'{"body": "\xe6\x97\xa5"}\n', r"fields\.jsonl: no usable text in it; text_field = 'text'"),
        ("english.txt", b"Only English.\n", "is of the scripts hira,kata,han"),
        ("bytes.txt", b"\xff\xfe\n", r"bytes\.txt:1: .*not UTF-8"),
    ],
)
def test_bad_text_is_named(text, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(settings_for(text, tmp_path, text=(str(tmp_path / name),)))
    assert not (tmp_path / "out").exists()


def test_unwritable_outputs_are_refused_before_training(text, tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/out: cannot be written|file"):
        run(settings_for(text, tmp_path, out=str(tmp_path / "file" / "out")))
    with pytest.raises(ValueError, match="out and model_out are both"):
        run(settings_for(text, tmp_path, model=str(model), model_out=str(tmp_path / "out")))
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError, match="cannot be written"):
            run(settings_for(text, tmp_path))
        tmp_path.chmod(0o700)


def test_a_model_of_another_tokenizer_is_refused(text, tmp_path, model):
    other = tmp_path / "other"
    run(settings_for(text, tmp_path, out=str(other)))
    with pytest.raises(ValueError, match="rows for 32,000 pieces, the tokenizer has 32,022"):
        run(settings_for(text, tmp_path, base=str(other), model=str(model), model_out=str(tmp_path / "resized")))
    assert not (tmp_path / "resized").exists()


def test_characters_are_held_out_not_documents():
    """Three documents of very unequal length: 2 % of their characters are held out, and no character is lost."""
    for lengths in ([500_000, 100_000, 500_000], [1_000_000], [20] * 5000, [3, 4]):
        documents = [str(number % 10) * length for number, length in enumerate(lengths)]
        kept, heldout = vocabulary._hold_out(documents, VocabularySettings(text=("x",), out="o", new_pieces=1))
        (held,) = heldout.values()
        assert sum(map(len, kept)) + sum(map(len, held)) == sum(lengths)
        assert sum(map(len, held)) == pytest.approx(max(1, 0.02 * sum(lengths)), abs=20)
