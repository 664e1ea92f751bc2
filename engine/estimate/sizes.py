"""The sizes of a training step's tensors in bytes: a shape times an item size, nothing fitted.

The Triton kernels run on CUDA in bfloat16. Elsewhere their eager references run, whose float32 copies are counted instead.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from engine.settings.sections import OptimizerSettings
from kernels import padded_to_tiles
from kernels.attention.eager import EagerSizes, eager_sizes
from kernels.attention.work import AttentionWork, attention_work
from kernels.logit_budget import default_budget, sum_of_parts
from kernels.logit_budget import plan as head_plan
from kernels.recompute import Recompute
from model.config import MistralConfig

# Bytes of a float32: reductions, logits and references compute in it.
FLOAT32 = 4


@dataclass(frozen=True, eq=False)
class Training:
    """Everything that a step's memory depends on."""

    config: MistralConfig
    dtype: torch.dtype  # of the parameters
    optimizer: OptimizerSettings
    recompute: Recompute
    tokens: int  # of a micro-batch
    rows: int  # of a micro-batch that reach the head
    accumulates: bool  # a step has several micro-batches
    log_probs: bool  # the objective needs log-probabilities before its gradients (preference tuning), not a weighted sum
    kernels: bool  # the Triton kernels run, not their eager references
    shards: int = 1  # ranks that each parameter is divided between (FSDP2)
    reshard: bool = True  # blocks release their gathered weights after the forward pass
    reduce_once: bool = False  # gradients are summed over the shards after a step's last micro-batch only
    fp8_layers: range = range(0)  # layers whose matrix products run in FP8
    keep_codes: bool = True  # FP8 codes of weights are kept during a step
    one_pass: bool = False  # attention's backward pass is one (`kernels.attention.backward`)
    documents: AttentionWork | None = None  # work lists, which cost memory with references only; default: documents of a window


class Sizes:
    """Bytes of a micro-batch's tensors, where nothing else is said."""

    def __init__(self, training: Training) -> None:
        self.training, self.config = training, training.config
        config = self.config
        self.item = training.dtype.itemsize
        self.hidden = self.rows_of(config.hidden_size)  # the residual stream
        self.query = self.rows_of(config.num_attention_heads * config.head_dim)  # also attention's output
        self.key = self.rows_of(config.num_key_value_heads * config.head_dim)  # also the value
        self.inner = self.rows_of(config.intermediate_size)  # of the feed-forward network
        self.qkv = self.query + 2 * self.key
        self.scale = training.tokens * FLOAT32  # of a norm
        self.log_sum_exp = training.tokens * config.num_attention_heads * FLOAT32
        self.head_elements = config.vocab_size * config.hidden_size  # of the head's weight, and of the embedding's
        self.block_elements = (config.parameters - 2 * self.head_elements - config.hidden_size) // config.num_hidden_layers

    def rows_of(self, width: int) -> int:
        """A row of `width` for each token."""
        return self.training.tokens * width * self.item

    def wide(self, size: int) -> int:
        """The same tensor in float32."""
        return size // self.item * FLOAT32

    def widened(self, size: int) -> int:
        """A float32 copy of a tensor; float32 tensors need none."""
        return 0 if self.item == FLOAT32 else self.wide(size)

    @property
    def sum_item(self) -> int:
        """Bytes of an element of a single rank's sums of gradients."""
        return FLOAT32 if self.training.optimizer.gradients == "float32" else self.item

    # Sharding.

    def share(self, size: int) -> int:
        """A rank's shard of `size`."""
        return -(-size // self.training.shards)

    def gathered(self, elements: int) -> int:
        """Gathered weights; a single rank gathers nothing."""
        return elements * self.item if self.training.shards > 1 else 0

    # Activations.

    @cached_property
    def tables(self) -> int:
        """Rotary angles; with the eager functions also the masks and the lists of what attention gathers."""
        angles = self.training.tokens * self.config.head_dim * FLOAT32
        if self.training.kernels:
            return angles
        made = self.eager_attention
        return angles + made.pairs + 8 * (made.gathered_queries + made.gathered_keys + self.training.tokens)

    @cached_property
    def eager_attention(self) -> EagerSizes:
        """Numbers of tokens and pairs that attention holds on a CPU."""
        work = self.training.documents or _whole_documents(self.training.tokens, self.config.sliding_window)
        return eager_sizes(work)

    @property
    def qkv_kept(self) -> int:
        """Query, key and value for attention's backward pass; on a CPU it keeps the tiles' copies instead."""
        return self.qkv if self.training.kernels or self.eager_attention.alone else 0

    @property
    def attention_kept(self) -> int:
        """Kept by attention for its backward pass, besides query, key and value."""
        if self.training.kernels:
            return self.query + self.log_sum_exp
        # The tiles' queries, keys and values (both repeated for each query head), masks as addends, the tiles' outputs and the
        # joined output.
        made = self.eager_attention
        rows = made.gathered_queries + 2 * made.gathered_keys + made.outputs + self.training.tokens
        tiles = rows * self.query + made.outputs * self.log_sum_exp
        return tiles // self.training.tokens + made.pairs * self.item

    @property
    def attention_backward(self) -> int:
        """The output's gradient, D, and the gradients of query, key and value.

        One pass adds a float32 sum of the query's gradient, and a number that programs take turns by for each row of a head.
        """
        if not self.training.kernels:
            return self._eager_attention_backward
        turns = self.wide(self.query) + self.training.tokens * self.config.num_attention_heads * FLOAT32
        return self.query + self.log_sum_exp + self.qkv + (turns if self.training.one_pass else 0)

    @property
    def _eager_attention_backward(self) -> int:
        """Gradients of the tiles' outputs, queries, and keys and values before and after the heads' repetition is summed."""
        made = self.eager_attention
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        rows = made.outputs + made.gathered_queries + 2 * made.gathered_keys * (group + 1) // group
        return rows * self.query // self.training.tokens

    @property
    def feed_forward_kept(self) -> int:
        """Kept by the feed-forward network for its backward pass, besides the residual stream and the norm's scale."""
        kept = {"none": self.hidden + 3 * self.inner, "light": 2 * self.inner, "ffn": 0, "block": 0}
        return kept[self.training.recompute]

    @property
    def block_kept(self) -> int:
        """Kept by a block for its backward pass."""
        if self.training.recompute == "block":
            return self.hidden
        normed = self.hidden if self.training.recompute == "none" else 0
        return 2 * (self.hidden + self.scale) + normed + self.qkv_kept + self.attention_kept + self.feed_forward_kept

    @property
    def block_transients(self) -> int:
        """Alive only at the end of a block's forward pass: normed rows, products, results of network and attention."""
        recompute = self.training.recompute
        made = 2 * self.hidden
        if recompute != "none":
            made += self.hidden + self.inner
        if recompute in ("ffn", "block"):
            made += 2 * self.inner
        if recompute == "block":
            made += self.qkv_kept + self.attention_kept + self.hidden
        return made

    @property
    def fp8_block_kept(self) -> int:
        """Kept by a block in FP8 for its backward pass: the scales of its four maps' inputs, but neither norms nor products."""
        recompute = self.training.recompute
        if recompute == "block":
            return self.hidden
        gate_up = 0 if recompute == "ffn" else 2 * self.inner
        return 2 * self.hidden + 6 * self.scale + self.qkv_kept + self.attention_kept + gate_up

    @property
    def fp8_block_transients(self) -> int:
        """Alive only at the end of an FP8 block's forward pass: the codes of the network's inputs, results as above."""
        recompute = self.training.recompute
        made = 2 * self.hidden + self.codes(self.config.hidden_size + self.config.intermediate_size)
        if recompute in ("ffn", "block"):
            made += 2 * self.inner
        if recompute == "block":
            made += self.qkv_kept + self.attention_kept + self.hidden
        return made + self.fp8_product(self.config.hidden_size, self.config.intermediate_size)

    def codes(self, width: int) -> int:
        """FP8 codes of rows of `width`."""
        return self.training.tokens * width

    def fp8_product(self, outputs: int, inputs: int) -> int:
        """Alive only within an FP8 product of rows and a weight.

        The weight's codes, where they are not kept; in the reference, both factors and the result in float32.
        """
        codes = 0 if self.training.keep_codes else outputs * inputs
        if self.training.kernels:
            return codes
        tokens = self.training.tokens
        return codes + FLOAT32 * (tokens * inputs + outputs * inputs) + self.widened(tokens * outputs * self.item)

    def fp8_weight_product(self, outputs: int, inputs: int) -> int:
        """Alive only within an FP8 product for a weight's gradient: shifted codes; in the reference, float32 factors."""
        shifted = self.codes(outputs)
        return shifted if self.training.kernels else shifted + FLOAT32 * self.training.tokens * (outputs + inputs)

    def fp8_encoding(self, width: int) -> int:
        """Alive only while rows of `width` become codes: float32 copies in the reference."""
        return 0 if self.training.kernels else 2 * FLOAT32 * self.training.tokens * width

    @property
    def fp8_weight_codes(self) -> int:
        """Codes of a block's weights in both directions, kept during a step."""
        return 2 * (self.block_elements - 2 * self.config.hidden_size) if self.training.keep_codes else 0

    @property
    def final_norm_kept(self) -> int:
        """Kept by the final norm. Autograd differentiates the reference: it keeps float32 rows, before and after scaling."""
        return self.hidden + self.scale if self.training.kernels else 2 * self.wide(self.hidden) + self.scale

    # Head.

    @cached_property
    def head_rows(self) -> int:
        """Number of rows that reach the head; the kernels get them padded."""
        rows = self.training.rows
        return padded_to_tiles(rows) if self.training.kernels else rows

    @cached_property
    def chunks(self) -> tuple[bool, int]:
        """(whether the gradients of all rows' logits are kept, number of rows of a chunk)."""
        budget = default_budget(torch.device("cuda" if self.training.kernels else "cpu"))
        total = sum_of_parts(self.head_elements, self.item, kernels=self.training.kernels)
        return head_plan(self.head_rows, self.config.vocab_size, self.item, budget, sum_bytes=total)

    @property
    def head_parts(self) -> int:
        """Number of parts that the head's gradients are computed in."""
        keep, chunk = self.chunks
        at_once = keep and (self.training.kernels or self.training.log_probs)
        return 1 if at_once else -(-self.head_rows // chunk)

    def logits(self, rows: int) -> int:
        return rows * self.config.vocab_size * FLOAT32

    def logit_gradients(self, rows: int) -> int:
        return rows * self.config.vocab_size * self.item

    @property
    def gathered_rows(self) -> int:
        """The hidden rows that reach the head, side by side."""
        return self.head_rows * self.config.hidden_size * self.item

    def widened_product(self, rows: int) -> int:
        """Float32 copies that the reference multiplies to logits."""
        if self.training.kernels:
            return 0
        return self.widened(rows * self.config.hidden_size * self.item) + self.widened(self.head_elements * self.item)

    # Optimizer.

    @property
    def moments(self) -> int:
        """Both moments of one element."""
        return 2 * getattr(torch, self.training.optimizer.moments).itemsize

    @property
    def state(self) -> int:
        """Optimizer state of one element on the device."""
        remainder = 2 if self.training.dtype == torch.bfloat16 else 0
        return remainder + (0 if self.training.optimizer.offload == "moments" else self.moments)


def _whole_documents(tokens: int, window: int | None) -> AttentionWork:
    length = min(tokens, window or tokens)
    return attention_work([*range(0, tokens, length), tokens], window)
