"""The memory plan against real steps: tensor bytes on the CPU, the allocator's peak on a GPU."""

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn

import engine.estimate.sizes
import kernels.linear_log_prob
from engine.estimate.memory import Training, largest_micro_batch, plan
from engine.estimate.sizes import Sizes
from engine.loop import accumulate
from engine.objectives.next_token import NextToken
from engine.objectives.preference import Preference
from engine.observe.preview import describe
from engine.optim.adamw import AdamW
from engine.run import open_run
from engine.settings.sections import OptimizerSettings
from kernels.attention import backward as attention_backward
from kernels.attention.work import attention_work
from kernels.configurations import TABLES
from kernels.recompute import Recompute
from model.config import PRESETS, MistralConfig
from model.mistral import Mistral, attention_by
from tests.engine.live_bytes import LiveBytes

MODES = get_args(Recompute)
CONFIG = MistralConfig(
    vocab_size=512,
    unpadded_vocab_size=500,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=128,
)
# A prompt, two answers that share it, and another document.
BOUNDS, PREFIXES = [0, 60, 130, 170, 256], [-1, 0, 0, -1]
# Budgets of bytes for logits: enough for all rows of a step at once, and for a part of them.
AMPLE, SCARCE = 2**29, 2**18


def steps(training: Training, device: torch.device, count: int = 1) -> Iterator[tuple[Mistral, AdamW]]:
    """Yields a model and its optimizer, before and after `count` steps of two micro-batches (one without accumulation)."""
    with device:
        model = Mistral(training.config).to(training.dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.recompute = training.recompute
    model.fp8_layers = training.fp8_layers
    model.weight_codes.keep = training.keep_codes
    optimizer = AdamW(model.named_parameters(), training.optimizer)
    yield model, optimizer
    work = training.documents.to(device)
    tokens = torch.randint(0, training.config.unpadded_vocab_size, (training.tokens,), device=device)
    positions = torch.arange(training.tokens, device=device)
    rows = torch.arange(training.rows, dtype=torch.int32, device=device)
    weight = torch.full((training.tokens,), 1 / training.rows, device=device)
    for _ in range(count):
        with model.weight_codes.unchanged():
            for _ in range(2 if training.accumulates else 1):
                hidden = model(tokens, positions, attention_by(work))
                if training.log_probs:
                    loss = -model.log_probs(hidden, tokens, rows).sum()
                else:
                    loss = model.nll(hidden, tokens, rows, weight)[0]
                del hidden
                loss.backward()
                del loss
        optimizer.step(1e-3)
    yield model, optimizer


def counted(training: Training) -> int:
    run = steps(training, torch.device("cpu"))
    model, optimizer = next(run)
    with LiveBytes(*model.parameters(), *optimizer.state.values()) as live:
        next(run)
    return live.peak


def training_of(mode, dtype, budget, monkeypatch, **changes) -> Training:
    for module in (engine.estimate.sizes, kernels.linear_log_prob):
        monkeypatch.setattr(module, "default_budget", lambda device: budget)
    documents = attention_work(BOUNDS, CONFIG.sliding_window, prefixes=PREFIXES)
    given = Training(
        CONFIG,
        dtype,
        OptimizerSettings(),
        mode,
        tokens=BOUNDS[-1],
        rows=200,
        accumulates=True,
        log_probs=False,
        kernels=False,
        documents=documents,
    )
    return replace(given, **changes)


# Every recompute mode with every form of the head: gradients in the forward pass or later, for all rows at once or for a part.
# Each dtype has half of the cases.
CASES = [
    (mode, log_probs, kept, (torch.float32, torch.bfloat16)[(number + kept) % 2])
    for number, mode in enumerate(MODES)
    for log_probs in (False, True)
    for kept in (False, True)
]


@pytest.mark.parametrize(("mode", "log_probs", "kept", "dtype"), CASES)
def test_the_planned_peak_is_the_counted_peak(mode, log_probs, kept, dtype, monkeypatch):
    budget = AMPLE if kept else SCARCE
    training = training_of(mode, dtype, budget, monkeypatch, log_probs=log_probs, accumulates=mode != "ffn")
    assert plan(training).peak == pytest.approx(counted(training), rel=0.02)


@pytest.mark.parametrize("gradients", ["parameter", "float32"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_plan_follows_the_optimizers_settings(moments, gradients, monkeypatch):
    settings = OptimizerSettings(moments=moments, gradients=gradients)
    training = training_of("block", torch.bfloat16, AMPLE, monkeypatch, optimizer=settings)
    assert plan(training).peak == pytest.approx(counted(training), rel=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_the_plan_knows_what_fp8_holds(mode, monkeypatch):
    """Two of four layers in FP8, with codes of weights that are kept and not kept."""
    kept = mode in ("light", "block")
    config = replace(CONFIG, num_hidden_layers=4)
    dtype = torch.bfloat16 if mode in ("light", "ffn") else torch.float32
    given = {"config": config, "fp8_layers": range(1, 3), "keep_codes": kept, "accumulates": mode != "none"}
    training = training_of(mode, dtype, AMPLE, monkeypatch, **given)
    assert plan(training).peak == pytest.approx(counted(training), rel=0.025)


def test_codes_of_weights_take_2_bytes_an_element():
    weights = 30 * (4096 * (6144 + 4096) + 3 * 4096 * 14336)
    for keep in (True, False):
        items = plan(shisa(fp8_layers=range(1, 31), keep_codes=keep)).items
        assert items["weight codes"] == (2 * weights if keep else 0)


def shisa(**changes) -> Training:
    """Full-parameter training of Shisa 7B on one GPU: exact masters, bfloat16 moments."""
    given = Training(
        PRESETS["shisa-7b"],
        torch.bfloat16,
        OptimizerSettings(moments="bfloat16"),
        "light",
        tokens=16384,
        rows=16384,
        accumulates=True,
        log_probs=False,
        kernels=True,
    )
    return replace(given, **changes)


def test_shisa_7b_takes_10_bytes_a_parameter_and_the_designs_activations():
    """Activations a token: 4.25 MiB with `none`, 2.88 with `light`, 1.13 with `ffn`, 0.25 with `block`."""
    items = plan(shisa()).items
    assert items["weights"] + items["optimizer"] + items["gradients"] == 10 * PRESETS["shisa-7b"].parameters
    for mode, mib in (("none", 4.25), ("light", 2.88), ("ffn", 1.13), ("block", 0.25)):
        activations = plan(shisa(recompute=mode)).items["activations"]
        assert activations / 16384 / 2**20 == pytest.approx(mib, rel=0.07), mode


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_plan_knows_what_attentions_backward_pass_allocates(passes, dtype, monkeypatch):
    """All but the kernels runs: they allocate nothing."""
    monkeypatch.setitem(TABLES[90], "attention_backward", replace(TABLES[90]["attention_backward"], passes=passes))
    for name in ("launch", "launch_tiles"):
        monkeypatch.setattr(attention_backward, name, lambda *arguments, **named: None)
    config, tokens = PRESETS["shisa-7b"], 384
    one_pass = attention_backward.in_one_pass(torch.device("cpu"), dtype)
    assert one_pass == (passes == 1)
    query, out = (torch.zeros(tokens, config.num_attention_heads, config.head_dim, dtype=dtype) for _ in range(2))
    key, value = (torch.zeros(tokens, config.num_key_value_heads, config.head_dim, dtype=dtype) for _ in range(2))
    log_sum_exp, work = torch.zeros(config.num_attention_heads, tokens), attention_work([0, 100, tokens], 128)
    grad = torch.zeros_like(out)
    with LiveBytes(grad) as live:
        attention_backward.attention_backward(grad, query, key, value, out, log_sum_exp, work.work, *work.numbers)
    # One number more: programs started so far.
    assert live.peak == Sizes(shisa(dtype=dtype, tokens=tokens, one_pass=one_pass)).attention_backward + 4 * one_pass


@pytest.mark.parametrize("fp8_layers", [range(0), range(2)])
def test_one_pass_of_attentions_backward_raises_only_a_peak_that_attention_makes(fp8_layers):
    """With Shisa 7B's feed-forward networks, their backward pass needs more; with narrow ones, attention's is the peak."""
    for inner, least, most in ((14336, 0, 0), (16, 1, 4 * 8192 * 32 * (128 + 1))):
        config = replace(
            PRESETS["shisa-7b"], num_hidden_layers=2, intermediate_size=inner, vocab_size=64, unpadded_vocab_size=64
        )
        given = shisa(config=config, tokens=8192, rows=1, fp8_layers=fp8_layers)
        assert least <= plan(replace(given, one_pass=True)).peak - plan(given).peak <= most


def test_the_largest_micro_batch_is_the_last_that_fits():
    """With `block` the peak falls once, where logits are no longer kept; the search must not stop there."""
    for mode, most in (("light", 32768), ("block", 16384)):
        peaks = {tokens: plan(shisa(recompute=mode, tokens=tokens, rows=tokens)).peak for tokens in range(1024, most + 1, 1024)}
        for limit in (77 * 2**30, 79 * 2**30, 100 * 2**30):
            expected = max((tokens for tokens, peak in peaks.items() if peak <= limit), default=0)
            assert largest_micro_batch(shisa(recompute=mode), limit, most=most) == expected
    assert largest_micro_batch(shisa(), 70 * 2**30, most=65536) == 0


@pytest.mark.parametrize(("accumulates", "once"), [(False, False), (False, True), (True, False), (True, True)])
def test_shards_divide_weights_and_state(accumulates, once):
    """One of eight ranks holds an eighth of the state and of the sums, whole float32 sums only where it reduces them once."""
    parameters = PRESETS["shisa-7b"].parameters
    items = plan(shisa(shards=8, accumulates=accumulates, reduce_once=once)).items
    assert items["weights"] == 2 * parameters // 8
    assert items["optimizer"] == 6 * parameters // 8
    assert items["gradients"] == (4 * parameters // (1 if once else 8) if accumulates else 0)
    assert items["gathered parameters"] > 0


@pytest.mark.gpu
@pytest.mark.xdist_group("large models, one at a time")
@pytest.mark.parametrize("log_probs", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_planned_peak_is_the_allocators_peak(mode, log_probs):
    """Four layers of Shisa 7B's widths: the allocator's rounding to blocks is small beside them."""
    config = replace(PRESETS["shisa-7b"], num_hidden_layers=4)
    tokens = 8192
    documents = attention_work([0, 3000, tokens], config.sliding_window)
    training = shisa(config=config, recompute=mode, tokens=tokens, rows=tokens, log_probs=log_probs, documents=documents)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    run = steps(training, torch.device("cuda"), count=2)
    next(run)
    torch.cuda.reset_peak_memory_stats()
    next(run)
    assert plan(training).peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.03)


@pytest.mark.parametrize(("stage", "step_size"), [("sft", 256), ("dpo", 2)], ids=["sft", "dpo"])
def test_a_runs_plan_is_the_peak_of_its_steps(stage, step_size, tiny_settings, tmp_path):
    """Steps of several micro-batches (sft) and of one (dpo), all different; the plan is the largest step's."""
    settings = tiny_settings(stage, tmp_path, step_size=step_size, steps=3)
    run = open_run(settings, ("conversations",) if stage == "sft" else ("preferences",), share_prompts=stage == "dpo")
    model = run.load_model()
    optimizer = AdamW(model.named_parameters(), settings.optimizer)
    objective = NextToken(neftune_alpha=5.0)
    if stage == "dpo":
        objective = Preference(settings.preference, [torch.zeros(len(dataset) // 2, 2) for dataset in run.datasets])
    with LiveBytes(*model.parameters(), *optimizer.state.values()) as live:
        for index in range(run.plan.steps):
            step = run.step(index)
            accumulate(model, objective, step)
            optimizer.step(1e-3)
    found = run.planned
    assert found.peak == pytest.approx(live.peak, rel=0.05)
    (line,) = (line for line in describe(run) if line.startswith("memory"))
    assert f" {found.peak / 2**20:.2f} MiB at most, in the {found.moment}: " in line


# From benchmarks/results/train-nvidia-h200.json: layers of Shisa 7B, tokens and rows of the largest micro-batch, whether it is
# preference tuning, and the allocator's peak in GiB.
MEASURED = [
    (8, 8192, 8192, False, 39.31696),
    (4, 8165, 4905, False, 26.37644),
    (4, 6604, 4882, True, 25.76120),
]


@pytest.mark.parametrize(("layers", "tokens", "rows", "log_probs", "gib"), MEASURED, ids=["pretrain", "sft", "dpo"])
def test_the_plan_is_the_peak_that_a_gpu_measured(layers, tokens, rows, log_probs, gib):
    training = shisa(
        config=replace(PRESETS["shisa-7b"], num_hidden_layers=layers),
        optimizer=OptimizerSettings(),
        tokens=tokens,
        rows=rows,
        accumulates=False,
        log_probs=log_probs,
    )
    assert plan(training).peak / 2**30 == pytest.approx(gib, rel=0.001)
