"""Model folders by name: a local path, or a repository of the Hugging Face hub, of which only the model's files are fetched."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
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
    named = hub_repository(name)
    if named is None:
        raise FileNotFoundError(f"{name}: no such folder (a hub repository is named owner/name, or owner/name@revision)")
    repository, revision = named
    folder = _fetch(repository, revision, _SMALL_FILES)
    return _fetch(repository, revision, weight_files(folder)) if weights else folder


def hub_repository(name: str | Path) -> tuple[str, str | None] | None:
    """(repository, revision or None) of a name that can only mean the hub; None for a local path, there or mistyped."""
    form = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", str(name))
    if form is None or Path(name).expanduser().parent.is_dir():
        return None
    repository, revision = form.groups()
    return repository, revision


def check_access(name: str) -> None:
    """Ask the hub whether this machine may read a model's weights, and fetch its configuration, but no weights.

    Weights that lie in the cache need no hub. Raises: FileNotFoundError as `resolve_folder` does.
    """
    repository, revision = hub_repository(name) or (name, None)
    folder = resolve_folder(name, weights=False)
    if all((folder / file).is_file() for file in weight_files(folder)):
        return
    with _refusals_named(repository, revision):
        HfApi().auth_check(repository)


def weight_files(folder: Path) -> list[str]:
    """Names of a folder's weight files: those that its index names, `model.safetensors` where there is no index."""
    index = folder / INDEX_NAME
    named = read_json(index).get("weight_map") if index.is_file() else None
    return sorted(set(map(str, named.values()))) if isinstance(named, dict) else [SINGLE_NAME]


def _fetch(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    with _refusals_named(repository, revision):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))


@contextmanager
def _refusals_named(repository: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub answers into one clear error. Raises: FileNotFoundError."""
    try:
        yield
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
