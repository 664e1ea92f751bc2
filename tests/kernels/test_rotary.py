"""Rotary embedding, in place in the packed row: against transformers, its defining property, and float64."""

import pytest
import torch
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

import kernels.rotary as module
from kernels.rotary import RotaryTable, rotary_, rotary_reference_, rotary_table, rotate_, rotate_back
from tests.kernels.error_rule import compare, far_apart, random

HEADS, KV_HEADS, SIZE, THETA = 4, 2, 16, 10000.0
# Tokens, query heads, key heads, head size.
SHAPES = [(1, 4, 2, 16), (5, 3, 1, 24), (127, 2, 1, 6), (129, 3, 1, 8), (0, 4, 2, 16)]


def inputs(tokens, heads, kv_heads, size, dtype, device):
    """(packed rows, their gradient, table)."""
    packed = [random(tokens, heads + 2 * kv_heads, size, dtype=dtype, device=device, seed=seed) for seed in (1, 2)]
    return *packed, table_of(torch.arange(tokens) * 5, size, device)


def table_of(positions, size, device):
    # Copies, so that a kernel that reads beyond a table is caught.
    return RotaryTable(*(angles.to(device).clone() for angles in rotary_table(positions, size, THETA)))


def turned(qkv, table, rotated_heads):
    """The rotated rows as a new tensor."""
    return rotary_(qkv.clone(), table, rotated_heads)


def plain(qkv, table, rotated_heads):
    """The formula as transformers writes it, all in the dtype of the rows."""
    cos, sin = (torch.cat((half, half), dim=-1)[:, None].to(qkv.dtype) for half in table)
    given = qkv[:, :rotated_heads]
    first, second = given.chunk(2, dim=-1)
    return torch.cat((given * cos + torch.cat((-second, first), dim=-1) * sin, qkv[:, rotated_heads:]), dim=1)


@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "size"), SHAPES)
def test_results_and_gradients_are_right(tokens, heads, kv_heads, size, dtype, device):
    qkv, grad, table = inputs(tokens, heads, kv_heads, size, dtype, device)
    rotated = heads + kv_heads
    compare(
        lambda qkv: turned(qkv, table, rotated),
        lambda qkv: plain(qkv, table, rotated),
        {"qkv": qkv.requires_grad_()},
        {"out": grad},
    )


def test_results_equal_transformers(device):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(300, HEADS + 2 * KV_HEADS, SIZE, generator=generator)
    # Positions restart, as in a packed row, and reach far.
    positions = torch.cat((torch.arange(100), torch.arange(4000, 4200)))
    frequencies = 1.0 / THETA ** (torch.arange(0, SIZE, 2).float() / SIZE)
    angles = torch.cat([positions.float()[:, None] * frequencies] * 2, dim=-1)
    query, key, value = (part.transpose(0, 1)[None] for part in qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1))
    query, key = apply_rotary_pos_emb(query, key, angles.cos()[None], angles.sin()[None])
    expected = torch.cat((query, key, value), dim=1)[0].transpose(0, 1)
    out = rotary_(qkv.to(device), table_of(positions, SIZE, device), HEADS + KV_HEADS)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_products_of_query_and_key_depend_only_on_their_distance():
    query, key = torch.randn(2, 1, 1, SIZE, dtype=torch.float64)

    def product(at_query, at_key):
        def at(vector, position):
            return turned(vector, rotary_table(torch.tensor([position]), SIZE, THETA), 1)

        return (at(query, at_query) * at(key, at_key)).sum()

    torch.testing.assert_close(product(3, 1), product(40, 38), rtol=1e-5, atol=1e-5)
    assert abs(product(3, 1) - product(3, 2)) > 1e-3


def test_the_gradient_is_rotated_back():
    qkv = torch.randn(7, 4, SIZE, dtype=torch.float64, requires_grad=True)
    table = rotary_table(torch.arange(7), SIZE, THETA)
    grad = torch.randn_like(qkv)
    back = table._replace(sin_TE=-table.sin_TE)
    expected = turned(grad, back, 3)
    for function in (rotary_, rotary_reference_):
        (found,) = torch.autograd.grad(function(qkv.clone(), table, 3), qkv, grad)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_rotation_is_in_place_and_leaves_values_alone(dtype, device):
    qkv, _, table = inputs(9, 3, 2, 12, dtype, device)
    # If values were rotated, Inf and NaN would spread to the other half of their head.
    qkv[4, 5:, 3] = float("inf")
    qkv[5, 5:, 8] = float("nan")
    expected = qkv.clone()
    assert rotary_(qkv, table, 5) is qkv
    assert torch.equal(qkv[:, 5:].nan_to_num(7.0), expected[:, 5:].nan_to_num(7.0))
    assert (qkv[1:, :5] != expected[1:, :5]).any(dim=-1).all()
    # Gradients of values are copied unchanged, too.
    back = rotate_back(expected[:, :3], expected[:, 3:5], expected[:, 5:], table)
    assert torch.equal(back[:, 5:].nan_to_num(7.0), expected[:, 5:].nan_to_num(7.0))
    assert back[:, :5].isfinite().all()


def test_strides_do_not_change_results(device):
    """Rows inside a wider tensor, heads before tokens, strided head elements, and the gradient of a sum."""
    qkv, grad, table = inputs(7, 3, 1, 10, torch.float32, device)
    expected = turned(qkv, table, 4)
    wide = torch.cat((qkv, qkv), dim=1)[:, :5]
    heads_first = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    spread = torch.stack((qkv, qkv), dim=-1)[..., 0]
    for given in (wide, heads_first, spread):
        assert not given.is_contiguous()
        rotary_(given, table, 4)
        assert torch.equal(given, expected)

    def gradient(grad):
        leaf = qkv.clone().requires_grad_()
        return torch.autograd.grad(turned(leaf, table, 4), leaf, grad)[0]

    expected = gradient(grad)
    assert torch.equal(gradient(grad.transpose(0, 1).contiguous().transpose(0, 1)), expected)
    assert torch.equal(gradient(torch.stack((grad, grad), dim=-1)[..., 0]), expected)
    for row in (grad[:1, :1, :1], grad[:1, :1], grad[:1]):
        assert torch.equal(gradient(row.expand_as(grad)), gradient(row.expand_as(grad).contiguous()))


def test_gradients_in_one_tensor_or_in_three_give_the_same_bits(dtype, device):
    qkv, grad, table = inputs(7, 3, 2, 12, dtype, device)
    parts = grad.split((3, 2, 2), dim=1)
    packed = rotate_back(*parts, table)
    assert packed.is_contiguous()
    (expected,) = torch.autograd.grad(turned(qkv.requires_grad_(), table, 5), qkv, grad)
    assert torch.equal(packed, expected)
    apart = [part.contiguous() for part in parts]
    assert torch.equal(rotate_back(*apart, table), packed)
    query, key, value = apart
    mixed = (query.transpose(0, 1).contiguous().transpose(0, 1), torch.cat((key, key), dim=1)[:, :2], value)
    assert torch.equal(rotate_back(*mixed, table), packed)
    ones = [part[:1, :1].expand_as(part) for part in parts]
    assert torch.equal(rotate_back(*ones, table), rotate_back(*(part.contiguous() for part in ones), table))


def test_two_runs_give_the_same_bits(dtype, device):
    qkv, grad, table = inputs(33, 3, 1, 12, dtype, device)
    runs = []
    for _ in range(2):
        out = turned(qkv.requires_grad_(), table, 4)
        runs.append([out, *torch.autograd.grad(out, qkv, grad)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_rotations_that_autograd_cannot_follow_raise(device):
    leaf, _, table = inputs(3, 2, 1, 8, torch.float32, device)
    leaf.requires_grad_()
    with pytest.raises(RuntimeError, match="leaf"):
        rotary_(leaf, table, 3)
    with pytest.raises(RuntimeError, match="rotate_ has no gradient"):
        rotate_(leaf.clone(), table, 3)


def test_offsets_beyond_31_bits_are_right(triton_device):
    qkv, grad, table = inputs(3, 3, 1, 12, torch.float16, triton_device)
    far = far_apart(qkv)
    rotate_(far, table, 4)
    rotate_(qkv, table, 4)
    assert torch.equal(far, qkv)
    parts = grad.split((3, 1, 1), dim=1)
    near = rotate_back(*parts, table)
    for number in range(3):
        given = [far_apart(part) if i == number else part for i, part in enumerate(parts)]
        assert torch.equal(rotate_back(*given, table), near)


def test_custom_operators_pass_torchs_checks(triton_device):
    qkv, grad, table = inputs(3, 2, 1, 8, torch.float32, triton_device)
    torch.library.opcheck(module._rotate_.registered, (qkv, *table, 3))
    torch.library.opcheck(module._rotate_back.registered, (*grad.split((2, 1, 1), dim=1), *table))
