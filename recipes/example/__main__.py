"""Write the example's data, the input of the configurations in recipes/tiny.

python -m recipes.example --out runs/quickstart/example
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.settings.toml import PathName
from recipes.command import command
from recipes.example.text import Example, ExampleSettings, make_example, write_example


@dataclass(frozen=True, kw_only=True)
class WriteSettings:
    """The embedded example as files."""

    out: PathName = "runs/quickstart/example"
    """Folder to write."""
    overwrite: bool = False
    """Replace an existing folder."""
    example: ExampleSettings = field(default_factory=ExampleSettings)
    """Size and seed of the example."""


def run(settings: WriteSettings) -> Example:
    """Write the files; returns the split behind them."""
    example = make_example(settings.example)
    write_example(settings.out, example, overwrite=settings.overwrite)
    print(
        f"{settings.out}: {len(example.trained):,} trained combinations of item, phrasing and language, "
        f"{len(example.held_out)} held out, {len(example.unseen)} about facts and sums that training never asks"
    )
    return example


def main(argv: Sequence[str] | None = None) -> None:
    command(WriteSettings, run, argv, "python -m recipes.example")


if __name__ == "__main__":
    main()
