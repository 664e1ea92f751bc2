"""Predicted speed against published single-node figures, a measured step and plain arithmetic."""

from dataclasses import replace

import pytest
import torch

from engine.estimate.devices import DEVICES
from engine.estimate.memory import Training
from engine.estimate.throughput import speed
from engine.settings.sections import OptimizerSettings
from model.config import PRESETS, MistralConfig

LLAMA_3_8B = MistralConfig(vocab_size=128256, sliding_window=None)
QWEN_25_7B = MistralConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    sliding_window=None,
)


def training(config=PRESETS["shisa-7b"], recompute="light", tokens=16384, **optimizer) -> Training:
    settings = OptimizerSettings(moments="bfloat16", **optimizer)
    return Training(
        config,
        torch.bfloat16,
        settings,
        recompute,
        tokens=tokens,
        rows=tokens,
        accumulates=True,
        log_probs=False,
        kernels=True,
    )


# Full-parameter training in bf16 at 700 W. KempnerForge, benchmarks/mfu_scaling/mfu_scaling.md: everything recomputed, FSDP;
# llmq, benchmarks/H100x1.md: nothing recomputed, gradients and moments in bf16.
PUBLISHED = [
    (LLAMA_3_8B, "block", "h200", 4096, 1, 10471),
    (LLAMA_3_8B, "block", "h200", 4096, 2, 9364),
    (LLAMA_3_8B, "block", "h200", 4096, 4, 9746),
    (QWEN_25_7B, "light", "h100", 1024, 1, 13863),
]


@pytest.mark.parametrize(("config", "recompute", "device", "context", "gpus", "published"), PUBLISHED)
def test_published_figures_of_other_engines_are_met_within_a_tenth(config, recompute, device, context, gpus, published):
    """Their attention computes five products backward. Most of the difference is their communication."""
    found = speed(
        training(config, recompute), DEVICES[device], context=context, step_tokens=gpus * 2**17, gpus=gpus, backward_products=5
    )
    assert found.hidden / gpus == pytest.approx(published, rel=0.1)


def test_our_own_measured_step_is_met():
    """38,657 tokens/s: eight layers of Shisa 7B on one H200, from benchmarks/results/train-nvidia-h200.json."""
    step = replace(
        training(replace(PRESETS["shisa-7b"], num_hidden_layers=8), tokens=8192),
        optimizer=OptimizerSettings(),
    )
    found = speed(step, DEVICES["h200"], context=4096, step_tokens=8192)
    assert found.hidden == pytest.approx(38_657, rel=0.05)


def test_nothing_is_faster_than_the_ceiling():
    """790 TFLOP/s on 48.05 GFLOP a token: 16.4 thousand tokens a second."""
    for mode in ("none", "light", "ffn", "block"):
        found = speed(training(recompute=mode), DEVICES["h200"], context=4096, step_tokens=2**20)
        assert found.hidden < 16_440
        assert found.communication == 0


def test_gathers_and_reductions_run_at_the_links_speed():
    """15.93 GB of weights, 7/8 of them over 400 GB/s: 35 ms a gather. A reduction takes twice as long, by default each time."""
    one = speed(training(), DEVICES["h200"], context=4096, step_tokens=8 * 16384, gpus=8)
    more = speed(training(), DEVICES["h200"], context=4096, step_tokens=3 * 8 * 16384, gpus=8)
    gather = 2 * PRESETS["shisa-7b"].parameters * 7 / 8 / 400e9
    assert gather == pytest.approx(0.035, rel=0.01)
    assert one.communication == pytest.approx(4 * gather)
    assert more.communication == pytest.approx(12 * gather)
    once = speed(replace(training(), reduce_once=True), DEVICES["h200"], context=4096, step_tokens=3 * 8 * 16384, gpus=8)
    assert once.communication == pytest.approx(8 * gather)
    unsharded = speed(replace(training(), reshard=False), DEVICES["h200"], context=4096, step_tokens=8 * 16384, gpus=8)
    assert unsharded.communication == pytest.approx(3 * gather)


def test_nodes_with_a_copy_each_exchange_gradients_only():
    """128 nodes of 8 GPUs: each GPU sends its float32 eighth of the gradients there and back over its own card."""
    found = speed(training(), DEVICES["h200"], context=4096, step_tokens=2**24, gpus=1024)
    node = speed(training(), DEVICES["h200"], context=4096, step_tokens=2**17, gpus=8)
    between = 2 * 4 * PRESETS["shisa-7b"].parameters / 8 * 127 / 128 / DEVICES["h200"].network
    assert found.communication - node.communication == pytest.approx(between)
    assert found.not_hidden < found.hidden <= 1024 * node.hidden


def test_an_update_takes_as_long_as_the_copies_of_offloaded_moments():
    """Both directions share the time, as the bus carries both at once."""
    sizes = {"context": 4096, "step_tokens": 2**20}
    offloaded = speed(training(offload="moments"), DEVICES["h100"], **sizes)
    kept = speed(training(), DEVICES["h100"], **sizes)
    copied = 4 * PRESETS["shisa-7b"].parameters / DEVICES["h100"].host
    assert 0.9 * copied < offloaded.compute - kept.compute < copied


def test_later_micro_batches_read_and_write_their_sums():
    """One GPU: each sum, and the gradients of embedding and head. Eight: an eighth of the sums, or whole gradients and sums."""
    parameters, edge = PRESETS["shisa-7b"].parameters, 2 * 120064 * 4096

    def later(step, gpus):
        """Seconds that a later micro-batch takes."""
        one, two = (
            speed(step, DEVICES["h200"], context=4096, step_tokens=number * gpus * 16384, gpus=gpus) for number in (1, 2)
        )
        return two.compute - one.compute

    bfloat16 = later(training(gradients="parameter"), 1)
    for step, gpus, moved in (
        (training(gradients="float32"), 1, 8 * parameters + 2 * edge),
        (training(), 8, 12 * parameters / 8),
        (replace(training(), reduce_once=True), 8, 10 * parameters),
    ):
        more = (moved - 4 * parameters - 2 * edge) / (0.84 * DEVICES["h200"].bandwidth)
        assert later(step, gpus) - bfloat16 == pytest.approx(more)


def test_fp8_is_as_fast_as_its_parts_by_hand():
    """Products at 1,160 TFLOP/s in 30 of 32 layers, and the passes that codes take; the same step without FP8 is slower."""
    plain, fp8 = training(), replace(training(), fp8_layers=range(1, 31))
    asked = {"context": 4096, "step_tokens": 2**17}
    device = DEVICES["h200"]
    found = speed(plain, device, **asked).compute - speed(fp8, device, **asked).compute
    linear = 30 * 4096 * (6144 + 4096 + 3 * 14336)
    products = 6 * linear * (1 / (0.93 * 790e12) - 1 / 1160e12)
    passes = 30 * (2 * 4096 + 4 * 14336 + 6144 + 6 * 4096)
    weights = linear * (6 + 7 * 8)
    assert found == pytest.approx(2**17 * products - (2**17 * passes + weights) / (0.84 * 4.3e12), rel=1e-9)
    kept, made_again = (speed(replace(fp8, keep_codes=keep), device, **asked).compute for keep in (True, False))
    assert made_again - kept == pytest.approx(linear * (80 - 6) / (0.84 * 4.3e12))
