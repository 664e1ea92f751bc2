"""What data costs: tokenising, packing, loading, planning.

    python -m benchmarks.data
    python -m benchmarks.data --parts tokenise --text corpus/ --tokenizer runs/tokenizer --out results.json

Rows by "part":
    tokenise  preparing a dataset (reading, encoding, hashing, writing), and encoding alone beside the libraries themselves
    pack      utilisation (places / (packs * capacity)) of each step's packs for real distributions of lengths
    load      micro-batches from a prepared dataset, and the share of a step that is spent waiting for them
    plan      making the order of a whole run, in a process of its own for its memory
"""

import io
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import torch
from tokenizers import Tokenizer as RustTokenizer

from benchmarks import lengths as of_length
from benchmarks import measure
from benchmarks.command import benchmark
from engine.data.batch import Batch, Packing, Step, make_step
from engine.data.dataset import DatasetWriter, TokenDataset
from engine.data.plan import Plan
from engine.data.prepare import prepare
from engine.data.records import read_text
from engine.data.sources import TEXT_SUFFIXES, find_sources
from engine.data.stream import step_stream
from engine.environment import choose_device
from engine.settings.sections import Source
from engine.settings.toml import to_table
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path

Row = dict[str, Any]
KINDS = ("text", "conversations", "preferences")
# Documents that steps are filled from.
_DRAWN = 200_000
# Places that see each other, as in Mistral 7B.
_WINDOW = 4096


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What to measure."""

    parts: tuple[Literal["tokenise", "pack", "load", "plan"], ...] = ("tokenise", "pack", "load", "plan")
    """Which of the four."""
    text: tuple[str, ...] = ()
    """Files of text to tokenise; without files of any kind, synthetic ones of each are."""
    conversations: tuple[str, ...] = ()
    """Files of conversations to tokenise."""
    preferences: tuple[str, ...] = ()
    """Files of preference pairs to tokenise."""
    tokenizer: str = ""
    """Folder with tokenizer.model; default: Mistral 7B's own, or where it is not installed one trained on synthetic text."""
    documents: int = 2000
    """Synthetic documents (conversations, pairs) of each kind."""
    context_length: int = 4096
    """Places of the longest segment, and of a micro-batch (twice that for pairs)."""
    step_size: int = 131072
    """Places of a step."""
    steps: int = 8
    """Steps that are packed and loaded."""
    step_seconds: tuple[float, ...] = (0.1, 1.0)
    """Times of a step for which the share spent waiting is measured."""
    plan_documents: tuple[int, ...] = (10_000, 1_000_000, 16_000_000)
    """Documents of the plans that are made."""
    rounds: int = 5
    """Times that each thing is measured."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where micro-batches go; auto: CUDA if there is a GPU."""
    out: str = ""
    """File of the result; default: print only."""

    def __post_init__(self) -> None:
        for name in ("documents", "context_length", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.step_size < self.context_length:
            raise ValueError(f"step_size = {self.step_size}: must be at least context_length = {self.context_length}")
        if any(seconds < 0 for seconds in self.step_seconds):
            raise ValueError(f"step_seconds = {list(self.step_seconds)}: must be 0 or more each")
        if any(documents < 1 for documents in self.plan_documents):
            raise ValueError(f"plan_documents = {list(self.plan_documents)}: must be at least 1 each")


def run(settings: DataSettings, command: str = "benchmarks.data") -> dict[str, Any]:
    """Measure, print tables, write the result after each part; returns it."""
    device = choose_device(settings.device)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="komainu-") as name:
        measures: dict[str, Callable[[], Iterator[Row]]] = {
            "tokenise": lambda: tokenise(settings, Path(name)),
            "pack": lambda: pack(settings),
            "load": lambda: load(settings, Path(name), device),
            "plan": lambda: plan(settings),
        }
        for part in settings.parts:
            new = [{"part": part, **row} for row in measures[part]()]
            rows += new
            print(measure.table(new, list(dict.fromkeys(column for row in new for column in row))), flush=True)
            if settings.out:
                content = measure.result("data", command, device, to_table(settings), rows, complete=False)
                measure.write_result(settings.out, content)
    result = measure.result("data", command, device, to_table(settings), rows)
    if settings.out:
        measure.write_result(settings.out, result)
    return result


def rates(seconds: Sequence[float], **counts: int) -> Row:
    """Times, and counts a second of their median."""
    spread = measure.spread(seconds)
    return {"seconds": spread, **{f"{name}_per_second": count / spread["median"] for name, count in counts.items()}}


# Tokenising


def tokenise(settings: DataSettings, folder: Path) -> Iterator[Row]:
    """`prepare` of each kind, and encoding alone."""
    given = {kind: list(getattr(settings, kind)) for kind in KINDS if getattr(settings, kind)}
    files = given or {kind: [str(path)] for kind, path in write_synthetic(folder, settings.documents).items()}
    tokenizer, name = choose_tokenizer(settings, folder)
    for kind, paths in files.items():
        seconds = []
        for turn in range(settings.rounds):
            start = time.perf_counter()
            report = prepare(paths, folder / f"{kind}-{turn}", tokenizer=tokenizer, kind=kind)
            seconds.append(time.perf_counter() - start)
        yield {
            "what": f"prepare {kind}", "provider": "komainu", "tokenizer": name,
            "source": "given" if given else "synthetic", "records": report["records"],
            **rates(seconds, documents=report["documents"], tokens=report["tokens"], characters=report["characters"]),
        }  # fmt: skip
    if "text" in files:
        yield from encode(tokenizer, name, texts_of(files["text"]), settings.rounds, folder)


def encode(tokenizer: Tokenizer, name: str, texts: list[str], rounds: int, folder: Path) -> Iterator[Row]:
    """Encoding alone: ours, sentencepiece text by text on one core, and the Rust library `tokenizers` on all."""
    write_tokenizer_folder(folder / "tokenizer", tokenizer.model_bytes)
    rust = RustTokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))

    def encode_rust() -> list[list[int]]:
        return [encoded.ids for encoded in rust.encode_batch(texts, add_special_tokens=False)]

    providers: dict[str, Callable[[], list[list[int]]]] = {
        "komainu": lambda: tokenizer.encode_batch(texts),
        "sentencepiece, one core": lambda: [tokenizer.encode(text) for text in texts],
        "tokenizers": encode_rust,
    }
    expected = tokenizer.encode_batch(texts)

    def timed(work: Callable[[], list[list[int]]]) -> Callable[[], float]:
        return lambda: measure.seconds_of(work, torch.device("cpu"))

    samples = measure.alternate({provider: timed(work) for provider, work in providers.items()}, rounds)
    counts = {"documents": len(texts), "tokens": sum(map(len, expected)), "characters": sum(map(len, texts))}
    for provider, work in providers.items():
        row = {"what": "encode text", "provider": provider, "tokenizer": name, **rates(samples[provider], **counts)}
        different = sum(ours != theirs for ours, theirs in zip(expected, work(), strict=True))
        yield row | ({"wrong": f"{different} of {len(texts)} texts encoded differently"} if different else {})


def choose_tokenizer(settings: DataSettings, folder: Path) -> tuple[Tokenizer, str]:
    """(tokenizer, what it is)."""
    if settings.tokenizer:
        return Tokenizer.load(settings.tokenizer), "given"
    try:
        return Tokenizer.load(mistral_tokenizer_path()), "Mistral 7B"
    except ImportError:
        tokenizer = trained_tokenizer(synthetic_texts(200, 1))
        return tokenizer, f"synthetic, {tokenizer.vocab_size} pieces"


def trained_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A SentencePiece model of a few hundred pieces, for machines that have no other."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines()), model_writer=model, model_type="bpe",
        vocab_size=1000, hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(model.getvalue())


def texts_of(paths: Sequence[str]) -> list[str]:
    """The texts of files, documents as `prepare` finds them."""
    sources = find_sources(paths, TEXT_SUFFIXES)
    return [read_text(record.value, "text") for source in sources for record in source.records("blank")]


def write_synthetic(folder: Path, documents: int) -> dict[str, Path]:
    """A file of each kind."""
    rng = random.Random(0)
    texts = iter(synthetic_texts(6 * documents, 2))
    paths = {"text": folder / "text.txt", "conversations": folder / "chat.jsonl", "preferences": folder / "pairs.jsonl"}
    paths["text"].write_text("\n\n".join("\n".join(next(texts) for _ in range(2)) for _ in range(documents)), encoding="utf-8")

    def turns() -> list[dict[str, str]]:
        roles = ("user", "assistant") * rng.randint(1, 3)
        return [{"role": role, "content": random_text(rng, rng.randint(5, 120))} for role in roles]

    chats = [{"messages": turns()} for _ in range(documents)]
    pairs = [{"prompt": next(texts), "chosen": next(texts), "rejected": next(texts)} for _ in range(documents)]
    for kind, records in (("conversations", chats), ("preferences", pairs)):
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        paths[kind].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def synthetic_texts(count: int, seed: int) -> list[str]:
    """Texts of some ten to some hundred words, every other one in Japanese characters."""
    rng = random.Random(seed)
    return [random_text(rng, int(rng.lognormvariate(4.5, 0.8)) + 5) for _ in range(count)]


_SYLLABLES = tuple(a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "ing", "ion", "ly"))
_JAPANESE = (
    "".join(map(chr, range(0x3042, 0x3094))) + "日本人大学生会社国語時間今年東京都行来見食飲読書話聞新古高安小川山水火木金土"
)


def random_text(rng: random.Random, words: int) -> str:
    """Words of a random language in which some are frequent; or of Japanese characters."""
    japanese = rng.random() < 0.5

    def word() -> str:
        # The square of a uniform number: small ones are frequent.
        if japanese:
            return "".join(_JAPANESE[int(len(_JAPANESE) * rng.random() ** 2)] for _ in range(rng.randint(1, 4)))
        return "".join(_SYLLABLES[int(len(_SYLLABLES) * rng.random() ** 2)] for _ in range(rng.randint(1, 3)))

    return ("" if japanese else " ").join(word() for _ in range(words))


# Packing


def pack(settings: DataSettings) -> Iterator[Row]:
    """Each distribution with each packer, step by step, as training packs."""
    for distribution in of_length.DISTRIBUTIONS:
        # Both sides of a pair lie in one pack.
        capacity = settings.context_length * (2 if distribution == "preferences" else 1)
        steps = list(steps_of(distribution, settings))
        items, places = sum(map(len, steps)), sum(map(sum, steps))
        fixed = {"lengths": distribution, "capacity": capacity, "items": items, "steps": len(steps)}
        for name, packer in of_length.PACKERS.items():
            work = partial(_packs, packer, steps, capacity)
            seconds = [measure.seconds_of(work, torch.device("cpu")) for _ in range(settings.rounds)]
            utilisation = places / (work() * capacity)
            yield {**fixed, "packer": name, "utilisation": utilisation, **rates(seconds, items=items, places=places)}
        fewest = sum(-(-sum(step) // capacity) for step in steps)
        yield {**fixed, "packer": "as few packs as places need", "utilisation": places / (fewest * capacity)}
        padded = np.mean([of_length.padded_utilisation(step, 8) for step in steps])
        yield {**fixed, "packer": "none: rows of 8 padded to the longest", "utilisation": float(padded)}


def _packs(packer: Callable[[Sequence[int], int], list[list[int]]], steps: Sequence[Sequence[int]], capacity: int) -> int:
    return sum(len(packer(step, capacity)) for step in steps)


def steps_of(distribution: str, settings: DataSettings) -> Iterator[list[int]]:
    """Places of the items of each step, in random order."""
    places = of_length.sample(distribution, _DRAWN)
    if distribution == "preferences":
        # A pair is never cut: one that is too long is left out.
        drawn = places[places <= 2 * settings.context_length].tolist()
    else:
        drawn = of_length.segments(places, settings.context_length)
    step: list[int] = []
    room, left = settings.step_size, settings.steps
    for item in drawn:
        if item > room and left:
            yield step
            step, room, left = [], settings.step_size, left - 1
        step.append(item)
        room -= item


# Loading


def load(settings: DataSettings, folder: Path, device: torch.device) -> Iterator[Row]:
    """Micro-batches of synthetic datasets."""
    for kind in KINDS:
        made = synthetic_plan(settings, kind, folder)
        pack_tokens = settings.context_length * (2 if made.paired else 1)
        fixed = {"kind": kind, "steps": made.steps, "pack_tokens": pack_tokens}
        seconds, tokens = [], 0
        for step in range(made.steps):
            start = time.perf_counter()
            tokens += make_step(made, step, Packing(_WINDOW, pack_tokens)).tokens
            seconds.append(time.perf_counter() - start)
        yield {"what": "make_step", **fixed, **rates(seconds, tokens=tokens // made.steps)}
        for step_seconds in settings.step_seconds:
            yield {"what": "step_stream", **fixed, **waiting(made, pack_tokens, step_seconds, device)}


def synthetic_plan(settings: DataSettings, kind: str, folder: Path) -> Plan:
    """A plan of `steps` steps over a dataset of random ids with real lengths."""
    out = folder / f"synthetic-{kind}"
    out.mkdir()
    rng = np.random.default_rng(0)
    places = of_length.sample(kind, _DRAWN)
    places = places[: int(np.searchsorted(np.cumsum(places), settings.steps * settings.step_size)) + 1]
    with DatasetWriter(out, kind, vocab_size=32000, tokenizer_fingerprint="synthetic") as writer:
        for total in places.tolist():
            for size in (total // 2, total - total // 2) if kind == "preferences" else (total,):
                size = min(size, settings.context_length) if kind == "preferences" else size
                ids = rng.integers(3, 32000, max(2, size + 1))
                trained = None if kind == "text" else np.arange(len(ids)) >= len(ids) // 2
                writer.add(ids, trained, len(ids) // 2 if kind == "preferences" else 0)
        writer.finish()
    dataset = TokenDataset.open(out)
    step_size = settings.step_size
    if kind == "preferences":
        step_size = max(1, round(step_size / float(places.mean())))
    return Plan(
        [dataset], [Source(str(out))], seed=0, context_length=settings.context_length, step_size=step_size,
        steps=settings.steps, epochs=None,
    )  # fmt: skip


def _copy(step: Step, device: torch.device) -> list[Batch]:
    return [batch.to(device) for batch in step.batches]


def waiting(made: Plan, pack_tokens: int, step_seconds: float, device: torch.device) -> Row:
    """What the loop waits for its next step where a step takes `step_seconds` without the processor."""
    waits, copies = [], []
    stream = step_stream(made, 0, Packing(_WINDOW, pack_tokens))
    start = time.perf_counter()
    for step in stream:
        waits.append(time.perf_counter() - start)
        copies.append(measure.seconds_of(partial(_copy, step, device), device))
        time.sleep(step_seconds)
        start = time.perf_counter()
    # The first wait is for the first step to be made, once a run.
    steady = waits[1:] or waits
    share = sum(steady) / (sum(steady) + max(len(steady) * step_seconds, 1e-12))
    return {
        "step_seconds": step_seconds, "wait_seconds": measure.spread(steady), "first_wait_seconds": waits[0],
        "copy_seconds": measure.spread(copies), "waiting_share": share,
    }  # fmt: skip


# Planning


class UnwrittenDataset(TokenDataset):
    """The lengths of a text dataset that is nowhere: enough to plan with."""

    def __init__(self, places: np.ndarray, name: str) -> None:
        self.folder = Path(name)
        self.kind = "text"
        self.lengths = places + 1
        self.fingerprint = self.tokenizer_fingerprint = "unwritten"


def plan(settings: DataSettings) -> Iterator[Row]:
    """Plans of more and more documents, four sources each, in processes of their own."""
    for documents in settings.plan_documents:
        row = {"what": "plan", "documents": documents}
        try:
            arguments = {
                "documents": documents, "context_length": settings.context_length, "step_size": settings.step_size,
                "rounds": settings.rounds if documents <= 1_000_000 else 1,
            }  # fmt: skip
            yield row | measure.call_apart("benchmarks.data", "plan_row", arguments, limit=600)
        except measure.PartError as error:
            yield row | {"missing": str(error)}


def plan_row(documents: int, context_length: int, step_size: int, rounds: int) -> Row:
    """One epoch of `documents` texts from four sources."""
    quarters = np.array_split(of_length.sample("text", documents), min(4, documents))
    datasets: list[TokenDataset] = [UnwrittenDataset(places, f"source {i}") for i, places in enumerate(quarters)]
    del quarters
    before = measure.peak_memory(torch.device("cpu"))["resident_gib"]
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        made = Plan(
            datasets, [Source(str(dataset.folder)) for dataset in datasets], seed=0, context_length=context_length,
            step_size=step_size, steps=None, epochs=1,
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
    found = [measure.seconds_of(lambda: made.units(made.steps // 2), torch.device("cpu")) for _ in range(5)]
    return {
        "steps": made.steps, **rates(seconds, documents=documents), "units_seconds": measure.spread(found),
        "peak_gib": measure.peak_memory(torch.device("cpu"))["resident_gib"], "peak_before_gib": before,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(DataSettings, run, argv, "data")


if __name__ == "__main__":
    main()
