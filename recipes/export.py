"""Export a trained model as a plain Hugging Face folder: weights, configuration and tokenizer, without training state.

python -m recipes.export --source runs/dpo --out exports/shisa-7b
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.settings.toml import PathName
from model.folder import complete_folder
from model.sampling import Sampling
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.fitting import fitted_config
from model.vocabulary.tokenizer import Tokenizer
from recipes.command import command


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Export of a trained model."""

    source: PathName
    """Run folder (its newest checkpoint) or Hugging Face folder with its tokenizer.model."""
    out: PathName
    """Folder to write."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the written weights."""
    overwrite: bool = False
    """Replace an existing folder."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.5, top_p=0.95, repetition_penalty=1.15))
    """How servers of the folder choose tokens unless a request says otherwise (generation_config.json); the default is that of
    Shisa 7B's model card. Length and seed are left to the server."""


def run(settings: ExportSettings) -> Path:
    """Write the folder and return its path. The same source gives the same bytes."""
    import torch

    from engine.checkpoint.state import newest_checkpoint, read_state
    from model.config import write_sampling
    from model.weights import convert_folder

    source = Path(settings.source)
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such run, checkpoint or model folder")
    if Path(settings.out).resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{settings.out}: is or holds the source, and overwriting would delete it; name another folder")
    checkpoint = newest_checkpoint(source) or source
    if (checkpoint / "training").is_dir():
        read_state(checkpoint)
    elif not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{source}: holds neither a complete checkpoint (step-...) nor a config.json")
    tokenizer = Tokenizer.load(checkpoint)
    with complete_folder(settings.out, overwrite=settings.overwrite) as folder:
        convert_folder(checkpoint, folder, getattr(torch, settings.dtype), fitted_config(checkpoint, tokenizer))
        write_sampling(folder, settings.sampling)
        write_tokenizer_folder(folder, tokenizer)
    size = sum(file.stat().st_size for file in Path(settings.out).iterdir())
    print(f"{settings.out}: {size / 2**20:.1f} MiB from {checkpoint}; load it with transformers' AutoModelForCausalLM")
    return Path(settings.out)


def main(argv: Sequence[str] | None = None) -> None:
    command(ExportSettings, run, argv, "python -m recipes.export")


if __name__ == "__main__":
    main()
