"""Memory of a training step before anything is allocated: what the code allocates, in the order in which it does.

`plan` walks through two micro-batches and an update as model, kernels and optimizer do, and adds up what is held and what comes
and goes: each operator has its lines here. The peak is the largest sum, its items are what it is made of. Nothing is fitted: a
size is a shape times an item size. Where the kernels' eager references run (on a CPU, and for float32 on a GPU), their wide
copies are counted instead of the kernels' outputs.

Shapes: T tokens, D width, A query heads' width, K key/value heads' width, F feed-forward size.
"""

from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from engine.settings.sections import OptimizerSettings
from kernels import padded_to_tiles
from kernels.attention.work import AttentionWork, attention_work
from kernels.linear_log_prob import default_budget
from kernels.linear_log_prob import plan as head_plan
from kernels.recompute import Recompute
from model.config import MistralConfig

ITEMS = ("weights", "optimizer", "gradients", "activations", "logits", "head gradient", "transients", "gathered parameters",
         "communication", "workspaces")  # fmt: skip
# float32, in which reductions, logits and references compute.
_WIDE = 4
# What `use_deterministic_algorithms` asks of cuBLAS, 8 x 4 MiB, for a handle; the backward pass's thread has one of its own.
_CUBLAS_WORKSPACE = 2 * 8 * 2**22
# Elements that the optimizer's eager reference updates at once.
_UPDATE_BLOCK = 2**17


@dataclass(frozen=True)
class Training:
    """All that a step's memory depends on.

    tokens: of a micro-batch. rows: of them that reach the head. accumulates: whether a step has several micro-batches.
    log_probs: whether the objective needs log-probabilities before its gradients (preference tuning), and not a weighted sum.
    kernels: whether the Triton kernels run, else their references. shards: ranks that a parameter is divided between (FSDP2).
    reshard: whether blocks release their gathered weights after the forward pass (`engine.distributed.sharding`).
    documents: the attention's work lists, which cost memory with the references only; default: whole documents of a window.
    """

    config: MistralConfig
    dtype: torch.dtype
    optimizer: OptimizerSettings
    recompute: Recompute
    tokens: int
    rows: int
    accumulates: bool
    log_probs: bool
    kernels: bool
    shards: int = 1
    reshard: bool = True
    documents: AttentionWork | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """The peak of a step: bytes of each of `ITEMS` at that moment, and what runs then."""

    items: dict[str, int]
    moment: str

    @property
    def peak(self) -> int:
        return sum(self.items.values())


def plan(training: Training) -> MemoryPlan:
    """The peak of tensor bytes on one rank's device in a training step. The CUDA context is not in it."""
    step = _Step(training)
    step.run()
    return step.account.plan


def largest_micro_batch(training: Training, limit: int, *, most: int, multiple: int = 1024) -> int:
    """Most tokens of a micro-batch, in multiples of `multiple` up to `most`, whose peak is at most `limit` bytes; 0 for none.

    The share of rows is that of `training`.
    """

    def sized(tokens: int) -> Training:
        return replace(training, tokens=tokens, rows=-(-tokens * training.rows // training.tokens), documents=None)

    sizes = range(multiple, most + 1, multiple)
    # The peak rises with the tokens, but falls once where the logits of all rows are no longer kept.
    kept = bisect(sizes, False, key=lambda tokens: not _Step(sized(tokens)).chunks[0])
    for part in (sizes[kept:], sizes[:kept]):
        fitting = bisect(part, False, key=lambda tokens: plan(sized(tokens)).peak > limit)
        if fitting:
            return part[fitting - 1]
    return 0


@dataclass
class _Account:
    """What is held, by item, and the largest sum so far."""

    held: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ITEMS, 0))
    total: int = 0
    peak: int = 0
    plan: MemoryPlan = field(default_factory=lambda: MemoryPlan(dict.fromkeys(ITEMS, 0), "nothing"))

    def hold(self, item: str, size: int, moment: str) -> None:
        self.held[item] += size
        self.total += size
        self.pass_by(moment)

    def release(self, item: str, size: int) -> None:
        self.held[item] -= size
        self.total -= size
        assert self.held[item] >= 0, f"{item} released twice"

    def pass_by(self, moment: str, transients: int = 0, **items: int) -> None:
        """A moment at which more is there than is held."""
        peak = self.total + transients + sum(items.values())
        if peak > self.peak:
            extra = {"transients": transients, **{name.replace("_", " "): size for name, size in items.items()}}
            self.peak = peak
            self.plan = MemoryPlan({name: size + extra.get(name, 0) for name, size in self.held.items()}, moment)

    @contextmanager
    def holding(self, item: str, size: int, moment: str) -> Iterator[None]:
        self.hold(item, size, moment)
        yield
        self.release(item, size)


class _Step:
    """The walk. Sizes are bytes: of T tokens in the model's dtype where a letter says so, `wide_` in float32."""

    def __init__(self, training: Training) -> None:
        self.training, self.config = training, training.config
        self.account = _Account()
        self.item = training.dtype.itemsize
        config = self.config
        self.D, self.A, self.K, self.F = (
            training.tokens * width * self.item
            for width in (config.hidden_size, config.num_attention_heads * config.head_dim,
                          config.num_key_value_heads * config.head_dim, config.intermediate_size)
        )  # fmt: skip
        self.qkv = self.A + 2 * self.K
        self.scale = training.tokens * _WIDE
        self.log_sum_exp = training.tokens * config.num_attention_heads * _WIDE
        self.head_elements = config.vocab_size * config.hidden_size
        self.block_elements = (config.parameters - 2 * self.head_elements - config.hidden_size) // config.num_hidden_layers
        self.sending = 0
        self.first = True

    def run(self) -> None:
        training, account = self.training, self.account
        account.hold("weights", self._share(self.config.parameters * self.item), "weights")
        remainder = 2 if training.dtype == torch.bfloat16 else 0
        state = remainder + (0 if training.optimizer.offload == "moments" else self.moments)
        account.hold("optimizer", self._share(self.config.parameters * state), "optimizer")
        if training.kernels:
            account.hold("workspaces", _CUBLAS_WORKSPACE, "workspaces")
        for self.last in (False, True) if training.accumulates else (True,):
            self.forward()
            self.head()
            self.backward()
            self.first = False
        self.update()

    @property
    def moments(self) -> int:
        """Bytes of both moments of a parameter."""
        return 2 * getattr(torch, self.training.optimizer.moments).itemsize

    def _share(self, size: int) -> int:
        return -(-size // self.training.shards)

    def _wide(self, size: int) -> int:
        """Bytes of the same in float32."""
        return size // self.item * _WIDE

    def _widened(self, size: int) -> int:
        """Bytes of a copy in float32, which float32 itself does not need."""
        return 0 if self.item == _WIDE else self._wide(size)

    # Forward.

    @cached_property
    def tables(self) -> int:
        """Angles, and with the references the masks of who sees whom."""
        angles = self.training.tokens * self.config.head_dim * _WIDE
        return angles + (0 if self.training.kernels else self.masks[0])

    @cached_property
    def masks(self) -> tuple[int, int]:
        """(elements of the reference's masks, elements of one side of key and value that its tiles copy)."""
        work = self.training.documents or _whole_documents(self.training.tokens, self.config.sliding_window)
        seen = copied = 0
        for start, end, ranges in work.queries():
            keys = sum(stop - begin for begin, stop, _ in ranges)
            seen += (end - start) * keys
            copied += keys if len(ranges) != 1 else 0
        return seen, copied

    @property
    def attention_kept(self) -> int:
        """Beside query, key and value: the output and what says how it came about."""
        if self.training.kernels:
            return self.A + self.log_sum_exp
        # Keys and values repeated for each query head, masks as addends, the tiles' outputs, and these side by side.
        seen, copied = self.masks
        copies = 2 * copied * self.A // self.training.tokens
        return 2 * self.A + copies + seen * self.item + 2 * self.A + self.log_sum_exp

    @property
    def feed_forward_kept(self) -> int:
        """Beside the residual stream and its scale."""
        return {"none": self.D + 3 * self.F, "light": 2 * self.F, "ffn": 0, "block": 0}[self.training.recompute]

    def block_kept(self, layer: int) -> int:
        """What a block keeps for its backward pass."""
        if self.training.recompute == "block":
            # The first one's input is the embeddings themselves.
            return self.D
        normed = self.D if self.training.recompute == "none" else 0
        return 2 * (self.D + self.scale) + normed + self.qkv + self.attention_kept + self.feed_forward_kept

    def forward(self) -> None:
        account = self.account
        account.hold("activations", self.tables, "embedding")
        block, head = self.gathered(self.block_elements), self.gathered(self.head_elements)
        with account.holding("gathered parameters", 2 * head + block, "embedding"):
            account.pass_by("embedding", self.D)
        for layer in range(self.config.num_hidden_layers):
            # Its weights, what they were gathered in, and what the next block's are gathered in.
            with account.holding("gathered parameters", 3 * block, "block forward"):
                account.hold("activations", self.block_kept(layer), "block forward")
                account.pass_by("block forward", self.forward_transients() + (self.D if layer else 0))
            if not self.training.reshard:
                account.hold("gathered parameters", block, "block forward")
        if self.training.reshard:
            # The last block's stay for the backward pass, which begins with them.
            account.hold("gathered parameters", block, "block forward")
        account.hold("activations", self.final_norm_kept, "final norm")

    def gathered(self, elements: int) -> int:
        """Bytes of whole weights, which are there anyway on a single rank."""
        return elements * self.item if self.training.shards > 1 else 0

    def forward_transients(self) -> int:
        """At the end of a block's feed-forward network: normed rows, product, what attention and network add."""
        recompute = self.training.recompute
        made = (
            2 * self.D + (0 if recompute == "none" else self.D + self.F) + (2 * self.F if recompute in ("ffn", "block") else 0)
        )
        return made + (self.qkv + self.attention_kept + self.D if recompute == "block" else 0)

    @property
    def final_norm_kept(self) -> int:
        # The reference is differentiated by autograd: wide rows, and these times their scale.
        return self.D + self.scale if self.training.kernels else 2 * self._wide(self.D) + self.scale

    # Head.

    @cached_property
    def rows(self) -> int:
        """Rows of the head; for kernels padded as the batch is."""
        rows = self.training.rows
        return padded_to_tiles(rows) if self.training.kernels else rows

    @cached_property
    def chunks(self) -> tuple[bool, int]:
        """(whether all rows' gradients by the logits are kept, rows of a chunk)."""
        budget = default_budget(torch.device("cuda" if self.training.kernels else "cpu"))
        return head_plan(self.rows, self.config.vocab_size, self.item, budget)

    def logits(self, rows: int) -> int:
        return rows * self.config.vocab_size * _WIDE

    def logit_gradients(self, rows: int) -> int:
        return rows * self.config.vocab_size * self.item

    def gathered_rows(self) -> int:
        return self.rows * self.config.hidden_size * self.item

    def head(self) -> None:
        """Log-probabilities, and where the loss is a weighted sum, the gradients too."""
        keep, chunk = self.chunks
        account, moment = self.account, "head forward"
        head = self.gathered(self.head_elements)
        account.hold("gathered parameters", head, moment)
        # The normed rows, in the objective's hands.
        account.hold("activations", self.D, moment)
        with account.holding("gathered parameters", head, moment):
            if self.training.log_probs:
                account.hold("logits", self.logit_gradients(self.rows) if keep else 0, moment)
                account.pass_by(moment, self.gathered_rows() + self.widened_product(chunk), logits=self.logits(chunk))
            else:
                self.head_gradients(moment, parts=1 if keep else -(-self.rows // chunk), scored=True)
                account.hold("activations", self.D, moment)
                account.hold("head gradient", self.head_elements * self.item, moment)
                account.release("activations", self.D)

    def widened_product(self, rows: int) -> int:
        """Copies in float32 that the reference multiplies to logits."""
        if self.training.kernels:
            return 0
        return self._widened(rows * self.config.hidden_size * self.item) + self._widened(self.head_elements * self.item)

    def head_gradients(self, moment: str, *, parts: int, scored: bool) -> None:
        """Gradients of the rows and of the head's weight, part by part. scored: by logits that are made here."""
        account = self.account
        part = self.rows if parts == 1 else self.chunks[1]
        chunk = min(self.chunks[1], part)
        both = 2 * self.gathered_rows()
        gradients = self.logit_gradients(part) if scored else 0
        weight = self.head_elements * self.item
        total = self.head_elements * _WIDE if parts > 1 else 0
        if scored:
            account.pass_by(
                moment, both + self.widened_product(chunk), logits=gradients + self.logits(chunk), head_gradient=total
            )
        if parts == 1:
            account.pass_by(moment, both, logits=gradients, head_gradient=weight)
        else:
            copies = 0 if self.training.kernels else self._widened(gradients) + self._widened(both // 2 * part // self.rows)
            # A part's product beside the sum.
            account.pass_by(moment, both + copies, logits=gradients, head_gradient=2 * total)
        scattered = self.D + (0 if self.training.kernels else self._wide(both // 2) + self._widened(both // 2) // 2)
        account.pass_by(moment, both + scattered, head_gradient=total or weight)
        account.pass_by(moment, both + self.D, head_gradient=total + weight)

    # Backward.

    def backward(self) -> None:
        account, config = self.account, self.config
        weight = self.head_elements * self.item
        block, head = self.gathered(self.block_elements), self.gathered(self.head_elements)
        if self.training.log_probs:
            keep, chunk = self.chunks
            self.head_gradients("head backward", parts=1 if keep else -(-self.rows // chunk), scored=not keep)
            account.release("logits", self.logit_gradients(self.rows) if keep else 0)
            account.hold("head gradient", weight, "head backward")
        account.release("activations", self.D)
        account.release("head gradient", weight)
        # From here on one gradient of the residual stream is there, which its two parts share.
        with account.holding("transients", self.D, "head backward"):
            self.gradients(self.head_elements, "head backward")
            self.reduce(self.head_elements, "head backward")
            account.release("gathered parameters", head)
            self.norm_backward("final norm backward", self.D)
            self.gradients(config.hidden_size, "final norm backward")
            self.reduce(config.hidden_size, "final norm backward")
            account.release("activations", self.final_norm_kept)
            # What the next block's weights are gathered in.
            with account.holding("gathered parameters", block if self.training.reshard else 0, "block backward"):
                for layer in reversed(range(config.num_hidden_layers)):
                    self.block_backward(layer)
                    self.reduce(self.block_elements, "block backward")
                    account.release("gathered parameters", 0 if self.training.reshard else block)
            account.release("gathered parameters", block if self.training.reshard else 0)
            account.release("activations", self.tables)
            with account.holding("gathered parameters", head, "embedding backward"):
                self.gradients(self.head_elements, "embedding backward")
                self.reduce(self.head_elements, "embedding backward")
        account.release("communication", self.sending)
        self.sending = 0

    def gradients(self, elements: int, moment: str, transients: int = 0) -> None:
        """New gradients of parameters. On a single rank they are kept as they are for the first micro-batch, else added to what
        is there; those of a sharded unit wait until it is done."""
        new = elements * self.item
        if self.training.shards > 1:
            self.account.hold("gradients", new, moment)
            self.account.pass_by(moment, transients)
            return
        wide = self.training.optimizer.gradients == "float32" and self.item < _WIDE
        self.account.pass_by(moment, transients + new + (elements * _WIDE if wide else 0))
        if self.first:
            self.account.hold("gradients", elements * _WIDE if wide else new, moment)

    def reduce(self, elements: int, moment: str) -> None:
        """A sharded unit's gradients: added up whole, in float32, until the last micro-batch, then summed over the ranks."""
        if self.training.shards == 1:
            return
        account, new, wide = self.account, elements * self.item, elements * _WIDE
        if self.first and not self.last:
            account.hold("gradients", wide, moment)
        if self.last:
            # What is sent stays until the next unit's is.
            account.hold("communication", wide, moment)
            account.pass_by(moment, communication=self._share(wide))
            account.release("communication", self.sending)
            self.sending = wide
            account.hold("gradients", self._share(new), moment)
            if not self.first:
                account.release("gradients", wide)
        account.release("gradients", new)

    def block_backward(self, layer: int) -> None:
        account, config = self.account, self.config
        moment = "block backward"
        recompute = self.training.recompute
        checkpointed = recompute == "block"
        kept = self.block_kept(layer)
        again = 0
        if checkpointed:
            again = 3 * self.D + 2 * self.scale + self.qkv + self.attention_kept + 3 * self.F
            account.hold("transients", again, moment)
            account.pass_by(moment, 2 * self.D)
        normed_kept = recompute in ("none", "block")
        # Feed-forward.
        width, inner = config.hidden_size, config.intermediate_size
        normed = 0 if normed_kept else self.D
        emitted = 0 if normed_kept else self.F
        gate_up = 2 * self.F if recompute == "ffn" else 0
        eager = 0 if self.training.kernels else self._widened(3 * self.F) + 5 * self._wide(self.F)
        account.pass_by(moment, normed + gate_up + self.F + emitted + eager)
        weights = 3 * width * inner
        self.norm_backward(moment, normed + gate_up + emitted + weights * self.item + self.D)
        self.gradients(weights, moment, self.D)
        half = self.D + self.scale
        freed = {"none": half + self.D + 3 * self.F, "light": half + 2 * self.F, "ffn": half, "block": 0}[recompute]
        account.release("activations", freed)
        if checkpointed:
            account.release("transients", half + self.D + 3 * self.F)
        # Attention's output projection.
        attended = config.num_attention_heads * config.head_dim
        self.gradients(width * attended, moment, self.A)
        # Attention.
        if self.training.kernels:
            account.pass_by(moment, self.A + self.qkv + self.log_sum_exp)
        else:
            # Gradients of query, repeated key and value, each summed up from tensors of the whole row.
            account.pass_by(moment, 6 * self.A)
        account.release("transients" if checkpointed else "activations", self.attention_kept + self.qkv)
        # Rotation back, projection, norm.
        packed = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        eager = 0 if self.training.kernels else 2 * self._wide(self.qkv)
        account.pass_by(moment, 2 * self.qkv + eager)
        self.norm_backward(moment, 2 * self.qkv + normed + width * packed * self.item + self.D)
        self.gradients(width * (packed + 2), moment, self.D + self.qkv)
        account.release("activations", kept - freed - (0 if checkpointed else self.attention_kept + self.qkv))
        if checkpointed:
            account.release("transients", again - (half + self.D + 3 * self.F) - self.attention_kept - self.qkv)

    def norm_backward(self, moment: str, transients: int) -> None:
        """The gradient of the normed rows, the reference's by way of float32."""
        eager = 0 if self.training.kernels else 2 * self._widened(self.D) + 4 * self._wide(self.D) - self.D
        self.account.pass_by(moment, transients + self.D + eager)

    # Update.

    def update(self) -> None:
        config = self.config
        largest = self._share(max(config.vocab_size, 2 * config.intermediate_size) * config.hidden_size)
        copied = largest * self.moments if self.training.optimizer.offload == "moments" else 0
        if self.training.kernels:
            self.account.pass_by("update", copied)
            return
        # Squares for the norm; then, an element: gradient, change, root and its float64 or, to round bfloat16 moments, their
        # wide copies and Philox's words; those of a split master; of the results, what stays until the next block has its own.
        squares = largest * (_WIDE + (_WIDE if self.item < _WIDE else 0))
        stochastic = self.training.optimizer.moments == "bfloat16"
        element = (56 if stochastic else 16) + (8 if self.item < _WIDE else 0) + (8 if largest > _UPDATE_BLOCK else 0)
        self.account.pass_by("update", max(squares, copied + min(largest, _UPDATE_BLOCK) * element))


def _whole_documents(tokens: int, window: int | None) -> AttentionWork:
    length = min(tokens, window or tokens)
    return attention_work([*range(0, tokens, length), tokens], window)
