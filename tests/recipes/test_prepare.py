import json

import numpy as np
import pytest

from engine.data.dataset import TokenDataset
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from recipes import prepare


@pytest.fixture
def conversations(tmp_path):
    path = tmp_path / "chats.jsonl"
    records = [
        {"conversations": [{"from": "human", "value": f"質問 {i}"}, {"from": "gpt", "value": "答え。" * (i + 1)}]}
        for i in range(9)
    ]
    path.write_text("\n".join(map(json.dumps, [*records, {"conversations": []}])), encoding="utf-8")
    return path


def test_the_command_prints_a_summary_and_a_preview(conversations, tmp_path, capsys):
    out = tmp_path / "out"
    prepare.main(["--kind", "conversations", "--paths", str(conversations), "--out", str(out), "--preview", "2"])
    printed = capsys.readouterr().out
    report = json.loads((out / "dataset.json").read_text())
    assert f"{report['documents']} conversations, {report['tokens']} tokens" in printed
    assert "messages: 9 user, 9 assistant" in printed
    assert f"skipped 1: no assistant turn; first at {conversations}:10" in printed
    lengths = np.fromfile(out / "lengths.bin", dtype="<u4")
    assert f"50 % {np.percentile(lengths, 50, method='nearest')}" in printed
    # Two documents, each one untrained and one trained run, the trained one ending with </s>.
    lines = printed.split("--- ")[1:]
    assert len(lines) == 2
    for i, line in enumerate(lines):
        runs = line.splitlines()[1:]
        assert [run[0] for run in runs] == ["-", " ", "+", " "]
        assert runs[0] == f"- {f'[INST] 質問 {i} [/INST]'!r}"
        assert runs[1].startswith("  1:<s> ")
        assert "答え。" * (i + 1) in runs[2]
        assert runs[3].endswith(" 2:</s>")


def test_show_marks_the_trained_text(conversations, tmp_path, capsys):
    arguments = ["--kind", "conversations", "--paths", str(conversations), "--out", str(tmp_path / "out"), "--show", "2"]
    prepare.main(arguments)
    plain = capsys.readouterr().out
    assert "<s> [INST] 質問 1 [/INST]⟦ 答え。答え。 </s>⟧" in plain
    tokenizer = Tokenizer.load(mistral_tokenizer_path())
    lines = list(prepare.shown(TokenDataset.open(tmp_path / "out"), tokenizer, 1, ("\x1b[32m", "\x1b[0m")))
    assert lines[1] == "<s> [INST] 質問 0 [/INST]\x1b[32m 答え。 </s>\x1b[0m"


def test_lengths_are_drawn_beside_the_dataset(conversations, tmp_path):
    prepare.main(["--kind", "conversations", "--paths", str(conversations), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    # The drawing is no part of the dataset: it opens and verifies as before.
    TokenDataset.open(tmp_path / "out").verify()


def test_preview_of_pairs_shows_both_sides(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "yes", "rejected": "no"}))
    prepare.main(["--kind", "preferences", "--paths", str(path), "--out", str(tmp_path / "out"), "--preview", "5"])
    printed = capsys.readouterr().out
    assert "--- 0 (chosen): " in printed
    assert "--- 0 (rejected): " in printed
    assert "+ 'no '" in printed


def test_prepare_reads_a_configuration_file(conversations, tmp_path, capsys):
    config = tmp_path / "prepare.toml"
    config.write_text(
        f'kind = "conversations"\npaths = ["{conversations}"]\nout = "{tmp_path / "a"}"\nheldout = 3\n'
        f'tokenizer = "{mistral_tokenizer_path()}"\n'
    )
    prepare.main([str(config), "--out", str(tmp_path / "b")])
    assert "3 conversations held out" in capsys.readouterr().out
    assert (tmp_path / "b-heldout" / "dataset.json").is_file()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "conversations", "--strict"], r"chats\.jsonl:10: no assistant turn"),
        (["--kind", "text"], r"chats\.jsonl: none of its 10 records can be used; the last: .*:10: missing field"),
        (["--kind", "conversations", "--tokenizer", "nowhere"], "no tokenizer at nowhere"),
    ],
)
def test_errors_end_with_one_line(conversations, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message) as ended:
        prepare.main([*options, "--paths", str(conversations), "--out", str(tmp_path / "out")])
    assert "\n" not in str(ended.value)


def test_a_negative_preview_is_refused():
    with pytest.raises(ValueError, match="preview = -1: must be at least 0"):
        prepare.PrepareSettings(kind="text", paths=("x",), out="y", preview=-1)


def test_run_returns_the_report(conversations, tmp_path):
    settings = prepare.PrepareSettings(kind="conversations", paths=(str(conversations),), out=str(tmp_path / "out"))
    report = prepare.run(settings)
    assert report["documents"] == 9
    assert report["tokenizer"]["fingerprint"] == Tokenizer.load(mistral_tokenizer_path()).fingerprint
