"""A run that goes on needs its starting model's path no more: content counts, and a model that is gone is rarely missed."""

import json
import shutil
from pathlib import Path

import pytest

from engine.run import open_run
from model.config import read_config
from model.mistral import Mistral, initialize
from model.weights import save_model
from recipes import dpo, sft

RECIPES = {"sft": (sft, "conversations"), "dpo": (dpo, "preferences")}


@pytest.fixture(scope="module")
def stopped(tiny_settings, tiny_model, tmp_path_factory):
    """{stage: folder}: runs of four steps, killed after two, each with the model in `model` that it began with beside it."""
    folders = {}
    for stage, (recipe, _) in RECIPES.items():
        folder = folders[stage] = tmp_path_factory.mktemp(stage)
        shutil.copytree(tiny_model, folder / "model")
        recipe.run(tiny_settings(stage, folder / "run", **changes(folder)))
        shutil.rmtree(folder / "run" / "step-00000004")
    return folders


def changes(folder, model="model"):
    log = {"tensorboard": False, "every": 1}
    return {"model": str(folder / model), "steps": 4, "checkpoint_every": 2, "heldout": [], "log": log}


@pytest.fixture
def copied(stopped, tiny_settings, tmp_path):
    """copied(stage) -> a copy of that run's folders, and a function that opens the run with a model of that name."""

    def copy(stage):
        folder = Path(shutil.copytree(stopped[stage], tmp_path / stage))
        settings = tiny_settings(stage, folder / "run", **changes(stopped[stage]))
        # The run names the model of its own copy.
        for path in folder.glob("run/step-*/training/state.json"):
            path.write_text(path.read_text().replace(settings.model, str(folder / "model")))

        def opened(model):
            return open_run(tiny_settings(stage, folder / "run", **changes(folder, model)), (RECIPES[stage][1],))

        return folder, opened

    return copy


def other_weights(folder):
    """Write other weights into a model's folder."""
    model = Mistral(read_config(folder))
    initialize(model, 7)
    save_model(model, folder)


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_run_goes_on_with_its_starting_model_under_another_path(copied, how):
    folder, opened = copied("sft")
    how(folder / "model", folder / "elsewhere")
    run = opened("elsewhere")
    assert (run.start, run.state(3).model) == (2, opened("elsewhere").state(3).model)
    assert json.loads((run.checkpoint / "training" / "state.json").read_text())["model"] == run.state(3).model is not None


def test_another_model_is_refused_by_name(copied, tiny_model):
    folder, opened = copied("sft")
    shutil.copytree(folder / "model", folder / "other")
    other_weights(folder / "other")
    said = (
        f"holds a run with model = '{folder / 'model'}', the settings now say '{folder / 'other'}', which has other weights; "
    )
    with pytest.raises(ValueError, match=said):
        opened("other")
    with pytest.raises(FileNotFoundError, match=f"{folder / 'nowhere'}: no such folder"):
        opened("nowhere")


def test_a_run_goes_on_without_its_starting_model(copied, tiny_settings, metric_lines, stopped):
    """Configuration and tokenizer come from the checkpoint."""
    folder, opened = copied("sft")
    shutil.rmtree(folder / "model")
    run = opened("model")
    assert (run.start, run.starting_model) == (2, None)
    sft.run(run.settings)
    whole = stopped["sft"] / "run"
    assert metric_lines(folder / "run") == metric_lines(whole)
    assert json.loads((folder / "run/step-00000004/training/state.json").read_text())["model"] == run.starting_weights


def test_a_starting_model_that_changed_is_noted(copied, capsys):
    folder, opened = copied("sft")
    other_weights(folder / "model")
    assert opened("model").start == 2
    assert (
        f"note       {folder / 'model'}: its weights changed since the run began; the run keeps its own"
        in capsys.readouterr().out
    )
    (folder / "model" / "config.json").write_text("{")
    assert opened("model").start == 2
    assert f"{folder / 'model'}: cannot be read any more (" in capsys.readouterr().out


def test_preference_tuning_misses_its_starting_model_only_for_tables_that_are_not_there(copied):
    folder, opened = copied("dpo")
    shutil.rmtree(folder / "model")
    settings = opened("model").settings
    (table,) = (folder / "run" / "reference").iterdir()
    table.rename(folder / "kept")
    with pytest.raises(FileNotFoundError, match=rf"{folder / 'model'}: no such folder .* the reference that .*reference lacks"):
        dpo.run(settings)
    (folder / "kept").rename(table)
    assert dpo.run(settings).name == "step-00000004"


def test_a_checkpoint_of_an_older_version_names_its_model_by_the_path(copied):
    folder, opened = copied("sft")
    path = folder / "run" / "step-00000002" / "training" / "state.json"
    state = json.loads(path.read_text())
    del state["model"]
    path.write_text(json.dumps(state))
    assert (opened("model").start, opened("model").state(3).model) == (2, None)
    shutil.move(folder / "model", folder / "elsewhere")
    with pytest.raises(ValueError, match=r"holds a run with model = '.*/model', the settings now say '.*/elsewhere'; choose"):
        opened("elsewhere")
    assert opened("model").start == 2


def test_a_tokenizer_that_a_run_was_given_may_be_gone(tiny_settings, stopped, tmp_path):
    out, tokenizer = tmp_path / "run", tmp_path / "tokenizer"
    shutil.copytree(stopped["sft"] / "model", tokenizer)
    settings = tiny_settings("sft", out, **changes(stopped["sft"]) | {"tokenizer": str(tokenizer)})
    sft.run(settings)
    before = open_run(settings, ("conversations",)).tokenizer
    shutil.rmtree(tokenizer)
    assert open_run(settings, ("conversations",)).tokenizer.fingerprint == before.fingerprint
