"""The error that an operator may have: FlashAttention's rule, against float64, with no fixed tolerance."""

import torch


def check(name, actual, exact, plain, *, sums=1):
    """Assert that the largest error is at most twice the error of plain torch in the same dtype, plus a rounding.

    Args: exact: in float64. plain: torch's result, in the dtype of `actual`. sums: number of float32 additions of values as
        large as the result whose order may differ from torch's.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, expected {plain.dtype}"
    if not exact.numel():
        return
    assert actual.isfinite().all(), f"{name}: {int((~actual.isfinite()).sum())} values are not finite"
    exact = exact.detach()
    error, plains = ((result.detach().double().to(exact.device) - exact).abs().max() for result in (actual, plain))
    # Plain torch may have been lucky: allow one rounding to the dtype, and float32 sums in another order.
    rounding = (torch.finfo(actual.dtype).eps / 2 + 4 * sums * torch.finfo(torch.float32).eps) * exact.abs().max()
    assert error <= 2 * plains + rounding, f"{name}: error {error:.3g}, of plain torch {plains:.3g}, rounding {rounding:.3g}"


def random(*shape, dtype, device, seed, scale=1.0):
    """Normal values drawn from a seed, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)


def compare(ours, plain, inputs, upstream, sums=None):
    """Check results and gradients of our function by the error rule, against plain torch in the same dtype and in float64.

    Args: ours, plain: functions of the inputs, in their order, that return a tensor or a tuple. inputs: by name; gradients are
        taken by the inputs that require them. upstream: gradient of each output by name. sums: by result, as in `check`.
    """
    found = []
    for function, wide in ((ours, False), (plain, True), (plain, False)):

        def as_given(tensor, wide=wide):
            return tensor.detach().double() if wide and tensor.is_floating_point() else tensor.detach()

        given = [as_given(tensor).requires_grad_(tensor.requires_grad) for tensor in inputs.values()]
        outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [tensor for tensor in given if tensor.requires_grad]
        grads = [grad.to(output.dtype) for grad, output in zip(upstream.values(), outputs, strict=True)]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    names = [*upstream, *(f"d {name}" for name, tensor in inputs.items() if tensor.requires_grad)]
    for name, *results in zip(names, *found, strict=True):
        check(name, *results, sums=(sums or {}).get(name, 1))


def far_apart(rows):
    """The same three rows, with a stride that fits 32 bits and whose double does not. Memory between them is never touched."""
    assert len(rows) == 3
    stride = 2**30 + 64
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty(2 * stride + rows[0].numel(), dtype=rows.dtype, device=rows.device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    far = storage.as_strided(rows.shape, (stride, *rows[0].contiguous().stride()))
    return far.copy_(rows)
