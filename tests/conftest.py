"""Fixtures shared by all tests: real data, and a bilingual tokenizer, model and datasets small enough to train in a second."""

import io
import random
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sentencepiece
import torch

from engine.data.dataset import DatasetWriter
from engine.settings.toml import from_table
from kernels.launch import INTERPRETED
from model.config import MistralConfig
from model.mistral import Mistral, initialize
from model.vocabulary.chat import encode_chat, encode_prompt
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.tokenizer import Tokenizer
from model.weights import save_model
from recipes.dpo import DpoSettings
from recipes.pretrain import PretrainSettings
from recipes.sft import SftSettings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tests compute on one thread: a second one gains nothing on small arrays, and waiting for it is slow on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text beside a developer's checkout. Without it, the tests that need it are skipped."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that operators run on.

    The CPU runs the eager references (with TRITON_INTERPRET=1, the kernels in Triton's interpreter), CUDA the Triton kernels.
    """
    return torch.device(request.param)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def reference_device(request):
    """As `device`, for tests that run the eager references on every device, as in float64."""
    return torch.device(request.param)


@pytest.fixture(params=[*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request):
    """Each device that Triton kernels run on: the CPU only with TRITON_INTERPRET=1."""
    return torch.device(request.param)


def pytest_configure() -> None:
    """A shell starts a command with & so that it ignores Ctrl-C; tests and their processes need it as a user's have it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests that run Triton kernels, and without a GPU skip the tests that need it."""
    for item in items:
        if {"device", "triton_device"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.kernels)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _few_empty_programs(request, monkeypatch):
    """Pad attention's work lists to 2 tiles, not 64, in the interpreter: an empty program costs it as much as any other."""
    if INTERPRETED and request.node.get_closest_marker("kernels"):
        monkeypatch.setattr("kernels.attention.work._PADDING", 2)


@pytest.fixture(autouse=True)
def _free_device_memory(request):
    """Give the memory that a GPU test left in torch's cache back to the GPU: other processes may need it."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        torch.cuda.empty_cache()


# Initialised widely, so that attention is far from uniform and the most likely token from a tie.
SMALL = MistralConfig(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=5,
    max_position_embeddings=128,
    initializer_range=0.3,
)


@pytest.fixture(scope="session")
def small_model():
    """small_model(seed=0, **changes of the configuration) -> Mistral in float32."""

    def build(seed: int = 0, **changes) -> Mistral:
        model = Mistral(replace(SMALL, **{"unpadded_vocab_size": 0, **changes}))
        initialize(model, seed)
        return model.requires_grad_(False)

    return build


WORDS = ("the", "cat", "sees", "a", "red", "dog", "and", "it", "runs", "ねこ", "は", "赤い", "いぬ", "を", "見る", "です")


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> Path:
    """A tokenizer folder of 340 pieces: the pieces of a few English and Japanese words, and every byte."""
    rng = random.Random(0)
    lines = [sentence(rng, 8) for _ in range(100)] + ["[INST] say [/INST] it"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer_folder(folder, model.getvalue())
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer, tmp_path_factory) -> Path:
    """A Hugging Face folder: a model of two layers, width 32 and window 16, and its tokenizer of 340 pieces."""
    # As in Shisa 7B, there are more rows than pieces.
    config = MistralConfig(
        vocab_size=384,
        unpadded_vocab_size=340,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    model = Mistral(config)
    initialize(model, 1)
    folder = tmp_path_factory.mktemp("model")
    save_model(model, folder)
    write_tokenizer_folder(folder, (tiny_tokenizer / "tokenizer.model").read_bytes())
    return folder


@dataclass(frozen=True)
class TinyData:
    """Prepared datasets of each kind. Some texts are longer than a context of 32 tokens; every pair fits 64 tokens."""

    text: Path
    text_heldout: Path
    conversations: Path
    conversations_heldout: Path
    preferences: Path
    preferences_heldout: Path


@pytest.fixture(scope="session")
def tiny_data(tiny_tokenizer, tmp_path_factory) -> TinyData:
    tokenizer = Tokenizer.load(tiny_tokenizer)
    root = tmp_path_factory.mktemp("data")
    rng = random.Random(1)

    def write(name: str, kind: str, documents: list) -> Path:
        folder = root / name
        folder.mkdir()
        with DatasetWriter(
            folder, kind, vocab_size=tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint
        ) as writer:
            for document in documents:
                writer.add(*document)
            writer.finish()
        return folder

    def text():
        return ([tokenizer.bos_id, *tokenizer.encode(sentence(rng, rng.randint(2, 45))), tokenizer.eos_id],)

    def conversation(turns: int):
        messages = []
        for _ in range(turns):
            messages.append({"role": "user", "content": sentence(rng, rng.randint(1, 4))})
            messages.append({"role": "assistant", "content": sentence(rng, rng.randint(1, 6))})
        chat = encode_chat(tokenizer, messages)
        return chat.ids, chat.trained

    def pair() -> list:
        question = {"role": "user", "content": sentence(rng, rng.randint(1, 4))}
        prompt = len(encode_prompt(tokenizer, [question]))
        sides = []
        for start in ("it runs", "ねこ は"):
            answer = {"role": "assistant", "content": f"{start} {sentence(rng, rng.randint(1, 8))}"}
            chat = encode_chat(tokenizer, [question, answer])
            sides.append((chat.ids, chat.trained, prompt))
        return sides

    def pairs(count: int) -> list:
        return [side for _ in range(count) for side in pair()]

    return TinyData(
        text=write("text", "text", [text() for _ in range(80)]),
        text_heldout=write("text-heldout", "text", [text() for _ in range(8)]),
        conversations=write("conversations", "conversations", [conversation(rng.randint(1, 2)) for _ in range(60)]),
        conversations_heldout=write("conversations-heldout", "conversations", [conversation(1) for _ in range(8)]),
        preferences=write("preferences", "preferences", pairs(32)),
        preferences_heldout=write("preferences-heldout", "preferences", pairs(6)),
    )


@pytest.fixture(scope="session")
def tiny_settings(tiny_model, tiny_data):
    """tiny_settings(stage, out, **changes) -> settings of "pretrain", "sft" or "dpo".

    A run has six steps and held-out data, and logs every other step.
    """

    def make(stage: str, out: Path, **changes):
        settings_class, data, heldout, sizes = {
            "pretrain": (PretrainSettings, tiny_data.text, tiny_data.text_heldout, (32, 256)),
            "sft": (SftSettings, tiny_data.conversations, tiny_data.conversations_heldout, (64, 256)),
            "dpo": (DpoSettings, tiny_data.preferences, tiny_data.preferences_heldout, (64, 4)),
        }[stage]
        table = {
            "model": str(tiny_model),
            "out": str(out),
            "sources": [{"path": str(data)}],
            "heldout": [str(heldout)],
            "context_length": sizes[0],
            "step_size": sizes[1],
            "pack_tokens": 128,
            "steps": 6,
            "device": "cpu",
            "schedule": {"peak": 3e-3, "warmup_steps": 2},
            "log": {"every": 2},
        }
        changed = {key: value for key, value in (table | changes).items() if value is not None}
        return from_table(settings_class, changed)

    return make
