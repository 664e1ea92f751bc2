"""The head: log-probabilities of targets under a linear layer.

T tokens, N projected rows, D width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import benchmarks.operators.operator as of
from benchmarks.operators.operator import Call, Case, Cost, Operator, Provider, Sizes, Tensors, compiled, peer, random_data
from kernels.linear_log_prob import linear_nll

# Rows of the exact computation at a time: float64 logits of a large vocabulary are large.
_CHUNK = 512


def _case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    """Logits like a trained model's: a wide spread, and targets from certain to unlikely.

    Freshly initialised weights would make all probabilities equal, and a peer that drops small probabilities would drop all.
    """
    normal = random_data(device)
    tokens, width, vocab = sizes.tokens, sizes.width, sizes.vocab
    weight_VD = normal(vocab, width, scale=width**-0.5)
    target_T = of.token_ids(tokens, vocab, device)
    # The logits of a row are then normal with deviation 3, and its target's is higher by 0 to 20.
    boost_T = torch.linspace(0, 20, tokens, device=device)
    hidden_TD = normal(tokens, width, scale=3.0) + boost_T[:, None] * weight_VD[target_T]
    rows_N = torch.full((-(-tokens // 128) * 128,), -1, dtype=torch.int32, device=device)
    rows_N[:tokens] = torch.arange(tokens, dtype=torch.int32, device=device)
    return Case(
        sizes,
        dtype,
        {"hidden": hidden_TD.to(dtype), "weight": weight_VD.to(dtype)},
        {"target": target_T, "rows": rows_N},
        # The loss is the mean of the negative log-probabilities.
        {"log_prob": torch.full((tokens,), -1 / tokens, device=device)},
    )


def _call(function: Callable[..., Tensor], case: Case) -> Call:
    target, rows = case.constants["target"], case.constants["rows"]
    return Call(lambda given: {"log_prob": function(given["hidden"], given["weight"], target, rows)})


def _loss_call(function: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case) -> Call:
    """A call of function(hidden, weight, target) -> mean loss; only the gradients can be compared."""
    target = case.constants["target"]
    return Call(
        lambda given: {"loss": function(given["hidden"], given["weight"], target)},
        upstream=lambda upstream: {"loss": torch.ones((), device=case.device)},
        results=lambda given, outputs, gradients: {f"d {name}": gradient for name, gradient in gradients.items()},
    )


def _exact(case: Case) -> Tensors:
    """Chunk by chunk, with d log_prob / d logits = Y - P written out."""
    hidden_TD, target_T = case.inputs["hidden"], case.constants["target"]
    weight_VD = case.inputs["weight"].double()
    log_probs, grads_hidden, grad_weight_VD = [], [], torch.zeros_like(weight_VD)
    for rows in torch.arange(len(hidden_TD), device=case.device).split(_CHUNK):
        chunk_ND, target_N1 = hidden_TD[rows].double(), target_T[rows, None]
        log_prob_NV = (chunk_ND @ weight_VD.T).log_softmax(dim=-1)
        log_probs.append(log_prob_NV.gather(1, target_N1)[:, 0])
        upstream_N1 = case.upstream["log_prob"][rows, None].double()
        grad_NV = log_prob_NV.exp_().mul_(-upstream_N1).scatter_add_(1, target_N1, upstream_N1)
        grads_hidden.append(grad_NV @ weight_VD)
        grad_weight_VD.addmm_(grad_NV.T, chunk_ND)
    return {"log_prob": torch.cat(log_probs), "d hidden": torch.cat(grads_hidden), "d weight": grad_weight_VD}


def _cost(case: Case, direction: str) -> Cost:
    sizes, size = case.sizes, case.dtype.itemsize
    hidden, weight = sizes.tokens * sizes.width * size, sizes.vocab * sizes.width * size
    product = 2 * sizes.tokens * sizes.width * sizes.vocab
    # Targets int64 and rows int32 are read; a float32 log-probability, or its gradient, is written or read.
    forward = Cost(hidden + weight + 16 * sizes.tokens, product)
    backward = Cost(2 * hidden + 2 * weight + 16 * sizes.tokens, 2 * product)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def _torch_log_prob(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, rows_N: Tensor | None = None) -> Tensor:
    """As in transformers: logits in the model's dtype, loss in float32."""
    return -F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), target_T, reduction="none")


def _known(case: Case) -> Call:
    """As in pre-training and fine-tuning: the weights of the rows are known, so gradients are made in the forward pass."""
    rows_N, weight_T = case.constants["rows"], -case.upstream["log_prob"]
    return _loss_call(lambda hidden, weight, target: linear_nll(hidden, weight, target, rows_N, weight_T)[0], case)


def _torch_fused(case: Case) -> Call:
    function = peer("torch.nn.functional", "linear_cross_entropy")
    options = peer("torch.nn", "LinearCrossEntropyOptions")()
    return _loss_call(lambda hidden, weight, target: function(hidden, weight, target, options=options), case)


def _liger(case: Case) -> Call:
    apply = peer("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction").apply

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        loss = apply(hidden, weight, target)
        return loss[0] if isinstance(loss, tuple) else loss

    return _loss_call(function, case)


def _cut_cross_entropy(case: Case) -> Call:
    function = peer("cut_cross_entropy", "linear_cross_entropy")
    return _call(lambda hidden, weight, target, rows: -function(hidden, weight, target, reduction="none", impl="cce"), case)


def _quack(case: Case) -> Call:
    function = peer("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return _loss_call(lambda hidden, weight, target: function(hidden, weight, target, reduction="mean"), case)


LINEAR_LOG_PROB = Operator(
    name="linear_log_prob",
    function="kernels.linear_log_prob:linear_log_prob",
    shape=lambda sizes: f"{sizes.tokens} x {sizes.width} x {sizes.vocab}",
    case=_case,
    call=_call,
    exact=_exact,
    cost=_cost,
    yardstick="torch F.cross_entropy",
    directions=("forward", "backward", "both"),
    compiled=False,  # the reference selects rows by value, which breaks the graph
    peers=(
        Provider("komainu linear_nll", _known, directions=("both",), ours=True, rival=False),
        Provider("torch F.cross_entropy", lambda case: _call(_torch_log_prob, case)),
        Provider("torch.compile", lambda case: _call(compiled(_torch_log_prob), case)),
        # These three compute gradients in the forward pass, so neither pass alone compares.
        Provider(
            "torch F.linear_cross_entropy",
            _torch_fused,
            package="torch.nn.functional:linear_cross_entropy",
            directions=("both",),
        ),
        Provider("Liger-Kernel", _liger, package="liger_kernel", cuda=True, directions=("both",)),
        Provider("QuACK", _quack, package="quack", cuda=True, directions=("both",)),
        Provider("cut-cross-entropy", _cut_cross_entropy, package="cut_cross_entropy", cuda=True),
    ),
)
