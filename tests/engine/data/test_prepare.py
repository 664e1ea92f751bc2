"""Preparation: documents and masks, skipped records, held-out parts, kills and damage."""

import fcntl
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from engine.data.dataset import TokenDataset
from engine.data.prepare import describe, prepare
from model.vocabulary.chat import encode_chat, encode_prompt
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(mistral_tokenizer_path())


@pytest.fixture
def make(tmp_path, tokenizer):
    """make(records or text, name=..., **settings of prepare) -> report of the dataset at tmp_path/out."""

    def write(content, name=None, kind="text", out="out", **settings):
        path = tmp_path / (name or ("in.txt" if isinstance(content, str) else "in.jsonl"))
        if not isinstance(content, str):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path.write_text(content, encoding="utf-8")
        return prepare([str(path)], tmp_path / out, tokenizer=tokenizer, kind=kind, **settings)

    return write


def chat(*contents):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


TEXTS = ["こんにちは、世界。", "Two lines\nof text </s> here", "x"]


def test_a_text_document_is_bos_pieces_eos(make, tmp_path):
    report = make("\n\n".join(TEXTS))
    dataset = TokenDataset.open(tmp_path / "out")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(mistral_tokenizer_path()))
    assert [dataset.tokens(i).tolist() for i in range(3)] == [[1, *reference.encode(text), 2] for text in TEXTS]
    assert dataset.tokenizer_fingerprint == Tokenizer.load(mistral_tokenizer_path()).fingerprint
    assert (report["documents"], report["tokens"]) == (3, dataset.lengths.sum())
    assert report["trained_tokens"] == report["tokens"] - 3
    assert report["characters"] == sum(map(len, TEXTS))
    assert report == dataset.report
    dataset.verify()


def test_an_answer_of_weight_0_is_not_trained_on(make, tmp_path, tokenizer):
    record = chat("U", "A", "V", "B b", "W", "C")
    whole = np.array(encode_chat(tokenizer, record["messages"]).trained)
    record["messages"][3]["weight"] = 0
    report = make([record], kind="conversations")
    trained = TokenDataset.open(tmp_path / "out").trained(0)
    second = slice(
        len(encode_chat(tokenizer, record["messages"][:2]).ids), len(encode_chat(tokenizer, record["messages"][:4]).ids)
    )
    assert whole[second].any()
    whole[second] = False
    assert (trained == whole).all()
    assert report["trained_tokens"] == whole.sum()


@pytest.fixture
def folder_with(tiny_tokenizer, tmp_path):
    """folder_with(template) -> a tokenizer whose folder has a chat template of its own."""

    def build(template):
        folder = shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
        (folder / "chat_template.jinja").write_text(template)
        return Tokenizer.load(folder)

    return build


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_records_that_a_folders_own_template_refuses_are_skipped_with_its_words(folder_with, tmp_path):
    tokenizer = folder_with(NO_SYSTEM)
    told = {"messages": [{"role": "system", "content": "S"}, *chat("a", "b")["messages"]]}
    preferred = pair("p", "a", "b")
    for kind, records in {
        "conversations": [chat("a", "b"), told, chat("c", "d"), told],
        "preferences": [preferred, {**preferred, "system": "S"}, {**preferred, "system": "T"}],
    }.items():
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        report = prepare([str(path)], tmp_path / kind, tokenizer=tokenizer, kind=kind)
        (reason, skip), *others = report["skipped"].items()
        assert not others
        assert (reason, skip["count"]) == ("the chat template of the tokenizer's folder refuses it", 2)
        assert skip["first"] == f"{path}:2"
        assert skip["detail"].endswith("no system here")
        assert report["documents"] == 2


def test_an_answer_of_weight_0_is_never_another_answer(folder_with, tmp_path):
    """A template that trains on an answer in two parts does not say which part belongs to which answer."""
    tokenizer = folder_with(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %} and {% generation %}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    path = tmp_path / "in.jsonl"
    weighted = chat("a", "the cat", "c", "a dog")
    weighted["messages"][1]["weight"] = 0
    path.write_text(json.dumps(chat("a", "the cat")) + "\n" + json.dumps(weighted) + "\n")
    report = prepare([str(path)], tmp_path / "out", tokenizer=tokenizer, kind="conversations")
    assert report["documents"] == 1
    assert list(report["skipped"]) == ["an answer of weight 0 that the chat template hides"]


def test_records_and_text_files_give_the_same_documents(make, tmp_path):
    make("\n\n".join(TEXTS), out="a")
    make([{"body": text, "id": 3} for text in TEXTS], out="b", text_field="body")
    assert TokenDataset.open(tmp_path / "a").fingerprint == TokenDataset.open(tmp_path / "b").fingerprint
    make("\n".join(["a", "", "b"]), out="c", split="line")
    assert len(TokenDataset.open(tmp_path / "c")) == 2


def test_conversations_keep_the_mask_of_the_chat_template(make, tmp_path, tokenizer):
    records = [chat("質問？", "答え。", "More?", "Yes </s> no"), chat("a", "b"), chat("a", "b", "c")]
    report = make(records, kind="conversations")
    dataset = TokenDataset.open(tmp_path / "out")
    for i, record in enumerate(records):
        expected = encode_chat(tokenizer, record["messages"])
        assert dataset.tokens(i).tolist() == expected.ids
        assert dataset.trained(i).tolist() == expected.trained
    assert report["roles"] == {"user": 5, "assistant": 4}
    assert report["trained_tokens"] == sum(dataset.trained(i).sum() for i in range(3))


def test_preferences_train_on_the_last_answer_only(make, tmp_path, tokenizer):
    prompt = [*chat("hello", "earlier answer", "問い")["messages"]]
    make([pair(prompt, "良い答え", "bad"), pair("p", "q", "r")], kind="preferences")
    dataset = TokenDataset.open(tmp_path / "out")
    assert (dataset.kind, len(dataset)) == ("preferences", 4)
    given = encode_prompt(tokenizer, prompt)
    for document, answer in ((0, "良い答え"), (1, "bad")):
        whole = encode_chat(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
        ids, trained = dataset.tokens(document).tolist(), dataset.trained(document)
        assert ids == whole.ids
        assert dataset.prompt_lengths[document] == len(given)
        assert ids[: len(given)] == given
        assert trained.tolist() == [False] * len(given) + [True] * (len(ids) - len(given))
        assert tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t]).strip() == answer


def test_unusable_records_are_skipped_counted_and_located(make, tmp_path):
    records = [chat("a"), chat("a", "b"), chat("c", ""), {"messages": [{"role": "bot", "content": "x"}]}, chat("d", " ")]
    report = make(records, kind="conversations")
    path = tmp_path / "in.jsonl"
    assert {reason: (skip["count"], skip["first"]) for reason, skip in report["skipped"].items()} == {
        "no assistant turn": (1, f"{path}:1"),
        "empty answer": (2, f"{path}:3"),
        "unknown role": (1, f"{path}:4"),
    }
    assert report["records"] == 5
    assert report["sources"][0]["documents"] == 1
    assert any(f"skipped 2: empty answer; first at {path}:3" in line for line in describe(report))
    with pytest.raises(ValueError, match=r"in\.jsonl:1: no assistant turn"):
        make(records, kind="conversations", out="strict", strict=True)


def test_unusable_pairs_are_skipped_with_their_reason(make, tmp_path):
    long = "word " * 50
    records = [pair("p", "same", "same "), pair(long, "a", "b"), pair("p", "a", long), pair("p", "", "b"), pair("p", "a", "b")]
    report = make(records, kind="preferences", max_length=40)
    path = tmp_path / "in.jsonl"
    assert {reason: skip["first"] for reason, skip in report["skipped"].items()} == {
        "identical chosen and rejected": f"{path}:1",
        "prompt longer than max_length = 40": f"{path}:2",
        "pair longer than max_length = 40": f"{path}:3",
        "empty answer": f"{path}:4",
    }
    assert report["documents"] == 2
    assert make(records, kind="preferences", out="all")["documents"] == 6


def test_a_source_without_a_usable_record_is_an_error(make, tmp_path):
    with pytest.raises(ValueError, match=r"in\.jsonl: none of its 2 records can be used; the last: .*:2: no assistant"):
        make([chat("a"), chat("b")], kind="conversations")
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out*")) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "chat"}, "kind = 'chat': must be one of text, conversations, preferences"),
        ({"split": "page"}, "split = 'page'"),
        ({"kind": "conversations", "split": "line"}, "no effect on conversations"),
        ({"kind": "conversations", "text_field": "body"}, "no effect on conversations"),
        ({"kind": "preferences", "max_length": 1}, "at least 2"),
        ({"heldout": -0.1}, "heldout = -0.1"),
        ({"heldout": 1.5}, "heldout = 1.5"),
        ({"heldout": float("nan")}, "heldout = nan"),
    ],
)
def test_wrong_settings_are_named(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make("x", **settings)


def numbered(count):
    return "\n\n".join(f"document number {i}" for i in range(count))


def texts(folder, tokenizer):
    dataset = TokenDataset.open(folder)
    return {tokenizer.decode(dataset.tokens(i).tolist()) for i in range(len(dataset))}


@pytest.mark.parametrize("heldout", [0.1, 20])
def test_the_held_out_part_depends_on_content_and_seed_only(make, tmp_path, tokenizer, heldout):
    report = make(numbered(200), heldout=heldout)
    main, aside = (texts(tmp_path / name, tokenizer) for name in ("out", "out-heldout"))
    assert main | aside == {f"document number {i}" for i in range(200)}
    assert not main & aside
    assert report["heldout_documents"] == len(aside)
    assert len(aside) == 20 if heldout == 20 else 5 < len(aside) < 40
    make("\n\n".join(reversed(numbered(200).split("\n\n"))), out="again", heldout=heldout)
    assert texts(tmp_path / "again-heldout", tokenizer) == aside
    make(numbered(200), out="seeded", heldout=heldout, seed=1)
    assert texts(tmp_path / "seeded-heldout", tokenizer) != aside


def test_equal_documents_and_prompts_are_held_out_together(make, tmp_path, tokenizer):
    make(numbered(50) + "\n\n" + numbered(50), heldout=0.3)
    assert not texts(tmp_path / "out", tokenizer) & texts(tmp_path / "out-heldout", tokenizer)
    pairs = [pair(f"p{i % 10}", f"good {i}", f"bad {i}") for i in range(40)]
    make(pairs, kind="preferences", out="pairs", heldout=10)
    datasets = [TokenDataset.open(tmp_path / name) for name in ("pairs", "pairs-heldout")]
    prompts = [{tuple(d.tokens(i)[: d.prompt_lengths[i]].tolist()) for i in range(len(d))} for d in datasets]
    assert not prompts[0] & prompts[1]
    # Ten pairs, and the other pairs with the tenth's prompt.
    assert [len(dataset) // 2 for dataset in datasets] == [28, 12]


def test_holding_out_everything_or_nothing_is_an_error(make, tmp_path):
    with pytest.raises(ValueError, match=r"heldout = 5 leaves no document for .*out: change it"):
        make(numbered(5), heldout=5)
    with pytest.raises(ValueError, match=r"heldout = 1e-09 leaves no document for .*out-heldout"):
        make(numbered(5), heldout=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_a_dataset_of_equal_inputs_is_kept_and_any_other_refused(make, tmp_path, tokenizer, capsys):
    first = make(numbered(9), heldout=2)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*/*")}
    assert make(numbered(9), name="moved.txt", heldout=2) == first
    assert "already prepared from the same inputs" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*/*")} == written
    for change in ({"heldout": 3}, {"heldout": 2, "seed": 1}, {"heldout": 2, "split": "line"}):
        with pytest.raises(ValueError, match=r"prepared from other inputs or settings, or by another version.*: .*overwrite"):
            make(numbered(9), **change)
    with pytest.raises(ValueError, match="prepared from other inputs"):
        make(numbered(10), heldout=2)
    make(numbered(10), heldout=2, overwrite=True)
    assert len(texts(tmp_path / "out", tokenizer) | texts(tmp_path / "out-heldout", tokenizer)) == 10
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(ValueError, match="out-heldout: held out by an earlier preparation"):
        make(numbered(10), overwrite=True)


def test_a_damaged_dataset_is_named_and_replaced_when_asked(make, tmp_path):
    make(numbered(9))
    (tmp_path / "out" / "lengths.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds a damaged dataset \(.*lengths\.bin"):
        make(numbered(9))
    make(numbered(9), overwrite=True)
    TokenDataset.open(tmp_path / "out").verify()


def test_a_folder_that_is_not_a_dataset_is_never_replaced(make, tmp_path):
    (tmp_path / "out").mkdir()
    make("fine", out="out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="mine: exists and is no prepared dataset"):
        make("x", out="mine", overwrite=True)
    with pytest.raises(NotADirectoryError, match=r"in\.txt/out: cannot be written: Not a directory"):
        make("x", out="in.txt/out")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_errors_leave_no_files_and_stale_parts_are_cleared(make, tmp_path):
    with pytest.raises(ValueError, match=r"in\.jsonl:2: broken JSON"):
        make('{"text": "a"}\n{"text": ', name="in.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "tokens-00000.bin").write_bytes(b"half a shard")
    make("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "in.txt", "out"]


def test_two_processes_do_not_write_the_same_dataset(make, tmp_path):
    hidden = tmp_path / ".out.partial"
    hidden.mkdir()
    lock = os.open(hidden, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another process is writing it now"):
            make("x")
    finally:
        os.close(lock)
    make("x")


@pytest.mark.parametrize("moment", ["DatasetWriter.finish", "Path.rename"])
def test_a_killed_run_leaves_no_dataset_and_the_next_completes(make, tmp_path, moment):
    (tmp_path / "in.txt").write_text(numbered(20))
    script = textwrap.dedent("""
        import os, signal, sys
        from engine.data import prepare
        from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
        name, method = sys.argv[3].split(".")
        setattr(getattr(prepare, name), method, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        prepare.prepare([sys.argv[1]], sys.argv[2], tokenizer=Tokenizer.load(mistral_tokenizer_path()), kind="text")
    """)
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "in.txt"), str(tmp_path / "out"), moment],
        cwd=ROOT,
        check=False,
        capture_output=True,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "tokens-00000.bin").is_file()
    assert make(numbered(20))["documents"] == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out"]


def test_small_shards_and_batches_give_the_same_documents(make, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("engine.data.prepare.BATCH_RECORDS", 3)
    make(numbered(50), shard_tokens=40)
    dataset = TokenDataset.open(tmp_path / "out")
    assert len(dataset.report["shards"]) > 5
    assert [tokenizer.decode(dataset.tokens(i).tolist()) for i in range(50)] == numbered(50).split("\n\n")


@pytest.mark.slow
def test_real_files_of_every_kind_are_prepared(shared_data, tmp_path, tokenizer):
    text = prepare([str(shared_data / "text/heldout/ja_pydocs.txt.gz")], tmp_path / "text", tokenizer=tokenizer, kind="text")
    assert (text["documents"], text["skipped"]) == (23, {})
    pairs = prepare(
        [str(shared_data / "pref/ja_pairs.jsonl.gz")],
        tmp_path / "pairs",
        tokenizer=tokenizer,
        kind="preferences",
        max_length=512,
    )
    assert pairs["documents"] // 2 + sum(skip["count"] for skip in pairs["skipped"].values()) == 1254
    path = shared_data / "sft/en_t0_prompt_completion.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        empty = [not json.loads(line)["completion"].strip() for line in file]
    chats = prepare([str(path)], tmp_path / "chats", tokenizer=tokenizer, kind="conversations")
    assert chats["skipped"]["empty answer"]["count"] == sum(empty) > 0
    assert chats["skipped"]["empty answer"]["first"] == f"{path}:{empty.index(True) + 1}"
    dataset = TokenDataset.open(tmp_path / "chats")
    assert len(dataset) == len(empty) - sum(empty)
    # Every conversation ends with </s>, which is trained on.
    last = np.array([[dataset.tokens(i)[-1], dataset.trained(i)[-1]] for i in range(0, len(dataset), 50)])
    assert (last == [tokenizer.eos_id, 1]).all()
