"""Memory plan of a training step, made before anything is allocated.

`plan` walks through two micro-batches and an update in the order in which model, kernels and optimizer allocate and free, and
keeps an account of the bytes held. The plan is the largest sum and its items. `sizes` holds the tensors' sizes, this file the
order. Each operator has its lines here: who changes an operator's allocations changes them too.
"""

from bisect import bisect
from dataclasses import replace

from engine.estimate.account import Account, MemoryPlan
from engine.estimate.sizes import FLOAT32, Sizes, Training
from engine.optim.offload import PIECE

# cuBLAS's workspace under `use_deterministic_algorithms`: 8 x 4 MiB for each of two handles, as the backward pass's thread has
# its own.
_CUBLAS_WORKSPACE = 2 * 8 * 2**22
# Elements of one eager pass of `kernels.adamw` on a CPU.
_UPDATE_BLOCK = 2**17


def plan(training: Training) -> MemoryPlan:
    """The peak of tensor bytes on one rank's device in a training step. The CUDA context is not in it."""
    step = _Step(training)
    step.run()
    return step.account.plan


def largest_micro_batch(
    training: Training,  # its share of rows that reach the head stays the same
    limit: int,  # bytes
    *,
    most: int,  # tokens
    multiple: int = 1024,
) -> int:
    """Most tokens of a micro-batch, in multiples of `multiple` up to `most`, with a peak of at most `limit`; 0 for none."""

    def sized(tokens: int) -> Training:
        return replace(training, tokens=tokens, rows=-(-tokens * training.rows // training.tokens), documents=None)

    sizes = range(multiple, most + 1, multiple)
    # The peak rises with the tokens, but falls once, where the logits of all rows are no longer kept.
    kept = bisect(sizes, False, key=lambda tokens: not Sizes(sized(tokens)).chunks[0])
    for part in (sizes[kept:], sizes[:kept]):
        fitting = bisect(part, False, key=lambda tokens: plan(sized(tokens)).peak > limit)
        if fitting:
            return part[fitting - 1]
    return 0


class _Step:
    """The walk through a step."""

    def __init__(self, training: Training) -> None:
        self.training, self.config = training, training.config
        self.sizes = Sizes(training)
        self.account = Account()
        self.sending = 0  # bytes of the last unit's gradients, which are still being sent
        self.first = True  # the first micro-batch of the step
        self.last = True  # the last micro-batch of the step

    def run(self) -> None:
        training, sizes, account = self.training, self.sizes, self.account
        account.hold("weights", sizes.share(self.config.parameters * sizes.item), "weights")
        account.hold("optimizer", sizes.share(self.config.parameters * sizes.state), "optimizer")
        if training.kernels:
            account.hold("workspaces", _CUBLAS_WORKSPACE, "workspaces")
        for self.last in (False, True) if training.accumulates else (True,):
            self.forward()
            self.head()
            self.backward()
            self.first = False
        account.release("weight codes", len(training.fp8_layers) * sizes.fp8_weight_codes)
        self.update()

    def forward(self) -> None:
        """Embedding, blocks, final norm."""
        sizes, account = self.sizes, self.account
        account.hold("activations", sizes.tables, "embedding")
        block, head = sizes.gathered(sizes.block_elements), sizes.gathered(sizes.head_elements)
        with account.holding("gathered parameters", 2 * head + block, "embedding"):
            account.pass_by("embedding", sizes.hidden)
        for layer in range(self.config.num_hidden_layers):
            # The block's weights, the buffer that they were gathered in, and the buffer of the next block.
            with account.holding("gathered parameters", 3 * block, "block forward"):
                fp8 = layer in self.training.fp8_layers
                if fp8 and self.first:
                    account.hold("weight codes", sizes.fp8_weight_codes, "block forward")
                account.hold("activations", sizes.fp8_block_kept if fp8 else sizes.block_kept, "block forward")
                # The first block's input is the embedding itself, and kept.
                transients = sizes.fp8_block_transients if fp8 else sizes.block_transients
                account.pass_by("block forward", transients + (sizes.hidden if layer else 0))
            if not self.training.reshard:
                account.hold("gathered parameters", block, "block forward")
        if self.training.reshard:
            # The last block's weights stay: the backward pass begins with them.
            account.hold("gathered parameters", block, "block forward")
        account.hold("activations", sizes.final_norm_kept, "final norm")

    def head(self) -> None:
        """Log-probabilities; where the loss is a weighted sum, also the gradients."""
        sizes, account, moment = self.sizes, self.account, "head forward"
        keep, chunk = sizes.chunks
        head = sizes.gathered(sizes.head_elements)
        account.hold("gathered parameters", head, moment)
        # The objective holds the normed rows.
        account.hold("activations", sizes.hidden, moment)
        with account.holding("gathered parameters", head, moment):
            if self.training.log_probs:
                account.hold("logits", sizes.logit_gradients(sizes.head_rows) if keep else 0, moment)
                account.pass_by(moment, sizes.gathered_rows + sizes.widened_product(chunk), logits=sizes.logits(chunk))
            else:
                self.head_gradients(moment, scored=True)
                account.hold("activations", sizes.hidden, moment)
                account.hold("head gradient", sizes.head_elements * sizes.item, moment)
                account.release("activations", sizes.hidden)

    def head_gradients(self, moment: str, *, scored: bool) -> None:
        """Gradients of the rows and of the head's weight, part by part. scored: the logits are made here too."""
        if not self.training.kernels:
            self.eager_head_gradients(moment, scored=scored)
            return
        sizes, account, parts = self.sizes, self.account, self.sizes.head_parts
        part = sizes.head_rows if parts == 1 else sizes.chunks[1]
        chunk = min(sizes.chunks[1], part)
        both = 2 * sizes.gathered_rows
        gradients = sizes.logit_gradients(part) if scored else 0
        weight = sizes.head_elements * sizes.item
        total = sizes.head_elements * FLOAT32 if parts > 1 else 0
        if scored:
            account.pass_by(moment, both, logits=gradients + sizes.logits(chunk), head_gradient=total)
        # The products of parts add themselves to the sum.
        account.pass_by(moment, both, logits=gradients, head_gradient=weight if parts == 1 else total)
        account.pass_by(moment, both + sizes.hidden, head_gradient=total + weight)

    def eager_head_gradients(self, moment: str, *, scored: bool) -> None:
        """`head_gradients` on a CPU: all parts share one buffer of logits, and float32 gradients overwrite the logits."""
        sizes, account, parts = self.sizes, self.account, self.sizes.head_parts
        chunk = min(sizes.chunks[1], sizes.head_rows)
        rows = (3 if scored else 2) * sizes.gathered_rows
        buffer = sizes.logits(chunk) if scored else 0
        narrow = sizes.item < FLOAT32
        gradients = sizes.logit_gradients(chunk) if scored and narrow else 0
        weight = sizes.head_elements * sizes.item
        total = sizes.head_elements * FLOAT32 if parts > 1 else 0
        if scored:
            account.pass_by(moment, rows + sizes.widened_product(chunk), logits=buffer + gradients, head_gradient=total)
        if parts == 1:
            account.pass_by(moment, rows, logits=buffer + gradients, head_gradient=weight)
        else:
            copies = sizes.widened(gradients) + sizes.widened(sizes.gathered_rows * chunk // sizes.head_rows)
            account.pass_by(moment, rows + copies, logits=buffer + gradients, head_gradient=total)
        scattered = sizes.hidden + sizes.wide(sizes.gathered_rows) + sizes.widened(sizes.gathered_rows) // 2
        account.pass_by(moment, rows + scattered, logits=buffer, head_gradient=total or weight)
        account.pass_by(moment, rows + sizes.hidden, logits=buffer, head_gradient=weight + (total if narrow else 0))

    def backward(self) -> None:
        """Head, final norm, blocks, embedding."""
        sizes, account = self.sizes, self.account
        weight = sizes.head_elements * sizes.item
        block, head = sizes.gathered(sizes.block_elements), sizes.gathered(sizes.head_elements)
        if self.training.log_probs:
            keep = sizes.chunks[0]
            self.head_gradients("head backward", scored=not keep)
            account.release("logits", sizes.logit_gradients(sizes.head_rows) if keep else 0)
            account.hold("head gradient", weight, "head backward")
        account.release("activations", sizes.hidden)
        account.release("head gradient", weight)
        # From here on there is one gradient of the residual stream, shared by its two addends.
        with account.holding("transients", sizes.hidden, "head backward"):
            self.gradients(sizes.head_elements, "head backward")
            self.reduce(sizes.head_elements, "head backward")
            account.release("gathered parameters", head)
            self.norm_backward("final norm backward", sizes.hidden)
            self.gradients(self.config.hidden_size, "final norm backward")
            self.reduce(self.config.hidden_size, "final norm backward")
            account.release("activations", sizes.final_norm_kept)
            # The buffer of the next block's weights.
            with account.holding("gathered parameters", block if self.training.reshard else 0, "block backward"):
                for layer in reversed(range(self.config.num_hidden_layers)):
                    if layer in self.training.fp8_layers:
                        self.fp8_block_backward("block backward")
                    else:
                        # The gradient from a block in FP8 carries its codes.
                        carried = sizes.codes(self.config.hidden_size) if layer + 1 in self.training.fp8_layers else 0
                        with account.holding("transients", carried, "block backward"):
                            self.block_backward("block backward")
                    self.reduce(sizes.block_elements, "block backward")
                    account.release("gathered parameters", 0 if self.training.reshard else block)
            account.release("gathered parameters", block if self.training.reshard else 0)
            account.release("activations", sizes.tables)
            with account.holding("gathered parameters", head, "embedding backward"):
                self.gradients(sizes.head_elements, "embedding backward")
                self.reduce(sizes.head_elements, "embedding backward")
        account.release("communication", self.sending)
        self.sending = 0

    def block_backward(self, moment: str) -> None:
        """Feed-forward network, attention's output projection, attention, its input projection."""
        sizes, account, config = self.sizes, self.account, self.config
        recompute, kernels = self.training.recompute, self.training.kernels
        again = 0  # activations that the backward pass computes again and has not yet freed
        if recompute == "block":
            again = 3 * sizes.hidden + 2 * sizes.scale + sizes.qkv_kept + sizes.attention_kept + 3 * sizes.inner
            account.hold("transients", again, moment)
            account.pass_by(moment, 2 * sizes.hidden)
        kept = sizes.block_kept

        # Feed-forward network. The other modes compute the normed rows and SwiGLU's output again.
        normed_kept = recompute in ("none", "block")
        normed = 0 if normed_kept else sizes.hidden
        activated = 0 if normed_kept else sizes.inner
        gate_up = 2 * sizes.inner if recompute == "ffn" else 0
        eager = 0 if kernels else sizes.widened(3 * sizes.inner) + 5 * sizes.wide(sizes.inner)
        account.pass_by(moment, normed + gate_up + sizes.inner + activated + eager)
        weights = 3 * config.hidden_size * config.intermediate_size
        alive = normed + gate_up + activated + self.product(weights)
        account.pass_by(moment, alive + self.factors(2 * sizes.inner + sizes.hidden))
        self.norm_backward(moment, alive + sizes.hidden)
        self.linear_gradients(weights, moment, sizes.hidden)
        half = sizes.hidden + sizes.scale
        if recompute == "block":
            account.release("transients", half + sizes.hidden + 3 * sizes.inner)
            again -= half + sizes.hidden + 3 * sizes.inner
        else:
            account.release("activations", half + sizes.feed_forward_kept)
            kept -= half + sizes.feed_forward_kept

        # Attention's output projection.
        query_width = config.num_attention_heads * config.head_dim
        self.linear_gradients(config.hidden_size * query_width, moment, sizes.query + self.factors(sizes.hidden + sizes.query))

        account.pass_by(moment, sizes.attention_backward)
        if recompute == "block":
            account.release("transients", sizes.attention_kept + sizes.qkv_kept)
            again -= sizes.attention_kept + sizes.qkv_kept
        else:
            account.release("activations", sizes.attention_kept + sizes.qkv_kept)
            kept -= sizes.attention_kept + sizes.qkv_kept

        # Rotation, input projection, norm.
        packed_width = query_width + 2 * config.num_key_value_heads * config.head_dim
        account.pass_by(moment, 2 * sizes.qkv + (0 if kernels else 2 * sizes.wide(sizes.qkv)))
        projection = config.hidden_size * packed_width
        alive = 2 * sizes.qkv + normed + self.product(projection)
        account.pass_by(moment, alive + self.factors(sizes.qkv + sizes.hidden))
        self.norm_backward(moment, alive + sizes.hidden)
        self.linear_gradients(projection, moment, sizes.hidden + sizes.qkv)
        self.gradients(2 * config.hidden_size, moment, sizes.hidden + sizes.qkv)
        account.release("activations", kept)
        account.release("transients", again)

    def fp8_block_backward(self, moment: str) -> None:
        """`block_backward` of a block in FP8."""
        sizes, account, config = self.sizes, self.account, self.config
        recompute, kernels = self.training.recompute, self.training.kernels
        width, inner = config.hidden_size, config.intermediate_size
        query_width = config.num_attention_heads * config.head_dim
        packed_width = query_width + 2 * config.num_key_value_heads * config.head_dim
        hidden_codes, inner_codes, packed_codes = map(sizes.codes, (width, inner, packed_width))
        item, again = "activations", 0
        if recompute == "block":
            item = "transients"
            again = sizes.hidden + 6 * sizes.scale + sizes.qkv_kept + sizes.attention_kept + 2 * sizes.inner
            account.hold(item, again, moment)
            account.pass_by(moment, 2 * sizes.hidden + hidden_codes)

        # Feed-forward network: codes of the gradient, with "ffn" the codes of the norm and gate and up again.
        there = hidden_codes
        gate_up = 2 * sizes.inner + hidden_codes if recompute == "ffn" else 0
        if recompute == "ffn":
            account.pass_by(moment, there + gate_up + sizes.fp8_product(2 * inner, width))
        held = inner_codes + sizes.fp8_weight_product(width, inner)
        self.fp8_gradients(width * inner, moment, there + gate_up + held)
        account.pass_by(moment, there + gate_up + sizes.inner + sizes.fp8_product(inner, width))
        eager = 0 if kernels else 7 * sizes.wide(sizes.inner)
        account.pass_by(moment, there + gate_up + sizes.inner + max(2 * inner_codes, eager))
        there += 2 * inner_codes
        account.pass_by(moment, there + sizes.fp8_encoding(2 * inner))
        held = hidden_codes + sizes.fp8_weight_product(2 * inner, width)
        self.fp8_gradients(2 * width * inner, moment, there + held)
        account.pass_by(moment, there + sizes.hidden + sizes.fp8_product(width, 2 * inner))
        self.norm_backward(moment, there + sizes.hidden + hidden_codes)
        kept = sizes.hidden + 3 * sizes.scale + (0 if recompute == "ffn" else 2 * sizes.inner)
        account.release(item, kept)

        # Attention's output projection.
        there = hidden_codes + sizes.query
        account.pass_by(moment, there + sizes.fp8_product(query_width, width))
        held = sizes.codes(query_width) + sizes.fp8_weight_product(width, query_width)
        self.fp8_gradients(width * query_width, moment, there + held)
        account.pass_by(moment, sizes.attention_backward)
        account.release(item, sizes.attention_kept + sizes.qkv_kept + sizes.scale)

        # Rotation, input projection, norm.
        account.pass_by(moment, sizes.qkv + (packed_codes if kernels else sizes.qkv + 2 * sizes.wide(sizes.qkv)))
        there = sizes.qkv + packed_codes
        held = hidden_codes + sizes.fp8_weight_product(packed_width, width)
        self.fp8_gradients(width * packed_width, moment, there + held)
        account.pass_by(moment, there + sizes.hidden + sizes.fp8_product(width, packed_width))
        self.norm_backward(moment, there + sizes.hidden + hidden_codes)
        self.gradients(2 * width, moment, sizes.hidden + sizes.qkv)
        account.release("activations", sizes.hidden + (0 if recompute == "block" else 2 * sizes.scale))
        account.release("transients", 2 * sizes.scale if recompute == "block" else 0)

    def fp8_gradients(self, elements: int, moment: str, transients: int) -> None:
        """`linear_gradients` of a weight in FP8, whose later products come in float32 and are added in a pass of their own."""
        added = elements * FLOAT32 if self.training.shards == 1 and not self.first else 0
        self.linear_gradients(elements, moment, transients + added)

    def norm_backward(self, moment: str, transients: int) -> None:
        """The gradient of the normed rows; the reference computes it in float32."""
        sizes = self.sizes
        eager = 0 if self.training.kernels else 2 * sizes.widened(sizes.hidden) + 4 * sizes.wide(sizes.hidden) - sizes.hidden
        self.account.pass_by(moment, transients + sizes.hidden + eager)

    def product(self, elements: int) -> int:
        """A new gradient of linear maps' weights. A single rank adds later micro-batches' to the first inside the product."""
        if self.training.shards > 1:
            return elements * self.sizes.item
        return elements * self.sizes.sum_item if self.first else 0

    def factors(self, size: int) -> int:
        """Float32 copies of the two factors of a weight's gradient, which the reference makes for a float32 sum."""
        wide = self.training.shards == 1 and self.sizes.sum_item > self.sizes.item and not self.training.kernels
        return self.sizes.wide(size) if wide else 0

    def linear_gradients(self, elements: int, moment: str, transients: int) -> None:
        """Gradients of linear maps' weights, which stay with their parameters."""
        new = self.product(elements)
        self.account.pass_by(moment, transients + new)
        self.account.hold("gradients", new, moment)

    def gradients(self, elements: int, moment: str, transients: int = 0) -> None:
        """New gradients of the other parameters.

        A single rank keeps the first micro-batch's gradients and adds the later ones to them. A sharded unit's gradients wait
        for `reduce`.
        """
        new, total = elements * self.sizes.item, elements * self.sizes.sum_item
        if self.training.shards > 1:
            self.account.hold("gradients", new, moment)
            self.account.pass_by(moment, transients)
            return
        self.account.pass_by(moment, transients + new + (total if total > new else 0))
        if self.first:
            self.account.hold("gradients", total, moment)

    def reduce(self, elements: int, moment: str) -> None:
        """A sharded unit's gradients: summed over the shards, and this rank's part added to its float32 sum.

        With `reduce_once`, whole float32 sums stay until the last micro-batch, and are summed over the shards then.
        """
        if self.training.shards == 1:
            return
        account, new, wide = self.account, elements * self.sizes.item, elements * FLOAT32
        share, once = self.sizes.share(wide), self.training.reduce_once
        total = wide if once else share
        if self.last or not once:
            # The buffer that is sent stays until the next unit's buffer is there.
            account.hold("communication", wide, moment)
            account.pass_by(moment, communication=share)
            account.release("communication", self.sending)
            self.sending = wide
        if self.last:
            account.hold("gradients", self.sizes.share(new), moment)
            account.release("gradients", 0 if self.first else total)
        elif self.first:
            account.hold("gradients", total, moment)
        account.release("gradients", new)

    def update(self) -> None:
        """Gradient norm and AdamW, parameter by parameter."""
        config, sizes, optimizer = self.config, self.sizes, self.training.optimizer
        largest = sizes.share(max(config.vocab_size, 2 * config.intermediate_size) * config.hidden_size)
        if self.training.kernels:
            # Two pieces of the moments are on the device at once.
            brought = 2 * min(largest, PIECE) * sizes.moments
            self.account.pass_by("update", brought if optimizer.offload == "moments" else 0)
            return
        # The norm's eager reference squares a whole parameter's gradient; a bfloat16 gradient is copied to float32 first.
        split = sizes.item < FLOAT32
        squares = largest * (FLOAT32 + (FLOAT32 if split else 0))
        block = min(largest, _UPDATE_BLOCK)
        if optimizer.moments == "bfloat16":
            # The eager reference, block by block: float32 gradient, moments, change and root, and Philox's words; a split
            # master's parts; the previous block's results.
            update = block * (56 + (4 if split else 0) + (8 if largest > block else 0))
        elif split:
            # torch's fused operator, block by block: float32 master and gradient, and the parts of the new master.
            update = block * 20
        else:
            # torch's fused operator over the whole parameter: the clipped gradient.
            update = largest * FLOAT32
        self.account.pass_by("update", max(squares, update))
