"""Log-probability of target tokens under a linear head, without keeping what is not needed.

Serves pre-training, supervised fine-tuning and preference tuning: each is a different function of the same log-probs.

Shapes: T tokens, N projected rows, D width, V vocabulary.
"""

import torch
from torch import Tensor

from kernels import accumulation_dtype

DEFAULT_BUDGET = 512 * 2**20


def linear_log_prob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    rows_N: Tensor,
    *,
    vocab_size: int | None = None,
    budget_bytes: int = DEFAULT_BUDGET,
) -> Tensor:
    """log softmax(hidden @ weight^T)[target], for the listed rows only.

    Args:
        hidden_TD: [T, D] floating. weight_VD: [V, D], the head.
        target_T: integer [T]; only the listed rows' entries are read.
        rows_N: integer [N], the rows to project, each at most once, padded with -1.
        vocab_size: columns from here on are padding and take no probability (default: V).
        budget_bytes: most bytes that the float32 logits may take at once. What fits entirely is kept for the backward
            pass (three matrix products in all); what does not is recomputed there in chunks (four).
    Returns: [T] float32 (float64 for float64 inputs), 0 outside the listed rows. Logits are never rounded below float32: in
        bf16 the sum over an answer would be off by up to 0.8 nats. A second backward pass raises RuntimeError.
    Raises: ValueError for a target of a listed row that is not in [0, vocab_size).
    """
    vocab_size = weight_VD.shape[0] if vocab_size is None else vocab_size
    return _LinearLogProb.apply(hidden_TD, weight_VD, target_T, rows_N, vocab_size, budget_bytes)


def linear_log_prob_reference(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, rows_N: Tensor, *, vocab_size: int | None = None
) -> Tensor:
    """The formula, materialising all logits, differentiated by autograd."""
    rows = rows_N[rows_N >= 0].long()
    wide = accumulation_dtype(hidden_TD.dtype)
    logits_NV = hidden_TD[rows].to(wide) @ weight_VD[:vocab_size].to(wide).T
    log_prob_N = logits_NV.log_softmax(dim=-1).gather(1, target_T[rows].long()[:, None])[:, 0]
    return torch.zeros(hidden_TD.shape[0], dtype=wide, device=hidden_TD.device).index_put((rows,), log_prob_N)


def wide_product(left_ND: Tensor, right_MD: Tensor) -> Tensor:
    """left @ right^T accumulated and returned in float32 (float64 for float64), whatever the inputs' dtype: [N, M]."""
    wide = accumulation_dtype(left_ND.dtype)
    if left_ND.dtype == wide:
        return left_ND @ right_MD.T
    if left_ND.is_cuda:
        return torch.mm(left_ND, right_MD.T, out_dtype=wide)
    return left_ND.to(wide) @ right_MD.to(wide).T


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, target_T, rows_N, vocab_size, budget_bytes):
        rows = rows_N[rows_N >= 0].long()
        hidden_ND, target_N = hidden_TD[rows], target_T[rows].long()
        _check_targets(rows, target_N, vocab_size)
        head = weight_VD[:vocab_size]
        wide = accumulation_dtype(hidden_TD.dtype)
        chunk = max(1, budget_bytes // (wide.itemsize * vocab_size))
        log_prob_N = torch.empty(len(rows), dtype=wide, device=hidden_TD.device)
        kept = None
        for part in torch.arange(len(rows), device=rows.device).split(chunk):
            log_prob_N[part], *kept = _log_probs_and_weights(hidden_ND[part], head, target_N[part])
            kept = kept if len(part) == len(rows) else None
        needs_backward = hidden_TD.requires_grad or weight_VD.requires_grad
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, rows)
        ctx.kept = kept if needs_backward else None
        ctx.shape, ctx.vocab_size, ctx.chunk, ctx.spent = hidden_TD.shape, vocab_size, chunk, False
        log_prob_T = torch.zeros(hidden_TD.shape[0], dtype=wide, device=hidden_TD.device)
        log_prob_T[rows] = log_prob_N
        return log_prob_T

    @staticmethod
    def backward(ctx, grad_T):
        if ctx.spent:
            raise RuntimeError("linear_log_prob: a second backward pass; the kept logits were overwritten by the first")
        ctx.spent = True
        hidden_ND, weight_VD, target_N, rows = ctx.saved_tensors
        head, dtype = weight_VD[: ctx.vocab_size], weight_VD.dtype
        grad_N = grad_T[rows]
        grad_hidden_TD = grad_T.new_zeros(ctx.shape, dtype=hidden_ND.dtype) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        for part in torch.arange(len(rows), device=rows.device).split(ctx.chunk):
            weights_NV, total_N = ctx.kept or _log_probs_and_weights(hidden_ND[part], head, target_N[part])[1:]
            # d log_prob / d logits = Y - P, times the row's incoming gradient.
            grad_logits = weights_NV.mul_((-grad_N[part] / total_N)[:, None])
            # No scatter_add: on CUDA its order of additions is not fixed.
            grad_logits[torch.arange(len(part), device=part.device), target_N[part]] += grad_N[part]
            grad_logits = grad_logits.to(dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[rows[part]] = grad_logits @ head
            if grad_weight_VD is not None:
                grad_weight_VD[: ctx.vocab_size].addmm_(grad_logits.T, hidden_ND[part])
        ctx.kept = None
        return grad_hidden_TD, grad_weight_VD, None, None, None, None


def _log_probs_and_weights(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs [N], exp(logits - row maximum) [N, V], its row sums [N]); one exponential a logit serves both passes."""
    logits_NV = wide_product(hidden_ND, head_VD)
    target_logit_N = logits_NV.gather(1, target_N[:, None])[:, 0]
    peak_N = logits_NV.amax(dim=-1)
    weights_NV = logits_NV.sub_(peak_N[:, None]).exp_()
    total_N = weights_NV.sum(dim=-1)
    return target_logit_N - peak_N - total_N.log(), weights_NV, total_N


def _check_targets(rows: Tensor, target_N: Tensor, vocab_size: int) -> None:
    wrong = (target_N < 0) | (target_N >= vocab_size)
    if wrong.any():
        first = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"linear_log_prob: target {int(target_N[first])} at row {int(rows[first])} is outside the "
            f"vocabulary of {vocab_size}"
        )
