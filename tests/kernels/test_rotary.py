"""Rotary embedding against transformers' and against its defining property."""

import torch
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

from kernels.rotary import rotary, rotary_table

HEADS, KV_HEADS, SIZE, THETA = 4, 2, 16, 10000.0


def test_equals_transformers():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(300, HEADS + 2 * KV_HEADS, SIZE, generator=generator)
    # Positions restart, as in a packed row, and reach far.
    positions = torch.cat((torch.arange(100), torch.arange(4000, 4200)))
    frequencies = 1.0 / THETA ** (torch.arange(0, SIZE, 2).float() / SIZE)
    angles = torch.cat([positions.float()[:, None] * frequencies] * 2, dim=-1)
    query, key, value = (part.transpose(0, 1)[None] for part in qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1))
    query, key = apply_rotary_pos_emb(query, key, angles.cos()[None], angles.sin()[None])
    expected = torch.cat((query, key, value), dim=1)[0].transpose(0, 1)
    out = rotary(qkv, rotary_table(positions, SIZE, THETA), HEADS + KV_HEADS)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_products_depend_on_the_distance_alone():
    query, key = torch.randn(2, 1, 1, SIZE, dtype=torch.float64)

    def product(at_query, at_key):
        def turned(vector, position):
            return rotary(vector, rotary_table(torch.tensor([position]), SIZE, THETA), 1)

        return (turned(query, at_query) * turned(key, at_key)).sum()

    torch.testing.assert_close(product(3, 1), product(40, 38), rtol=1e-5, atol=1e-5)
    assert abs(product(3, 1) - product(3, 2)) > 1e-3


def test_gradient_is_the_turn_back():
    qkv = torch.randn(7, 4, SIZE, dtype=torch.float64, requires_grad=True)
    table = rotary_table(torch.arange(7), SIZE, THETA)
    grad = torch.randn_like(qkv)
    (turned,) = torch.autograd.grad(rotary(qkv, table, 3), qkv, grad)
    back = table._replace(sin_TE=-table.sin_TE)
    torch.testing.assert_close(turned, rotary(grad, back, 3), rtol=1e-12, atol=1e-12)
