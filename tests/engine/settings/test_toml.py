"""Settings: read from TOML, overridden, written back, and refused with the file and the key."""

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.settings.sections import LogSettings, OptimizerSettings, PreferenceSettings, ScheduleSettings, Source
from engine.settings.toml import from_table, named, parse, read_toml, to_toml
from engine.settings.training import TrainSettings
from recipes.chat import ChatSettings
from recipes.dpo import DpoSettings
from recipes.export import ExportSettings
from recipes.prepare import PrepareSettings
from recipes.pretrain import PretrainSettings
from recipes.sft import SftSettings
from recipes.vocabulary import VocabularySettings

SOURCES = (Source("data/en", share=0.25), Source('odd "name"\\', passes=2.5))
TRAIN = {"model": "preset:tiny", "out": "runs/日本語", "sources": SOURCES, "step_size": 512}
EVERY = [
    PretrainSettings(**TRAIN),
    PretrainSettings(
        **TRAIN,
        tokenizer="t",
        heldout=("a", "b"),
        heldout_limit=3,
        context_length=64,
        pack_tokens=128,
        steps=7,
        epochs=1.5,
        seed=-3,
        device="cpu",
        dtype="bfloat16",
        evaluate_every=2,
        checkpoint_every=3,
        keep_checkpoints=1,
        resume="never",
        dry_run=True,
        optimizer=OptimizerSettings(0.8, 0.9, 1e-20, 0.0, 1e300),
        log=LogSettings(1, False, "project"),
        schedule=ScheduleSettings("linear", 1e-05, 4, 0.1),
    ),
    SftSettings(**TRAIN, neftune_alpha=15.0),
    DpoSettings(**TRAIN, preference=PreferenceSettings("sigmoid", 0.3, 0.1), neftune_alpha=2.0, reference_cache="cache"),
    ExportSettings(source="runs/dpo", out="exports/x", dtype="float16", overwrite=True),
    VocabularySettings(text=("a.txt", "b.txt"), out="t", new_pieces=100),
    PrepareSettings(kind="conversations", paths=("a.jsonl",), out="d"),
    ChatSettings(model="m", history="chat_history"),
]


def written(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("value", EVERY, ids=lambda value: type(value).__name__)
def test_every_recipes_settings_read_back_equal(tmp_path, value):
    path = written(tmp_path, to_toml(value))
    assert read_toml(type(value), path) == value
    assert parse(type(value), [str(path)]) == value


# Paths; an empty one is refused, and a leading ~ becomes the home folder.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: text[0] != "~")
positive = st.floats(0, exclude_min=True, allow_infinity=False)
sources = st.builds(Source, path=texts, share=st.none() | positive)


@given(
    st.builds(
        DpoSettings,
        model=texts,
        out=texts,
        sources=st.lists(sources, min_size=1, max_size=3).map(tuple),
        step_size=st.integers(1, 2**62),
        heldout=st.lists(texts, max_size=3).map(tuple),
        epochs=st.none() | positive,
        seed=st.integers(-(2**62), 2**62),
        neftune_alpha=st.floats(0, allow_infinity=False),
        optimizer=st.builds(OptimizerSettings, eps=positive, clip_norm=st.floats(0, allow_infinity=False)),
        reference_cache=texts,
    )
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_settings_read_back_equal(tmp_path, value):
    assert read_toml(DpoSettings, written(tmp_path, to_toml(value))) == value


BASE = 'model = "m"\nout = "o"\nstep_size = 8\n'
SOURCE = '[[sources]]\npath = "p"\n'


@pytest.mark.parametrize("value", ["nan", "inf", "-1.0"])
@pytest.mark.parametrize(
    "name",
    [
        *("neftune_alpha", "epochs", "parallel.timeout", "schedule.peak", "schedule.final_share", "preference.beta"),
        *("preference.label_smoothing", "guard.spike", "guard.lag", "sources.0.share", "sources.0.passes"),
        *(f"optimizer.{name}" for name in ("beta1", "beta2", "eps", "weight_decay", "clip_norm")),
    ],
)
def test_numbers_that_cannot_be_meant_are_named(tmp_path, name, value):
    """Every number of a training run is finite and not negative. NaN passes a check of the form `value < 0`."""
    *section, key = name.split(".")
    text = BASE + SOURCE
    if section == ["sources", "0"]:
        text += f"{key} = {value}\n"
    else:
        text = text + f"[{section[0]}]\n{key} = {value}\n" if section else f"{key} = {value}\n" + text
    with pytest.raises(ValueError, match=rf"{key} = {float(value)}: must ") as error:
        read_toml(DpoSettings, written(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "step_siz = 3\n" + SOURCE, "unknown key 'step_siz'; the nearest known one is 'step_size'"),
        (BASE + SOURCE + "[optimizer]\nbeta_1 = 1\n", "unknown key 'optimizer.beta_1'; the nearest known one is 'optimizer.b"),
        (BASE + SOURCE + "[optimiser]\nbeta1 = 0.5\n", "unknown key 'optimiser'; the nearest known one is 'optimizer'"),
        (BASE + SOURCE + "weight = 1\n", "unknown key 'sources.0.weight'; the nearest known one is 'sources.0."),
        (BASE + "step-size = 9\n" + SOURCE, "'step_size' is given twice"),
        ('model = "m"\nout = "o"\n' + SOURCE, "missing key 'step_size'"),
        (BASE + "[[sources]]\nshare = 1\n", "missing key 'sources.0.path'"),
        (BASE + 'steps = "3"\n' + SOURCE, "steps = '3': must be int, is str"),
        (BASE + "steps = true\n" + SOURCE, "steps = True: must be int, is bool"),
        (BASE + "steps = 3.0\n" + SOURCE, "steps = 3.0: must be int, is float"),
        (BASE + "dry_run = 1\n" + SOURCE, "dry_run = 1: must be bool, is int"),
        (BASE + 'heldout = "x"\n' + SOURCE, "heldout = 'x': must be a list, is str"),
        (BASE + "heldout = [1]\n" + SOURCE, "heldout.0 = 1: must be str, is int"),
        (BASE + 'sources = ["p"]\n', "sources.0 = 'p': must be a table, is str"),
        (BASE + "optimizer = 3\n" + SOURCE, "optimizer = 3: must be a table, is int"),
        (BASE + 'device = "tpu"\n' + SOURCE, "device = 'tpu': must be one of 'auto', 'cpu', 'cuda'"),
        (BASE + "steps = 0\n" + SOURCE, "steps = 0: must be above 0"),
        (BASE + "evaluate_every = 5\n" + SOURCE, "evaluate_every has no effect without heldout"),
        (BASE + SOURCE + "[schedule]\npeak = -1.0\n", "schedule.peak = -1.0"),
        (BASE + "sources = []\n", "sources: name at least one prepared folder"),
        (BASE + "x = \n", "not valid TOML"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ValueError) as error:
        read_toml(PretrainSettings, path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit) as ended:
        parse(PretrainSettings, [str(path)])
    assert ended.value.code == f"error: {error.value}"


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.toml: no such settings file"):
        read_toml(PretrainSettings, tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary.toml: not valid TOML"):
        read_toml(PretrainSettings, tmp_path / "binary.toml")
    with pytest.raises(SystemExit, match=r"error: nowhere.toml: no such settings file"):
        parse(PretrainSettings, ["nowhere.toml", "--out", "x"])


def test_overrides_win_over_the_file(tmp_path):
    path = written(tmp_path, BASE + "steps = 4\n" + SOURCE + "[schedule]\npeak = 1e-3\nwarmup_steps = 7\n")
    found = parse(
        SftSettings,
        [str(path), "--steps", "9", "--schedule.peak", "2e-4", "--neftune-alpha", "0", "--sources.0.path", "q", "--dry-run"],
    )
    expected = from_table(
        SftSettings,
        {
            "model": "m",
            "out": "o",
            "step_size": 8,
            "steps": 9,
            "sources": [{"path": "q"}],
            "neftune_alpha": 0,
            "dry_run": True,
            "schedule": {"peak": 2e-4, "warmup_steps": 7},
        },
    )
    assert found == expected


def test_overrides_complete_the_file(tmp_path):
    """Missing keys, and settings that need another setting, are errors only after the overrides."""
    path = written(tmp_path, 'model = "m"\nstep_size = 8\nevaluate_every = 3\n' + SOURCE)
    found = parse(PretrainSettings, [str(path), "--out", "o", "--heldout", "h1", "h2"])
    assert (found.out, found.heldout, found.evaluate_every) == ("o", ("h1", "h2"), 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "o", "--step-siz", "1"], "step-siz"),
        (["--out", "o", "--steps", "three"], "three"),
        (["--out", "o", "--steps", "0"], "steps = 0"),
        (["--ou", "o"], "--out"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, capsys, argv, message):
    path = written(tmp_path, 'model = "m"\nstep_size = 8\n' + SOURCE)
    with pytest.raises(SystemExit) as ended:
        parse(PretrainSettings, [str(path), *argv])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wrong_file_with_overrides_is_named(tmp_path):
    path = written(tmp_path, BASE + "step_siz = 3\n" + SOURCE)
    with pytest.raises(SystemExit, match=r"config.toml: unknown key 'step_siz'"):
        parse(PretrainSettings, [str(path), "--steps", "1"])


def test_a_command_line_alone_is_enough_without_lists_of_tables():
    assert parse(ExportSettings, ["--source", "a", "--out", "b"]) == ExportSettings(source="a", out="b")


@pytest.mark.parametrize(
    ("settings_class", "argv", "said"),
    [
        (
            ExportSettings,
            [],
            "missing setting 'source' (and out): give --source, or source = ... in a TOML file: the command S",
        ),
        (
            ExportSettings,
            ["--source=a"],
            "missing setting 'out': give --out, or out = ... in a TOML file: the command SETTINGS.t",
        ),
        (
            PretrainSettings,
            ["--out", "o", "--model", "m", "--sources.0.path", "p"],
            "missing setting 'step_size': give --step-si",
        ),
        (
            PretrainSettings,
            ["--model", "m", "--out", "o", "--step-size", "3", "--no-dry-run"],
            "missing setting 'sources': add it in a TOML file, as tables ([[sources]] path = ...)",
        ),
    ],
)
def test_a_missing_setting_is_named_in_one_line(settings_class, argv, said):
    with pytest.raises(SystemExit) as ended:
        parse(settings_class, argv)
    assert str(ended.value.code).startswith(f"error: {said}")
    assert "\n" not in str(ended.value.code)


def test_a_missing_setting_beside_a_file_is_named_in_one_line(tmp_path):
    path = written(tmp_path, 'model = "m"\nstep_size = 8\n' + SOURCE)
    with pytest.raises(SystemExit, match=r"^error: missing setting 'out': give --out, or out = \.\.\. in a TOML file: "):
        parse(PretrainSettings, [str(path), "--steps", "1"], prog="python -m recipes.pretrain")


@pytest.mark.parametrize("settings_class", sorted({type(value) for value in EVERY}, key=lambda c: c.__name__))
def test_help_needs_no_file_and_explains_the_options(capsys, settings_class):
    with pytest.raises(SystemExit) as ended:
        parse(settings_class, ["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "--out" in shown or settings_class is ChatSettings
    if issubclass(settings_class, TrainSettings):
        for words in ("Batch size:", "Micro-batch size:", "Gradient accumulation", "Activation checkpointing:", "Validation:"):
            assert words in shown
        assert "Learning rate at the end of the warm-up." in shown


@dataclass(frozen=True)
class _Shapes:
    pair: tuple[int, str]
    kind: Literal["a", "b"] | None = None


def test_lists_of_fixed_length_are_checked_by_element(tmp_path):
    value = _Shapes((3, "x"), "b")
    assert read_toml(_Shapes, written(tmp_path, to_toml(value))) == value
    with pytest.raises(ValueError, match="pair: needs 2 values, has 1"):
        from_table(_Shapes, {"pair": [1]})
    with pytest.raises(ValueError, match=r"pair.1 = 2: must be str, is int"):
        from_table(_Shapes, {"pair": [1, 2]})
    with pytest.raises(ValueError, match=r"kind = 'c': must be one of 'a', 'b'"):
        from_table(_Shapes, {"pair": [1, "x"], "kind": "c"})


def test_the_file_may_stand_anywhere_and_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (BASE + SOURCE).encode())
    assert parse(PretrainSettings, ["--steps", "3", str(path), "--seed", "1"]) == parse(
        PretrainSettings, [str(path), "--seed", "1", "--steps", "3"]
    )
    with pytest.raises(SystemExit, match=r"error: b.toml: a second settings file, beside .*config.toml: name one"):
        parse(PretrainSettings, [str(path), "b.toml"])


@pytest.mark.parametrize(
    ("settings_class", "argument", "message"),
    [
        (ChatSettings, "models", "models: is a folder; the only argument without .* such as --model models$"),
        (ChatSettings, "nowhere/m", "nowhere/m: no such settings file; the only argument .* --model nowhere/m$"),
        (ExportSettings, "models", "models: is a folder; .* such as --source models$"),
        (PretrainSettings, "models.toml", "models.toml: is a folder, not a settings file$"),
    ],
)
def test_an_argument_without_an_options_name_must_be_a_settings_file(tmp_path, monkeypatch, settings_class, argument, message):
    monkeypatch.chdir(tmp_path)
    for name in ("models", "models.toml"):
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        parse(settings_class, [argument])


def test_a_tilde_is_the_home_folder_in_every_path_and_in_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.chdir(tmp_path)
    text = 'model = "~/m"\nout = "~/o"\nstep_size = 8\nheldout = ["~/h"]\nreference_cache = "~/r"\n[[sources]]\npath = "~/p"\n'
    found = read_toml(DpoSettings, written(tmp_path, text))
    assert (found.model, found.out, found.heldout, found.reference_cache) == (
        "/home/ada/m",
        "/home/ada/o",
        ("/home/ada/h",),
        "/home/ada/r",
    )
    assert found.sources[0].path == "/home/ada/p"
    # Bash leaves a ~ behind = alone.
    said = parse(ChatSettings, ["--model=~/m", "--prompt", "~/m", "--system", "~"])
    assert (said.model, said.prompt, said.system) == ("/home/ada/m", "~/m", "~")
    assert parse(PrepareSettings, ["--kind", "text", "--paths", "~/a", "b", "--out", "c"]).paths == ("/home/ada/a", "b")


@pytest.mark.parametrize("settings_class", sorted({type(value) for value in EVERY}, key=lambda c: c.__name__))
def test_help_names_the_settings_file(capsys, settings_class):
    with pytest.raises(SystemExit):
        parse(settings_class, ["--help"], prog="python -m recipes.x")
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "from both; an option overrides the file's key: python -m recipes.x SETTINGS.toml [OPTIONS]" in shown
    if issubclass(settings_class, TrainSettings):
        assert "[[sources]] tables can be added in the file alone, with the keys path, share, passes." in shown


@pytest.mark.parametrize(
    ("settings_class", "argv", "name"),
    [
        (ExportSettings, ["--source", "", "--out", "o"], "source"),
        (PrepareSettings, ["--kind", "text", "--paths", "a", "", "--out", "o"], "paths"),
        (PrepareSettings, ["--kind", "text", "--paths", "a", "--out", ""], "out"),
        (PrepareSettings, ["--kind", "text", "--paths", "a", "--out", "o", "--tokenizer", ""], "tokenizer"),
    ],
)
def test_an_empty_path_is_refused_and_not_taken_for_the_current_folder(settings_class, argv, name):
    with pytest.raises(SystemExit, match=rf"^error: {name} is empty: name a file or folder"):
        parse(settings_class, argv)


def test_a_path_that_is_empty_by_default_may_be_empty(tmp_path):
    assert read_toml(DpoSettings, written(tmp_path, BASE + 'tokenizer = ""\n' + SOURCE)).tokenizer == ""


def test_a_list_of_tables_as_an_option_is_refused_in_one_line(tmp_path):
    path = written(tmp_path, BASE + SOURCE)
    with pytest.raises(SystemExit, match=r"^error: --sources: add sources in the TOML file, each as a table"):
        parse(PretrainSettings, [str(path), "--sources", "data/x"])


def test_every_value_has_a_dotted_name_and_paths_are_told_apart():
    found = {name: (value, is_path) for name, value, is_path in named(PretrainSettings(**TRAIN, heldout=("a", "b"), steps=3))}
    assert found["sources.0.path"] == ("data/en", True)
    assert found["sources.0.share"] == (0.25, False)
    assert found["heldout.1"] == ("b", True)
    assert found["schedule.peak"] == (ScheduleSettings().peak, False)
    assert found["steps"] == (3, False)
    assert "epochs" not in found
