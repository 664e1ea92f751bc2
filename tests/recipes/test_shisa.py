"""The files of Shisa's recipe: each stage reads its file, each number has its reason, and the files fit one another."""

import dataclasses
import json
import re
import shutil
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine.optim.schedule import learning_rate
from engine.settings.toml import read_toml
from engine.settings.training import TrainSettings
from kernels import padded_to_tiles
from model.config import preset
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from model.weights import load_model
from recipes import dpo, export, prepare, pretrain, sft
from recipes.chain.stages import read_chain
from recipes.dpo import DpoSettings
from recipes.evaluate import EvaluateSettings
from recipes.export import ExportSettings
from recipes.generate import GenerateSettings
from recipes.pairs import PairsSettings
from recipes.pipeline import PipelineSettings
from recipes.prepare import PrepareSettings
from recipes.pretrain import PretrainSettings
from recipes.select import SelectSettings
from recipes.sft import SftSettings
from recipes.shisa import split_languages
from recipes.shisa.split_languages import SplitSettings
from recipes.translate import TranslateSettings
from recipes.vocabulary import VocabularySettings

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "shisa"
STAGES = {
    "select_ultrafeedback": SelectSettings,
    "translate_slimorca": TranslateSettings,
    "translate_airoboros": TranslateSettings,
    "generate": GenerateSettings,
    "pairs": PairsSettings,
    "split_pretrain": SplitSettings,
    "split_sft": SplitSettings,
    "vocabulary": VocabularySettings,
    "prepare_pretrain_ja": PrepareSettings,
    "prepare_pretrain_en": PrepareSettings,
    "prepare_sft_ja": PrepareSettings,
    "prepare_sft_en": PrepareSettings,
    "prepare_sft_slimorca": PrepareSettings,
    "prepare_dpo": PrepareSettings,
    "pretrain": PretrainSettings,
    "sft": SftSettings,
    "sft_ja": SftSettings,
    "dpo": DpoSettings,
    "evaluate": EvaluateSettings,
    "export": ExportSettings,
}
TRAININGS = ("pretrain", "sft", "sft_ja", "dpo")
# These settings do not change the resulting model, or their absence says enough.
UNSTATED = {
    "tokenizer",
    "heldout",
    "heldout_limit",
    "steps",
    "epochs",
    "device",
    "resume",
    "dry_run",
    "reference_cache",
    "offload",
    "parallel",
    "fp8",
    "guard",
    "profile",
    "replay",
    "evaluate",
    "force",
    "from_",
    "from_data",
    "from_optimizer",
    "start",
}


def read(stage: str):
    return read_toml(STAGES[stage], FOLDER / f"{stage}.toml")


def prepared() -> dict[str, PrepareSettings]:
    """The settings of every preparation by the folder that it writes."""
    return {settings.out: settings for stage in STAGES if stage.startswith("prepare_") for settings in [read(stage)]}


def test_every_file_of_the_recipe_is_read_by_its_stage():
    assert {path.stem for path in FOLDER.glob("*.toml")} == {*STAGES, "pipeline"}
    for stage, settings_class in STAGES.items():
        assert isinstance(read(stage), settings_class)


@pytest.mark.lint
@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_has_a_comment_above_it(stage):
    commented = False
    for number, line in enumerate((FOLDER / f"{stage}.toml").read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            commented = False
        elif line.startswith("#"):
            commented = True
        elif "=" in line:
            # The sources of a mixture share the comment of the first.
            assert commented or line.startswith(("path =", "share =", "passes =")), f"{stage}.toml:{number}: {line}"
        elif line.startswith("[["):
            commented = True


@pytest.mark.parametrize("stage", TRAININGS)
def test_no_hyperparameter_is_left_to_a_default(stage):
    table = tomllib.loads((FOLDER / f"{stage}.toml").read_text(encoding="utf-8"))

    def missing(settings_class, stated: dict) -> set[str]:
        return {field.name for field in dataclasses.fields(settings_class)} - stated.keys() - UNSTATED

    assert not missing(STAGES[stage], table)
    settings = read(stage)
    groups = ["optimizer", "schedule", "log"] + (["preference"] if stage == "dpo" else [])
    for group in groups:
        assert not missing(type(getattr(settings, group)), table[group])
    assert ("steps" in table) != ("epochs" in table)


@pytest.mark.lint
def test_the_readme_explains_every_source_tag():
    explained = set(re.findall(r"^\| \[([^\]]+)\]", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    used = set()
    for path in FOLDER.glob("*.toml"):
        comments = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
        tags = {tag.split(":")[0] for text in re.findall(r"\[([^\[\]]+)\]", comments) for tag in text.split("; ")}
        used |= tags - {"tags", "INST"}
    assert used == explained


def test_the_chain_runs_the_recipe_on_the_published_data_in_its_order():
    settings = read_toml(PipelineSettings, FOLDER / "pipeline.toml")
    chain, mistakes = read_chain(settings.stages, root=settings.root, out=settings.root, options={})
    assert not mistakes
    making = {"select_ultrafeedback", "translate_slimorca", "translate_airoboros", "generate", "pairs"}
    assert [stage.name for stage in chain.stages] == [stage for stage in STAGES if stage not in making]
    assert all(isinstance(stage.settings, STAGES[stage.name]) for stage in chain.stages)
    # Each training, the evaluation and the export follow from all before, by way of the model.
    assert {stage.name for stage in chain.depending(["sft"])} == {"sft", "sft_ja", "dpo", "evaluate", "export"}
    assert {stage.name for stage in chain.depending(["prepare_dpo"])} == {"prepare_dpo", "dpo", "evaluate", "export"}
    assert chain.depending(["vocabulary", "split_pretrain", "split_sft"]) == list(chain.stages)


def test_vocabulary_has_the_size_of_the_preset():
    vocabulary, shape = read("vocabulary"), preset("shisa-7b")
    pieces = Tokenizer.load(mistral_tokenizer_path()).vocab_size + vocabulary.new_pieces
    assert pieces == 120_000 == shape.unpadded_vocab_size
    assert padded_to_tiles(pieces) == 120_064 == shape.vocab_size


def test_pretraining_sees_eight_billion_tokens_nine_in_ten_japanese():
    settings = read("pretrain")
    assert abs(settings.steps * settings.step_size - 8e9) < settings.step_size
    shares = {Path(source.path).name: source.share for source in settings.sources}
    assert shares == {"pretrain-ja": 0.9, "pretrain-en": 0.1}
    assert sum(shares.values()) == pytest.approx(1)


def test_second_fine_tuning_is_one_epoch_of_the_japanese_part_of_the_first():
    first, second = read("sft"), read("sft_ja")
    assert second.epochs == 1
    assert [source.path for source in second.sources] == ["runs/shisa/data/sft-ja"]
    assert set(second.sources) < set(first.sources)
    assert second.heldout == first.heldout


def test_each_stage_reads_the_output_of_the_one_before():
    vocabulary = read("vocabulary")
    written = [vocabulary.model_out, *(read(stage).out for stage in TRAININGS)]
    taken = [*(read(stage).model for stage in TRAININGS), read("export").source]
    assert taken == written
    splits = {f"{read(stage).out}/{part}.jsonl.gz" for stage in ("split_pretrain", "split_sft") for part in ("ja", "rest")}
    files = [path for settings in prepared().values() for path in settings.paths if not path.startswith("hub:")]
    assert sorted(files) == sorted(splits)
    assert set(vocabulary.text) <= splits
    assert {settings.tokenizer for settings in prepared().values()} == {vocabulary.out}


def test_no_folder_is_written_twice():
    outs = [read(stage).out for stage in STAGES]
    outs += [read("vocabulary").model_out, *(f"{settings.out}-heldout" for settings in prepared().values())]
    assert len(set(outs)) == len(outs)


@pytest.mark.parametrize(
    ("stage", "kind"), [("pretrain", "text"), ("sft", "conversations"), ("sft_ja", "conversations"), ("dpo", "preferences")]
)
def test_training_reads_prepared_data_of_its_kind(stage, kind):
    settings, data = read(stage), prepared()
    for source in settings.sources:
        assert data[source.path].kind == kind
    for folder in settings.heldout:
        assert data[folder.removesuffix("-heldout")].heldout > 0
    if kind == "preferences":
        assert data[settings.sources[0].path].max_length == settings.context_length


@pytest.mark.parametrize("stage", TRAININGS)
def test_sizes_and_schedule_are_consistent(stage):
    settings: TrainSettings = read(stage)
    sides = 2 if stage == "dpo" else 1
    assert settings.pack_tokens >= sides * settings.context_length
    assert settings.context_length <= preset("shisa-7b").sliding_window
    if stage != "dpo":
        assert settings.step_size % settings.pack_tokens == 0
    steps = settings.steps or 190
    rates = [learning_rate(settings.schedule, step, steps) for step in range(steps)]
    assert max(rates) == settings.schedule.peak
    assert rates[-1] < settings.schedule.peak / 10


def test_the_whole_chain_runs_on_a_tiny_model(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """Split, prepare and train four times by the files, at a thousandth of the size."""
    monkeypatch.chdir(tmp_path)
    japanese, english = "ねこ は 赤い いぬ を 見る です", "the cat sees a red dog and it runs home"
    texts = [{"text": f"{text} {number}"} for number in range(40) for text in (japanese, english)]
    chats = [
        {"conversations": [{"from": "human", "value": f"{text} {number}"}, {"from": "gpt", "value": text}]}
        for number in range(40)
        for text in (japanese, english)
    ]
    pairs = [
        {"prompt": f"{text} {number}", "chosen": text, "rejected": "it runs"}
        for number in range(8)
        for text in (japanese, english)
    ]
    given = {"split_pretrain": texts, "split_sft": chats, "prepare_sft_slimorca": chats, "prepare_dpo": pairs}
    shutil.copytree(tiny_tokenizer, read("vocabulary").out)
    shutil.copytree(tiny_model, read("vocabulary").model_out)
    folders = [tiny_model]
    for stage, settings_class in STAGES.items():
        settings = read(stage)
        if stage in given:
            (tmp_path / f"{stage}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in given[stage]), encoding="utf-8")
            settings = dataclasses.replace(settings, paths=(f"{stage}.jsonl",))
        if settings_class is SplitSettings:
            split_languages.run(settings)
        elif settings_class is PrepareSettings:
            prepare.run(dataclasses.replace(settings, heldout=0.2, preview=0))
        elif stage in TRAININGS:
            run = {"pretrain": pretrain.run, "sft": sft.run, "sft_ja": sft.run, "dpo": dpo.run}[stage]
            checkpoint = run(
                dataclasses.replace(
                    settings,
                    step_size=4 if stage == "dpo" else 128,
                    context_length=64,
                    pack_tokens=128,
                    device="cpu",
                    dtype="float32",
                    steps=2,
                    epochs=None,
                    evaluate_every=0,
                    checkpoint_every=0,
                    keep_every=0,
                    schedule=dataclasses.replace(settings.schedule, warmup_steps=1),
                    log=dataclasses.replace(settings.log, tensorboard=False),
                )
            )
            folders.append(checkpoint)
        elif stage == "export":
            exported = export.run(settings)
    assert Tokenizer.load(exported).fingerprint == Tokenizer.load(tiny_tokenizer).fingerprint
    chain = [load_model(folder).state_dict() for folder in folders]
    assert all(not torch.equal(before[name], after[name]) for before, after in pairwise(chain) for name in before)
