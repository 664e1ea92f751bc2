"""Models by name: local folders, repositories of the hub, and folders in another form."""

import fnmatch
from pathlib import Path

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

import model.hub as hub
from model.config import read_config
from model.hub import resolve_folder
from model.weights import TensorFolder


def test_a_folder_is_itself_and_a_mistyped_path_never_reaches_the_hub(tmp_path, monkeypatch):
    def reach(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(hub, "snapshot_download", reach)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").write_text("")
    assert resolve_folder("runs") == resolve_folder("runs/") == Path("runs")
    wrong = ["run", "./run", "../run", "/no/such/folder", "runs/sft", "runs/sft/step-1", "~/models", "file", "a/b/c"]
    for name in (*wrong, "a b/c"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such folder"):
            resolve_folder(name)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of the hub, owner/name; the list of (revision, file) that were asked for."""
    remote, asked = tmp_path / "remote", []
    files = {
        "config.json": "{}",
        "params.json": "{}",
        "tokenizer.model": "",
        "model-00001-of-00001.safetensors": "",
        "consolidated.safetensors": "",
        "old.safetensors": "",
        "original/params.json": "{}",
        "original/config.json": "{}",
        hub.INDEX_NAME: '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}',
    }
    for name, text in files.items():
        (remote / name).parent.mkdir(parents=True, exist_ok=True)
        (remote / name).write_text(text)

    def download(name, *, revision, allow_patterns):
        assert name == "owner/name"
        asked.extend((revision, file) for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns))
        return str(remote)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_only_the_files_that_the_index_names_are_fetched(repository):
    resolve_folder("owner/name@v1.0")
    assert {file for _, file in repository} == {
        "config.json",
        "tokenizer.model",
        hub.INDEX_NAME,
        "model-00001-of-00001.safetensors",
    }
    assert {revision for revision, _ in repository} == {"v1.0"}


def test_resolving_a_configuration_fetches_no_weights(repository):
    resolve_folder("owner/name", weights=False)
    assert not [file for _, file in repository if file.endswith(".safetensors")]


def test_a_gated_repository_says_what_to_do(tmp_path, monkeypatch):
    class Gated(GatedRepoError):
        def __init__(self):
            """The base class would need the hub's response."""

    def refuse(*_, **__):
        raise Gated

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gated: accept .* https://huggingface\.co/owner/name, then log in"):
        resolve_folder("owner/name")


def test_an_empty_name_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert resolve_folder("~/m") == tmp_path / "m"
    with pytest.raises(FileNotFoundError, match="name is empty"):
        resolve_folder("")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", "an adapter .*merge it into its base"),
        ("pytorch_model-00001-of-00002.bin", "pickles .*convert them with transformers"),
        ("consolidated.00.pth", "Mistral's own layout"),
        ("consolidated.safetensors", "Mistral's own layout"),
        ("model.Q4_K_M.gguf", "GGUF"),
    ],
)
def test_folders_in_another_form_say_what_they_are(tmp_path, file, message):
    (tmp_path / file).write_text("{}")
    for read in (read_config, TensorFolder):
        with pytest.raises(FileNotFoundError, match=f"{file}: .*{message}"):
            read(tmp_path)


@pytest.mark.parametrize(
    "failure",
    [
        LocalEntryNotFoundError("Got: ConnectError: no route\nPlease check your internet connection."),
        LocalEntryNotFoundError(""),
        OSError("no space left"),
        ValueError("no such repository"),
        type("ProxyError", (Exception,), {})("the proxy refuses"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_an_unreachable_hub_is_one_line_with_a_remedy(tmp_path, monkeypatch, failure):
    def download(*_, **__):
        raise failure

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        resolve_folder("owner/name")
    assert str(error.value).startswith("owner/name: no such local folder, and the hub did not give it")
    assert "give its path" in str(error.value)
    assert "\n" not in str(error.value)
    assert (str(failure).splitlines() or [type(failure).__name__])[0] in str(error.value)
