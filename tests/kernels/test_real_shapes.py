"""Every operator at the shapes of Shisa 7B on a GPU, against plain torch in float64 by the error rule.

The same tests run on a CPU at small shapes, where they check the eager references and themselves.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from kernels.adamw import adamw_, adamw_reference_, join_master, split_master
from kernels.attention.decode import decode_attention
from kernels.attention.sliding_window import sliding_window_attention
from kernels.attention.work import attention_work
from kernels.embedding import embedding
from kernels.feed_forward import feed_forward
from kernels.gradient_norm import gradient_norm
from kernels.linear_log_prob import linear_log_prob, linear_nll
from kernels.norm_qkv import norm_qkv
from kernels.rms_norm import add_rms_norm
from kernels.rotary import rotary_, rotary_table
from kernels.swiglu import swiglu
from tests.kernels.attention_rows import Row, plain, plain_gradients
from tests.kernels.error_rule import check, compare, random

EPS = 1e-5


class Shapes(NamedTuple):
    """device, tokens: of the packed row. rows: of the vocabulary; the first `pieces` are real."""

    device: str
    tokens: int
    heads: int
    kv_heads: int
    head_size: int
    width: int
    inner: int
    window: int
    rows: int
    pieces: int

    def random(self, *shape, seed, scale=1.0):
        return random(*shape, dtype=torch.bfloat16, device=self.device, seed=seed, scale=scale)

    @property
    def packed_heads(self) -> int:
        return self.heads + 2 * self.kv_heads

    @property
    def parts(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads, self.kv_heads


SMALL = Shapes("cpu", 44, 4, 2, 16, 24, 20, 17, 131, 120)
SHISA = Shapes("cuda", 6001, 32, 8, 128, 4096, 14336, 4096, 120064, 120000)


@pytest.fixture(params=[pytest.param(SMALL, id="small"), pytest.param(SHISA, id="Shisa 7B", marks=pytest.mark.gpu)])
def shapes(request):
    return request.param


def leaf(tensor):
    return tensor.requires_grad_()


def rotated(heads, table):
    """Rotary embedding by complex numbers, whose product is a rotation."""
    wide = heads if heads.dtype == torch.float64 else heads.float()
    turn = torch.complex(table.cos_TE, table.sin_TE)[:, None]
    turned = torch.complex(*wide.chunk(2, dim=-1)) * turn
    return torch.cat((turned.real, turned.imag), dim=-1).to(heads.dtype)


def test_norm_of_a_sum_is_right(shapes):
    shape = (shapes.tokens, shapes.width)
    given = {"residual": shapes.random(*shape, seed=0), "hidden": shapes.random(*shape, seed=1)}
    given["weight"] = shapes.random(shapes.width, seed=2)
    upstream = {"total": shapes.random(*shape, seed=3), "out": shapes.random(*shape, seed=4)}

    def formula(residual, hidden, weight):
        total = residual + hidden
        return total, F.rms_norm(total, weight.shape, weight, EPS)

    compare(
        lambda *tensors: add_rms_norm(*tensors, EPS),
        formula,
        {name: leaf(tensor) for name, tensor in given.items()},
        upstream,
        {"d weight": shapes.tokens},
    )


def test_swiglu_is_right(shapes):
    gate_up = leaf(shapes.random(shapes.tokens, 2 * shapes.inner, seed=0))

    def formula(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    compare(swiglu, formula, {"gate up": gate_up}, {"out": shapes.random(shapes.tokens, shapes.inner, seed=1)})


def test_rotation_is_right(shapes):
    shape = (shapes.tokens, shapes.packed_heads, shapes.head_size)
    table = rotary_table(torch.arange(shapes.tokens, device=shapes.device), shapes.head_size, 10000.0)
    count = shapes.heads + shapes.kv_heads

    def formula(qkv):
        return torch.cat((rotated(qkv[:, :count], table), qkv[:, count:]), dim=1)

    given = {"qkv": leaf(shapes.random(*shape, seed=0))}
    compare(lambda qkv: rotary_(qkv.clone(), table, count), formula, given, {"out": shapes.random(*shape, seed=1)})


def test_embedding_and_its_gradient_are_right(shapes):
    # Half of the tokens are one piece.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, shapes.rows, (shapes.tokens,), generator=generator)
    tokens[::2] = 3
    tokens[-1] = shapes.rows - 1
    tokens = tokens.to(shapes.device)
    compare(
        lambda weight: embedding(tokens, weight),
        lambda weight: F.embedding(tokens, weight),
        {"weight": leaf(shapes.random(shapes.rows, shapes.width, seed=1))},
        {"out": shapes.random(shapes.tokens, shapes.width, seed=2)},
        {"d weight": shapes.tokens},
    )


def test_norm_and_qkv_are_right(shapes):
    table = rotary_table(torch.arange(shapes.tokens, device=shapes.device), shapes.head_size, 10000.0)
    shape, outputs = (shapes.tokens, shapes.width), shapes.packed_heads * shapes.head_size
    given = {
        "residual": shapes.random(*shape, seed=0),
        "delta": shapes.random(*shape, seed=1),
        "norm weight": shapes.random(shapes.width, seed=2),
        "qkv weight": shapes.random(outputs, shapes.width, seed=3, scale=shapes.width**-0.5),
    }
    upstream = {"total": shapes.random(*shape, seed=4)}
    for seed, (name, heads) in enumerate(zip(("query", "key", "value"), shapes.parts, strict=True), 5):
        upstream[name] = shapes.random(shapes.tokens, heads, shapes.head_size, seed=seed)

    def formula(residual, delta, norm_weight, qkv_weight):
        total = residual + delta
        packed = F.rms_norm(total, norm_weight.shape, norm_weight, EPS) @ qkv_weight.T
        query, key, value = packed.unflatten(-1, (-1, shapes.head_size)).split(shapes.parts, dim=1)
        return total, rotated(query, table), rotated(key, table), value

    compare(
        lambda *tensors: norm_qkv(*tensors, table, shapes.parts[:2], EPS),
        formula,
        {name: leaf(tensor) for name, tensor in given.items()},
        upstream,
        {"d norm weight": shapes.tokens, "d qkv weight": shapes.tokens},
    )


@pytest.mark.parametrize("recompute", ["none", "light", "ffn"])
def test_feed_forward_is_right(recompute, shapes):
    shape = (shapes.tokens, shapes.width)
    given = {
        "residual": shapes.random(*shape, seed=0),
        "delta": shapes.random(*shape, seed=1),
        "norm weight": shapes.random(shapes.width, seed=2),
        "gate up weight": shapes.random(2 * shapes.inner, shapes.width, seed=3, scale=shapes.width**-0.5),
        "down weight": shapes.random(shapes.width, shapes.inner, seed=4, scale=shapes.inner**-0.5),
    }

    def formula(residual, delta, norm_weight, gate_up_weight, down_weight):
        total = residual + delta
        gate, up = (F.rms_norm(total, norm_weight.shape, norm_weight, EPS) @ gate_up_weight.T).chunk(2, dim=-1)
        return total, (F.silu(gate) * up) @ down_weight.T

    compare(
        lambda *tensors: feed_forward(*tensors, EPS, recompute=recompute),
        formula,
        {name: leaf(tensor) for name, tensor in given.items()},
        {"total": shapes.random(*shape, seed=5), "out": shapes.random(*shape, seed=6)},
        {"d norm weight": shapes.tokens, "d gate up weight": shapes.tokens, "d down weight": shapes.tokens},
    )


def test_attention_is_right(shapes):
    """Documents shorter and longer than the window, and padding; the formula in chunks of one key/value head."""
    first = shapes.window + shapes.window // 4
    lengths = (first, 1, shapes.tokens - first - 6)
    row = Row(lengths, shapes.window, 128, shapes.parts[:2], padding=5, size=shapes.head_size)
    query, key, value, grad = row.inputs(torch.bfloat16, shapes.device)
    tensors = [leaf(tensor.detach().clone()) for tensor in (query, key, value)]
    work = attention_work(row.bounds, row.window, tokens=row.tokens).to(shapes.device)
    out = sliding_window_attention(*tensors, work=work)
    found = [out.detach(), *torch.autograd.grad(out, tensors, grad)]
    seen, group = row.visible().to(shapes.device), shapes.heads // shapes.kv_heads
    for kv_head in range(shapes.kv_heads):
        heads, own = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
        slices = (heads, own, own, heads)
        given = [tensor[:, part] for tensor, part in zip((query, key, value, grad), slices, strict=True)]
        results = []
        for dtype in (torch.float64, torch.bfloat16):
            *inputs, upstream = (tensor.to(dtype) for tensor in given)
            results.append([plain(*inputs, seen)[0], *plain_gradients(*inputs, seen, upstream)])
        ours = [tensor[:, part] for tensor, part in zip(found, (heads, heads, own, own), strict=True)]
        for name, *compared in zip(("out", "d query", "d key", "d value"), ours, *results, strict=True):
            check(f"{name} of key/value head {kv_head}", *compared, sums=group)


@pytest.mark.parametrize("new", [1, 7])
def test_attention_of_new_tokens_is_right(new, shapes):
    tokens = shapes.tokens - 5
    seen = tokens - new
    query, key, value, _ = Row((tokens,), None, 128, shapes.parts[:2], size=shapes.head_size).inputs(
        torch.bfloat16, shapes.device
    )
    place = torch.arange(seen - shapes.window, seen, device=shapes.device)
    rings = []
    for tensor in (key, value):
        ring = torch.empty((shapes.window, *tensor.shape[1:]), dtype=tensor.dtype, device=shapes.device)
        ring[place % shapes.window] = tensor[place]
        rings.append(ring)
    out = decode_attention(query[seen:], key[seen:], value[seen:], *rings, seen, shapes.window)
    # The first new place sees window - 1 places before itself.
    first = seen - shapes.window + 1
    visible = Row((tokens - first,), shapes.window, 128).visible().to(shapes.device)
    given = [tensor[first:] for tensor in (query, key, value)]
    exact = plain(*(tensor.double() for tensor in given), visible)[0][-new:]
    check("out", out, exact, plain(*given, visible)[0][-new:])


@pytest.mark.parametrize("way", ["keep", "recompute", "known"])
def test_head_is_right(way, shapes):
    """Half of the tokens are listed; rows of the weight beyond `pieces` get no probability."""
    tokens = shapes.tokens // 4
    hidden = leaf(shapes.random(tokens, shapes.width, seed=0))
    weight = leaf(shapes.random(shapes.rows, shapes.width, seed=1, scale=shapes.width**-0.5))
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(0, shapes.pieces, (tokens,), generator=generator).to(shapes.device)
    rows = torch.arange(0, tokens, 2, dtype=torch.int32, device=shapes.device)
    grad = random(tokens, dtype=torch.float32, device=shapes.device, seed=3)

    def ours(hidden, weight):
        if way == "known":
            loss, log_prob = linear_nll(hidden, weight, target, rows, -grad, vocab_size=shapes.pieces)
            return log_prob, *torch.autograd.grad(loss, (hidden, weight))
        log_prob = linear_log_prob(hidden, weight, target, rows, vocab_size=shapes.pieces, mode=way)
        return log_prob, *torch.autograd.grad(log_prob, (hidden, weight), grad)

    def formula(hidden, weight):
        listed = rows.long()
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = (hidden[listed] @ weight[: shapes.pieces].T).to(wide).log_softmax(dim=-1)
        listed_log_prob = log_probs.gather(1, target[listed, None])[:, 0]
        log_prob = torch.zeros(tokens, dtype=wide, device=shapes.device).index_put((listed,), listed_log_prob)
        return log_prob, *torch.autograd.grad(log_prob, (hidden, weight), grad.to(wide))

    exact = formula(*(leaf(tensor.detach().double()) for tensor in (hidden, weight)))
    for name, *compared in zip(
        ("log_prob", "d hidden", "d weight"), ours(hidden, weight), exact, formula(hidden, weight), strict=True
    ):
        check(name, *(tensor.detach() for tensor in compared), sums=8)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_an_update_equals_the_references(moments, shapes):
    """To the bit on a GPU; a CPU may use torch's own operator."""
    shape = (2 * shapes.inner, shapes.width)
    parameter, remainder = split_master(random(*shape, dtype=torch.float32, device=shapes.device, seed=0, scale=0.02))
    gradient = shapes.random(*shape, seed=1, scale=1e-3)
    first = random(*shape, dtype=moments, device=shapes.device, seed=2, scale=1e-3)
    state = [parameter, remainder, gradient, first, first.float().square().to(moments)]
    results = []
    for function, device in ((adamw_, shapes.device), (adamw_reference_, "cpu")):
        tensors = [tensor.to(device, copy=True) for tensor in state]
        function(
            *tensors,
            learning_rate=1e-3,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            step=3,
            gradient_scale=torch.tensor(0.5, device=device),
            seed=7,
            parameter_id=2,
        )
        results.append([tensor.cpu() for tensor in tensors])
    masters = [join_master(*tensors[:2]) for tensors in results]
    torch.testing.assert_close(*masters, rtol=1e-6, atol=1e-8)
    if shapes.device == "cuda":
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_norm_of_all_gradients_is_right(shapes):
    sizes = [(shapes.rows, shapes.width), (2 * shapes.inner, shapes.width), (shapes.width,), (1,)]
    gradients = [shapes.random(*size, seed=seed) for seed, size in enumerate(sizes)]
    exact = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
    torch.testing.assert_close(gradient_norm(gradients, gradients[0].device).double(), exact, rtol=1e-6, atol=0)
