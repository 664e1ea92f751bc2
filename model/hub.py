"""Model folders by name: a local path, or a repository of the Hugging Face hub, of which only the model's files are fetched."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError

from model.config import PRESET, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Names without a wildcard match the repository's top folder alone. The adapter's file identifies a folder without a model.
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX_NAME,
)


def resolve_folder(name: str | Path, *, weights: bool = True) -> Path:
    """The folder of a model: a local path, or a hub repository `owner/name` or `owner/name@revision`, fetched to its cache.

    Fetches the configuration and the tokenizer and, with `weights`, the files that the index names (`model.safetensors` where
    there is no index). A name counts as a hub repository only if it has that form and `owner` is no local folder: a mistyped
    local path never reaches the network.

    Raises: FileNotFoundError naming the path or repository and the remedy.
    """
    path = Path(name).expanduser()
    if not str(name):
        raise FileNotFoundError("the model's name is empty: give a folder, or a hub repository owner/name")
    if path.is_dir():
        return path
    if str(name).startswith(PRESET):
        raise FileNotFoundError(
            f"{name}: a preset has no weights and no tokenizer; name a folder, or a hub repository owner/name"
        )
    form = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", str(name))
    if form is None or path.parent.is_dir():
        raise FileNotFoundError(f"{name}: no such folder (a hub repository is named owner/name, or owner/name@revision)")
    repository, revision = form.groups()
    folder = _fetch(repository, revision, _SMALL_FILES)
    return _fetch(repository, revision, weight_files(folder)) if weights else folder


def weight_files(folder: Path) -> list[str]:
    """Names of a folder's weight files: those that its index names, `model.safetensors` where there is no index."""
    index = folder / INDEX_NAME
    named = read_json(index).get("weight_map") if index.is_file() else None
    return sorted(set(map(str, named.values()))) if isinstance(named, dict) else [SINGLE_NAME]


def _fetch(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except GatedRepoError:
        raise FileNotFoundError(
            f"{repository}: the repository is gated: accept its conditions at https://huggingface.co/{repository}, then log in "
            "with `hf auth login` or set HF_TOKEN"
        ) from None
    except Exception as error:  # an error of the hub, of the operating system or of the HTTP client
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        at = f"{repository}@{revision}" if revision else repository
        raise FileNotFoundError(
            f"{at}: no such local folder, and the hub did not give it: {reason}. "
            "Check the name and the network, or download it elsewhere and give its path"
        ) from None
