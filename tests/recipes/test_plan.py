"""The plan of a run from its configuration alone: every training recipe, on the GPUs that it targets."""

import json
from pathlib import Path

import pytest

from engine.estimate.devices import DEVICES
from engine.estimate.memory import plan
from model.config import PRESETS
from recipes.dpo import DpoSettings
from recipes.plan import look_ahead, main, settings_of
from recipes.pretrain import PretrainSettings
from recipes.sft import SftSettings

SHISA = Path(__file__).resolve().parents[2] / "recipes" / "shisa"
MODEL = ["--model", "preset:shisa-7b", "--optimizer.moments", "bfloat16"]


def outlook(stage: str, *overrides: str, device: str = "h200", gpus: int = 1, memory_gib: float = 0.0):
    settings = settings_of(str(SHISA / f"{stage}.toml"), [*MODEL, *overrides])
    return look_ahead(settings, DEVICES[device], gpus, memory_gib)


@pytest.mark.parametrize(("stage", "recipe"), [("pretrain", PretrainSettings), ("sft", SftSettings), ("dpo", DpoSettings)])
def test_the_settings_in_the_file_tell_the_recipe(stage, recipe):
    assert type(settings_of(str(SHISA / f"{stage}.toml"), [])) is recipe


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_shisa_7b_fits_one_h200(stage):
    """16,384 tokens a micro-batch with exact masters, bfloat16 moments and `light`, where gradients add up in bfloat16."""
    found = outlook(stage, "--pack-tokens", "16384", "--optimizer.gradients", "parameter")
    assert found.training.tokens == 16384
    assert found.training.log_probs == (stage == "dpo")
    assert found.free > 5
    assert found.largest["light"] >= 16384


def test_shisa_7b_fits_one_80_gb_card_with_its_moments_on_the_host():
    assert outlook("pretrain", "--pack-tokens", "4096", device="h100").free < 0
    found = outlook("pretrain", "--optimizer.offload", "moments", "--pack-tokens", "4096", device="h100")
    assert found.free > 4
    with pytest.raises(ValueError, match="works on one rank only"):
        outlook("pretrain", "--optimizer.offload", "moments", device="h100", gpus=8)


def test_shisa_7b_fits_eight_80_gb_cards():
    found = outlook("pretrain", "--pack-tokens", "8192", device="h100", gpus=8)
    assert found.training.shards == 8
    assert found.free > 30
    # Whole float32 sums take 29.7 GiB, an eighth of them 3.7.
    once = outlook("pretrain", "--pack-tokens", "8192", "--parallel.reduce_once", device="h100", gpus=8)
    assert found.free - once.free == pytest.approx(26, abs=0.7)


@pytest.mark.parametrize("mode", ["none", "ffn"])
def test_the_largest_micro_batch_fits_and_the_next_does_not(mode):
    tokens = outlook("pretrain", device="h100", gpus=8).largest[mode]
    for more, fits in ((0, True), (256, False)):
        found = outlook("pretrain", "--recompute", mode, "--pack-tokens", str(tokens + more), device="h100", gpus=8)
        assert (found.free >= 0) == fits


def test_a_small_step_is_one_micro_batch():
    settings = settings_of(str(SHISA.parent / "tiny" / "base.toml"), [])
    found = look_ahead(settings, DEVICES["h200"])
    assert set(found.largest.values()) == {settings.step_size}
    assert not found.training.accumulates


def test_json_holds_every_item_of_the_plan(capsys, tmp_path):
    picture = tmp_path / "new" / "scaling.svg"
    main([str(SHISA / "pretrain.toml"), *MODEL, "--pack-tokens", "16384", "--json", "--plot", str(picture)])
    table = json.loads(capsys.readouterr().out)
    expected = plan(outlook("pretrain", "--pack-tokens", "16384").training)
    assert table["items_gib"] == {name: size / 2**30 for name, size in expected.items.items()}
    assert table["items_gib"]["weights"] * 2**30 == 2 * PRESETS["shisa-7b"].parameters
    total = table["peak_gib"] + table["context_gib"] + table["fragmentation_gib"] + table["free_gib"]
    assert total == pytest.approx(table["memory_gib"])
    assert [found["gpus"] for found in table["scaling"]] == [2**power for power in range(1, 7)]
    assert table["left_out"].keys() == {"1", "128", "256", "512", "1024"}
    assert picture.read_text().count("<svg") == 1


def test_the_text_names_every_item(capsys):
    main([str(SHISA / "pretrain.toml"), *MODEL, "--pack-tokens", "16384", "--memory-gib", "80"])
    text = capsys.readouterr().out
    for word in ("weights", "optimizer", "gradients", "activations", "logits", "head gradient", "context", "fragmentation"):
        assert f"  {word}" in text
    assert "DOES NOT FIT: too much by" in text


def test_a_run_that_does_not_fit_names_settings_that_do(capsys):
    given = [str(SHISA / "pretrain.toml"), *MODEL, "--pack-tokens", "8192", "--gpu", "h100"]
    main(given)
    (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("these would fit: "))
    for proposal in said.removeprefix("these would fit: ").split(", or "):
        changes = proposal.rpartition(" (")[0].replace('"', "").split(" with ")
        main([*given, *(word for change in changes for word in (f"--{change.split(' = ')[0]}", change.split(" = ")[1]))])
        assert "DOES NOT FIT" not in capsys.readouterr().out, proposal


def rows(capsys, *arguments):
    """The printed rows of numbers of GPUs, and the lines of what is left out."""
    main([str(SHISA / "pretrain.toml"), *MODEL, *arguments])
    lines = capsys.readouterr().out.splitlines()
    start = next((number for number, line in enumerate(lines) if line.split()[:1] == ["GPUs"]), len(lines) - 1)
    table = [line.split() for line in lines[start + 1 : lines.index("assumed:") - 1] if not line.startswith("left out")]
    return table, [line for line in lines if line.startswith("left out")]


def test_numbers_of_gpus_that_the_run_does_not_fit_are_left_out(capsys):
    """Each printed number of GPUs fits by a plan of its own; efficiencies relate to the first of them."""
    table, (_, left_out) = rows(capsys, "--gpu", "h100", "--pack-tokens", "8192")
    fitting = [row[0] for row in table]
    assert fitting == ["2", "4", "8", "16", "32", "64", "128"]
    for gpus in (1, 2, 4, 8):
        assert (outlook("pretrain", "--pack-tokens", "8192", device="h100", gpus=gpus).free >= 0) == (str(gpus) in fitting)
    assert table[0][4] == "100.0%"
    too_little = -outlook("pretrain", "--pack-tokens", "8192", device="h100", gpus=1).free
    assert f"1 GPU: {too_little:.1f} GiB too little" in left_out
    # 2^20 tokens are 128 micro-batches.
    assert "256, 512, 1,024 GPUs: step_size has fewer micro-batches of 8,192 tokens" in left_out


def test_the_slower_assumption_comes_first_and_unmeasured_rows_say_so(capsys):
    table, _ = rows(capsys, "--pack-tokens", "8192")
    for row in table:
        slow, each, share, fast = (float(value.strip("%").replace(",", "")) for value in row[2:6])
        assert slow <= fast
        assert each == pytest.approx(slow / int(row[0]), abs=1)
        assert share == pytest.approx(100 * each / float(table[0][3].replace(",", "")), abs=0.06)
        assert ("never measured" in " ".join(row)) == (row[0] != "1")
        assert ("network assumed" in " ".join(row)) == (int(row[0]) > 8)
    assert all("never measured" in " ".join(row) for row in rows(capsys, "--gpu", "h100", "--pack-tokens", "1024")[0])


def test_a_recompute_mode_that_no_document_fits_has_no_speed(capsys):
    _, left_out = rows(capsys, "--memory-gib", "80", "--optimizer.gradients", "parameter")
    found = outlook("pretrain", "--optimizer.gradients", "parameter", memory_gib=80)
    assert found.largest["light"] < 4096 <= found.largest["block"]
    assert found.speeds.keys() == {mode for mode, most in found.largest.items() if most >= 4096}
    assert left_out[0].startswith("left out, as fewer than 4,096 tokens fit: none (")


def test_a_run_that_fits_nowhere_has_no_speeds(capsys, tmp_path):
    table, (modes, gpus) = rows(capsys, "--memory-gib", "8")
    assert table == []
    assert modes.endswith("none (0), light (0), ffn (0), block (0)")
    assert gpus.startswith("left out: 1 GPU: ")
    with pytest.raises(SystemExit, match="--plot: no number of GPUs fits this run"):
        main([str(SHISA / "pretrain.toml"), *MODEL, "--memory-gib", "8", "--plot", str(tmp_path / "scaling.svg")])


def test_the_plan_holds_the_sums_that_the_run_would_choose():
    for pack, gradients in ((4096, "float32"), (2**18, "parameter"), (2**18 - 128, "float32")):
        found = outlook("pretrain", "--pack-tokens", str(pack))
        assert found.training.optimizer.gradients == gradients
    two, four = (
        outlook("pretrain", "--optimizer.gradients", gradients).memory.items["gradients"]
        for gradients in ("parameter", "float32")
    )
    assert (two, four) == tuple(size * PRESETS["shisa-7b"].parameters for size in (2, 4))
    assert outlook("pretrain").memory.items["gradients"] == four


def test_a_model_folder_gives_the_shape(tiny_model):
    settings = settings_of(str(SHISA / "pretrain.toml"), ["--model", str(tiny_model)])
    assert look_ahead(settings, DEVICES["h200"]).training.config.hidden_size == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model = runs/shisa/resized: no such folder yet; name its shape: --model preset:shisa-7b"),
        ([*MODEL, "--gpus", "3", "--parallel.replicas", "2"], "gpus = 3: must be a multiple of parallel.replicas = 2"),
        ([*MODEL, "--gpus", "0"], "gpus = 0"),
    ],
)
def test_wrong_arguments_give_one_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main([str(SHISA / "pretrain.toml"), *arguments])
    assert message in str(error.value)


def test_the_kind_of_gpu_and_the_device_have_names_of_their_own(capsys):
    config = str(SHISA / "sft.toml")
    with pytest.raises(SystemExit):
        main([config, *MODEL, "--device", "h100"])
    assert "--device says where a recipe runs (auto, cpu, cuda); the kind of GPU is --gpu h100" in capsys.readouterr().err
    main([config, *MODEL, "--device", "cpu", "--gpu", "h100"])
    assert "on 1 GPU of 79 GiB" in capsys.readouterr().out


def test_fp8_takes_memory_for_codes_and_is_predicted_to_be_a_quarter_faster():
    tokens = ("--pack-tokens", "8192")
    plain, fp8, lean = (
        outlook("pretrain", *tokens, *more)
        for more in ((), ("--precision", "fp8"), ("--precision", "fp8", "--fp8.no-keep-weights"))
    )
    assert (fp8.training.fp8_layers, lean.training.keep_codes) == (range(1, 31), False)
    assert fp8.memory.peak - lean.memory.peak == pytest.approx(fp8.memory.items["weight codes"], rel=0.01)
    assert fp8.speeds["light"].hidden == pytest.approx(1.26 * plain.speeds["light"].hidden, rel=0.03)
    assert lean.curve[0].hidden < fp8.curve[0].hidden
    assert fp8.basis(1) == "predicted; never measured"
    assert "FP8" in fp8.assumptions[-1]
    assert "FP8" not in plain.assumptions[-1]


def test_a_model_that_fp8_does_not_take_is_refused():
    with pytest.raises(ValueError, match=r"fp8\.bf16_first = 20 and fp8\.bf16_last = 20 leave none of the model's 32 layers"):
        outlook("pretrain", "--precision", "fp8", "--fp8.bf16-first", "20", "--fp8.bf16-last", "20")
