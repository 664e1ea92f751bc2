"""Tokenise text, conversations or preference pairs once, into a dataset that the training recipes memory-map.

python -m recipes.prepare --kind text --paths corpus/ --tokenizer runs/tokenizer --out data/corpus --heldout 0.01
python -m recipes.prepare --kind conversations --paths chat.jsonl.gz --out data/chat --show 3
python -m recipes.prepare --kind conversations --paths chat/ --out data/chat-ja --language ja --max-length 4096 --too-long split
python -m recipes.prepare --kind preferences --paths "pairs/*.jsonl" --out data/pairs --max-length 2048 --strict
"""

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.data.dataset import TokenDataset
from engine.data.prepare import describe, prepare
from engine.settings.toml import PathName
from model.vocabulary.chat import template_name, with_named_template
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from recipes.command import command
from recipes.drawing import new_figure, save_figure

LENGTHS = "lengths.png"  # in the prepared folder
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
    template: PathName = ""
    """Chat template: shisa, chatml, or a file of Jinja; default: the tokenizer folder's own, or else shisa. A model that is
    trained on the dataset carries its template from then on."""
    language: str = ""
    """Keep only records in this language, by script: ja, zh, ko, latin, or a script of ISO 15924 such as cyrl; default: all."""
    max_length: int | None = None
    """Most tokens of a document, or of each side of a pair; default: no limit (training splits what exceeds its context)."""
    too_long: Literal["skip", "cut", "split"] = "skip"
    """What becomes of longer ones, counted. skip: nothing. cut: their beginning; of a conversation whole exchanges. split (not
    pairs): parts one after another; of a conversation whole exchanges, each part behind the system message."""
    heldout: float = 0.0
    """Validation: share (below 1) or number of documents that go to a second dataset <out>-heldout instead, chosen by a hash of
    their content."""
    seed: int = 0
    """Seed of the hash that chooses the held-out documents."""
    strict: bool = False
    """Stop at the first unusable record, instead of skipping, counting and reporting it."""
    overwrite: bool = False
    """Replace a dataset in `out` that was prepared from something else."""
    show: int = 0
    """Print this many prepared documents as text, the trained tokens in green (in ⟦ ⟧ where the output has no colours)."""
    preview: int = 0
    """Print this many prepared documents, token by token; + marks trained tokens."""

    def __post_init__(self) -> None:
        for name in ("show", "preview"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0")
        if self.template and self.kind == "text":
            raise ValueError(f"template = {self.template!r} has no effect on text: leave it out")


def run(settings: PrepareSettings) -> dict[str, Any]:
    """Prepare the dataset and print a summary; returns its dataset.json."""
    tokenizer = Tokenizer.load(settings.tokenizer or mistral_tokenizer_path())
    if settings.template:
        tokenizer = with_named_template(tokenizer, settings.template)
    if settings.kind != "text":
        print(f"chat template: {template_name(tokenizer)}")
    report = prepare(
        settings.paths,
        settings.out,
        tokenizer=tokenizer,
        kind=settings.kind,
        text_field=settings.text_field,
        split=settings.split,
        language=settings.language,
        max_length=settings.max_length,
        too_long=settings.too_long,
        heldout=settings.heldout,
        seed=settings.seed,
        strict=settings.strict,
        overwrite=settings.overwrite,
    )
    dataset = TokenDataset.open(settings.out)
    print("\n".join([f"{settings.out}:", *describe(report), lengths_line(dataset)]))
    # A dataset that was kept has its drawing.
    if not (drawing := Path(settings.out) / LENGTHS).is_file():
        draw_lengths(dataset, drawing)
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    marks = ("\x1b[32m", "\x1b[0m") if colours else ("⟦", "⟧")
    for line in (*shown(dataset, tokenizer, settings.show, marks), *preview(dataset, tokenizer, settings.preview)):
        print(line)
    return report


def lengths_line(dataset: TokenDataset) -> str:
    """Percentiles of the document lengths."""
    values = np.percentile(dataset.lengths, PERCENTILES, method="nearest")
    return "tokens a document: " + ", ".join(
        f"{percent} % {value:,}" for percent, value in zip(PERCENTILES, values.tolist(), strict=True)
    )


def draw_lengths(dataset: TokenDataset, file: Path) -> None:
    """A histogram of the document lengths, on a logarithmic axis."""
    figure = new_figure(7.0, 3.2)
    if figure is None:
        return
    axes = figure.add_subplot(xlabel="tokens a document", ylabel="documents", xscale="log")
    shortest, longest = int(dataset.lengths.min()), int(dataset.lengths.max())
    axes.hist(dataset.lengths, bins=np.geomspace(shortest, max(longest, shortest + 1), 50).tolist())
    axes.axvline(float(np.median(dataset.lengths)), color="#d1495b", label=f"median {np.median(dataset.lengths):,.0f}")
    axes.legend()
    save_figure(figure, file)


def shown(dataset: TokenDataset, tokenizer: Tokenizer, count: int, marks: tuple[str, str]) -> Iterator[str]:
    """The first `count` documents (pairs) as text, their trained tokens between the two marks."""
    for title, runs in _documents(dataset, count):
        texts = ((tokenizer.spell(ids), trained) for ids, trained in runs)
        yield title
        yield "".join(f"{marks[0]}{text}{marks[1]}" if trained else text for text, trained in texts)


def preview(dataset: TokenDataset, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """The first `count` documents (pairs) as stored: runs of tokens, '+' before trained tokens, '-' before the others."""
    names = tokenizer.pieces()
    for title, runs in _documents(dataset, count):
        yield title
        for ids, trained in runs:
            yield f"{'+' if trained else '-'} {tokenizer.decode(ids)!r}"
            yield "  " + " ".join(f"{id}:{names[id]}" for id in ids)


def _documents(dataset: TokenDataset, count: int) -> Iterator[tuple[str, list[tuple[list[int], bool]]]]:
    """The first `count` documents (pairs): a title, and runs of ids that are all trained on or all not."""
    sides = 2 if dataset.kind == "preferences" else 1
    for document in range(min(count * sides, len(dataset))):
        ids, trained = dataset.tokens(document).tolist(), dataset.trained(document).tolist()
        # Nothing predicts the first token of a document.
        trained[0] = False
        side = ("", " (chosen)" if document % 2 == 0 else " (rejected)")[sides - 1]
        title = f"--- {document // sides}{side}: {len(ids)} tokens, {sum(trained)} trained on"
        places = itertools.groupby(zip(ids, trained, strict=True), key=itemgetter(1))
        yield title, [([id for id, _ in run], told) for told, run in places]


def main(argv: Sequence[str] | None = None) -> None:
    command(PrepareSettings, run, argv, "python -m recipes.prepare")


if __name__ == "__main__":
    main()
