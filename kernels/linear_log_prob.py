"""Log-probability of target tokens under a linear head, without keeping what is not needed.

Serves pre-training, supervised fine-tuning and preference tuning: each is a different function of the same log-probs.

With logits x = hidden weight^T, P = softmax(x) and Y = 1 at the target, d log_prob / d x = Y - P: what a loss makes of a
log-prob enters its gradient as a factor of the row. So there are three ways, by what is known when the logits are there and by
memory:

    keep        P - Y is kept, rounded to the inputs' dtype; the backward pass is two products and two row scales (3 products)
    recompute   the log-sum-exp of each row is kept; the backward pass computes the logits again (4 products)
    known       the rows' gradients are known in the forward pass, as where the loss is a weighted sum (`linear_nll`): their
                gradients are made there, and nothing is kept but these (3 products)

float32 logits exist for a chunk of rows at a time. The weight's gradient is one product over all rows where their gradients by
the logits are kept, else a sum over chunks in float32, rounded once.

Shapes: T tokens, N listed rows, D width, V rows of the weight, of which the first `vocab_size` are real.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kernels import accumulation_dtype
from kernels.row_log_prob import gather_rows, row_gradients, row_statistics, scale_in_place, scatter_rows

Mode = Literal["auto", "keep", "recompute"]
# Rows that a product needs to be efficient, of which a chunk is a multiple.
_TILE = 128


class Plan(NamedTuple):
    """keep: whether the gradients by the logits of all rows are kept. chunk: rows whose logits exist at once."""

    keep: bool
    chunk: int


def default_budget(device: torch.device) -> int:
    """Bytes of logits and of their gradients: on CUDA 2.5 GiB, which keep 8,192 rows of 120,064; elsewhere 512 MiB."""
    return 5 * 2**29 if device.type == "cuda" else 2**29


def plan(rows: int, vocab: int, itemsize: int, budget_bytes: int, mode: Mode = "auto", *, backward: bool = True) -> Plan:
    """What is kept and how many rows' logits exist at once under a budget.

    Args: rows: listed ones, padding included. vocab: rows of the weight, padding included. itemsize: of the inputs' dtype.
        mode: auto keeps what fits. backward: whether there will be a backward pass; without, nothing is kept.
    Raises: ValueError for another mode, and for a budget too small for the mode.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode = {mode!r}: must be one of {', '.join(get_args(Mode))}")
    logits, gradient = vocab * max(4, itemsize), vocab * itemsize
    row = logits + gradient if backward else logits
    if budget_bytes < row:
        raise ValueError(f"budget_bytes = {budget_bytes}: one row of {vocab} takes {row}; give at least that")
    if backward and mode != "recompute":
        chunk = _whole_tiles((budget_bytes - rows * gradient) // logits, rows)
        if chunk >= min(rows, 1 if mode == "keep" else _TILE):
            return Plan(True, max(1, chunk))
        if mode == "keep":
            raise ValueError(
                f"budget_bytes = {budget_bytes}: to keep {rows} rows of {vocab} takes {rows * gradient + logits}; give that or "
                f"mode = 'recompute'"
            )
    return Plan(False, max(1, _whole_tiles(budget_bytes // row, rows)))


def _whole_tiles(room: int, rows: int) -> int:
    if room >= rows:
        return rows
    return room // _TILE * _TILE if room >= _TILE else room


def linear_log_prob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    rows_N: Tensor,
    *,
    vocab_size: int | None = None,
    budget_bytes: int | None = None,
    mode: Mode = "auto",
) -> Tensor:
    """log softmax(hidden @ weight^T)[target], for the listed rows only, for any loss on it.

    Args:
        hidden_TD: [T, D] floating. weight_VD: [V, D], the head, of the same dtype; finite in its padding as well.
        target_T: integer [T]; only the listed rows' entries are read.
        rows_N: integer [N], the rows to project, each at most once, padded with -1 at any place.
        vocab_size: columns from here on are padding, take no probability and get no gradient (default: V).
        budget_bytes: most bytes that logits and their gradients may take at once (default: `default_budget`). On top come a
            float32 sum of the weight's gradient where it is made in chunks, and copies of a chunk in torch's eager functions.
        mode: see the module; auto keeps what fits the budget.
    Returns: [T] float32 (float64 for float64 inputs), 0 outside the listed rows. Logits are never rounded below float32: in
        bf16 the sum over an answer would be off by up to 0.8 nats.

    The gradients are rounded once to the inputs' dtype. Added up over M micro-batches in bf16, each sum is rounded again: by at
    most 2^-9 of the largest partial sum each time, in all about M 2^-9 of the largest value, after which an addend smaller than
    2^-9 of the sum is lost. Add up in float32 where that is too much.

    Raises: ValueError for a target of a listed row that is not in [0, vocab_size), on CUDA, where nothing is waited for, a
        device assertion; for a wrong mode; for a budget too small for it.
    """
    backward = any(_needed(hidden_TD, weight_VD))
    sizes = _sizes(hidden_TD, weight_VD, rows_N, vocab_size, budget_bytes, mode, backward=backward)
    return _log_prob(hidden_TD, weight_VD, target_T, _some(rows_N, hidden_TD), *sizes, False)[0]


def linear_log_prob_statistics(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    rows_N: Tensor,
    *,
    vocab_size: int | None = None,
    budget_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, log-sum-exps, entropies in nats) of the listed rows, without gradients.

    Arguments, dtype and errors are those of `linear_log_prob`. Returns: three times [T], 0 outside the listed rows.
    """
    sizes = _sizes(hidden_TD, weight_VD, rows_N, vocab_size, budget_bytes, "auto", backward=False)
    with torch.no_grad():
        return _log_prob(hidden_TD, weight_VD, target_T, _some(rows_N, hidden_TD), *sizes, True)[:3]


def linear_nll(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    rows_N: Tensor,
    weight_T: Tensor,
    *,
    vocab_size: int | None = None,
    budget_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted negative log-likelihood, whose gradients are made in the forward pass: the `known` way.

    Args: weight_T: floating [T], finite; it gets no gradient. The others, and errors, are those of `linear_log_prob`.
    Returns: (sum(weight * -log_prob), a scalar; the log-probs [T], 0 outside the listed rows, without a gradient). The backward
        pass multiplies the gradients by the loss's own, which costs nothing where that is 1: put any factor into `weight_T`. It
        hands them out, so that a second one raises RuntimeError.
    """
    needed = _needed(hidden_TD, weight_VD)
    sizes = _sizes(hidden_TD, weight_VD, rows_N, vocab_size, budget_bytes, "auto", backward=any(needed))
    weight_T = weight_T.detach().to(accumulation_dtype(hidden_TD.dtype)).contiguous()
    return _nll(hidden_TD, weight_VD, target_T, _some(rows_N, hidden_TD), weight_T, *sizes, *needed)[:2]


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


def wide_product(left_ND: Tensor, right_MD: Tensor) -> Tensor:
    """left @ right^T accumulated and returned in float32 (float64 for float64), whatever the inputs' dtype: [N, M]."""
    wide = accumulation_dtype(left_ND.dtype)
    if left_ND.is_cuda and left_ND.dtype != wide:
        return torch.mm(left_ND, right_MD.T, out_dtype=wide)
    return torch.mm(left_ND.to(wide), right_MD.to(wide).T)


def _needed(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[bool, bool]:
    """Whether each will get a gradient."""
    enabled = torch.is_grad_enabled()
    return enabled and hidden_TD.requires_grad, enabled and weight_VD.requires_grad


def _some(rows_N: Tensor, hidden_TD: Tensor) -> Tensor:
    """The list as kernels take it; empty where there are no tokens at all, of which even padding would read the first."""
    if rows_N.device.type == "cpu" and not torch.compiler.is_compiling():
        # Nothing waits for a CPU: its products need no padding.
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
    *,
    backward: bool,
) -> tuple[int, bool, int]:
    """(real columns, whether to keep, rows of a chunk)."""
    vocab = weight_VD.shape[0]
    budget_bytes = default_budget(hidden_TD.device) if budget_bytes is None else budget_bytes
    keep, chunk = plan(rows_N.shape[0], vocab, hidden_TD.dtype.itemsize, budget_bytes, mode, backward=backward)
    return vocab if vocab_size is None else vocab_size, keep, chunk


@torch.library.custom_op("komainu::linear_log_prob", mutates_args=())
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
    """(log-probs [T], log-sum-exps [T], entropies [T] or nothing, P - Y [N, V] or nothing)."""
    _check_targets(target_T, rows_N, vocab_size)
    log_prob_T, log_sum_exp_T, entropy_T, kept_NV = _log_prob_outputs(hidden_TD, weight_VD, rows_N, keep, with_entropy)
    _score(
        gather_rows(hidden_TD, rows_N), weight_VD, target_T, rows_N, log_prob_T, log_sum_exp_T, vocab_size, chunk,
        entropy_T=entropy_T if with_entropy else None, gradient_NV=kept_NV if keep else None,
    )  # fmt: skip
    return log_prob_T, log_sum_exp_T, entropy_T, kept_NV


@torch.library.custom_op("komainu::linear_log_prob_backward", mutates_args=())
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
    """(gradient of the hidden states [T, D], of the weight [V, D]), nothing for one that is not needed."""
    scale_T = (-grad_T).contiguous()
    target_T = target_T.contiguous()
    hidden_ND = gather_rows(hidden_TD, rows_N, scale_T if keep and needs_weight else None)

    def recomputed(part: slice) -> Tensor:
        rows, logits_NV = rows_N[part], wide_product(hidden_ND[part], weight_VD)
        gradient_NV = torch.empty(logits_NV.shape, dtype=hidden_TD.dtype, device=hidden_TD.device)
        row_gradients(logits_NV, target_T, rows, log_sum_exp_T, gradient_NV, scale_T, vocab_size=vocab_size)
        return gradient_NV

    return _gradients(
        kept_NV.__getitem__ if keep else recomputed, _parts(len(rows_N), len(rows_N) if keep else chunk), hidden_ND, weight_VD,
        rows_N, len(hidden_TD), scale_T if keep else None, needs_hidden, needs_weight,
    )  # fmt: skip


@torch.library.custom_op("komainu::linear_nll", mutates_args=())
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
    """(loss, log-probs [T], gradient of the hidden states [T, D], of the weight [V, D]), nothing for one that is not needed."""
    _check_targets(target_T, rows_N, vocab_size)
    log_prob_T, log_sum_exp_T, _, _ = _log_prob_outputs(hidden_TD, weight_VD, rows_N, False, False)
    hidden_ND = gather_rows(hidden_TD, rows_N)

    def scored(part: slice) -> Tensor:
        rows = rows_N[part]
        gradient_NV = torch.empty((len(rows), len(weight_VD)), dtype=hidden_TD.dtype, device=hidden_TD.device)
        _score(
            hidden_ND[part], weight_VD, target_T, rows, log_prob_T, log_sum_exp_T, vocab_size, chunk, gradient_NV=gradient_NV,
            scale_T=weight_T,
        )  # fmt: skip
        return gradient_NV

    if needs_hidden or needs_weight:
        parts = _parts(len(rows_N), len(rows_N) if keep else chunk)
        gradients = _gradients(
            scored, parts, hidden_ND, weight_VD, rows_N, len(hidden_TD), None, needs_hidden, needs_weight
        )  # fmt: skip
    else:
        _score(hidden_ND, weight_VD, target_T, rows_N, log_prob_T, log_sum_exp_T, vocab_size, chunk)
        gradients = _no_gradients(hidden_TD, weight_VD, needs_hidden, needs_weight)
    return -(weight_T * log_prob_T).sum(), log_prob_T, *gradients


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
    """`row_statistics` of the listed rows, whose logits exist for a chunk at a time."""
    target_T = target_T.contiguous()
    for part in _parts(len(rows_N), chunk):
        row_statistics(
            wide_product(hidden_ND[part], weight_VD), target_T, rows_N[part], log_prob_T, log_sum_exp_T, vocab_size=vocab_size,
            entropy_T=entropy_T, gradient_NV=None if gradient_NV is None else gradient_NV[part], scale_T=scale_T,
        )  # fmt: skip


def _gradients(
    gradient_of: Callable[[slice], Tensor],
    parts: Sequence[slice],
    hidden_ND: Tensor,
    weight_VD: Tensor,
    rows_N: Tensor,
    tokens: int,
    scale_T: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient of the hidden states [tokens, D], of the weight [V, D]), nothing for one that is not needed.

    Args: gradient_of: gradients of a part's rows by their logits. scale_T: what is still missing in those of the hidden states.
    """
    dtype = hidden_ND.dtype
    grad_hidden, grad_weight = _no_gradients(hidden_ND, weight_VD, False, False)
    product_ND = torch.empty_like(hidden_ND)
    for number, part in enumerate(parts):
        gradient_NV = gradient_of(part)
        if needs_hidden:
            torch.mm(gradient_NV, weight_VD, out=product_ND[part])
        if needs_weight and len(parts) == 1:
            grad_weight = torch.mm(gradient_NV.T, hidden_ND[part])
        elif needs_weight:
            product_VD = wide_product(gradient_NV.T, hidden_ND[part].T)
            grad_weight = product_VD if number == 0 else grad_weight.add_(product_VD)
            # Else it is there until the next part's: as much as the sum itself, while logits are.
            del product_VD
        # Before those of the next part are made: the budget is for one.
        del gradient_NV
    if needs_hidden:
        grad_hidden = scatter_rows(product_ND, rows_N, tokens, scale_T)
    return grad_hidden, grad_weight.to(dtype)


def _parts(rows: int, size: int) -> list[slice]:
    """Rows by at most `size`; one part without rows where there are none."""
    return [slice(first, min(first + size, rows)) for first in range(0, max(rows, 1), max(size, 1))]


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
    """Where values are not: tensors of the gradients' shapes, and of none for one that is not needed."""
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
    # Else a gradient of zeros is made for each, of all the logits' size for the kept ones.
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
