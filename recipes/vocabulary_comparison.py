"""`recipes.vocabulary --compare`: gain and cost of vocabularies of several sizes, beside other tokenizers.

Costs are of a Mistral 7B with the vocabulary, for a million characters of each language.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from kernels import padded_to_tiles
from model.config import MISTRAL_7B, MistralConfig
from model.vocabulary.merge import Merged, candidates_for, merge, unreachable
from model.vocabulary.scripts import Scripts
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from model.vocabulary.train import train
from recipes.drawing import new_figure, save_figure

Encode = Callable[[list[str]], list[list[int]]]

CONTEXT = 4096  # tokens of a sequence, for the work of attention
_CHARACTERS = 1_000_000  # characters whose cost is counted
_OWN_SHARE = 0.2  # below this share of characters in the scripts, a text counts as another language's


@dataclass(frozen=True)
class Contender:
    """A tokenizer to compare."""

    name: str
    pieces: int
    encode: Encode
    decode: Callable[[list[int]], str]
    merged: Merged | None = None  # for our own merges
    selected: bool = False  # our own merge of the most widely used pieces, instead of the pieces that training found first

    @classmethod
    def of(cls, name: str, tokenizer: Tokenizer, merged: Merged | None = None, selected: bool = False) -> Contender:
        return cls(name, tokenizer.vocab_size, tokenizer.encode_batch, tokenizer.decode, merged, selected)


def merged_contenders(
    base: Tokenizer, texts: Sequence[str], sizes: Sequence[int], scripts: Scripts, coverage: float
) -> Iterator[Contender]:
    """Two merges of each size, from one training: the most widely used pieces, and the first trained pieces."""
    trained = train(texts, candidates_for(max(sizes)), scripts=scripts, coverage=coverage)
    characters = sum(len(piece) == 1 for piece in trained.pieces)
    for size in sizes:
        candidates = trained.pieces[: characters + candidates_for(size)]
        for name, chosen in (("by use", texts), ("first trained", None)):
            merged = merge(base.model_bytes, candidates, size, texts=chosen)
            yield Contender.of(f"{size:,} {name}", Tokenizer(merged.model_bytes), merged, chosen is not None)


def carried() -> list[Contender]:
    """The tokenizers of mistral-common, without Mistral 7B v0.1's own; without that package none, after one line."""
    try:
        first = mistral_tokenizer_path()
    except FileNotFoundError as missing:
        print(f"compared without mistral-common's tokenizers: {missing}")
        return []
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    files = sorted(first.parent.glob("*.model.v*"))
    found = [Contender.of(path.name, Tokenizer.load(path)) for path in files if path != first]
    for path in sorted(first.parent.glob("tekken_*.json")):
        tekken = Tekkenizer.from_file(path)

        def encode(texts: list[str], tekken: Any = tekken) -> list[list[int]]:
            return [tekken.encode(text, bos=False, eos=False) for text in texts]

        found.append(Contender(path.name, tekken.n_words, encode, tekken.decode))
    return found


def in_folder(folder: str) -> Contender:
    """The tokenizer of a folder: its tokenizer.model, or else its tokenizer.json. Raises: FileNotFoundError without either."""
    path = Path(folder)
    if (path / "tokenizer.model").is_file() or not (path / "tokenizer.json").is_file():
        return Contender.of(path.name, Tokenizer.load(path))
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return Contender(path.name, tokenizer.get_vocab_size(), encode, tokenizer.decode)


def lines_without(scripts: Scripts, texts: Iterable[str]) -> list[str]:
    """The non-empty lines without a character of the scripts, which no new piece may touch."""
    return [line for text in texts for line in text.split("\n") if line and not scripts.occur_in(line)]


def changed_lines(lines: list[str], before: Encode, after: Encode) -> dict[str, int]:
    """The number of lines, and how many of them have other token ids after than before."""
    changed = sum(old != new for old, new in zip(before(lines), after(lines), strict=True))
    return {"lines": len(lines), "changed": changed}


def compare(
    base: Tokenizer, contenders: Iterable[Contender], texts: Mapping[str, list[str]], scripts: Scripts
) -> dict[str, Any]:
    """Measure the base and the contenders on texts.

    Returns: "texts": characters and language of each text; "tokenizers": one row for each tokenizer, the base first.
    """
    about = {}
    for name, documents in texts.items():
        characters = sum(map(len, documents))
        own = sum(map(scripts.occur_in, chain(*documents)))
        language = str(scripts) if own >= _OWN_SHARE * characters else "other"
        about[name] = {"characters": characters, "language": language}
    foreign = lines_without(scripts, chain(*texts.values()))
    rows = []
    for contender in chain([Contender.of("base", base)], contenders):
        row = _measure(contender, texts, about)
        if contender.merged is not None:
            lost = unreachable(contender.merged.model_bytes)
            old = sum(id < contender.merged.base_size for id in lost)
            row["new_pieces"] = len(contender.merged.pieces)
            row["selected"] = contender.selected
            row["unreachable"] = {"new": len(lost) - old, "base": old}
            row["lines_without_the_scripts"] = changed_lines(foreign, base.encode_batch, contender.encode)
        rows.append(row)
    for row in rows:
        for language, measured in row["languages"].items():
            first = rows[0]["languages"][language]["characters_per_token"]
            measured["ratio"] = round(measured["characters_per_token"] / first, 4)
    return {"texts": about, "tokenizers": rows}


def _measure(contender: Contender, texts: Mapping[str, list[str]], about: Mapping[str, Any]) -> dict[str, Any]:
    """Characters per token of each text, and gain and cost of each language."""
    tokens, partial, seconds = {}, {}, 0.0
    for name, documents in texts.items():
        start = time.process_time()
        encoded = contender.encode(documents)
        seconds += time.process_time() - start
        bytes_only = {id for id in set(chain(*encoded)) if "\ufffd" in contender.decode([id])}
        tokens[name] = sum(map(len, encoded))
        partial[name] = sum(id in bytes_only for id in chain(*encoded))
    characters = {name: about[name]["characters"] for name in texts}
    config = replace(MISTRAL_7B, vocab_size=padded_to_tiles(contender.pieces), unpadded_vocab_size=contender.pieces)
    languages = {}
    for language in dict.fromkeys(text["language"] for text in about.values()):
        names = [name for name in texts if about[name]["language"] == language]
        all_tokens, all_characters, all_partial = (sum(of[name] for name in names) for of in (tokens, characters, partial))
        languages[language] = {
            "characters_per_token": round(all_characters / all_tokens, 4),
            "byte_tokens_percent": round(100 * all_partial / all_tokens, 4),
            **_cost(config, _CHARACTERS * all_tokens / all_characters),
        }
    return {
        "name": contender.name,
        "pieces": contender.pieces,
        "characters_per_token": {name: round(characters[name] / tokens[name], 4) for name in texts},
        "languages": languages,
        "characters_per_cpu_second": round(sum(characters.values()) / seconds),
        "parameters_added": config.parameters - MISTRAL_7B.parameters,
        "training_flops_per_token": _training(config),
    }


def _training(config: MistralConfig) -> int:
    """FLOPs of training on one token of a full context."""
    from engine.estimate.flops import training_flops
    from kernels.attention.work import attended_pairs

    pairs = attended_pairs([CONTEXT], config.sliding_window)
    return training_flops(config, tokens=CONTEXT, rows=CONTEXT, pairs=pairs) // CONTEXT


def _cost(config: MistralConfig, tokens: float) -> dict[str, float]:
    """Cost of a text: to train on it, to read it as a prompt, and to write it token by token.

    Writing reads every bf16 weight once a token, except the embedding.
    """
    training = tokens * _training(config)
    read = 2 * (config.parameters - config.vocab_size * config.hidden_size)
    return {
        "training_pflop": round(training / 1e15, 3),
        "prompt_pflop": round(training / 3e15, 3),
        "generation_read_tb": round(tokens * read / 1e12, 3),
    }


def lines(comparison: Mapping[str, Any]) -> Iterator[str]:
    """The comparison as text."""
    rows = comparison["tokenizers"]
    width = 1 + max(len(row["name"]) for row in rows)

    def table(cell_width: int, titles: Iterable[str], cells: Callable[[Mapping[str, Any]], Iterable[str]]) -> Iterator[str]:
        yield " " * width + "".join(f"{title:>{cell_width}}" for title in titles)
        for row in rows:
            yield f"{row['name']:<{width}}" + "".join(f"{cell:>{cell_width}}" for cell in cells(row))

    names = list(comparison["texts"])
    yield "characters per token"
    yield from table(
        14,
        [Path(name).name.split(".")[0][:13] for name in names],
        lambda row: [f"{row['characters_per_token'][name]:.3f}" for name in names],
    )
    for language in rows[0]["languages"]:
        yield f"\n{language}: a million characters with Mistral 7B"
        yield from table(
            12,
            ["chars/token", "ratio", "byte tokens", "train PFLOP", "read PFLOP", "write TB"],
            lambda row, language=language: _language_cells(row["languages"][language]),  # type: ignore[misc]
        )
    yield ""
    yield from table(
        16,
        ["parameters +", "FLOP/token +", "Mchar/CPU s", "unreachable", "lines changed"],
        lambda row: _model_cells(row, rows[0]),
    )


def _language_cells(of: Mapping[str, float]) -> list[str]:
    return [
        f"{of['characters_per_token']:.3f}",
        f"{of['ratio']:.3f}",
        f"{of['byte_tokens_percent']:.3f}%",
        f"{of['training_pflop']:,.2f}",
        f"{of['prompt_pflop']:,.2f}",
        f"{of['generation_read_tb']:,.2f}",
    ]


def _model_cells(row: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    merged = "unreachable" in row
    return [
        f"{row['parameters_added'] / 1e6:,.0f} M",
        f"{row['training_flops_per_token'] / base['training_flops_per_token'] - 1:.2%}",
        f"{row['characters_per_cpu_second'] / 1e6:.2f}",
        str(sum(row["unreachable"].values())) if merged else "-",
        str(row["lines_without_the_scripts"]["changed"]) if merged else "-",
    ]


def draw(comparison: Mapping[str, Any], path: Path) -> None:
    """Draw characters per token and relative costs over the number of pieces. Without matplotlib one line says so."""
    figure = new_figure(13, 4.5)
    if figure is None:
        return
    rows = comparison["tokenizers"]
    ours = [rows[0], *(row for row in rows if row.get("selected"))]
    others = [row for row in rows[1:] if "new_pieces" not in row]
    sizes = [row["pieces"] / 1000 for row in ours]
    gain, cost = figure.subplots(1, 2)
    for name, about in comparison["texts"].items():
        values = [row["characters_per_token"][name] for row in ours]
        style = "s:" if about["language"] == "other" else "o-"
        gain.plot(sizes, values, style, markersize=3, label=Path(name).name.split(".")[0])
    for language, base in rows[0]["languages"].items():
        values = [row["languages"][language]["characters_per_token"] for row in others]
        marker = "+" if language == "other" else "x"
        places = [row["pieces"] / 1000 for row in others]
        gain.scatter(places, values, marker=marker, color="0.3", label=f"other tokenizers, {language}")
        for name, style, label in (("training_pflop", "o-", "training"), ("generation_read_tb", "s--", "generation")):
            relative = [row["languages"][language][name] / base[name] for row in ours]
            cost.plot(sizes, relative, style, markersize=3, label=f"{label}, {language}")
    gain.set_title("Characters per token")
    cost.set_title("Cost of the same text, base = 1 (Mistral 7B)")
    for axes in (gain, cost):
        axes.set(xlabel="thousand pieces", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)
