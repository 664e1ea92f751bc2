"""Predicted tokens a second of a training step, on one GPU and on many.

Time is work divided by speed: matrix products by the measured ceiling, memory traffic by the bandwidth, collectives by the
links. Two figures are given: communication fully hidden behind computation, and not hidden at all. `ASSUMPTIONS` lists the
assumed shares of the ceilings; a test compares the results with published figures.
"""

from dataclasses import dataclass, replace

from engine.estimate.devices import NODE, Device
from engine.estimate.flops import recomputed_flops, training_flops
from engine.estimate.sizes import FLOAT32, Training
from kernels.attention.work import attended_pairs
from model.config import MistralConfig

# Shares of the ceilings that a step reaches, and attention's speed relative to matrix products.
_PRODUCTS, _BANDWIDTH = 0.93, 0.84
_ATTENTION_FORWARD, _ATTENTION_BACKWARD = 420 / 790, 320 / 790
# Matrix products of attention's backward pass: three in the pass by queries, four by keys. The forward pass has two.
_BACKWARD_PRODUCTS = 7

ASSUMPTIONS = (
    f"matrix products reach {_PRODUCTS:.0%} of the measured ceiling, memory traffic {_BANDWIDTH:.0%} of a copy's bandwidth",
    f"attention reaches {_ATTENTION_FORWARD:.0%} of the ceiling forward and {_ATTENTION_BACKWARD:.0%} backward, in "
    f"{_BACKWARD_PRODUCTS} products",
    "documents are as long as the context; all tokens reach the head",
    f"up to {NODE} GPUs shard the model over NVLink; beyond, each node holds a copy and nodes sum their gradients (HSDP)",
    "400 Gb/s of network a GPU, 90 % of it usable; all links are used at once",
    "not hidden: a step takes computation plus communication",
    "hidden: a step takes the longer of computation and communication, plus the first gather and the end of each "
    "reduction; never measured",
    "measured: a step of 8 of Shisa 7B's 32 layers on one H200, by an earlier version; predicted within 5 %",
    "not counted: multiprocessors that collectives occupy, stragglers, waiting for data",
)


FP8_ASSUMPTION = "FP8 products reach 1,160 TFLOP/s, below the 1,249 to 1,305 published for cuBLAS on an H200; not measured"


@dataclass(frozen=True)
class Speed:
    """Predicted time of a step."""

    gpus: int
    step_tokens: int  # of all GPUs
    compute: float  # seconds of a rank
    communication: float  # seconds of a rank
    exposed: float  # seconds of communication that nothing can hide

    @property
    def hidden(self) -> float:
        """Tokens a second of all GPUs with communication hidden."""
        return self.step_tokens / (max(self.compute, self.communication) + self.exposed)

    @property
    def not_hidden(self) -> float:
        """Tokens a second of all GPUs with no communication hidden."""
        return self.step_tokens / (self.compute + self.communication)


def speed(
    training: Training,
    device: Device,
    *,
    context: int,  # tokens of a document
    step_tokens: int,  # of all GPUs; at least one micro-batch a rank is taken
    gpus: int = 1,
    replicas: int | None = None,  # copies of the model; default: one a node
    backward_products: int = _BACKWARD_PRODUCTS,  # of attention
) -> Speed:
    """Predict the time of a step."""
    replicas = max(1, gpus // NODE) if replicas is None else replicas
    micro_batches = max(1, round(step_tokens / (gpus * training.tokens)))
    rank = replace(training, shards=gpus // replicas)
    compute = micro_batches * _micro_batch(rank, device, context, backward_products) + _update(rank, device)
    compute += _fp8_weights(rank, micro_batches) / (_BANDWIDTH * device.bandwidth)
    compute += (micro_batches - 1) * _accumulation(rank) / (_BANDWIDTH * device.bandwidth)
    communication, exposed = _communication(rank, device, gpus, replicas, micro_batches)
    return Speed(gpus, micro_batches * gpus * training.tokens, compute, communication, exposed)


def _micro_batch(training: Training, device: Device, context: int, backward_products: int) -> float:
    config, tokens, rows = training.config, training.tokens, training.rows
    pairs = attended_pairs([context] * (tokens // context) + [tokens % context], config.sliding_window)
    work = training_flops(config, tokens=tokens, rows=rows, pairs=0)
    work += recomputed_flops(config, tokens=tokens, pairs=0, recompute=training.recompute)
    # FP8 operations count half: what is missing is half of them.
    count = len(training.fp8_layers)
    halved = training_flops(config, tokens=tokens, rows=rows, pairs=0, fp8_layers=count)
    halved += recomputed_flops(config, tokens=tokens, pairs=0, recompute=training.recompute, fp8_layers=count)
    fp8 = 2 * (work - halved)
    forward = training_flops(config, tokens=0, rows=0, pairs=pairs) / 3
    passes = 2 if training.recompute == "block" else 1
    attention = passes * forward / _ATTENTION_FORWARD + backward_products / 2 * forward / _ATTENTION_BACKWARD
    seconds = ((work - fp8) / _PRODUCTS + attention) / device.products + fp8 / device.fp8_products
    moved = tokens * _token_bytes(config, count) + rows * _row_bytes(config)
    return seconds + moved / (_BANDWIDTH * device.bandwidth)


def _token_bytes(config: MistralConfig, fp8_layers: int) -> int:
    """Bytes that the kernels other than matrix products and attention move for a token."""
    width, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    packed = query + 2 * config.num_key_value_heads * config.head_dim
    # Reads and writes, forward and backward. Norm with residual sum, twice: 4 and 6 of the width. SwiGLU: 3 and 6 of the inner
    # width. Rotation: 2 and 2 of the packed heads.
    layer = 2 * (20 * width + 9 * inner + 4 * packed)
    # Norms and SwiGLU write codes of 1 byte instead of rows, and norms those of their gradients too: 7 + 12 bytes of the width,
    # 5 + 13 of the inner width. Rotation: 4 and 3 of the packed heads. Passes of their own: codes of attention's output, 3 + 3,
    # and shifts of the codes of all four outputs' gradients, 2 each.
    fp8 = 38 * width + 18 * inner + 7 * packed + 6 * query + 2 * (2 * width + packed) + 4 * inner
    return config.num_hidden_layers * layer + fp8_layers * (fp8 - layer)


def _fp8_weights(training: Training, micro_batches: int) -> int:
    """Bytes that a step moves to make codes of weights, and to add the products of their gradients, which come apart."""
    config = training.config
    rows = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim + 3 * config.intermediate_size
    elements = len(training.fp8_layers) * config.hidden_size * rows
    # Two reads and both codes once; or two reads and one code in each pass.
    codes = 6 if training.keep_codes else 10 * micro_batches
    return elements * (codes + (micro_batches - 1) * 2 * FLOAT32)


def _row_bytes(config: MistralConfig) -> int:
    """Bytes of a head's row: float32 logits written and read twice; bf16 gradients written and read twice."""
    return config.vocab_size * (3 * 4 + 3 * 2)


def _accumulation(training: Training) -> float:
    """Bytes that a later micro-batch's gradients take to be added to the sums: a read and a write of each sum, and reads."""
    config, item = training.config, training.dtype.itemsize
    if training.shards == 1:
        wide = FLOAT32 if training.optimizer.gradients == "float32" else item
        # Products add themselves to the sums. Embedding and head have gradients of their own to read.
        return 2 * wide * config.parameters + item * 2 * config.vocab_size * config.hidden_size
    if training.reduce_once:
        return (item + 2 * FLOAT32) * config.parameters
    return 3 * FLOAT32 * config.parameters / training.shards


def _update(training: Training, device: Device) -> float:
    moment = 2 if training.optimizer.moments == "bfloat16" else 4
    parameters = training.config.parameters / training.shards
    # The gradient is read twice (norm, update); parameter, remainder and moments are read and written.
    state = 2 * 2 + 2 * (2 + 2 + (0 if training.optimizer.offload == "moments" else 2 * moment))
    seconds = parameters * state / (_BANDWIDTH * device.bandwidth)
    if training.optimizer.offload == "moments":
        # Both directions at once, over the update itself: two moments of each parameter.
        seconds = max(seconds, parameters * 2 * moment / device.host)
    return seconds


def _communication(training: Training, device: Device, gpus: int, replicas: int, micro_batches: int) -> tuple[float, float]:
    """(seconds of all collectives of a step, seconds of the first gather and of each reduction's end)."""
    if gpus == 1:
        return 0.0, 0.0
    config, shards = training.config, training.shards
    nodes = -(-shards // NODE)

    def moved(size: float) -> float:
        """Seconds of a gather or reduction over the shards, by rings that enter each node through all of its cards."""
        return max(size * (shards - 1) / shards / device.nvlink, size * (nodes - 1) / nodes / (NODE * device.network))

    def summed(size: float) -> float:
        """Seconds of a shard's sum over the replicas; over the network where each replica is a node."""
        link = device.network if gpus > NODE else device.nvlink
        return 2 * size / shards * (replicas - 1) / replicas / link

    weights, gradients = config.parameters * 2, config.parameters * 4
    gathers = (2 if training.reshard else 1) * micro_batches
    edge = config.vocab_size * config.hidden_size / config.parameters
    reductions = 1 if training.reduce_once else micro_batches
    reduced, exchanged = moved(gradients), summed(gradients)
    # Each reduction ends with the embedding's gradient, which nothing is left to hide.
    exposed = edge * (moved(weights) + reductions * reduced + exchanged)
    return gathers * moved(weights) + reductions * reduced + exchanged, exposed
