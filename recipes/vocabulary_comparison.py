"""What a vocabulary of each size gives and costs, beside other tokenizers: the table and the drawing of `--compare`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from engine.estimate.flops import training_flops
from kernels.attention.work import attended_pairs
from model.config import MISTRAL_7B, MistralConfig
from model.vocabulary.merge import Merged, candidates_for, merge, unreachable
from model.vocabulary.resize import padded_size
from model.vocabulary.scripts import Scripts
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from model.vocabulary.train import train

CONTEXT = 4096  # tokens of a sequence, for the work of attention
_CHARACTERS = 1_000_000  # of the text whose cost is counted
_OWN_SHARE = 0.2  # of a text's characters that are of the scripts; a text with fewer is one of other languages


@dataclass(frozen=True)
class Contender:
    """A tokenizer as the comparison sees it.

    merged: how it was merged, for those that were. selected: by use, not in the order of training.
    """

    name: str
    pieces: int
    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    merged: Merged | None = None
    selected: bool = False

    @classmethod
    def of(cls, name: str, tokenizer: Tokenizer, merged: Merged | None = None, selected: bool = False) -> Contender:
        return cls(name, tokenizer.vocab_size, tokenizer.encode_batch, tokenizer.decode, merged, selected)


def merged_contenders(
    base: Tokenizer, texts: Sequence[str], sizes: Sequence[int], scripts: Scripts, coverage: float
) -> Iterator[Contender]:
    """For each size the pieces that the texts use most widely, and as many in the order of training; trained once."""
    trained = train(texts, candidates_for(max(sizes)), scripts=scripts, coverage=coverage)
    characters = sum(len(piece) == 1 for piece in trained.pieces)
    for size in sizes:
        candidates = trained.pieces[: characters + candidates_for(size)]
        for name, chosen in (("by use", texts), ("first trained", None)):
            merged = merge(base.model_bytes, candidates, size, texts=chosen)
            yield Contender.of(f"{size:,} {name}", Tokenizer(merged.model_bytes), merged, chosen is not None)


def carried() -> list[Contender]:
    """The tokenizers that the mistral-common package carries, but for Mistral 7B v0.1's own."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    first = mistral_tokenizer_path()
    found = [Contender.of(path.name, Tokenizer.load(path)) for path in sorted(first.parent.glob("*.model.v*"))
             if path != first]  # fmt: skip
    for path in sorted(first.parent.glob("tekken_*.json")):
        tekken = Tekkenizer.from_file(path)

        def encode(texts: list[str], tekken: Any = tekken) -> list[list[int]]:
            return [tekken.encode(text, bos=False, eos=False) for text in texts]

        found.append(Contender(path.name, tekken.n_words, encode, tekken.decode))
    return found


def in_folder(folder: str) -> Contender:
    """The tokenizer of a folder: its tokenizer.model, or else its tokenizer.json.

    Raises:
        FileNotFoundError: it holds neither.
    """
    path = Path(folder)
    if (path / "tokenizer.model").is_file() or not (path / "tokenizer.json").is_file():
        return Contender.of(path.name, Tokenizer.load(path))
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return Contender(path.name, tokenizer.get_vocab_size(), encode, tokenizer.decode)


def compare(
    base: Tokenizer, contenders: Sequence[Contender], texts: Mapping[str, list[str]], scripts: Scripts
) -> dict[str, Any]:
    """Measure the base and the contenders on texts.

    Returns:
        "texts": characters and language of each; "tokenizers": one row for each tokenizer, the base first; all costs are of a
        Mistral 7B with that vocabulary, for a million characters of each language.
    """
    languages: dict[str, list[str]] = {}
    about: dict[str, dict[str, Any]] = {}
    for name, documents in texts.items():
        characters = sum(map(len, documents))
        own = sum(map(scripts.occur_in, chain(*documents)))
        language = str(scripts) if own >= _OWN_SHARE * characters else "other"
        languages.setdefault(language, []).append(name)
        about[name] = {"characters": characters, "language": language}
    foreign = [line for text in chain(*texts.values()) for line in text.split("\n") if line and not scripts.occur_in(line)]
    expected = base.encode_batch(foreign)
    rows = []
    for contender in [Contender.of("base", base), *contenders]:
        counts, partial, seconds = {}, {}, 0.0
        for name, documents in texts.items():
            start = time.process_time()
            encoded = contender.encode(documents)
            seconds += time.process_time() - start
            counts[name] = sum(map(len, encoded))
            bytes_only = {id for id in set(chain(*encoded)) if "\ufffd" in contender.decode([id])}
            partial[name] = sum(id in bytes_only for id in chain(*encoded))
        characters_of = {name: about[name]["characters"] for name in texts}
        row: dict[str, Any] = {
            "name": contender.name,
            "pieces": contender.pieces,
            "characters_per_token": {name: round(characters_of[name] / counts[name], 4) for name in texts},
            "languages": {},
            "characters_per_cpu_second": round(sum(characters_of.values()) / seconds),
        }
        config = replace(MISTRAL_7B, vocab_size=padded_size(contender.pieces), unpadded_vocab_size=contender.pieces)
        row["parameters_added"] = config.parameters - MISTRAL_7B.parameters
        row["training_flops_per_token"] = _training(config)
        for language, names in languages.items():
            tokens, characters = (sum(of[name] for name in names) for of in (counts, characters_of))
            row["languages"][language] = {
                "characters_per_token": round(characters / tokens, 4),
                "byte_tokens_percent": round(100 * sum(partial[name] for name in names) / tokens, 4),
                **_cost(config, _CHARACTERS * tokens / characters),
            }
        if contender.merged is not None:
            lost = unreachable(contender.merged.model_bytes)
            row["new_pieces"] = len(contender.merged.pieces)
            row["selected"] = contender.selected
            row["unreachable"] = {
                "new": sum(id >= contender.merged.base_size for id in lost),
                "base": sum(id < contender.merged.base_size for id in lost),
            }
            changed = sum(a != b for a, b in zip(expected, contender.encode(foreign), strict=True))
            row["lines_without_the_scripts"] = {"lines": len(foreign), "changed": changed}
        rows.append(row)
    for row in rows:
        for language, measured in row["languages"].items():
            first = rows[0]["languages"][language]
            measured["ratio"] = round(measured["characters_per_token"] / first["characters_per_token"], 4)
    return {"texts": about, "tokenizers": rows}


def _training(config: MistralConfig) -> int:
    """Operations of training on a token of a full context."""
    pairs = attended_pairs([CONTEXT], config.sliding_window)
    return training_flops(config, tokens=CONTEXT, rows=CONTEXT, pairs=pairs) // CONTEXT


def _cost(config: MistralConfig, tokens: float) -> dict[str, float]:
    """What a text of so many tokens costs: to train on, to read as a prompt, and to write one token after another, where every
    weight in bf16 is read for each token, but for the embedding."""
    training = tokens * _training(config)
    read = 2 * (config.parameters - config.vocab_size * config.hidden_size)
    return {
        "training_pflop": round(training / 1e15, 3),
        "prompt_pflop": round(training / 3e15, 3),
        "generation_read_tb": round(tokens * read / 1e12, 3),
    }


def lines(comparison: Mapping[str, Any]) -> Iterator[str]:
    """The comparison for people."""
    rows, width = comparison["tokenizers"], 1 + max(len(row["name"]) for row in comparison["tokenizers"])
    names = list(comparison["texts"])
    yield "characters per token"
    yield " " * width + "".join(f"{Path(name).name.split('.')[0][:13]:>14}" for name in names)
    for row in rows:
        yield f"{row['name']:<{width}}" + "".join(f"{row['characters_per_token'][name]:>14.3f}" for name in names)
    for language in rows[0]["languages"]:
        yield f"\n{language}: a million characters with Mistral 7B"
        yield " " * width + "".join(f"{title:>12}" for title in ("chars/token", "ratio", "byte tokens", "train PFLOP",
                                                                 "read PFLOP", "write TB"))  # fmt: skip
        for row in rows:
            of = row["languages"][language]
            yield (
                f"{row['name']:<{width}}{of['characters_per_token']:>12.3f}{of['ratio']:>12.3f}{of['byte_tokens_percent']:>11.3f}%"
                f"{of['training_pflop']:>12,.2f}{of['prompt_pflop']:>12,.2f}{of['generation_read_tb']:>12,.2f}"
            )
    yield ""
    yield " " * width + "".join(f"{title:>16}" for title in ("parameters +", "FLOP/token +", "Mchar/CPU s", "unreachable",
                                                             "lines changed"))  # fmt: skip
    for row in rows:
        share = row["training_flops_per_token"] / rows[0]["training_flops_per_token"] - 1
        merged = ("-", "-")
        if "unreachable" in row:
            merged = (str(sum(row["unreachable"].values())), str(row["lines_without_the_scripts"]["changed"]))
        yield (
            f"{row['name']:<{width}}{row['parameters_added'] / 1e6:>14,.0f} M{share:>16.2%}"
            f"{row['characters_per_cpu_second'] / 1e6:>16.2f}{merged[0]:>16}{merged[1]:>16}"
        )


def draw(comparison: Mapping[str, Any], path: Path) -> None:
    """Draw characters per token and relative costs over the number of pieces, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = comparison["tokenizers"]
    ours = [rows[0], *(row for row in rows if row.get("selected"))]
    others = [row for row in rows[1:] if "new_pieces" not in row]
    sizes = [row["pieces"] / 1000 for row in ours]
    with matplotlib.rc_context({"svg.hashsalt": "vocabulary", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(13, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, about in comparison["texts"].items():
            own = about["language"] != "other"
            values = [row["characters_per_token"][name] for row in ours]
            left.plot(sizes, values, "o-" if own else "s:", markersize=3, label=Path(name).name.split(".")[0])
        for language in rows[0]["languages"]:
            marker = "x" if language != "other" else "+"
            places = [row["pieces"] / 1000 for row in others]
            values = [row["languages"][language]["characters_per_token"] for row in others]
            left.scatter(places, values, marker=marker, color="0.3", label=f"other tokenizers, {language}")
            for cost, style in (("training_pflop", "o-"), ("generation_read_tb", "s--")):
                relative = [row["languages"][language][cost] / rows[0]["languages"][language][cost] for row in ours]
                what = "training" if cost == "training_pflop" else "generation"
                right.plot(sizes, relative, style, markersize=3, label=f"{what}, {language}")
        left.set(title="Characters per token", xlabel="thousand pieces", ylim=(0, None))
        right.set(title="Cost of the same text, base = 1 (Mistral 7B)", xlabel="thousand pieces", ylim=(0, None))
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(path, format="svg", metadata={"Date": None})
