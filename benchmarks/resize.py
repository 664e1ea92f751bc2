"""What new rows are worth: a small Mistral trained on the base vocabulary, resized by each method, and trained on.

    python -m benchmarks.resize --folder runs/resize --out FILE

Bits per character of held-out Japanese right after resizing, and after further steps on text that the base has not seen, beside
the base that is trained on with its own vocabulary for at least as many operations. Each is the work of the recipes: prepare,
the vocabulary's merge and resize, pretrain. What was made lies in `folder`: a run that was stopped goes on where it was, and
`stages` ends one earlier.
"""

import gzip
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from benchmarks import measure
from benchmarks.command import benchmark
from engine.checkpoint.state import newest_checkpoint
from engine.data.dataset import TokenDataset
from engine.data.prepare import prepare
from engine.estimate.flops import training_flops
from engine.settings.sections import LogSettings, ScheduleSettings, Source
from engine.settings.toml import to_table
from kernels.attention.work import attended_pairs
from model.config import MistralConfig
from model.folder import complete_folder, write_file
from model.mistral import Mistral, initialize
from model.vocabulary.distill import Distillation
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.merge import extend, split_pieces
from model.vocabulary.resize import Method, resize_model
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from model.weights import save_model
from recipes import pretrain
from recipes.pretrain import PretrainSettings

BASE = "base vocabulary"
LANGUAGES = ("ja", "en")
# The base is of English with some Japanese, what follows the other way round.
SHARES = {"base": {"ja": 0.5, "en": 0.5}, "more": {"ja": 0.9, "en": 0.1}}


@dataclass(frozen=True, kw_only=True)
class ResizeBenchSettings:
    """The model, how long it is trained, and how."""

    folder: str
    """Existing or new folder for all that is made: texts, data, models, runs."""
    methods: tuple[Method, ...] = get_args(Method)
    """How new rows begin; each is resized and trained on."""
    stages: Literal["base", "all"] = "all"
    """base: no more than train the base."""
    new_pieces: int = 8000
    width: int = 64
    layers: int = 4
    context_length: int = 256
    step_size: int = 1024
    """Tokens of a step."""
    base_steps: int = 300
    more_steps: int = 80
    """Steps after resizing."""
    distilled_tokens: int = 20_000
    """Tokens that distilled rows learn from before."""
    evaluate_every: int = 20
    """Steps after resizing between evaluations."""
    base_rate: float = 3e-3
    """Learning rate of the base at its peak."""
    more_rate: float = 1e-3
    """Learning rate after resizing, constant."""
    vocabulary_characters: int = 4_000_000
    """Japanese text to learn the pieces from."""
    heldout_characters: int = 20_000
    """Of each language, parts of as many documents as that takes."""
    data: str = ""
    """Folder of {ja,en}_{train,heldout}.txt.gz; default: shared/data/text beside the checkout."""
    threads: int = 1
    seed: int = 0
    out: str = ""
    """Result file; default: print only."""

    def __post_init__(self) -> None:
        for name in ("new_pieces", "layers", "base_steps", "more_steps", "distilled_tokens", "evaluate_every", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.width < 32 or self.width % 32:
            raise ValueError(f"width = {self.width}: must be a multiple of 32, a head's")

    @property
    def config(self) -> MistralConfig:
        return MistralConfig(
            hidden_size=self.width, intermediate_size=-(-self.width * 11 // 128) * 32, num_hidden_layers=self.layers,
            num_attention_heads=self.width // 32, num_key_value_heads=1, head_dim=32, sliding_window=self.context_length,
            max_position_embeddings=self.context_length,
        )  # fmt: skip


def run(settings: ResizeBenchSettings, command: str = "benchmarks.resize") -> dict[str, Any]:
    """Train, resize, train on; the result, which is also written after each method where `out` is given."""
    torch.set_num_threads(settings.threads)
    bench = Bench(settings)
    rows: list[dict[str, Any]] = []
    base = bench.trained_base()
    if settings.stages == "all":
        for name in (BASE, *settings.methods):
            rows += bench.rows(name, base)
            print(measure.table(rows, tuple(rows[0])), flush=True)
            if settings.out:
                measure.write_result(settings.out, bench.result(command, rows, complete=False))
    result = bench.result(command, rows)
    if settings.out and rows:
        measure.write_result(settings.out, result)
    return result


class Bench:
    """What is made for the measurement, each part once."""

    def __init__(self, settings: ResizeBenchSettings) -> None:
        self.settings = settings
        self.folder = Path(settings.folder)
        self.base = Tokenizer.load(mistral_tokenizer_path())

    def result(self, command: str, rows: list[dict[str, Any]], *, complete: bool = True) -> dict[str, Any]:
        return measure.result("resize", command, torch.device("cpu"), to_table(self.settings), rows, complete=complete)

    def trained_base(self) -> Path:
        """The base model's folder."""
        fresh = self.folder / "fresh"
        if not fresh.is_dir():
            with complete_folder(fresh) as partial:
                model = Mistral(self.settings.config)
                initialize(model, self.settings.seed)
                save_model(model, partial)
                write_tokenizer_folder(partial, self.base.model_bytes)
        settings = self._pretrain("base", fresh, self.base, steps=self.settings.base_steps, every=0)
        return self._trained(settings)

    def rows(self, name: str, base: Path) -> Iterator[dict[str, Any]]:
        """The evaluations of one way to go on from the base."""
        steps, every = self.settings.more_steps, self.settings.evaluate_every
        tokenizer, start = self.merged, base
        if name == BASE:
            tokenizer = self.base
            # As many operations between evaluations as the larger head takes, or a little more.
            ratio = self._place_flops(self.merged) / self._place_flops(self.base)
            steps, every = math.ceil(steps * ratio), math.ceil(every * ratio)
        else:
            start = self.resized(name, base)
        settings = self._pretrain(name, start, tokenizer, steps, every)
        self._trained(settings)
        place, evaluations = self._place_flops(tokenizer) / 1e12, 0
        tokens, spent = 0, self._distilled_tflop() if name == "distilled" else 0.0
        for line in (Path(settings.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            tokens += values.get("tokens", 0)
            if "eval/ja_heldout/loss" not in values:
                continue
            done = min(self.settings.more_steps, evaluations * self.settings.evaluate_every)
            evaluations += 1
            yield {
                "after": f"{done} steps" if done else "resizing", "method": name, "steps": values["step"], "tokens": tokens,
                "tflop": spent + tokens * place,
                **{f"bits_per_character_{language}": self._bits(language, tokenizer, values) for language in LANGUAGES},
            }  # fmt: skip

    def resized(self, method: str, base: Path) -> Path:
        """The folder of the base resized by a method."""
        folder = self.folder / f"resized-{method}"
        if not folder.is_dir():
            learnt: dict[str, Any] = {}
            if method == "distilled":
                chosen = self.settings
                learnt["texts"] = self._documents("ja_train")[1::2]
                learnt["distillation"] = Distillation(
                    tokens=chosen.distilled_tokens, context_length=chosen.context_length, step_tokens=chosen.step_size
                )
            with complete_folder(folder) as partial:
                resize_model(base, partial, self.base, self.merged, method=method, seed=self.settings.seed, **learnt)  # type: ignore[arg-type]
        return folder

    def _distilled_tflop(self) -> float:
        """Operations of distillation: a training step, and the base's forward pass through the blocks over all its tokens."""
        ids: list[int] = []
        for text in self._documents("ja_train")[1::2]:
            if len(ids) < self.settings.distilled_tokens:
                ids += self.merged.encode(text)
        ids = ids[: self.settings.distilled_tokens]
        base_tokens = sum(self._spelled[id] for id in ids)
        return (len(ids) * self._place_flops(self.merged) + base_tokens * self._place_flops(self.base, head=False) / 3) / 1e12

    @cached_property
    def _spelled(self) -> list[int]:
        """How many base tokens each piece stands for."""
        return [1] * self.base.vocab_size + [len(ids) for ids in split_pieces(self.base, self.merged)]

    @cached_property
    def merged(self) -> Tokenizer:
        """The merged tokenizer."""
        folder = self.folder / "tokenizer"
        if not folder.is_dir():
            texts = _part(self._documents("ja_train"), self.settings.vocabulary_characters, self.settings.seed)
            merged, _ = extend(self.base.model_bytes, texts, self.settings.new_pieces)
            with complete_folder(folder) as partial:
                write_tokenizer_folder(partial, merged.model_bytes)
        return Tokenizer.load(folder)

    def _pretrain(self, name: str, model: Path, tokenizer: Tokenizer, steps: int, every: int) -> PretrainSettings:
        chosen, stage = self.settings, "base" if name == "base" else "more"
        if stage == "base":
            warmup = min(20, steps // 10)
            schedule = ScheduleSettings(kind="cosine", peak=chosen.base_rate, warmup_steps=warmup, final_share=0.1)
        else:
            schedule = ScheduleSettings(kind="constant", peak=chosen.more_rate, warmup_steps=min(5, steps // 10))
        return PretrainSettings(
            model=str(model), out=str(self.folder / f"run-{name.replace(' ', '-')}"),
            sources=tuple(
                Source(str(self._prepared(f"{language}_{stage}", tokenizer)), share=share)
                for language, share in SHARES[stage].items()
            ),
            heldout=tuple(str(self._prepared(f"{language}_heldout", tokenizer)) for language in LANGUAGES),
            context_length=chosen.context_length, step_size=chosen.step_size,
            pack_tokens=chosen.step_size + chosen.context_length, steps=steps,
            evaluate_every=every, checkpoint_every=100, keep_checkpoints=1, device="cpu", seed=chosen.seed, schedule=schedule,
            log=LogSettings(every=25, tensorboard=False),
        )  # fmt: skip

    def _trained(self, settings: PretrainSettings) -> Path:
        """The folder of the last checkpoint of a run, trained where it is not there yet."""
        last = newest_checkpoint(settings.out)
        if last is None or last.name != f"step-{settings.steps:08d}":
            last = pretrain.run(settings)
        assert last is not None
        return last

    def _prepared(self, name: str, tokenizer: Tokenizer) -> Path:
        """The dataset of a text, in a tokenizer's ids."""
        folder = self.folder / f"data-{tokenizer.vocab_size}" / name
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            prepare([str(self._text(name))], folder, tokenizer=tokenizer, kind="text")
        return folder

    def _text(self, name: str) -> Path:
        """A text file: parts of documents. What the base sees and what is trained on later have no document in common."""
        path = self.folder / f"{name}.txt"
        if not path.is_file():
            language, stage = name.split("_")
            source = self._documents(f"{language}_{'heldout' if stage == 'heldout' else 'train'}")
            texts = {
                "heldout": lambda: _part(source, self.settings.heldout_characters, self.settings.seed, longest=400),
                "base": lambda: source[0::2],
                "more": lambda: source[1::2],
            }[stage]()
            write_file(path, "\n\n".join(texts) + "\n")
        return path

    def _documents(self, name: str) -> list[str]:
        folder = Path(self.settings.data) if self.settings.data else measure.ROOT.parent / "shared" / "data" / "text"
        path = folder / f"{name}.txt.gz"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such text; name the folder of {{ja,en}}_{{train,heldout}}.txt.gz as data")
        return [text for text in gzip.decompress(path.read_bytes()).decode().split("\n\n") if text.strip()]

    def _place_flops(self, tokenizer: Tokenizer, *, head: bool = True) -> float:
        """Operations of training on a place of a whole context."""
        config, length = self.settings.config, self.settings.context_length
        sized = replace(config, vocab_size=tokenizer.vocab_size, unpadded_vocab_size=tokenizer.vocab_size)
        return training_flops(sized, tokens=length, rows=length * head, pairs=attended_pairs([length], length)) / length

    def _bits(self, language: str, tokenizer: Tokenizer, values: dict[str, float]) -> float:
        """Bits per character of a held-out text, from nats per predicted token: all but the first of each document."""
        dataset = TokenDataset.open(self._prepared(f"{language}_heldout", tokenizer))
        predicted = int((dataset.lengths - 1).sum())
        characters = sum(len(text.strip()) for text in self._text(f"{language}_heldout").read_text("utf-8").split("\n\n"))
        return values[f"eval/{language}_heldout/loss"] * predicted / characters / math.log(2)


def _part(documents: Sequence[str], characters: int, seed: int, longest: int = 10_000) -> list[str]:
    """The beginnings of randomly chosen documents, of `characters` in all."""
    texts, total = [], 0
    for text in random.Random(seed).sample(documents, len(documents)):
        if total >= characters:
            break
        texts.append(text[:longest])
        total += len(texts[-1])
    return texts


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(ResizeBenchSettings, run, argv, "resize")


if __name__ == "__main__":
    main()
