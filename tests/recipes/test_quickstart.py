"""The whole pipeline at a fraction of its size: results, report, targets, refusals."""

import json
from pathlib import Path

import pytest
import torch

from engine.checkpoint.state import newest_checkpoint
from engine.data.dataset import TokenDataset
from engine.settings.training import TrainSettings
from model.config import read_config
from model.weights import load_model
from recipes import prepare, quickstart
from recipes.chain.stages import read_chain
from recipes.example import closing, report
from recipes.example.text import ExampleSettings

SMALL = ExampleSettings(
    facts=16, largest_first=3, largest_second=3, unseen_sums=2, unasked_facts=2, conversation_rounds=1, preferences=8
)
TRAINED = ("base", "cpt", "sft1", "sft2", "dpo")
MODELS = ["base", "resized", "CPT", "SFT 1", "SFT 2", "DPO"]


def stages_of(out: Path | str) -> dict:
    """The chain's stages by name, with their paths in a folder."""
    settings = quickstart.read_chain_file()
    chain, mistakes = read_chain(settings.stages, root=settings.root, out=str(out), options={})
    assert not mistakes
    return {stage.name: stage for stage in chain.stages}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    settings = quickstart.QuickstartSettings(out=str(out), device="cpu", steps=2, new_pieces=100, example=SMALL)
    return out, quickstart.run(settings)


def test_every_stage_leaves_its_results(made):
    out, _ = made
    assert {path.name for path in out.iterdir()} == set(quickstart.MADE)
    for name in TRAINED:
        checkpoint = newest_checkpoint(out / name)
        assert checkpoint == out / name / "step-00000002"
        assert (out / name / "metrics.jsonl").is_file()
        assert (checkpoint / "training" / "state.json").is_file()
    assert read_config(out / "base" / "step-00000002").unpadded_vocab_size == 32000
    assert read_config(out / "resized").unpadded_vocab_size == 32100
    assert read_config(out / "export").vocab_size == 32128
    for path in (out / "data").iterdir():
        assert len(TokenDataset.open(path)) > 0


def test_each_stage_starts_from_the_one_before(made):
    out, _ = made

    def begun_with(name: str) -> str:
        return json.loads((out / name / "step-00000002" / "training" / "state.json").read_text())["settings"]["model"]

    assert begun_with("base") == "preset:tiny"
    assert begun_with("cpt") == str(out / "resized")
    assert [begun_with(name) for name in ("sft1", "sft2", "dpo")] == [str(out / name) for name in ("cpt", "sft1", "sft2")]


def test_the_exported_folder_is_the_last_model_and_loads_in_transformers(made):
    out, table = made
    transformers = pytest.importorskip("transformers")
    assert table["exported"] == str(out / "export")
    ours = load_model(out / "export")
    last = load_model(out / "dpo" / "step-00000002")
    for (name, exported), (_, trained) in zip(ours.named_parameters(), last.named_parameters(), strict=True):
        assert torch.equal(exported, trained), name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "export")
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    question = [{"role": "user", "content": "日本の首都はどこですか？"}, {"role": "assistant", "content": "東京です。"}]
    text = transformers.AutoTokenizer.from_pretrained(out / "export").apply_chat_template(question, tokenize=False)
    assert text == "<s>[INST] 日本の首都はどこですか？ [/INST] 東京です。 </s>"


def test_the_report_has_every_item(made):
    out, table = made
    assert table == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [entry["model"] for entry in table["models"]] == MODELS
    cells = {"en fact", "en sum", "ja fact", "ja sum"}
    for entry in table["models"]:
        for questions in ("held_out", "unseen"):
            assert set(entry[questions]) == cells
            for cell in entry[questions].values():
                assert 0 <= cell["exact"] <= 1
                assert cell["loss"] > 0
                assert cell["questions"] > 0
    for values in table["characters_per_token"].values():
        assert values["before"] > 0
    assert (
        table["characters_per_token"]["text_ja_heldout"]["after"] > table["characters_per_token"]["text_ja_heldout"]["before"]
    )
    assert (
        table["characters_per_token"]["text_en_heldout"]["after"] == table["characters_per_token"]["text_en_heldout"]["before"]
    )
    assert table["reward_margin"]["before"] == 0
    assert table["reward_margin"]["after"] != 0
    assert set(table["polite_share"]) == {"en", "ja"}
    assert [answer["language"] for answer in table["answers"]] == ["en"] * 3 + ["ja"] * 3
    for name in TRAINED:
        curve = table["curves"][name]
        assert [point["step"] for point in curve["training"]] == [1, 2]
        assert [point["step"] for point in curve["heldout"]] == [0, 2]
    seconds = table["seconds"]
    stages = {name for name in stages_of(out) if not name.startswith("scores_")} - {"report"}
    assert set(seconds) == {"evaluation", "total", *stages}
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"], abs=1)


def test_the_report_is_readable_and_drawn(made):
    out, table = made
    text = (out / "report.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    for name in MODELS:
        # Two tables of eight figures: held-out questions and unseen questions.
        assert len([line for line in lines if line.startswith(f"| {name} |") and line.count("|") == 10]) == 2
    for heading in ("Held-out questions", "Vocabulary", "Preference tuning", "Answers", "Losses", "Time"):
        assert any(line.startswith("## ") and heading in line for line in lines)
    for answer in table["answers"]:
        assert answer["question"] in text
    assert "reward margin" in text
    assert table["exported"] in text
    assert "not checked" in lines[-1]
    picture = (out / "losses.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_a_full_run_that_misses_its_targets_fails(made):
    _, table = made
    assert table["missed"]
    assert not table["full"]
    closing.check_targets(table, Path("run/report.md"))
    with pytest.raises(ValueError, match=r"English facts are .*% exact after SFT 2, below 80%.*run/report\.md"):
        closing.check_targets(table | {"full": True}, Path("run/report.md"))
    closing.check_targets(table | {"full": True, "missed": []}, Path("run/report.md"))


def test_a_second_run_removes_only_the_results_of_the_first(tmp_path):
    out = tmp_path / "run"
    quickstart.start_afresh(out)
    for name in ("sft1", "export"):
        (out / name / "deep").mkdir(parents=True)
    (out / "report.md").write_text("old")
    (out / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "data").write_text("mine")
    (out / "data").symlink_to(tmp_path / "elsewhere")
    quickstart.start_afresh(out)
    assert {path.name for path in out.iterdir()} == {quickstart.MARKER, "notes.txt"}
    assert (tmp_path / "elsewhere" / "data").read_text() == "mine"


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit, match="holds files that no quickstart made"):
        quickstart.main(["--out", str(tmp_path), "--device", "cpu"])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_dry_run_prints_every_stage_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quickstart.main(["--dry-run"])
    printed = capsys.readouterr().out
    for number, (name, stage) in enumerate(stages_of("runs/quickstart").items(), 1):
        assert f"[{number}/24] {name}: to make: {stage.command.split(' --device')[0]}" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argument", ["--steps=0", "--new-pieces=0"])
def test_settings_out_of_range_are_refused(argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        quickstart.main([argument])
    assert "must be at least 1" in str(stopped.value) + capsys.readouterr().err


def test_every_path_moves_with_out():
    for stage in stages_of("elsewhere").values():
        assert quickstart.ROOT not in repr(stage.settings)


def test_each_stage_reads_what_the_stages_before_make(tmp_path):
    stages = stages_of(tmp_path)
    model = {"base": "resized", "resized": "cpt", "cpt": "sft1", "sft1": "sft2", "sft2": "dpo"}
    assert stages["vocabulary"].settings.model == stages["base"].settings.out
    assert stages["vocabulary"].settings.model_out == str(tmp_path / "resized")
    for before, after in list(model.items())[1:]:
        assert stages[after].settings.model == str(tmp_path / before)
    assert stages["export"].settings.source == stages["dpo"].settings.out
    prepared = {stage.settings.out for stage in stages.values() if isinstance(stage.settings, prepare.PrepareSettings)}
    used = {
        path
        for stage in stages.values()
        if isinstance(stage.settings, TrainSettings)
        for path in (*stage.settings.heldout, *(source.path for source in stage.settings.sources))
    }
    assert used == prepared


def test_the_machine_is_named():
    assert f"{torch.get_num_threads()} threads" in report.machine(torch.device("cpu"))


def test_a_file_in_place_of_its_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*file: is a file; name a folder with --out"):
        quickstart.main(["--out", str(tmp_path / "file"), "--device", "cpu"])
