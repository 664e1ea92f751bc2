"""E4M3 codes and their scales: against a search of all codes; kernels that emit codes: against a pass of their own."""

import math

import numpy as np
import pytest
import torch

import kernels.rms_norm as norms
import kernels.rotary as rotation
import kernels.swiglu as products
from kernels import fp8
from kernels.configurations import TABLES, Configuration
from kernels.fp8 import Codes, column_codes, matrix_codes, row_codes, shifted_columns
from kernels.launch import INTERPRETED
from kernels.rotary import rotary_table, rotate_back, rotate_back_codes
from tests.kernels.error_rule import far_apart, random
from tests.kernels.last_program import launch_last_program, vast

EPS = 1e-5


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """In the interpreter, tiles of 32 x 16, so that small matrices have several."""
    if INTERPRETED:
        monkeypatch.setitem(TABLES[90], "fp8_columns", Configuration(block=16, rows=32))
        monkeypatch.setitem(TABLES[90], "fp8_largest_scale", Configuration(block=32))


# All finite values of E4M3 that are not negative, in order; their index is their code.
VALUES = np.arange(127, dtype=np.uint8)
VALUES = torch.from_numpy(VALUES).view(fp8.E4M3).double().numpy()


def nearest(values, scale):
    """The code of each value / scale, ties to even, found by search."""
    sizes = np.minimum(np.abs(values) / scale, VALUES[-1])
    above = np.clip(np.searchsorted(VALUES, sizes), 1, 126)
    below = above - 1
    up, down = VALUES[above] - sizes, sizes - VALUES[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.where(np.signbit(values), code + 128, code).astype(np.uint8)


def smallest_scale(largest):
    """The smallest power of two, at least 2^-126, that brings `largest` to 448."""
    return 2.0 ** max(-126, math.ceil(math.log2(largest / 448))) if largest else 2.0**-126


def bits(codes):
    """Codes as bytes. -0 equals 0, as every product does with them."""
    found = codes.view(torch.uint8)
    return torch.where(found == 128, 0, found)


def same(one, other):
    return torch.equal(bits(one.code_TK), bits(other.code_TK)) and torch.equal(one.scale_T, other.scale_T)


def spread_rows(tokens, width, dtype, device, seed=0):
    """Rows of very different sizes; one of zeros."""
    rows = random(tokens, width, dtype=torch.float32, device=device, seed=seed)
    size = random(tokens, 1, dtype=torch.float32, device=device, seed=seed + 1, scale=3.0).exp()
    rows = (rows * size).clamp(-6e4, 6e4)
    rows[tokens // 2] = 0
    return rows.to(dtype)


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (7, 20), (3, 130), (0, 16)])
def test_codes_are_the_nearest_values_at_the_smallest_scale(tokens, width, dtype, device):
    rows = spread_rows(max(tokens, 1), width, dtype, device)[:tokens]
    found = row_codes(rows)
    assert found.code_TK.dtype == fp8.E4M3
    assert found.scale_T.dtype == torch.float32
    for row, codes, scale in zip(rows.double().cpu().numpy(), found.code_TK.cpu(), found.scale_T.tolist(), strict=True):
        assert scale == smallest_scale(np.abs(row).max())
        assert np.array_equal(codes.view(torch.uint8).numpy(), nearest(row, scale))


@pytest.mark.parametrize("power", [-130, -119, -3, 0, 5, 119])
def test_448_is_the_largest_value_of_a_scale(power, device):
    """A value above 448 by its last bit takes the next power of two."""
    limit = torch.tensor(448.0) * 2.0**power
    rows = torch.stack((limit, torch.nextafter(limit, torch.tensor(math.inf))))[:, None].repeat(1, 16).to(device)
    scale = row_codes(rows).scale_T.tolist()
    assert scale == [smallest_scale(value) for value in rows[:, 0].double().tolist()]
    if power >= -126:
        assert scale == [2.0**power, 2.0 ** (power + 1)]


def test_ties_go_to_the_even_code(device):
    """The middle of each two neighbouring codes, at scale 1."""
    middles = torch.from_numpy((VALUES[1:] + VALUES[:-1]) / 2).float()
    row = torch.cat((middles, -middles, torch.tensor([448.0, 0.0])))[None].to(device)
    found = row_codes(row)
    assert found.scale_T.item() == 1
    assert np.array_equal(found.code_TK[0].cpu().view(torch.uint8).numpy(), nearest(row[0].double().cpu().numpy(), 1.0))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_nan_and_changes_no_other(wrong, dtype, device):
    rows = spread_rows(5, 32, dtype, device)
    expected = row_codes(rows)
    rows[3, 7] = wrong
    found = row_codes(rows)
    assert found.scale_T[3].isnan()
    assert found.code_TK[3].float().isnan().all()
    others = [0, 1, 2, 4]
    assert same(Codes(found.code_TK[others], found.scale_T[others]), Codes(expected.code_TK[others], expected.scale_T[others]))
    assert column_codes(rows, found.scale_T)[:, 3].float().isnan().all()


def test_an_outlier_of_60000_changes_no_other_rows_codes(dtype, device):
    rows = random(9, 64, dtype=dtype, device=device, seed=3)
    expected = row_codes(rows)
    rows[4, 11] = 60_000
    found = row_codes(rows)
    others = [row for row in range(9) if row != 4]
    assert same(Codes(found.code_TK[others], found.scale_T[others]), Codes(expected.code_TK[others], expected.scale_T[others]))
    assert found.scale_T[4] == 256
    assert expected.scale_T[4] < 1


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (33, 20), (40, 20), (16, 16), (0, 16)])
def test_columns_are_the_rows_transposed_with_zeros_behind(tokens, width, dtype, device):
    rows = spread_rows(max(tokens, 1), width, dtype, device)[:tokens]
    codes = row_codes(rows)
    columns = column_codes(rows, codes.scale_T)
    assert columns.shape == (width, max(16, -(-tokens // 16) * 16))
    assert columns.is_contiguous()
    assert torch.equal(columns[:, :tokens].view(torch.uint8), codes.code_TK.T.view(torch.uint8))
    assert not columns[:, tokens:].float().any()


def test_codes_beyond_the_largest_are_clamped(dtype, device):
    """A cast on a CPU would give NaN before torch 2.12."""
    rows = torch.full((2, 16), 1000.0, dtype=dtype, device=device)
    rows[1] = -470
    columns = column_codes(rows, torch.ones(2, device=device))
    assert columns[0, :2].float().tolist() == [448, -448]


@pytest.mark.parametrize(("rows", "columns"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
def test_a_matrix_has_one_scale_and_the_same_codes_both_ways(shape, rows, columns, dtype, device):
    matrix = random(*shape, dtype=dtype, device=device, seed=5, scale=0.02)
    code, transposed, scale = matrix_codes(matrix, rows=rows, columns=columns)
    assert scale.item() == smallest_scale(matrix.abs().max().item())
    expected = torch.from_numpy(nearest(matrix.double().cpu().numpy(), scale.item())).to(device)
    assert torch.equal(code.view(torch.uint8), expected) if rows else not code.numel()
    assert torch.equal(transposed.view(torch.uint8), expected.T) if columns else not transposed.numel()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_scale_of_a_matrix_sees_both_signs(sign, device):
    matrix = torch.full((16, 16), 0.5, device=device)
    matrix[3, 4] = sign * 900.0
    assert matrix_codes(matrix)[2].item() == 4


@pytest.mark.parametrize("tokens", [1, 37, 70])
def test_shifted_columns_hold_both_scales(tokens, device):
    """code * C equals code * scale * input scale, up to E4M3's smallest steps."""
    grad = row_codes(spread_rows(tokens, 16, torch.float32, device))
    input_scale = row_codes(spread_rows(tokens, 16, torch.float32, device, seed=7)).scale_T
    shifted, common = shifted_columns(grad, input_scale)
    both = grad.scale_T.double() * input_scale.double()
    assert common[0].double() * common[4].double() == both.max()
    expected = grad.code_TK.double() * (both / both.max())[:, None]
    codes = torch.from_numpy(nearest(expected.cpu().numpy(), 1.0)).to(device)
    assert torch.equal(bits(shifted[:, :tokens].contiguous()), bits(codes.T.contiguous()))
    assert not shifted[:, tokens:].float().any()


def test_shifted_columns_reach_beyond_the_range_of_float32(device):
    """Both scales at their smallest and at their largest: the product is 2^-252 and 2^240."""
    for value, power in ((2.0**-140, -252), (3e38, 240)):
        rows = torch.full((2, 16), value, device=device)
        codes = row_codes(rows)
        shifted, common = shifted_columns(codes, codes.scale_T)
        assert common[0].double().log2() + common[4].double().log2() == power
        assert torch.equal(shifted[:, :2].contiguous().view(torch.uint8), codes.code_TK.T.contiguous().view(torch.uint8))


def test_a_row_that_is_not_finite_makes_shifted_columns_nan(device):
    rows = random(4, 16, dtype=torch.float32, device=device, seed=1)
    scale = row_codes(rows).scale_T
    rows[2, 3] = math.nan
    shifted, _ = shifted_columns(row_codes(rows), scale)
    assert shifted[:, 2].float().isnan().all()


def norm_inputs(tokens, width, dtype, device):
    hidden, residual = (random(tokens, width, dtype=dtype, device=device, seed=seed, scale=3.0) for seed in (0, 1))
    return residual, hidden, random(width, dtype=dtype, device=device, seed=2)


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (5, 20), (40, 20), (0, 16)])
def test_codes_of_the_norm_equal_a_pass_of_their_own(tokens, width, dtype, device):
    residual, hidden, weight = norm_inputs(tokens, width, dtype, device)
    normed, scale = norms.norm_forward(hidden, weight, EPS)
    codes, norm_scale = norms.norm_codes(hidden, weight, EPS)
    assert same(codes, row_codes(normed))
    assert torch.equal(norm_scale, scale)
    total, normed, scale = norms.add_norm_forward(residual, hidden, weight, EPS)
    found, codes, norm_scale = norms.add_norm_codes(residual, hidden, weight, EPS)
    assert torch.equal(found, total)
    assert same(codes, row_codes(normed))
    assert torch.equal(norm_scale, scale)
    columns = norms.norm_columns(total, weight, norm_scale, codes.scale_T)
    assert torch.equal(bits(columns), bits(fp8.transposed(codes.code_TK)))


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (5, 20), (40, 20), (0, 16)])
def test_codes_of_the_norms_gradient_equal_a_pass_of_their_own(tokens, width, added, dtype, device):
    total, grad, weight = norm_inputs(tokens, width, dtype, device)
    grad_total = random(tokens, width, dtype=dtype, device=device, seed=4, scale=50.0) if added else None
    scale = norms.norm_forward(total, weight, EPS)[1]
    given = grad, grad_total, total, weight, scale
    *gradients, codes = norms.norm_backward_codes(*given)
    assert all(torch.equal(one, other) for one, other in zip(gradients, norms.norm_backward(*given), strict=True))
    assert same(codes, row_codes(gradients[0]))


# Tokens, heads of queries, of keys and of values, size of a head.
ROTATED = [(1, 4, 2, 2, 16), (5, 3, 1, 1, 24), (7, 2, 1, 3, 6), (0, 4, 2, 2, 16)]


def rotated_inputs(tokens, query, key, value, size, dtype, device):
    """Gradients of very different sizes: in one row the query's, in the next the key's, then the value's is the largest."""
    parts = []
    for number, heads in enumerate((query, key, value)):
        part = random(tokens, heads, size, dtype=torch.float32, device=device, seed=number)
        part[number::3] *= 100
        parts.append(part.to(dtype))
    return *parts, rotary_table(torch.arange(tokens, device=device) * 5, size, 100.0)


@pytest.mark.parametrize("shape", ROTATED)
def test_codes_of_the_rotation_back_equal_a_pass_of_their_own(shape, dtype, device):
    given = rotated_inputs(*shape, dtype, device)
    assert same(rotate_back_codes(*given), row_codes(rotate_back(*given).flatten(1)))


def test_values_that_are_not_finite_stay_in_their_token_and_pair(device):
    query, key, value, table = rotated_inputs(3, 2, 1, 1, 16, torch.float32, device)
    expected = rotate_back_codes(query, key, value, table)
    value[1, 0, 3] = math.inf
    found = rotate_back_codes(query, key, value, table)
    assert found.scale_T[1].isnan()
    assert found.code_TK[1].float().isnan().all()
    assert same(*(Codes(codes.code_TK[::2], codes.scale_T[::2]) for codes in (found, expected)))


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (5, 20), (40, 20), (0, 16)])
def test_codes_of_swiglu_equal_a_pass_of_their_own(tokens, width, dtype, device):
    gate_up = random(tokens, 2 * width, dtype=dtype, device=device, seed=0, scale=2.0)
    grad = random(tokens, width, dtype=dtype, device=device, seed=1)
    codes = products.swiglu_codes(gate_up)
    assert same(codes, row_codes(products.swiglu(gate_up)))
    assert torch.equal(bits(products.swiglu_columns(gate_up, codes.scale_T)), bits(fp8.transposed(codes.code_TK)))
    gradients = products.swiglu_backward_codes(gate_up, grad)
    products.swiglu_backward_(gate_up, grad, emit=False)
    assert same(gradients, row_codes(gate_up))


@pytest.mark.parametrize("part", [slice(0, 16), slice(16, 32)], ids=["gate", "up"])
def test_the_scale_of_swiglus_gradient_sees_both_halves(part, device):
    """The larger of both gradients decides: of the gate where up is large, of up where the gate is large."""
    gate_up = torch.full((3, 32), 0.5, device=device)
    gate_up[:, part] = 40.0
    grad = random(3, 16, dtype=torch.float32, device=device, seed=1)
    found = products.swiglu_backward_codes(gate_up, grad)
    products.swiglu_backward_(gate_up, grad, emit=False)
    assert same(found, row_codes(gate_up))
    assert torch.equal(found.scale_T, row_codes(gate_up[:, 16 - part.start : 32 - part.start]).scale_T)


def test_rows_may_have_any_stride(dtype, device):
    """Every second row, and a transposed matrix."""
    residual, hidden, weight = norm_inputs(6, 32, dtype, device)
    apart = torch.stack((hidden, residual), dim=1)[:, 0]
    crossed = hidden.T.contiguous().T
    expected, norm_expected = row_codes(hidden), norms.norm_codes(hidden, weight, EPS)
    grad = residual[:, :16].contiguous()
    swiglu_expected = products.swiglu_codes(hidden), products.swiglu_backward_codes(hidden, grad)
    for given in (apart, crossed):
        assert same(row_codes(given), expected)
        assert torch.equal(bits(column_codes(given, expected.scale_T)), bits(fp8.transposed(expected.code_TK)))
        assert torch.equal(bits(matrix_codes(given)[0]), bits(matrix_codes(hidden)[0]))
        assert same(norms.norm_codes(given, weight, EPS)[0], norm_expected[0])
        columns = norms.norm_columns(given, weight, norm_expected[1], norm_expected[0].scale_T)
        assert torch.equal(bits(columns), bits(fp8.transposed(norm_expected[0].code_TK)))
        assert same(products.swiglu_codes(given), swiglu_expected[0])
        assert same(products.swiglu_backward_codes(given, residual[:, :16]), swiglu_expected[1])
        columns = products.swiglu_columns(given, swiglu_expected[0].scale_T)
        assert torch.equal(bits(columns), bits(fp8.transposed(swiglu_expected[0].code_TK)))


def test_rotated_gradients_may_have_any_stride(device):
    """Heads before tokens, strided elements, parts of one tensor, and one row for all tokens."""
    *parts, table = rotated_inputs(6, 2, 2, 2, 16, torch.float32, device)
    expected = rotate_back_codes(*parts, table)
    packed = torch.cat(parts, dim=1).split(2, dim=1)
    spread = parts[0].transpose(0, 1).contiguous().transpose(0, 1), torch.stack((parts[1],) * 2, dim=-1)[..., 0], parts[2]
    for given in (packed, spread):
        assert same(rotate_back_codes(*given, table), expected)
    ones = [part[:1, :1].expand_as(part) for part in parts]
    assert same(rotate_back_codes(*ones, table), rotate_back_codes(*(part.contiguous() for part in ones), table))


def test_offsets_may_exceed_31_bits(triton_device):
    residual, hidden, weight = norm_inputs(3, 32, torch.float16, triton_device)
    far, far_residual = far_apart(hidden), far_apart(residual)
    codes, scale = norms.norm_codes(hidden, weight, EPS)
    inner = products.swiglu_codes(hidden)
    assert same(row_codes(far), row_codes(hidden))
    assert torch.equal(bits(column_codes(far, codes.scale_T)), bits(column_codes(hidden, codes.scale_T)))
    assert same(norms.add_norm_codes(far_residual, far, weight, EPS)[1], norms.add_norm_codes(residual, hidden, weight, EPS)[1])
    found = norms.norm_columns(far, weight, scale, codes.scale_T)
    assert torch.equal(bits(found), bits(norms.norm_columns(hidden, weight, scale, codes.scale_T)))
    assert same(products.swiglu_codes(far), inner)
    assert torch.equal(bits(products.swiglu_columns(far, inner.scale_T)), bits(products.swiglu_columns(hidden, inner.scale_T)))
    found = norms.norm_backward_codes(far_residual, far, far, weight, scale)
    expected = norms.norm_backward_codes(residual, hidden, hidden, weight, scale)
    assert torch.equal(found[0], expected[0])
    assert same(found[2], expected[2])
    *parts, table = rotated_inputs(3, 2, 1, 1, 16, torch.float16, triton_device)
    expected = rotate_back_codes(*parts, table)
    for number in range(3):
        given = [far_apart(part) if i == number else part for i, part in enumerate(parts)]
        assert same(rotate_back_codes(*given, table), expected)
    grad, far_grad = hidden[:, :16], far[:, :16]
    assert same(products.swiglu_backward_codes(far, far_grad), products.swiglu_backward_codes(hidden, grad))


def test_codes_may_exceed_31_bits(triton_device, monkeypatch):
    """17 rows of 2^27 codes: both offsets of the last tile, in the codes and in the transposed codes, pass 2^31."""
    monkeypatch.setattr(fp8, "launch", launch_last_program)
    tokens, width = 17, 2**27
    end = row_codes(random(tokens, 16, dtype=torch.float32, device=triton_device, seed=0)).code_TK.view(torch.uint8)
    code = vast(tokens * width, torch.uint8, triton_device).view(tokens, width)
    code[:, -16:] = end
    scale = torch.ones(tokens, device=triton_device)
    torch.utils.deterministic.fill_uninitialized_memory = False
    shifted, _ = shifted_columns(Codes(code.view(fp8.E4M3), scale), scale)
    assert torch.equal(shifted[-16:, :tokens].view(torch.uint8), end.T)
    assert not shifted[-16:, tokens:].float().any()


def test_custom_operators_pass_torchs_checks(triton_device):
    _, hidden, weight = norm_inputs(5, 32, torch.float32, triton_device)
    codes, scale = norms.norm_codes(hidden, weight, EPS)
    *parts, table = rotated_inputs(5, 2, 1, 1, 16, torch.float32, triton_device)
    for operator, given in (
        (fp8._row_codes, (hidden,)),
        (fp8._column_codes, (hidden, codes.scale_T)),
        (fp8._matrix_codes, (hidden, torch.ones((), device=triton_device), True, False)),
        (fp8._shifted_columns, (codes.code_TK, codes.scale_T, codes.scale_T)),
        (norms._norm_codes, (hidden, weight, EPS)),
        (norms._add_norm_codes, (hidden, hidden, weight, EPS)),
        (norms._norm_columns, (hidden, weight, scale, codes.scale_T)),
        (norms._norm_backward_codes, (hidden, hidden, hidden, weight, scale)),
        (rotation._rotate_back_codes, (*parts, *table)),
        (products._swiglu_codes, (hidden,)),
        (products._swiglu_columns, (hidden, codes.scale_T)),
        (products._swiglu_backward_codes, (hidden, hidden[:, :16])),
    ):
        # The other checks compute with E4M3 numbers, which torch cannot.
        torch.library.opcheck(operator.registered, given, test_utils="test_faketensor")
