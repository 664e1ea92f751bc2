"""The memory plan against what real steps hold: tensor bytes on the CPU, the allocator's peak on a GPU."""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from torch import nn

import engine.estimate.sizes
import kernels.linear_log_prob
from benchmarks.measure import RESULTS
from benchmarks.own import open_job
from benchmarks.train import TrainBenchSettings, make_job
from engine.estimate.memory import Training, largest_micro_batch, plan
from engine.loop import accumulate
from engine.objectives.next_token import NextToken
from engine.objectives.preference import Preference
from engine.observe.preview import describe
from engine.optim.adamw import AdamW
from engine.run import Run, open_run
from engine.settings.sections import OptimizerSettings
from kernels.attention.work import attention_work
from kernels.recompute import Recompute
from model.config import PRESETS, MistralConfig
from model.mistral import Mistral, attention_by
from tests.engine.live_bytes import LiveBytes

MODES = get_args(Recompute)
CONFIG = MistralConfig(
    vocab_size=512, unpadded_vocab_size=500, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=128,
)  # fmt: skip
# A prompt, two answers that share it, and a document beside them.
BOUNDS, PREFIXES = [0, 60, 130, 170, 256], [-1, 0, 0, -1]
# Bytes of logits: for the rows of a step all at once, and for a part of them.
AMPLE, SCARCE = 2**29, 2**18


def steps(training: Training, device: torch.device, count: int = 1) -> Iterator[tuple[Mistral, AdamW]]:
    """A model and its optimizer, then that many steps of two micro-batches (one, where nothing accumulates)."""
    with device:
        model = Mistral(training.config).to(training.dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.recompute = training.recompute
    optimizer = AdamW(model.named_parameters(), training.optimizer)
    yield model, optimizer
    work = training.documents.to(device)
    tokens = torch.randint(0, training.config.unpadded_vocab_size, (training.tokens,), device=device)
    positions = torch.arange(training.tokens, device=device)
    rows = torch.arange(training.rows, dtype=torch.int32, device=device)
    weight = torch.full((training.tokens,), 1 / training.rows, device=device)
    for _ in range(count):
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
        CONFIG, dtype, OptimizerSettings(), mode, tokens=BOUNDS[-1], rows=200, accumulates=True, log_probs=False, kernels=False,
        documents=documents,
    )  # fmt: skip
    return replace(given, **changes)


# Every recompute mode with every way of the head: gradients known with the logits or not, of all rows at once or of a part of
# them. Each dtype has half of these.
CASES = [
    (mode, log_probs, kept, (torch.float32, torch.bfloat16)[(number + kept) % 2])
    for number, mode in enumerate(MODES) for log_probs in (False, True) for kept in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("mode", "log_probs", "kept", "dtype"), CASES)
def test_the_planned_peak_is_the_counted_one(mode, log_probs, kept, dtype, monkeypatch):
    budget = AMPLE if kept else SCARCE
    training = training_of(mode, dtype, budget, monkeypatch, log_probs=log_probs, accumulates=mode != "ffn")
    assert plan(training).peak == pytest.approx(counted(training), rel=0.02)


@pytest.mark.parametrize("gradients", ["parameter", "float32"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_optimizers_settings_are_planned(moments, gradients, monkeypatch):
    settings = OptimizerSettings(moments=moments, gradients=gradients)
    training = training_of("block", torch.bfloat16, AMPLE, monkeypatch, optimizer=settings)
    assert plan(training).peak == pytest.approx(counted(training), rel=0.02)


def shisa(**changes) -> Training:
    """Full-parameter training of Shisa 7B on one GPU: exact masters, bfloat16 moments."""
    given = Training(
        PRESETS["shisa-7b"], torch.bfloat16, OptimizerSettings(moments="bfloat16"), "light", tokens=16384, rows=16384,
        accumulates=True, log_probs=False, kernels=True,
    )  # fmt: skip
    return replace(given, **changes)


def test_shisa_7b_is_what_the_arithmetic_says():
    """10 bytes a parameter; activations of 2.88 MiB a token with `light`, 4.25, 1.13 and 0.25 with the other modes."""
    items = plan(shisa()).items
    assert items["weights"] + items["optimizer"] + items["gradients"] == 10 * PRESETS["shisa-7b"].parameters
    for mode, mib in (("none", 4.25), ("light", 2.88), ("ffn", 1.13), ("block", 0.25)):
        activations = plan(shisa(recompute=mode)).items["activations"]
        assert activations / 16384 / 2**20 == pytest.approx(mib, rel=0.07), mode


def test_the_largest_micro_batch_is_the_last_that_fits():
    """By trying each, also where the peak falls as logits are no longer kept: `block` keeps so little else."""
    for mode, most in (("light", 32768), ("block", 16384)):
        peaks = {tokens: plan(shisa(recompute=mode, tokens=tokens, rows=tokens)).peak for tokens in range(1024, most + 1, 1024)}
        for limit in (77 * 2**30, 79 * 2**30, 100 * 2**30):
            expected = max((tokens for tokens, peak in peaks.items() if peak <= limit), default=0)
            assert largest_micro_batch(shisa(recompute=mode), limit, most=most) == expected
    assert largest_micro_batch(shisa(), 70 * 2**30, most=65536) == 0


@pytest.mark.parametrize("accumulates", [False, True])
def test_shards_divide_what_they_hold(accumulates):
    """A rank of eight: an eighth of the state; whole float32 gradients only where they add up over micro-batches."""
    parameters = PRESETS["shisa-7b"].parameters
    items = plan(shisa(shards=8, accumulates=accumulates)).items
    assert items["weights"] == 2 * parameters // 8
    assert items["optimizer"] == 6 * parameters // 8
    assert items["gradients"] == (4 * parameters if accumulates else 0)
    assert items["gathered parameters"] > 0


@pytest.mark.gpu
@pytest.mark.xdist_group("large models, one at a time")
@pytest.mark.parametrize("log_probs", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_planned_peak_is_the_allocators(mode, log_probs):
    """Four layers of Shisa 7B's widths, so that rounding to the allocator's blocks is small."""
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


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("step_tokens", [128, 256])
def test_a_runs_plan_is_what_its_steps_hold(stage, step_tokens, tiny_settings, tmp_path):
    """Steps of one micro-batch and of several, all different; the plan is of the largest."""
    settings = tiny_settings(stage, tmp_path, step_size=step_tokens // (64 if stage == "dpo" else 1))
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


MEASURED = json.loads((RESULTS / "train-nvidia-h200.json").read_text())
OURS = [row for row in MEASURED["rows"] if row["name"] == "komainu" and "missing" not in row]


@pytest.mark.parametrize("row", OURS, ids=lambda row: row["task"])
def test_the_plan_is_what_a_gpu_held(row, tmp_path, monkeypatch):
    """What the allocator held at most in runs that are on record, planned without their GPU."""
    given = {field.name: row[field.name] for field in fields(TrainBenchSettings) if field.name in row}
    given |= {name: MEASURED["settings"][row["task"]][name] for name in ("rounds", "steps", "warmup", "seed")}
    run = open_job(make_job(TrainBenchSettings(**given, device="cpu"), torch.device("cpu"), tmp_path))
    with_references = Run._training
    monkeypatch.setattr(Run, "_training", lambda *given, **more: replace(with_references(*given, **more), kernels=True))
    assert run.planned.peak / 2**30 == pytest.approx(row["memory"]["allocated_gib"], rel=0.001)
