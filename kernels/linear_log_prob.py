"""Log-probability of target tokens under a linear head, holding float32 logits for a chunk of rows at a time.

Pre-training, supervised fine-tuning and preference tuning are different functions of these log-probabilities.

With logits x = hidden weight^T, P = softmax(x) and Y = 1 at the target, d log_prob / d x = Y - P. The derivative of a loss by a
log-probability multiplies this row by a factor. Three ways follow, chosen by memory and by when the factors are known:

    keep        keep P - Y in the inputs' dtype; the backward pass is two products and two row scales (3 products in all)
    recompute   keep each row's log-sum-exp; the backward pass computes the logits again (4 products)
    known       the loss is a weighted sum, so the factors are known beforehand (`linear_nll`): the forward pass makes the
                gradients and keeps nothing else (3 products)

The weight's gradient is one product where the logits' gradients of all rows exist at once. Otherwise it is a float32 sum over
chunks, to which the products add themselves, rounded once.

Eager functions overwrite logits by their gradients where both have one dtype, and apply the factors of rows to the narrow
[N, D] sides of the products: on a CPU each pass over [N, V] costs as much as a product.

Shapes: T tokens, N listed rows, D width, V rows of the weight; the first `vocab_size` of them are real, the rest is padding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import accumulation_dtype
from kernels.launch import operator, runs_triton
from kernels.linear import add_product_, wide_product
from kernels.logit_budget import Mode, default_budget, plan, sum_of_parts
from kernels.row_log_prob import gather_rows, row_gradients, row_statistics, scale_in_place, scatter_rows


def linear_log_prob(
    hidden_TD: Tensor,  # floating
    weight_VD: Tensor,  # the head, of the same dtype; padding rows must be finite
    target_T: Tensor,  # integer; only the listed rows' entries are read
    rows_N: Tensor,  # integer: the rows to project, each at most once, padded with -1 anywhere
    *,
    vocab_size: int | None = None,  # columns from here on get neither probability nor gradient (default: V)
    budget_bytes: int | None = None,
    mode: Mode = "auto",  # see the module; auto keeps what fits the budget
) -> Tensor:
    """log softmax(hidden @ weight^T)[target] of the listed rows, for any loss on it.

    Args:
        budget_bytes: bound on logits and their gradients (default: `default_budget`). A float32 sum of the weight's gradient,
            where chunks make it, comes on top; gradients of all rows are kept where that costs no more (see `logit_budget`).
            The copies inside torch's eager functions come on top as well.
    Returns: [T] float32 (float64 for float64 inputs), 0 outside the listed rows. Logits are never rounded below float32: in
        bf16 the sum over an answer would be off by up to 0.8 nats.

    Gradients are rounded once to the inputs' dtype. A bf16 sum of gradients over M micro-batches rounds again at each addition,
    by at most 2^-9 of the largest partial sum: about M 2^-9 of the largest value in all. From then on, addends below 2^-9 of
    the sum are lost. Accumulate in float32 where that is too much.

    Raises: ValueError for a row that is listed twice and for a listed row's target outside [0, vocab_size) (on CUDA device
        assertions, so the host need not wait), for an unknown mode, and for a budget too small for the mode.
    """
    needed = _needed(hidden_TD, weight_VD)
    sizes = _sizes(hidden_TD, weight_VD, rows_N, vocab_size, budget_bytes, mode, needed)
    return _log_prob(hidden_TD, weight_VD, target_T, _kernel_rows(rows_N, hidden_TD), *sizes, False)[0]


def linear_log_prob_statistics(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    rows_N: Tensor,
    *,
    vocab_size: int | None = None,
    budget_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, log-sum-exps, entropies in nats) of the listed rows, without gradients.

    Arguments, dtype and errors: see `linear_log_prob`. Returns: three times [T], 0 outside the listed rows.
    """
    sizes = _sizes(hidden_TD, weight_VD, rows_N, vocab_size, budget_bytes, "auto", (False, False))
    with torch.no_grad():
        return _log_prob(hidden_TD, weight_VD, target_T, _kernel_rows(rows_N, hidden_TD), *sizes, True)[:3]


def linear_nll(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    rows_N: Tensor,
    weight_T: Tensor,  # floating, finite; gets no gradient
    *,
    vocab_size: int | None = None,
    budget_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted negative log-likelihood; the forward pass makes the gradients (the `known` way).

    The other arguments and the errors: see `linear_log_prob`.

    Returns: (sum(weight * -log_prob), a scalar; the log-probabilities [T], 0 outside the listed rows, without a gradient).
        The backward pass multiplies the gradients by the loss's own gradient, which is free where that is 1: put any factor
        into `weight_T`. It hands the gradients out, so a second backward pass raises RuntimeError.
    """
    needed = _needed(hidden_TD, weight_VD)
    sizes = _sizes(hidden_TD, weight_VD, rows_N, vocab_size, budget_bytes, "auto", needed)
    weight_T = weight_T.detach().to(accumulation_dtype(hidden_TD.dtype)).contiguous()
    return _nll(hidden_TD, weight_VD, target_T, _kernel_rows(rows_N, hidden_TD), weight_T, *sizes, *needed)[:2]


def linear_log_prob_reference(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, rows_N: Tensor, *, vocab_size: int | None = None
) -> Tensor:
    """The formula, materialising all logits, differentiated by autograd."""
    rows = rows_N[rows_N >= 0].long()
    wide = accumulation_dtype(hidden_TD.dtype)
    logits_NV = hidden_TD[rows].to(wide) @ weight_VD[:vocab_size].to(wide).T
    log_prob_N = logits_NV.log_softmax(dim=-1).gather(1, target_T[rows].long()[:, None])[:, 0]
    return torch.zeros(hidden_TD.shape[0], dtype=wide, device=hidden_TD.device).index_put((rows,), log_prob_N)


def linear_nll_reference(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, rows_N: Tensor, weight_T: Tensor, *, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    log_prob_T = linear_log_prob_reference(hidden_TD, weight_VD, target_T, rows_N, vocab_size=vocab_size)
    return -(weight_T * log_prob_T).sum(), log_prob_T.detach()


def _needed(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[bool, bool]:
    """(whether the hidden states need a gradient, whether the weight needs one)."""
    enabled = torch.is_grad_enabled()
    return enabled and hidden_TD.requires_grad, enabled and weight_VD.requires_grad


def _kernel_rows(rows_N: Tensor, hidden_TD: Tensor) -> Tensor:
    """The list as kernels read it; empty where there are no tokens, because even padding reads token 0."""
    if rows_N.device.type == "cpu" and not torch.compiler.is_compiling():
        # On a CPU a boolean mask is no host sync, and products need no padding.
        rows_N = rows_N[rows_N >= 0]
    rows_N = rows_N.to(torch.int32).contiguous()
    return rows_N if hidden_TD.shape[0] else rows_N[:0]


def _sizes(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    rows_N: Tensor,
    vocab_size: int | None,
    budget_bytes: int | None,
    mode: Mode,
    needed: tuple[bool, bool],
) -> tuple[int, bool, int]:
    """(real columns, whether to keep the logits' gradients, rows of a chunk)."""
    vocab, item = weight_VD.shape[0], hidden_TD.dtype.itemsize
    budget_bytes = default_budget(hidden_TD.device) if budget_bytes is None else budget_bytes
    sum_bytes = sum_of_parts(weight_VD.numel(), item, kernels=runs_triton(hidden_TD)) if needed[1] else 0
    keep, chunk = plan(rows_N.shape[0], vocab, item, budget_bytes, mode, backward=any(needed), sum_bytes=sum_bytes)
    return vocab if vocab_size is None else vocab_size, keep, chunk


@operator("komainu::linear_log_prob")
def _log_prob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    rows_N: Tensor,
    vocab_size: int,
    keep: bool,
    chunk: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probabilities [T], log-sum-exps [T], entropies [T] or empty, P - Y [N, V] or empty)."""
    _check_rows(rows_N, len(hidden_TD))
    _check_targets(target_T, rows_N, vocab_size)
    log_prob_T, log_sum_exp_T, entropy_T, kept_NV = _log_prob_outputs(hidden_TD, weight_VD, rows_N, keep, with_entropy)
    _score(
        gather_rows(hidden_TD, rows_N),
        weight_VD,
        target_T.contiguous(),
        rows_N,
        log_prob_T,
        log_sum_exp_T,
        vocab_size,
        chunk,
        entropy_T=entropy_T if with_entropy else None,
        gradient_NV=kept_NV if keep else None,
    )
    return log_prob_T, log_sum_exp_T, entropy_T, kept_NV


@operator("komainu::linear_log_prob_backward")
def _log_prob_backward(
    grad_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    rows_N: Tensor,
    log_sum_exp_T: Tensor,
    kept_NV: Tensor,
    vocab_size: int,
    keep: bool,
    chunk: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of (the hidden states [T, D], the weight [V, D]); empty where not needed."""
    scale_T = (-grad_T).contiguous()
    target_T = target_T.contiguous()
    hidden_ND = gather_rows(hidden_TD, rows_N, scale_T if keep and needs_weight else None)
    scaled_ND, eager = hidden_ND, not runs_triton(hidden_TD)
    if eager and needs_weight and not keep:
        scaled_ND = gather_rows(hidden_TD, rows_N, scale_T)
    logits_of = _Logits(hidden_ND, weight_VD, chunk)

    def recomputed(part: slice) -> Tensor:
        logits_NV = logits_of(part)
        gradient_NV = _gradient_buffer(logits_NV, hidden_TD.dtype)
        scale = None if eager else scale_T
        row_gradients(logits_NV, target_T, rows_N[part], log_sum_exp_T, gradient_NV, scale, vocab_size=vocab_size)
        return gradient_NV

    return _gradients(
        kept_NV.__getitem__ if keep else recomputed,
        _parts(len(rows_N), len(rows_N) if keep else chunk),
        scaled_ND,
        weight_VD,
        rows_N,
        len(hidden_TD),
        scale_T if keep or eager else None,
        needs_hidden,
        needs_weight,
    )


@operator("komainu::linear_nll")
def _nll(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    rows_N: Tensor,
    weight_T: Tensor,
    vocab_size: int,
    keep: bool,
    chunk: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, log-probabilities [T], gradients of the hidden states [T, D] and the weight [V, D], empty where not needed)."""
    _check_rows(rows_N, len(hidden_TD))
    _check_targets(target_T, rows_N, vocab_size)
    log_prob_T, log_sum_exp_T, _, _ = _log_prob_outputs(hidden_TD, weight_VD, rows_N, False, False)
    hidden_ND, target_T = gather_rows(hidden_TD, rows_N), target_T.contiguous()
    results = (log_prob_T, log_sum_exp_T, vocab_size)
    eager = not runs_triton(hidden_TD)
    logits_of = _Logits(hidden_ND, weight_VD, chunk)

    def scored(part: slice) -> Tensor:
        rows = rows_N[part]
        if eager:
            logits_NV = logits_of(part)
            gradient_NV = _gradient_buffer(logits_NV, hidden_TD.dtype)
            row_statistics(logits_NV, target_T, rows, *results[:2], vocab_size=vocab_size, gradient_NV=gradient_NV)
        else:
            gradient_NV = hidden_TD.new_empty((len(rows), len(weight_VD)))
            _score(hidden_ND[part], weight_VD, target_T, rows, *results, chunk, gradient_NV=gradient_NV, scale_T=weight_T)
        return gradient_NV

    if needs_hidden or needs_weight:
        parts = _parts(len(rows_N), len(rows_N) if keep and not eager else chunk)
        scaled_ND = gather_rows(hidden_TD, rows_N, weight_T) if eager and needs_weight else hidden_ND
        gradients = _gradients(
            scored,
            parts,
            scaled_ND,
            weight_VD,
            rows_N,
            len(hidden_TD),
            weight_T if eager else None,
            needs_hidden,
            needs_weight,
        )
    else:
        _score(hidden_ND, weight_VD, target_T, rows_N, *results, chunk)
        gradients = _no_gradients(hidden_TD, weight_VD, needs_hidden, needs_weight)
    return -(weight_T * log_prob_T).sum(), log_prob_T, *gradients


class _Logits:
    """The logits of a part of the rows, in float32.

    On a CPU all parts share one buffer: the system would map new memory for each, page by page.
    """

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, chunk: int) -> None:
        self.hidden_ND, self.weight_VD, self.chunk = hidden_ND, weight_VD, chunk
        self._buffer_NV: Tensor | None = None

    def __call__(self, part: slice) -> Tensor:
        hidden_ND = self.hidden_ND[part]
        if hidden_ND.device.type != "cpu":
            return wide_product(hidden_ND, self.weight_VD)
        if self._buffer_NV is None:
            rows = min(self.chunk, len(self.hidden_ND))
            dtype = accumulation_dtype(hidden_ND.dtype)
            self._buffer_NV = torch.empty((rows, len(self.weight_VD)), dtype=dtype)
        return wide_product(hidden_ND, self.weight_VD, out=self._buffer_NV[: len(hidden_ND)])


def _gradient_buffer(logits_NV: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the logits' gradients: the logits' own where an eager function can overwrite them."""
    in_place = logits_NV.dtype == dtype and not runs_triton(logits_NV)
    return logits_NV if in_place else torch.empty(logits_NV.shape, dtype=dtype, device=logits_NV.device)


def _score(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    rows_N: Tensor,
    log_prob_T: Tensor,
    log_sum_exp_T: Tensor,
    vocab_size: int,
    chunk: int,
    entropy_T: Tensor | None = None,
    gradient_NV: Tensor | None = None,
    scale_T: Tensor | None = None,
) -> None:
    """`row_statistics` of the listed rows; logits exist for a chunk at a time."""
    logits_of = _Logits(hidden_ND, weight_VD, chunk)
    for part in _parts(len(rows_N), chunk):
        row_statistics(
            logits_of(part),
            target_T,
            rows_N[part],
            log_prob_T,
            log_sum_exp_T,
            vocab_size=vocab_size,
            entropy_T=entropy_T,
            gradient_NV=None if gradient_NV is None else gradient_NV[part],
            scale_T=scale_T,
        )


def _gradients(
    gradient_of: Callable[[slice], Tensor],  # a part's rows -> gradients by their logits
    parts: Sequence[slice],
    hidden_ND: Tensor,  # times scale_T where given and the weight's gradient is needed
    weight_VD: Tensor,
    rows_N: Tensor,
    tokens: int,
    scale_T: Tensor | None,  # factors still to be applied to the rows of `gradient_of`; None for 1
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of (the hidden states [tokens, D], the weight [V, D]); empty where not needed."""
    grad_hidden, grad_weight = _no_gradients(hidden_ND, weight_VD, False, False)
    product_ND = torch.empty_like(hidden_ND)
    for number, part in enumerate(parts):
        gradient_NV = gradient_of(part)
        if needs_hidden:
            torch.mm(gradient_NV, weight_VD, out=product_ND[part])
        if needs_weight and len(parts) == 1:
            grad_weight = torch.mm(gradient_NV.T, hidden_ND[part])
        elif needs_weight and number == 0:
            grad_weight = wide_product(gradient_NV.T, hidden_ND[part].T)
        elif needs_weight:
            add_product_(grad_weight, gradient_NV.T, hidden_ND[part])
        # Freed before the next part is made: the budget is for one part.
        del gradient_NV
    if needs_hidden:
        grad_hidden = scatter_rows(product_ND, rows_N, tokens, scale_T)
    return grad_hidden, grad_weight.to(hidden_ND.dtype)


def _parts(rows: int, size: int) -> list[slice]:
    """Cut rows into parts of at most `size`; no rows give one empty part."""
    return [slice(first, min(first + size, rows)) for first in range(0, max(rows, 1), max(size, 1))]


def _check_rows(rows_N: Tensor, tokens: int) -> None:
    """Refuse a token that is listed twice: its gradient would be either of the two or their sum, depending on the device."""
    if rows_N.device.type == "meta" or not len(rows_N):
        return
    listed_N = (rows_N >= 0).to(torch.int32)
    count_T = torch.zeros(tokens, dtype=torch.int32, device=rows_N.device).index_add_(0, rows_N.clamp(min=0), listed_N)
    repeated = (count_T > 1).any()
    problem = "is listed more than once in rows_N: list each row at most once"
    if rows_N.is_cuda:
        torch._assert_async(~repeated, f"linear_log_prob: a row {problem}")
    elif repeated:
        raise ValueError(f"linear_log_prob: row {int(count_T.argmax())} {problem}")


def _check_targets(target_T: Tensor, rows_N: Tensor, vocab_size: int) -> None:
    if rows_N.device.type == "meta" or not len(rows_N):
        return
    target_N = target_T[rows_N.clamp(min=0)]
    wrong_N = (rows_N >= 0) & ((target_N < 0) | (target_N >= vocab_size))
    outside = f"is outside the vocabulary of {vocab_size}"
    if rows_N.is_cuda:
        torch._assert_async(~wrong_N.any(), f"linear_log_prob: the target of a listed row {outside}")
    elif wrong_N.any():
        first = int(wrong_N.nonzero()[0, 0])
        raise ValueError(f"linear_log_prob: target {int(target_N[first])} at row {int(rows_N[first])} {outside}")


def _log_prob_outputs(hidden_TD, weight_VD, rows_N, keep, with_entropy) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, device = hidden_TD.shape[0], hidden_TD.device
    wide = accumulation_dtype(hidden_TD.dtype)
    log_prob_T, log_sum_exp_T = (torch.zeros(tokens, dtype=wide, device=device) for _ in range(2))
    entropy_T = torch.zeros(tokens if with_entropy else 0, dtype=wide, device=device)
    shape = (rows_N.shape[0] if keep else 0, weight_VD.shape[0])
    return log_prob_T, log_sum_exp_T, entropy_T, torch.empty(shape, dtype=hidden_TD.dtype, device=device)


def _no_gradients(hidden_TD, weight_VD, *needed) -> tuple[Tensor, Tensor]:
    """Uninitialised tensors of the gradients' shapes, empty where a gradient is not needed."""
    tensors = zip((hidden_TD, weight_VD), needed, strict=True)
    hidden_shape, weight_shape = (tensor.shape if wanted else (0,) for tensor, wanted in tensors)
    return hidden_TD.new_empty(hidden_shape), weight_VD.new_empty(weight_shape)


@_log_prob.register_fake
def _(hidden_TD, weight_VD, target_T, rows_N, vocab_size, keep, chunk, with_entropy):
    return _log_prob_outputs(hidden_TD, weight_VD, rows_N, keep, with_entropy)


@_log_prob_backward.register_fake
def _(grad_T, hidden_TD, weight_VD, target_T, rows_N, log_sum_exp_T, kept_NV, vocab_size, keep, chunk, *needed):
    return _no_gradients(hidden_TD, weight_VD, *needed)


@_nll.register_fake
def _(hidden_TD, weight_VD, target_T, rows_N, weight_T, vocab_size, keep, chunk, *needed):
    return weight_T.new_empty(()), torch.empty_like(weight_T), *_no_gradients(hidden_TD, weight_VD, *needed)


def _save_log_prob(ctx, inputs, output) -> None:
    *tensors, ctx.vocab_size, ctx.keep, ctx.chunk, _ = inputs
    _, *others = output
    log_sum_exp_T, _, kept_NV = others
    ctx.save_for_backward(*tensors, log_sum_exp_T, kept_NV)
    ctx.mark_non_differentiable(*others)
    # Otherwise autograd makes zero gradients for them, one as large as all logits.
    ctx.set_materialize_grads(False)


def _differentiate_log_prob(ctx, grad_T, *_):
    needed = ctx.needs_input_grad[:2]
    if grad_T is None:
        return (None,) * 8
    gradients = _log_prob_backward(grad_T, *ctx.saved_tensors, ctx.vocab_size, ctx.keep, ctx.chunk, *needed)
    return *_where_needed(gradients, needed), *(None,) * 6


def _save_nll(ctx, inputs, output) -> None:
    _, *others = output
    ctx.save_for_backward(*others[1:])
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.spent = False


def _differentiate_nll(ctx, grad, *_):
    if ctx.spent:
        raise RuntimeError("linear_nll: a second backward pass; the first handed out the gradients that the forward pass made")
    if grad is None:
        return (None,) * 10
    ctx.spent = True
    needed = ctx.needs_input_grad[:2]
    gradients = _where_needed(ctx.saved_tensors, needed)
    for gradient in gradients:
        if gradient is not None:
            scale_in_place(gradient, grad)
    return *gradients, *(None,) * 8


def _where_needed(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True)]


_log_prob.register_autograd(_differentiate_log_prob, setup_context=_save_log_prob)
_nll.register_autograd(_differentiate_nll, setup_context=_save_nll)
