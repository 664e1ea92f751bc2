"""The operators' benchmark: what it counts, what it calls wrong, and whom it finds."""

import dataclasses
import json

import pytest
import torch

import kernels.rms_norm
from benchmarks import kernels as benchmark
from benchmarks import measure
from benchmarks.operators import OPERATORS
from benchmarks.operators.operator import Provider, Sizes
from model.config import PRESETS, MistralConfig

CPU = torch.device("cpu")
# 6 tokens in documents of 4 and 2, width 8, 4 query heads and 2 key/value heads of 2, feed-forward 5, 16 pieces, window 3.
CONFIG = MistralConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=5,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    sliding_window=3,
)
SIZES = Sizes.of(CONFIG, 6, 4)
TIMING = benchmark.Timing(CPU, rounds=2, repeats=1, ceilings={"product_flops": 1e9, "copy_bytes": 1e9})


def case_of(name, dtype=torch.float32, sizes=SIZES):
    return OPERATORS[name].case(sizes, dtype, CPU)


def measured(operator, names):
    return benchmark.measure_operator(operator, case_of(operator.name), names, TIMING)


def test_a_row_is_cut_into_documents():
    assert SIZES.documents == (4, 2)
    assert Sizes.of(CONFIG, 8, 4).documents == (4, 4)
    assert Sizes.of(CONFIG, 6).documents == (6,)


# A hidden state has 6 * 8 elements, gate or up 6 * 5, a layer 128 + 64 + 80 + 40 + 2 * 8; values of 2 bytes.
_HEAD, _LAYER = 2 * 6 * 8 * 16, 128 + 64 + 80 + 40 + 16
_PAIRS = 2 * ((1 + 2 + 3 + 3) + (1 + 2)) * 4 * 2  # with a window of 3, places of documents of 4 and 2 see so many
COSTS = {
    ("rms_norm", "forward"): ((48 + 8 + 48) * 2, 0),
    ("rms_norm", "backward"): ((48 + 48 + 8 + 48 + 8) * 2, 0),
    ("add_rms_norm", "forward"): ((48 + 48 + 8 + 48 + 48) * 2, 0),
    ("add_rms_norm", "backward"): ((48 + 48 + 48 + 8 + 48 + 8) * 2, 0),
    # 6 heads of 2 are turned in place, backward writes all 8; a float32 cosine and sine a token.
    ("rotary", "forward"): (6 * 6 * 2 * 2 * 2 + 6 * 2 * 4, 0),
    ("rotary", "backward"): (6 * 8 * 2 * 2 * 2 + 6 * 2 * 4, 0),
    ("swiglu", "forward"): (30 * 3 * 2, 0),
    ("swiglu", "backward"): (30 * 5 * 2, 0),
    ("swiglu backward, in place", "update"): (30 * 6 * 2, 0),
    # The weight's gradient is dense.
    ("embedding", "backward"): (6 * 8 + 6 * 8 * 2 + 16 * 8 * 2, 0),
    # int64 targets, int32 rows, float32 log-probabilities.
    ("linear_log_prob", "forward"): (6 * 8 * 2 + 16 * 8 * 2 + 6 * 16, _HEAD),
    ("linear_log_prob", "backward"): (2 * 6 * 8 * 2 + 2 * 16 * 8 * 2 + 6 * 16, 2 * _HEAD),
    ("linear_log_prob", "both"): (3 * 6 * 8 * 2 + 3 * 16 * 8 * 2 + 2 * 6 * 16, 3 * _HEAD),
    ("sliding_window_attention", "forward"): (2 * 6 * 8 * 2 + 2 * 6 * 4 * 2, 2 * _PAIRS),
    ("sliding_window_attention", "backward"): (4 * 6 * 8 * 2 + 4 * 6 * 4 * 2, 5 * _PAIRS),
    # Query and out of 4 heads of 2; keys and values of 2 heads at 3 attended places.
    ("decode_attention", "forward"): ((2 * 8 + 2 * 3 * 4) * 2, 2 * 2 * 3 * 8),
    # Gradient; parameter with remainder and both moments read and written.
    ("adamw", "update"): (_LAYER * (2 + 2 * (2 + 2) + 2 * 8), 0),
    ("gradient_norm", "forward"): (_LAYER * 2 + 4, 0),
}


@pytest.mark.parametrize(("name", "direction"), COSTS)
def test_an_operator_moves_and_computes_what_was_counted_by_hand(name, direction):
    cost = OPERATORS[name].cost(case_of(name, torch.bfloat16), direction)
    assert (cost.bytes, cost.operations) == COSTS[name, direction]


def test_the_embedding_reads_each_row_that_occurs_once():
    different = len(set(case_of("embedding").constants["tokens"].tolist()))
    assert different < 6
    cost = OPERATORS["embedding"].cost(case_of("embedding", torch.bfloat16), "forward")
    assert cost.bytes == 6 * 8 + different * 8 * 2 + 6 * 8 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_ours_and_plain_torch_are_right(name, dtype):
    """The exact results are written apart from our references, so that agreement says something about both."""
    operator = OPERATORS[name]
    case = case_of(name, dtype, Sizes.of(CONFIG, 70, 40))
    providers = {provider.name: provider for provider in operator.providers() if "compile" not in provider.name}
    judge = benchmark.Judge(operator, case, providers[operator.yardstick])
    for provider in providers.values():
        if provider.missing(case):
            continue
        trial = benchmark.Trial(operator, provider, case)
        for direction in provider.directions or operator.directions:
            row = judge.errors(trial, direction)
            assert "wrong" not in row, (provider.name, direction, row)


def test_a_wrong_kernel_is_flagged_and_is_no_peer_to_beat(monkeypatch):
    """Its window is one place too wide, and it is the fastest."""
    operator = OPERATORS["sliding_window_attention"]
    wide = dataclasses.replace(case_of(operator.name), sizes=dataclasses.replace(SIZES, window=4))
    peers = {provider.name: provider for provider in operator.peers}
    wrong = Provider("wide window", lambda _: peers["torch SDPA"].build(wide))
    seconds = {"komainu": [1.0], "torch SDPA": [1.0], "wide window": [0.5]}
    monkeypatch.setattr(benchmark.Timing, "samples", lambda _, works: {name: seconds[name] for name in works})
    rows = measured(dataclasses.replace(operator, peers=(*operator.peers, wrong)), list(seconds))
    assert [row["provider"] for row in rows if "wrong" in row] == ["wide window"] * 2
    assert {row["best_peer"] for row in rows} == {"torch SDPA"}
    assert {row["provider"]: row["speed_over_best_peer"] for row in rows} == {
        "komainu": 1.0,
        "torch SDPA": 1.0,
        "wide window": 2.0,
    }


def test_a_result_that_is_not_a_number_is_wrong():
    operator, case = OPERATORS["rms_norm"], case_of("rms_norm")
    judge = benchmark.Judge(operator, case, operator.peers[0])
    broken = Provider("broken", lambda case: operator.call(lambda hidden, weight, eps: hidden * weight * float("nan"), case))
    row = judge.errors(benchmark.Trial(operator, broken, case), "forward")
    assert "wrong" in row
    json.dumps(row, allow_nan=False)


def test_a_provider_that_overwrites_its_inputs_changes_no_other():
    operator, case = OPERATORS["rms_norm"], case_of("rms_norm")

    def in_place(hidden, weight, eps):
        out = kernels.rms_norm.rms_norm(hidden, weight, eps)
        hidden.data.zero_()
        return out

    before = case.inputs["hidden"].clone()
    trial = benchmark.Trial(operator, Provider("in place", lambda case: operator.call(in_place, case)), case)
    first, second = (trial.results(backward=False)["out"] for _ in range(2))
    assert torch.equal(case.inputs["hidden"], before)
    assert torch.equal(first, second)
    assert first.any()


def test_a_new_backend_appears_by_itself_and_a_missing_peer_says_why(monkeypatch):
    def fails(case):
        raise RuntimeError("no luck\nwith details")

    monkeypatch.setattr(kernels.rms_norm, "rms_norm_triton", kernels.rms_norm.rms_norm_reference, raising=False)
    absent = Provider("absent", fails, package="a_package_that_nobody_has")
    elsewhere, unlucky = Provider("elsewhere", fails, package="torch", cuda=True), Provider("unlucky", fails)
    operator = dataclasses.replace(OPERATORS["rms_norm"], peers=(*OPERATORS["rms_norm"].peers, absent, elsewhere, unlucky))
    names = [provider.name for provider in operator.providers()]
    assert names[:4] == ["komainu", "komainu (triton)", "eager", "torch.compile"]
    rows = measured(operator, ("komainu (triton)", "absent", "elsewhere", "unlucky"))
    assert [row["seconds"]["samples"] for row in rows[:2]] == [2, 2]
    assert {row["provider"]: row["missing"] for row in rows[2:]} == {
        "absent": "a_package_that_nobody_has is not installed",
        "elsewhere": "runs on CUDA only",
        "unlucky": "RuntimeError: no luck",
    }


def test_slow_providers_get_fewer_calls(monkeypatch):
    calls, seconds = {"quick": 0, "slow": 0, "slower": 0}, {"quick": 0.001, "slow": 0.25, "slower": 3.0}
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def kernel_seconds(work, device, *, repeats, warmup, prepare):
        for _ in range(repeats + warmup):
            work(prepare())
        return [seconds[prepare()]] * repeats

    def work(name):
        calls[name] += 1
        now[0] += seconds[name]

    monkeypatch.setattr(measure, "kernel_seconds", kernel_seconds)
    timing = benchmark.Timing(CPU, rounds=3, repeats=4, ceilings={})
    samples = timing.samples({name: (work, lambda name=name: name) for name in calls})
    # Two calls say how long one takes; a turn of several calls begins with a warm-up.
    assert {name: len(taken) for name, taken in samples.items()} == {"quick": 12, "slow": 6, "slower": 3}
    assert calls == {"quick": 2 + 3 * 5, "slow": 2 + 3 * 3, "slower": 2 + 3}


def test_a_run_measures_each_operator_and_writes_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "small", CONFIG)
    monkeypatch.setattr(measure, "ceilings", lambda device, dtype: TIMING.ceilings)
    out = tmp_path / "kernels.json"
    chosen = {"operators": ("swiglu", "gradient_norm"), "providers": ("komainu", "eager", "Liger-Kernel"), "tokens": (1, 6)}
    result = benchmark.run(benchmark.KernelSettings(device="cpu", rounds=1, repeats=1, out=str(out), **chosen))
    assert json.loads(out.read_text()) == result
    assert (result["settings"]["tokens"], result["ceilings"]) == ([1, 6], TIMING.ceilings)
    ours = [row for row in result["rows"] if row["provider"] == "komainu" and row["direction"] == "forward"]
    # The optimizer's work does not depend on the number of tokens.
    assert [row["shape"] for row in ours] == ["1 x 2 * 5", "6 x 2 * 5", "one layer, 328 parameters"]
    assert ours[1]["floor_seconds"] == 360e-9  # 1e9 bytes a second: 120 bytes a tensor of 6 * 5
    assert ours[1]["floor_fraction"] == ours[1]["floor_seconds"] / ours[1]["seconds"]["median"]
    assert 0 <= ours[1]["error"] <= ours[1]["error_allowed"] < 1e-4
    assert ours[1]["best_peer"] == "eager"
    assert "gradient_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"operators": ("rms_norn",)}, "unknown 'rms_norn'; choose from sliding_window_attention"),
        ({"providers": ("Liger",)}, "unknown 'Liger'; choose from komainu"),
        ({"tokens": (0,)}, r"tokens = \(0,\): must be at least 1"),
        ({"rounds": 0}, "rounds = 0: must be at least 1"),
    ],
)
def test_wrong_settings_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        benchmark.KernelSettings(**change)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_on_a_gpu_rows_are_right_and_timed(name):
    device = torch.device("cuda")
    operator = OPERATORS[name]
    case = operator.case(Sizes.of(dataclasses.replace(CONFIG, head_dim=64, hidden_size=256), 256), torch.bfloat16, device)
    timing = benchmark.Timing(device, rounds=1, repeats=2, ceilings=measure.ceilings(device))
    for row in benchmark.measure_operator(operator, case, ("komainu", operator.yardstick), timing):
        assert "wrong" not in row, row
        assert "missing" not in row, row
        assert row["seconds"]["median"] > 0
        assert row["peak_mib"] >= 0
