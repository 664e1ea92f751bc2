"""A chain of recipes: what is skipped, resumed, stale, made again; what a dry run finds; and that nothing is written by it."""

import dataclasses
import io
import json
import random
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from engine.checkpoint.state import newest_checkpoint
from engine.settings.toml import to_toml
from model.config import read_config
from recipes import pipeline
from tests.conftest import sentence

CHAIN = """
root = "runs"

[[stages]]
name = "text"
recipe = "prepare"
options = ["--kind", "text", "--paths", "text.txt", "--split", "line", "--tokenizer", "model", "--out", "runs/data/text"]

[[stages]]
name = "chat"
recipe = "prepare"
options = ["--kind", "conversations", "--paths", "chat.jsonl", "--tokenizer", "model", "--out", "runs/data/chat"]

[[stages]]
recipe = "pretrain"
file = "pretrain.toml"

[[stages]]
recipe = "sft"
file = "sft.toml"

[[stages]]
name = "export"
recipe = "export"
options = ["--source", "runs/sft", "--out", "runs/export", "--dtype", "float32"]
"""
STAGES = ["text", "chat", "pretrain", "sft", "export"]


@pytest.fixture(scope="module")
def run_once(tmp_path_factory, tiny_model, tiny_settings):
    """The folder of a chain that has run, and what it printed."""
    folder = tmp_path_factory.mktemp("chain") / "folder"
    folder.mkdir()
    write_chain(folder, tiny_model, tiny_settings)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.chdir(folder)
        run()
    return folder, said.getvalue()


@pytest.fixture
def finished(run_once, tmp_path, monkeypatch):
    """A copy of a chain that has run, as the working folder."""
    shutil.copytree(run_once[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def chain(tmp_path, tiny_model, tiny_settings, monkeypatch):
    """The files of a chain of five stages in the working folder, none of them run."""
    write_chain(tmp_path, tiny_model, tiny_settings)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_chain(folder: Path, model: Path, tiny_settings, steps: int = 2) -> None:
    rng = random.Random(3)
    shutil.copytree(model, folder / "model")
    (folder / "text.txt").write_text("".join(sentence(rng, 12) + "\n" for _ in range(30)), encoding="utf-8")
    chats = [{"prompt": sentence(rng, 3), "completion": sentence(rng, 4)} for _ in range(30)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    for stage, before, data in (("pretrain", "model", "text"), ("sft", "runs/pretrain", "chat")):
        settings = tiny_settings(stage, Path("runs") / stage, heldout=[], steps=steps, epochs=None)
        settings = dataclasses.replace(
            settings,
            model=before,
            sources=(dataclasses.replace(settings.sources[0], path=f"runs/data/{data}"),),
            log=dataclasses.replace(settings.log, tensorboard=False),
        )
        (folder / f"{stage}.toml").write_text(to_toml(settings), encoding="utf-8")
    (folder / "chain.toml").write_text(CHAIN, encoding="utf-8")


def run(*arguments: str) -> None:
    pipeline.main(["chain.toml", *arguments])


def refused(*arguments: str) -> str:
    """What the chain says where it refuses to run."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    return str(ended.value.code)


def made(capsys) -> list[str]:
    """The stages that were made since the last call."""
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[1].rstrip(":") for line in lines if line.startswith("[") and ": done in" in line]


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def edit(file: str, old: str, new: str) -> None:
    text = Path(file).read_text(encoding="utf-8")
    assert old in text
    Path(file).write_text(text.replace(old, new), encoding="utf-8")


def test_a_chain_makes_every_stage_once_and_says_how_long_each_took(run_once, finished, capsys):
    out = run_once[1]
    for number, name in enumerate(STAGES, 1):
        assert f"[{number}/5] {name}: python -m recipes." in out
        assert any(line.startswith(name) and f"runs/{'data/' if number < 3 else ''}{name}" in line for line in out.splitlines())
    assert newest_checkpoint("runs/sft") == Path("runs/sft/step-00000002")
    assert read_config("runs/export").vocab_size == 384
    before = files(finished)
    run()
    assert made(capsys) == []
    assert before == files(finished)


def test_a_killed_training_goes_on_and_a_half_made_stage_is_made_again(chain, capsys, monkeypatch):
    from engine.checkpoint.saving import Saving
    from recipes import export

    whole = Saving.save
    monkeypatch.setattr(Saving, "save", lambda self, state: [whole(self, state), exec("raise KeyboardInterrupt")][0])
    edit("sft.toml", "checkpoint_every = 0", "checkpoint_every = 1")
    edit("pretrain.toml", "checkpoint_every = 0", "checkpoint_every = 1")
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 130
    said = capsys.readouterr()
    assert "[3/5] pretrain: not finished; the same command goes on from here" in said.err
    assert newest_checkpoint("runs/pretrain").name == "step-00000001"
    monkeypatch.undo()
    monkeypatch.chdir(chain)

    def killed(settings):
        export_run(settings)
        raise KeyboardInterrupt

    export_run = export.run
    monkeypatch.setattr(export, "run", killed)
    with pytest.raises(SystemExit):
        run()
    out = capsys.readouterr().out
    assert "start      step 1 of 2, from runs/pretrain/step-00000001" in out
    assert (chain / "runs/export").is_dir()
    monkeypatch.setattr(export, "run", export_run)
    # The folder lies there, and its marker does not say that it is complete.
    run()
    assert made(capsys) == ["export"]


def test_a_changed_setting_makes_its_stage_and_all_that_follow_stale(finished, capsys):
    edit("pretrain.toml", "peak = 0.003", "peak = 0.004")
    made(capsys)
    before = files(finished)
    said = refused()
    assert "3 stages are stale, and no stale result is used" in said
    assert "pretrain: schedule.peak = 0.004, was 0.003" in said
    assert "sft: it reads the result of pretrain, which is stale" in said
    assert "export: it reads the result of sft, which is stale" in said
    assert said.endswith("python -m recipes.pipeline chain.toml --from pretrain")
    assert before == files(finished)
    # What is not made from a stale result may run.
    run("--only", "text", "chat")
    edit("pretrain.toml", "peak = 0.004", "peak = 0.003")
    run()
    assert made(capsys) == []


def test_a_setting_that_changes_no_result_makes_nothing_stale(finished, capsys):
    edit("pretrain.toml", "pack_tokens = 128", "pack_tokens = 256")
    edit("pretrain.toml", 'recompute = "light"', 'recompute = "block"')
    made(capsys)
    run()
    assert made(capsys) == []


def test_changed_data_makes_its_readers_stale_and_a_copy_does_not(finished, capsys):
    text = Path("text.txt").read_text(encoding="utf-8")
    Path("text.txt").write_text(text, encoding="utf-8")
    made(capsys)
    run()
    assert made(capsys) == []
    Path("text.txt").write_text(text.replace("cat", "dog"), encoding="utf-8")
    said = refused()
    assert "text: text.txt changed (paths.0): the file has another content" in said
    assert "pretrain: it reads the result of text" in said
    assert "chat" not in said.replace("chain.toml", "")


def test_a_result_that_somebody_else_changed_is_not_used(finished):
    with open("runs/export/config.json", "a") as file:
        file.write("\n")
    said = refused()
    assert "export: runs/export was changed after the stage had made it: config.json has another content" in said
    shutil.rmtree("runs/pretrain/step-00000002")
    shutil.copytree("runs/sft/step-00000002", "runs/pretrain/step-00000002")
    assert "pretrain: runs/pretrain was changed after the stage had made it" in refused()


def test_from_makes_a_stage_and_what_depends_on_it_again_and_keeps_the_earlier_results(finished, capsys):
    weights = newest_checkpoint("runs/sft") / "model-00001-of-00001.safetensors"
    before = weights.read_bytes()
    edit("sft.toml", "peak = 0.003", "peak = 0.004")
    made(capsys)
    run("--from", "sft")
    assert made(capsys) == ["sft", "export"]
    assert weights.read_bytes() != before
    assert (finished / "runs/sft.old/step-00000002" / weights.name).read_bytes() == before
    run("--from", "chat")
    assert made(capsys) == ["chat", "sft", "export"]
    assert (finished / "runs/sft.old2").is_dir()
    run()
    assert made(capsys) == []


def test_from_is_kept_over_a_kill_and_is_done_once_under_torchruns_restarts(finished, capsys, monkeypatch):
    from recipes import sft

    original = sft.run
    monkeypatch.setattr(sft, "run", lambda settings: exec("raise KeyboardInterrupt"))
    with pytest.raises(SystemExit):
        run("--from", "chat")
    monkeypatch.setattr(sft, "run", original)
    made(capsys)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run("--from", "chat")
    assert made(capsys) == ["sft", "export"]


def test_only_runs_one_stage_and_names_what_it_lacks(chain, capsys):
    assert "stage sft: model = runs/pretrain: not there yet; stage pretrain makes it" in refused("--only", "sft")
    run("--only", "text")
    assert made(capsys) == ["text"]
    run("--only", "text", "pretrain")
    assert made(capsys) == ["pretrain"]
    assert "--only: 'pretran' is no stage; the nearest one is 'pretrain'" in refused("--only", "pretran")
    assert "--from: 'dpo' is no stage" in refused("--from", "dpo")


def test_a_deleted_result_matters_only_where_a_stage_will_read_it(finished, capsys):
    shutil.rmtree("runs/pretrain")
    made(capsys)
    run()
    assert "pretrain: finished already (runs/pretrain is gone; nothing is still to read it)" in capsys.readouterr().out
    assert "pretrain: runs/pretrain is gone, and sft will read it" in refused("--from", "sft")


def test_a_stage_that_failed_before_it_wrote_anything_may_change_its_settings(chain, capsys):
    edit("chain.toml", '"--split", "line"', '"--split", "file", "--heldout", "0.5"')
    assert "leaves no document" in refused()
    edit("chain.toml", '"--split", "file", "--heldout", "0.5"', '"--split", "line"')
    run("--only", "text")
    assert made(capsys) == ["text"]


def test_a_result_that_no_chain_has_made_is_never_overwritten(finished):
    Path("runs/pipeline/export.json").unlink()
    for _ in range(2):
        assert "runs/export: exists already" in refused()
    assert read_config("runs/export").vocab_size == 384


def test_out_moves_every_path_and_a_moved_folder_is_the_same_chain(finished, capsys):
    run("--out", "elsewhere", "--only", "text")
    assert Path("elsewhere/data/text/dataset.json").is_file()
    Path("runs").rename("further")
    made(capsys)
    run("--out", "further")
    assert made(capsys) == []
    assert not Path("runs").exists()


def test_options_reach_their_stage(finished):
    said = refused("--sft.steps", "1", "--pretrain.schedule.peak", "0.002")
    assert "pretrain: schedule.peak = 0.002, was 0.003" in said
    assert "sft: steps = 1, was 2" in said
    # The remedy is a command that can be copied.
    assert "chain.toml --sft.steps 1 --pretrain.schedule.peak 0.002 --from pretrain sft" in said


def test_a_dry_run_writes_nothing_and_shows_memory_and_disk_of_stages_whose_model_is_not_there_yet(chain, capsys):
    before = files(chain)
    run("--dry-run")
    assert files(chain) == before
    out = capsys.readouterr().out
    assert out.count("memory: ") == 2
    assert "[4/5] sft: to make" in out
    assert "disk: " in out
    assert "nothing was started or written" in out
    run("--only", "text", "chat")
    before = files(chain)
    run("--dry-run")
    out = capsys.readouterr().out
    # With its data there, a stage's own dry run speaks.
    assert "dry run: nothing was trained or written" in out
    assert "[1/5] text: finished" in out
    assert files(chain) == before


MISTAKES = {
    "a misspelt setting": ("sft.toml", "neftune_alpha", "neftune_alfa", "stage sft: sft.toml: unknown key 'neftune_alfa'"),
    "a missing file": ("chain.toml", '"sft.toml"', '"stf.toml"', "stage stf: stf.toml: no such settings file"),
    "an unknown recipe": (
        "chain.toml",
        '"export"\noptions',
        '"exprot"\noptions',
        "'exprot' is no recipe; the nearest one is 'export'",
    ),
    "an unknown option": ("chain.toml", '"--dtype"', '"--dtyp"', "stage export: "),
    "a path that nobody makes": (
        "chain.toml",
        '"text.txt"',
        '"texts.txt"',
        "stage text: paths.0 = texts.txt: no such file or folder, and no earlier stage makes it",
    ),
    "an order that cannot be": (
        "pretrain.toml",
        'model = "model"',
        'model = "runs/export"',
        "stage pretrain: model = runs/export: no such file or folder, only the later stage export makes it",
    ),
    "two writers": ("sft.toml", 'out = "runs/sft"', 'out = "runs/pretrain"', "stage pretrain writes it, too"),
    "a name twice": ("chain.toml", 'name = "chat"', 'name = "text"', "stage text: two stages have this name"),
    "an option of no stage": ("chain.toml", "", "", "'stf' is no stage; the nearest one is 'sft'"),
    "a replay": ("sft.toml", "replay = 0", "replay = 1", "stage sft: replay has no place in a chain"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_dry_run_finds(mistake, chain):
    file, old, new, said = MISTAKES[mistake]
    edit(file, old, new) if old else None
    before = files(chain)
    assert said in refused("--dry-run", *(["--stf.steps", "1"] if not old else []))
    assert files(chain) == before


def test_a_dry_run_finds_a_training_that_the_memory_does_not_hold(chain, monkeypatch):
    monkeypatch.setattr("engine.environment.host_memory", lambda: (2**20, 2**20))
    said = refused("--dry-run")
    assert said.count("which does not fit: lower pack_tokens") == 2


def test_a_dry_run_finds_a_disk_that_is_too_small(chain, monkeypatch):
    usage = shutil.disk_usage(chain)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**19))
    assert re.search(r"disk: 1\.\d MiB to write, 0\.5 MiB free in .*: free the disk", refused("--dry-run"))


def test_a_dry_run_names_all_mistakes_at_once(chain):
    edit("chain.toml", '"text.txt"', '"texts.txt"')
    edit("sft.toml", "neftune_alpha", "neftune_alfa")
    (chain / "runs").mkdir()
    (chain / "runs/data").write_text("a file")
    said = refused("--dry-run")
    assert said.startswith("error: 4 mistakes")
    assert "texts.txt" in said
    assert "neftune_alfa" in said
    assert said.count("runs/data is not a folder") == 2


def test_a_dry_run_asks_the_hub_for_models_and_data_and_fetches_no_weights(chain, monkeypatch):
    from engine.data import sources
    from model import hub

    asked = []

    class Api:
        def auth_check(self, repository, repo_type="model"):
            asked.append((repository, repo_type))
            raise OSError("401 Unauthorized")

        def dataset_info(self, repository, revision=None):
            raise OSError("no such data set")

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, revision, allow_patterns: without_weights(chain, allow_patterns))
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: True)
    edit("pretrain.toml", 'model = "model"', 'model = "someone/model"')
    edit("chain.toml", '"text.txt"', '"hub:someone/text"')
    said = refused("--dry-run")
    assert "stage pretrain: someone/model: no such local folder, and the hub did not give it: 401 Unauthorized" in said
    assert "stage text: hub:someone/text: not available: no such data set" in said
    assert asked == [("someone/model", "model")]


def without_weights(folder: Path, patterns: list[str]) -> str:
    assert not any("safetensors" in name and "index" not in name for name in patterns)
    target = folder.parent / f"{folder.name}-cache"
    target.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(folder / "model" / name, target)
    return str(target)


def test_a_second_chain_in_the_same_folder_is_refused(chain):
    from engine.distributed.run_lock import run_lock

    Path("runs/pipeline").mkdir(parents=True)
    with run_lock(Path("runs/pipeline")):
        assert "another process is writing it now" in refused()


def test_a_marker_that_cannot_be_read_is_named(chain):
    Path("runs/pipeline").mkdir(parents=True)
    Path("runs/pipeline/text.json").write_text("{")
    assert "runs/pipeline/text.json: " in refused()
    assert "delete it" in refused()
