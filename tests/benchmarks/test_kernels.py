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
from model.config import MistralConfig

CPU = torch.device("cpu")
BY_NAME = {operator.name: operator for operator in OPERATORS}
# 6 tokens in documents of 4 and 2, width 8, 4 query heads and 2 key/value heads of 2, feed-forward 5, 16 pieces, window 3.
CONFIG = MistralConfig(
    vocab_size=16, hidden_size=8, intermediate_size=5, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    head_dim=2, sliding_window=3,
)  # fmt: skip
SIZES = Sizes.of(CONFIG, 6, 4)
TIMING = benchmark.Timing(CPU, rounds=2, repeats=1, ceilings={"product_flops": 1e9, "copy_bytes": 1e9})
QUICK = ("komainu", "eager")


def case_of(name, dtype=torch.float32, sizes=SIZES):
    return BY_NAME[name].case(sizes, dtype, CPU)


def quick(name):
    """Who computes an operator here without compiling anything, as far as it is installed."""
    return [
        provider for provider in BY_NAME[name].providers()
        if provider.name != "torch.compile" and provider.missing(case_of(name)) is None
    ]  # fmt: skip


def test_a_row_is_cut_into_documents():
    assert SIZES.documents == (4, 2)
    assert Sizes.of(CONFIG, 8, 4).documents == (4, 4)
    assert Sizes.of(CONFIG, 6).documents == (6,)


def counted(name, direction, dtype):
    cost = BY_NAME[name].cost(case_of(name, dtype), direction)
    return cost.bytes, cost.operations


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_of_token_by_token_operators(dtype, size):
    # A tensor of hidden states has 6 * 8 elements, a norm's weight 8.
    assert counted("rms_norm", "forward", dtype) == ((48 + 8 + 48) * size, 0)
    assert counted("rms_norm", "backward", dtype) == ((48 + 48 + 8 + 48 + 8) * size, 0)
    assert counted("add_rms_norm", "forward", dtype) == ((48 + 48 + 8 + 48 + 48) * size, 0)
    assert counted("add_rms_norm", "backward", dtype) == ((48 + 48 + 48 + 8 + 48 + 8) * size, 0)
    # 6 heads of 2 are turned in place and 2 are not, backward copies those; 1 cosine and 1 sine a token, float32.
    assert counted("rotary", "forward", dtype) == (6 * 6 * 2 * size * 2 + 6 * 2 * 4, 0)
    assert counted("rotary", "backward", dtype) == (6 * 8 * 2 * size * 2 + 6 * 2 * 4, 0)
    # Gate, up and product have 6 * 5 elements each.
    assert counted("swiglu", "forward", dtype) == (30 * 3 * size, 0)
    assert counted("swiglu", "backward", dtype) == (30 * 5 * size, 0)
    # The product is written too.
    assert counted("swiglu backward, in place", "update", dtype) == (30 * 6 * size, 0)


def test_bytes_of_the_embedding():
    different = len(set(case_of("embedding").constants["tokens"].tolist()))
    assert different < 6
    ids = 6 * 8
    assert counted("embedding", "forward", torch.bfloat16) == (ids + different * 8 * 2 + 6 * 8 * 2, 0)
    # Document, place and length of a token are int64.
    assert counted("embedding, NEFTune", "forward", torch.bfloat16) == (ids + different * 8 * 2 + 6 * 8 * 2 + 6 * 24, 0)
    # The weight's gradient is dense.
    assert counted("embedding", "backward", torch.bfloat16) == (ids + 6 * 8 * 2 + 16 * 8 * 2, 0)


def test_work_of_the_head():
    product = 2 * 6 * 8 * 16
    hidden, weight, scalars = 6 * 8 * 2, 16 * 8 * 2, 6 * (8 + 4 + 4)
    forward, backward = (hidden + weight + scalars, product), (2 * hidden + 2 * weight + scalars, 2 * product)
    assert counted("linear_log_prob", "forward", torch.bfloat16) == forward
    assert counted("linear_log_prob", "backward", torch.bfloat16) == backward
    assert counted("linear_log_prob", "both", torch.bfloat16) == (forward[0] + backward[0], forward[1] + backward[1])


def test_the_head_is_measured_in_each_of_its_ways():
    ways = {provider.name: provider.directions for provider in BY_NAME["linear_log_prob"].providers() if provider.ours}
    assert ways == {
        "komainu": (), "komainu, kept": (), "komainu, recomputed": (), "komainu, no gradient": ("forward",),
        "komainu linear_nll": ("both",),
    }  # fmt: skip


def test_work_of_attention_counts_the_pairs_that_see_each_other():
    # With a window of 3, the places of a document of 4 see 1, 2, 3, 3 places, those of one of 2 see 1 and 2.
    pairs = (1 + 2 + 3 + 3) + (1 + 2)
    product = 2 * pairs * 4 * 2
    query, key = 6 * 4 * 2 * 2, 6 * 2 * 2 * 2
    assert counted("sliding_window_attention", "forward", torch.bfloat16) == (2 * query + 2 * key, 2 * product)
    assert counted("sliding_window_attention", "backward", torch.bfloat16) == (4 * query + 4 * key, 5 * product)


def test_decoding_costs_the_places_that_are_seen():
    # A window of 3 of the 7 places: query and out of 4 heads of 2, keys and values of 2 heads of 2.
    assert counted("decode_attention", "forward", torch.bfloat16) == ((2 * 8 + 2 * 3 * 4) * 2, 2 * 2 * 3 * 8)


def test_bytes_of_the_optimizer():
    # Query, key and value [16, 8], output [8, 8], gate and up [10, 8], down [8, 5], two norms of 8.
    elements = 128 + 64 + 80 + 40 + 16
    assert sum(tensor.numel() for tensor in case_of("gradient_norm").inputs.values()) == elements
    # Gradient; master and both moments read and written.
    assert counted("adamw", "update", torch.float32) == (elements * (4 + 2 * 4 + 2 * 8), 0)
    # Gradient; parameter and remainder; moments.
    assert counted("adamw", "update", torch.bfloat16) == (elements * (2 + 2 * (2 + 2) + 2 * 8), 0)
    assert counted("gradient_norm", "forward", torch.bfloat16) == (elements * 2 + 4, 0)


def test_mistrals_floors_are_those_of_the_house_plan():
    """8,192 tokens in bfloat16 at 4.3 TB/s and 790 TFLOP/s, in microseconds, as computed independently of this code."""
    sizes = Sizes.of(dataclasses.replace(MistralConfig(), num_hidden_layers=1), 8192)
    expected = {
        ("rms_norm", "forward"): 31.2, ("rms_norm", "backward"): 46.8, ("add_rms_norm", "forward"): 62.4,
        ("add_rms_norm", "backward"): 62.4, ("swiglu", "forward"): 163.9, ("swiglu", "backward"): 273.1,
        ("rotary", "forward"): 39.0, ("rotary", "backward"): 46.8, ("sliding_window_attention", "forward"): 522,
        ("sliding_window_attention", "backward"): 1305,
    }  # fmt: skip
    for (name, direction), microseconds in expected.items():
        # Counting needs no data.
        case = dataclasses.replace(case_of(name, torch.bfloat16), sizes=sizes)
        cost = BY_NAME[name].cost(case, direction)
        floor = max(cost.bytes / 4.3e12, cost.operations / 790e12) * 1e6
        # The plan leaves out weights of norms and rotary tables.
        assert floor == pytest.approx(microseconds, rel=0.03), (name, direction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BY_NAME)
def test_ours_and_plain_torch_are_right(name, dtype):
    """Exact results and yardsticks are written apart from our references, so that agreement says something of both."""
    operator = BY_NAME[name]
    sizes = Sizes.of(CONFIG, 70, 40)
    case = operator.case(sizes, dtype, CPU)
    providers = {provider.name: provider for provider in quick(name)}
    judge = benchmark.Judge(operator, case, providers[operator.yardstick])
    for provider in providers.values():
        if provider.missing(case):
            continue
        trial = benchmark.Trial(operator, provider, case)
        for direction in provider.directions or operator.directions:
            row = judge.errors(trial, direction)
            if provider.name == "torch fused, bfloat16 state":
                # What the exact masters are for.
                assert "master" in row["wrong"]
            elif provider.name == "torch get_total_norm" and dtype == torch.bfloat16:
                assert row["error"] > 1e-4
            else:
                assert "wrong" not in row, (provider.name, direction, row)


def test_a_wrong_kernel_is_flagged_and_is_no_peer_to_beat(monkeypatch):
    """One whose window is one place too wide, and which is the fastest."""
    operator = BY_NAME["sliding_window_attention"]
    wide = dataclasses.replace(case_of("sliding_window_attention"), sizes=dataclasses.replace(SIZES, window=4))
    peers = {provider.name: provider for provider in operator.peers}
    wrong = Provider("wide window", lambda _: peers["torch SDPA"].build(wide))
    monkeypatch.setattr(
        TIMING.__class__, "samples", lambda _, works: {name: [0.5 if name == "wide window" else 1.0] for name in works}
    )
    operator = dataclasses.replace(operator, peers=(*operator.peers, wrong))
    rows = benchmark.measure_operator(operator, case_of(operator.name), ("komainu", "torch SDPA", "wide window"), TIMING)
    assert [(row["provider"], row["direction"]) for row in rows if "wrong" in row] == [
        ("wide window", "forward"), ("wide window", "backward"),
    ]  # fmt: skip
    assert {row["best_peer"] for row in rows} == {"torch SDPA"}
    assert {row["provider"]: row["speed_over_best_peer"] for row in rows} == {
        "komainu": 1.0, "torch SDPA": 1.0, "wide window": 2.0,
    }  # fmt: skip


def test_a_result_that_is_not_a_number_is_wrong():
    operator = BY_NAME["rms_norm"]
    case = case_of("rms_norm")
    judge = benchmark.Judge(operator, case, operator.peers[0])
    broken = Provider("broken", lambda case: operator.call(lambda hidden, weight, eps: hidden * weight * float("nan"), case))
    row = judge.errors(benchmark.Trial(operator, broken, case), "forward")
    assert "wrong" in row
    json.dumps(row, allow_nan=False)


def test_a_provider_that_overwrites_its_inputs_changes_nobody_elses():
    operator = BY_NAME["rms_norm"]
    case = case_of("rms_norm")

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


def test_a_new_backend_appears_by_itself(monkeypatch):
    monkeypatch.setattr(kernels.rms_norm, "rms_norm_triton", kernels.rms_norm.rms_norm_reference, raising=False)
    names = [provider.name for provider in BY_NAME["rms_norm"].providers()]
    assert names[:4] == ["komainu", "komainu (triton)", "eager", "torch.compile"]
    rows = benchmark.measure_operator(BY_NAME["rms_norm"], case_of("rms_norm"), ("komainu (triton)",), TIMING)
    assert [row["direction"] for row in rows] == ["forward", "backward"]
    assert all(row["seconds"]["samples"] == 2 for row in rows)


def test_what_cannot_be_measured_is_a_row_that_says_why():
    def fails(case):
        raise RuntimeError("no luck\nwith details")

    operator = BY_NAME["rms_norm"]
    peers = (
        *operator.peers,
        Provider("absent", fails, package="a_package_that_nobody_has"),
        Provider("elsewhere", fails, package="torch", cuda=True),
        Provider("unlucky", fails),
    )
    operator = dataclasses.replace(operator, peers=peers)
    rows = benchmark.measure_operator(operator, case_of("rms_norm"), ("absent", "elsewhere", "unlucky"), TIMING)
    assert {row["provider"]: row["missing"] for row in rows} == {
        "absent": "a_package_that_nobody_has is not installed", "elsewhere": "runs on CUDA only",
        "unlucky": "RuntimeError: no luck",
    }  # fmt: skip
    assert not any("seconds" in row for row in rows)


def test_a_row_holds_time_floor_memory_and_error():
    rows = benchmark.measure_operator(BY_NAME["swiglu"], case_of("swiglu"), QUICK, TIMING)
    assert [(row["provider"], row["direction"]) for row in rows] == [
        ("komainu", "forward"), ("komainu", "backward"), ("eager", "forward"), ("eager", "backward"),
    ]  # fmt: skip
    for row in rows:
        # 1e9 bytes a second: 120 bytes a tensor of 6 * 5.
        assert row["floor_seconds"] == {"forward": 360e-9, "backward": 600e-9}[row["direction"]]
        assert row["floor_fraction"] == row["floor_seconds"] / row["seconds"]["median"]
        assert row["peak_mib"] >= 120 / 2**20
        assert 0 <= row["error"] <= row["error_allowed"] < 1e-4
        assert row["best_peer"] == "eager"
    assert rows[1]["peak_mib"] > rows[0]["peak_mib"]


def test_every_provider_gets_its_turns_and_slow_ones_fewer_calls(monkeypatch):
    calls = {"quick": 0, "slow": 0, "slower": 0}
    seconds = {"quick": 0.001, "slow": 0.25, "slower": 3.0}
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def kernel_seconds(work, device, *, repeats, warmup, prepare):
        for _ in range(repeats + warmup):
            work(prepare())
        return [seconds[prepare()]] * repeats

    monkeypatch.setattr(measure, "kernel_seconds", kernel_seconds)

    def work(name):
        calls[name] += 1
        now[0] += seconds[name]

    timing = benchmark.Timing(CPU, rounds=3, repeats=4, ceilings={})
    samples = timing.samples({name: (work, lambda name=name: name) for name in calls})
    # Two calls say how long one takes; a turn of what is not slow begins with a warm-up.
    assert {name: len(taken) for name, taken in samples.items()} == {"quick": 12, "slow": 6, "slower": 3}
    assert calls == {"quick": 2 + 3 * 5, "slow": 2 + 3 * 3, "slower": 2 + 3}


def test_a_run_writes_a_result_of_each_operator_and_needs_no_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SMALL", CONFIG)
    monkeypatch.setattr(measure, "ceilings", lambda device, dtype: TIMING.ceilings)
    written = []
    monkeypatch.setattr(measure, "write_result", lambda path, content: written.append(json.loads(json.dumps(content))))
    settings = benchmark.KernelSettings(
        device="cpu", operators=("swiglu", "gradient_norm"), providers=("komainu", "Liger-Kernel"), tokens=(1, 6), rounds=1,
        repeats=1, out="somewhere",
    )  # fmt: skip
    result = benchmark.run(settings)
    assert [content["complete"] for content in written] == [False, False, False, True]
    assert written[-1] == json.loads(json.dumps(result))
    assert result["settings"]["tokens"] == [1, 6]
    assert result["ceilings"] == TIMING.ceilings
    shapes = [row["shape"] for row in result["rows"] if row["provider"] == "komainu" and row["direction"] == "forward"]
    # The optimizer's work does not depend on the number of tokens.
    assert shapes == ["1 x 2 * 5", "6 x 2 * 5", "one layer, 328 parameters"]
    assert "gradient_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operators": ("rms_norn",)}, "unknown 'rms_norn'; the nearest known one is 'rms_norm'"),
        ({"providers": ("Liger",)}, "unknown 'Liger'; the nearest known one is 'eager'|'Liger-Kernel'"),
        ({"tokens": (0,)}, "must be at least 1 each"),
        ({"rounds": 0}, "rounds = 0: must be at least 1"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        benchmark.KernelSettings(**change)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BY_NAME)
def test_on_a_gpu_rows_are_right_and_timed(name):
    operator, device = BY_NAME[name], torch.device("cuda")
    config = MistralConfig(
        vocab_size=512, hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=100,
    )  # fmt: skip
    case = operator.case(Sizes.of(config, 320, 200), torch.bfloat16, device)
    timing = benchmark.Timing(device, rounds=1, repeats=3, ceilings={"product_flops": 1e15, "copy_bytes": 5e12})
    rows = benchmark.measure_operator(operator, case, ("komainu", operator.yardstick, "torch varlen"), timing)
    assert {row["provider"] for row in rows} >= {"komainu", operator.yardstick}
    for row in rows:
        assert "wrong" not in row, row
        assert "missing" not in row, row
        assert row["seconds"]["median"] > 0
        assert row["peak_mib"] >= 0
