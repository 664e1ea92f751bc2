"""Tokenise text, conversations or preference pairs once, into a dataset that the training recipes memory-map.

python -m recipes.prepare --kind text --paths corpus/ --tokenizer runs/tokenizer --out data/corpus --heldout 0.01
python -m recipes.prepare --kind conversations --paths chat.jsonl.gz --out data/chat --preview 3
python -m recipes.prepare --kind preferences --paths "pairs/*.jsonl" --out data/pairs --max-length 2048 --strict
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from engine.data.dataset import TokenDataset
from engine.data.prepare import describe, prepare
from engine.settings.toml import PathName
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from recipes.command import command

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Tokenisation of one dataset."""

    kind: Literal["text", "conversations", "preferences"]
    """text: .txt files and records with a text field; conversations: ShareGPT, messages, Alpaca, or prompt and completion;
    preferences: prompt, chosen, rejected."""
    paths: tuple[PathName, ...]
    """Files (.txt, .jsonl, .json, each also .gz; .parquet), folders, patterns, or a hub data set (recipes/README.md)."""
    out: PathName
    """Folder for the prepared dataset."""
    tokenizer: PathName | None = None
    """Folder with tokenizer.model, or a *.model file; default: Mistral 7B's own (needs mistral-common)."""
    text_field: str = "text"
    """Field of a record that holds the text (kind text)."""
    split: Literal["blank", "line", "file"] = "blank"
    """A document of a .txt file ends at: a blank line, each line, or the end of the file."""
    max_length: int | None = None
    """Skip pairs with a side of more tokens than this (kind preferences)."""
    heldout: float = 0.0
    """Validation: share (below 1) or number of documents that go to a second dataset <out>-heldout instead, chosen by a hash of
    their content."""
    seed: int = 0
    """Seed of the hash that chooses the held-out documents."""
    strict: bool = False
    """Stop at the first unusable record, instead of skipping, counting and reporting it."""
    overwrite: bool = False
    """Replace a dataset in `out` that was prepared from something else."""
    preview: int = 0
    """Print this many prepared documents, token by token; + marks trained tokens."""

    def __post_init__(self) -> None:
        if self.preview < 0:
            raise ValueError(f"preview = {self.preview}: must be at least 0")


def run(settings: PrepareSettings) -> dict[str, Any]:
    """Prepare the dataset and print a summary; returns its dataset.json."""
    tokenizer = Tokenizer.load(settings.tokenizer or mistral_tokenizer_path())
    if settings.kind != "text":
        print(f"chat template: {'ours, in the llama-2 form' if tokenizer.template is None else 'the own one of the tokenizer'}")
    report = prepare(
        settings.paths,
        settings.out,
        tokenizer=tokenizer,
        kind=settings.kind,
        text_field=settings.text_field,
        split=settings.split,
        max_length=settings.max_length,
        heldout=settings.heldout,
        seed=settings.seed,
        strict=settings.strict,
        overwrite=settings.overwrite,
    )
    dataset = TokenDataset.open(settings.out)
    print("\n".join([f"{settings.out}:", *describe(report), lengths_line(dataset)]))
    for line in preview(dataset, tokenizer, settings.preview):
        print(line)
    return report


def lengths_line(dataset: TokenDataset) -> str:
    """Percentiles of the document lengths."""
    values = np.percentile(dataset.lengths, PERCENTILES, method="nearest")
    return "tokens a document: " + ", ".join(
        f"{percent} % {value:,}" for percent, value in zip(PERCENTILES, values.tolist(), strict=True)
    )


def preview(dataset: TokenDataset, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """The first `count` documents (pairs) as stored: runs of tokens, '+' before trained tokens, '-' before the others."""
    sides = 2 if dataset.kind == "preferences" else 1
    names = tokenizer.pieces()
    for document in range(min(count * sides, len(dataset))):
        ids, trained = dataset.tokens(document).tolist(), dataset.trained(document).tolist()
        # Nothing predicts the first token of a document.
        trained[0] = False
        side = ("", " (chosen)" if document % 2 == 0 else " (rejected)")[sides - 1]
        yield f"--- {document // sides}{side}: {len(ids)} tokens, {sum(trained)} trained on"
        start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or trained[end] != trained[start]:
                yield f"{'+' if trained[start] else '-'} {tokenizer.decode(ids[start:end])!r}"
                yield "  " + " ".join(f"{id}:{names[id]}" for id in ids[start:end])
                start = end


def main(argv: Sequence[str] | None = None) -> None:
    command(PrepareSettings, run, argv, "python -m recipes.prepare")


if __name__ == "__main__":
    main()
