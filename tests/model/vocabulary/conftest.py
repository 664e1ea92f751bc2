"""Tokenizers that the tests of the vocabulary share: Mistral's own, and merges of it from written and from real text."""

import gzip
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece

from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.merge import Merged, extend
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path

SUBJECTS = ["私", "彼女", "東京の先生", "となりの猫", "日本の学生", "コンピューター", "サーバー", "母", "図書館の本", "猿"]
OBJECTS = ["りんご", "一九八〇年の記録", "「雨月物語」", "ｶﾒﾗ"]
VERBS = ["食べました。", "読んでいます。", "作ることができます！", "忘れてしまった……", "見つけたのですか？"]


@dataclass(frozen=True)
class Extended:
    """A merged tokenizer: its parts, and the folder written from it."""

    merged: Merged
    tokenizer: Tokenizer
    folder: Path
    texts: list[str]


@pytest.fixture(scope="session")
def mistral() -> Tokenizer:
    return Tokenizer.load(mistral_tokenizer_path())


@pytest.fixture(scope="session")
def written_texts() -> list[str]:
    """600 sentences; English, digits and spaces among them, as in real text."""
    frames = ("{}は{}を{}", "  {} は、{}を{}", "2023年に{}がPythonで{}を{}")
    return [frame.format(*words) for frame in frames for words in itertools.product(SUBJECTS, OBJECTS, VERBS)]


@pytest.fixture(scope="session", params=["written", "real"])
def extended(request, mistral, written_texts, tmp_path_factory) -> Extended:
    """Mistral's tokenizer with 300 pieces from the text above, and with 2,000 from 400 kB of real text."""
    if request.param == "written":
        texts, new_pieces = written_texts, 300
    else:
        path = request.getfixturevalue("shared_data") / "text" / "heldout" / "ja_webdocs.txt.gz"
        texts, new_pieces = gzip.decompress(path.read_bytes()).decode().split("\n\n"), 2000
    merged, _ = extend(mistral.model_bytes, texts, new_pieces)
    folder = tmp_path_factory.mktemp(request.param)
    write_tokenizer_folder(folder, merged.model_bytes)
    return Extended(merged, Tokenizer(merged.model_bytes), folder, texts)


@pytest.fixture(scope="session")
def train_model():
    """Trains a small SentencePiece model of any kind on this project's own English."""
    lines = [line for path in sorted(Path(__file__).parents[3].glob("model/*.py")) for line in path.read_text().split("\n")]

    def train(**options) -> bytes:
        model = io.BytesIO()
        given = {
            "model_type": "bpe",
            "vocab_size": 700,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "hard_vocab_limit": False,
            "minloglevel": 2,
        } | options
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **given)
        return model.getvalue()

    return train
