"""Tokens a second of a training step on paper, on one GPU and on many.

Time is work over what a device reaches: products over its measured ceiling, passes over memory over its bandwidth, collectives
over the links. A rank's own time is that of one GPU; communication is either hidden behind it or not, and both are given. The
shares of the ceilings are assumptions, said in `ASSUMPTIONS` and held against published figures by a test.
"""

from dataclasses import dataclass, replace

from engine.estimate.flops import recomputed_flops, training_flops
from engine.estimate.memory import Training
from kernels.attention.work import attended_pairs
from model.config import MistralConfig

# GPUs that share NVLink, each with a network card of its own.
NODE = 8


@dataclass(frozen=True)
class Device:
    """What a GPU reaches. memory: usable GiB. products: bf16 operations a second of a large product. bandwidth: bytes a second
    of a copy in its memory. nvlink, network, host: bytes a second and direction, in a node, between nodes, to the host."""

    memory: float
    products: float
    bandwidth: float
    nvlink: float = 400e9
    network: float = 45e9
    host: float = 50e9


# The H200's two ceilings are measured. The H100 has the same chip; its memory is taken to reach the same share of its maker's
# figure (3.35 TB/s of the H200's 4.8).
DEVICES = {"h200": Device(139.0, 790e12, 4.3e12), "h100": Device(79.0, 790e12, 3.0e12)}

# Shares of the ceilings that a step reaches, and attention's operations a second relative to products.
_PRODUCTS, _BANDWIDTH = 0.93, 0.84
_ATTENTION_FORWARD, _ATTENTION_BACKWARD = 420 / 790, 320 / 790
# Products of attention's backward pass of which each is half of the forward pass: three in the pass by queries, four by keys.
_BACKWARD_PRODUCTS = 7

ASSUMPTIONS = (
    f"products reach {_PRODUCTS:.0%} of the measured ceiling, passes over memory {_BANDWIDTH:.0%} of a copy's bandwidth",
    f"attention reaches {_ATTENTION_FORWARD:.0%} of the ceiling forward and {_ATTENTION_BACKWARD:.0%} backward, in "
    f"{_BACKWARD_PRODUCTS} products",
    "documents are as long as the context; all places reach the head",
    f"up to {NODE} GPUs shard the model over NVLink; beyond, each node holds a copy, gradients are summed between nodes (HSDP)",
    "400 Gb/s of network a GPU, of which 90 % arrive; all links are used at once",
    "hidden: a step takes the longer of computation and communication, and the first gather and last reduction; else their sum",
    "what collectives take of the multiprocessors, stragglers and waiting for data are not in it",
)


@dataclass(frozen=True)
class Speed:
    """gpus: of the run. step_tokens: of a step. compute, communication: seconds of a rank in a step. exposed: those of
    communication that nothing can hide."""

    gpus: int
    step_tokens: int
    compute: float
    communication: float
    exposed: float

    @property
    def hidden(self) -> float:
        """Tokens a second of all GPUs, communication hidden."""
        return self.step_tokens / (max(self.compute, self.communication) + self.exposed)

    @property
    def not_hidden(self) -> float:
        return self.step_tokens / (self.compute + self.communication)


def speed(
    training: Training, device: Device, *, context: int, step_tokens: int, gpus: int = 1, replicas: int | None = None,
    backward_products: int = _BACKWARD_PRODUCTS,
) -> Speed:  # fmt: skip
    """Of a step of `step_tokens` places (at least one micro-batch a rank) on so many GPUs.

    Args: context: places of a document. replicas: copies of the model; default one a node. backward_products: of attention.
    """
    replicas = max(1, gpus // NODE) if replicas is None else replicas
    micro_batches = max(1, round(step_tokens / (gpus * training.tokens)))
    rank = replace(training, shards=gpus // replicas)
    compute = micro_batches * _micro_batch(rank, device, context, backward_products) + _update(rank, device)
    # A sum of gradients over micro-batches: two reads and a write of each.
    parameters = training.config.parameters
    compute += (micro_batches - 1) * 3 * training.dtype.itemsize * parameters / (_BANDWIDTH * device.bandwidth)
    communication, exposed = _communication(rank, device, gpus, replicas, micro_batches)
    return Speed(gpus, micro_batches * gpus * training.tokens, compute, communication, exposed)


def _micro_batch(training: Training, device: Device, context: int, backward_products: int) -> float:
    config, tokens, rows = training.config, training.tokens, training.rows
    pairs = attended_pairs([context] * (tokens // context) + [tokens % context], config.sliding_window)
    products = training_flops(config, tokens=tokens, rows=rows, pairs=0)
    products += recomputed_flops(config, tokens=tokens, pairs=0, recompute=training.recompute)
    forward = training_flops(config, tokens=0, rows=0, pairs=pairs) / 3
    passes = 2 if training.recompute == "block" else 1
    attention = passes * forward / _ATTENTION_FORWARD + backward_products / 2 * forward / _ATTENTION_BACKWARD
    seconds = (products / _PRODUCTS + attention) / device.products
    return seconds + (tokens * _token_bytes(config) + rows * _row_bytes(config)) / (_BANDWIDTH * device.bandwidth)


def _token_bytes(config: MistralConfig) -> int:
    """Bytes that the kernels beside products and attention move for a token."""
    width, inner = config.hidden_size, config.intermediate_size
    packed = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    # Of both norms: sum and norm, 4 forward; norm again, gradient, 6 backward. SwiGLU: 3 and 6. Rotation: 2 and 2.
    return 2 * config.num_hidden_layers * (20 * width + 9 * inner + 4 * packed)


def _row_bytes(config: MistralConfig) -> int:
    """Logits in float32 written, read for statistics and for gradients; these written, and read by two products."""
    return config.vocab_size * (3 * 4 + 3 * 2)


def _update(training: Training, device: Device) -> float:
    moment = 2 if training.optimizer.moments == "bfloat16" else 4
    parameters = training.config.parameters / training.shards
    # The gradient for its norm and again, parameter, remainder and moments read and written.
    state = 2 * 2 + 2 * (2 + 2 + (0 if training.optimizer.offload == "moments" else 2 * moment))
    seconds = parameters * state / (_BANDWIDTH * device.bandwidth)
    if training.optimizer.offload == "moments":
        # There and back one after the other.
        seconds += parameters * 4 * moment / device.host
    return seconds


def _communication(training: Training, device: Device, gpus: int, replicas: int, micro_batches: int) -> tuple[float, float]:
    """(seconds of collectives in a step, those of the first gather and the last reduction)."""
    if gpus == 1:
        return 0.0, 0.0
    config, shards = training.config, training.shards
    nodes = -(-shards // NODE)

    def moved(size: float) -> float:
        """A gather or a reduction over the shards: rings that enter each node through all of its cards."""
        return max(size * (shards - 1) / shards / device.nvlink, size * (nodes - 1) / nodes / (NODE * device.network))

    def summed(size: float) -> float:
        """Over the replicas, of a shard; between nodes where a replica is a node."""
        link = device.network if gpus > NODE else device.nvlink
        return 2 * size / shards * (replicas - 1) / replicas / link

    weights, gradients = config.parameters * 2, config.parameters * 4
    gathers = (2 if training.reshard else 1) * micro_batches
    edge = config.vocab_size * config.hidden_size / config.parameters
    reduction = moved(gradients) + summed(gradients)
    return gathers * moved(weights) + reduction, edge * (moved(weights) + reduction)
