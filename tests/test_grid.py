"""The integer grid: exact round trips, the papers' formulas on small numbers, packing at every width."""

import pytest
import torch

from methods.core.formats.integer import Grid, ScaleSearch, choose_scale, dequantize, quantize

WIDTHS = range(2, 9)


def weight(rows=24, columns=192, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def fake_quantize(w, grid, search=None):
    search = search or ScaleSearch()
    scale, zero_point = choose_scale(w, grid, search)
    return dequantize(quantize(w, scale, zero_point, grid), scale, zero_point, torch.float32)


@pytest.mark.parametrize("bits", WIDTHS)
def test_symmetric_minmax_is_the_formula(bits):
    w, grid = weight(), Grid(bits, 64, scale_dtype=torch.float32)
    groups = w.view(24, 3, 64)
    s = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    expected = s * torch.clamp(torch.round(groups / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(fake_quantize(w, grid), expected.view_as(w))


@pytest.mark.parametrize("bits", WIDTHS)
def test_asymmetric_is_the_unsigned_grid_of_the_papers(bits):
    """Levels 0 .. 2^b - 1 with an integer zero point, in its unsigned form."""
    w, grid = weight() + 0.03, Grid(bits, 64, symmetric=False, scale_dtype=torch.float32)
    groups = w.view(24, 3, 64)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    s = (high - low) / (2**bits - 1)
    z = torch.round(-low / s)
    expected = s * (torch.clamp(torch.round(groups / s) + z, 0, 2**bits - 1) - z)
    assert torch.equal(fake_quantize(w, grid), expected.view_as(w))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_quantizing_again_changes_nothing(bits, symmetric):
    w, grid = weight(), Grid(bits, 64, symmetric)
    scale, zero_point = choose_scale(w, grid, ScaleSearch("search"))
    codes = quantize(w, scale, zero_point, grid)
    again = quantize(dequantize(codes, scale, zero_point, torch.float32), scale, zero_point, grid)
    assert torch.equal(codes, again)
    assert codes.min() >= grid.q_min and codes.max() <= grid.q_max


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_round_trips(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    grid = Grid(bits, None)
    codes = torch.randint(grid.q_min, grid.q_max + 1, (6, 100), dtype=torch.int8)
    assert torch.equal(unpack_from_int32(pack_to_int32(codes, bits), bits, codes.shape), codes)


def test_error_is_at_most_half_a_step_inside_the_range():
    w = weight()
    for symmetric in (True, False):
        grid = Grid(4, 64, symmetric, torch.float32)
        scale, zero_point = choose_scale(w, grid, ScaleSearch())
        error = (fake_quantize(w, grid) - w).abs().view(24, 3, 64)
        assert (error <= scale.unsqueeze(-1) * 0.5001).all()


@pytest.mark.parametrize("norm", [2.0, 2.4, 3.0, 4.0])
def test_search_is_the_best_of_its_candidates(norm):
    """Against a plain loop over gamma and over groups."""
    w, grid = weight(4, 128), Grid(3, 64)
    found = (fake_quantize(w, grid, ScaleSearch("search", norm=norm)) - w).abs().pow(norm).view(4, 2, 64).sum(-1)
    for row in range(4):
        for group in range(2):
            part = w[row : row + 1, group * 64 : (group + 1) * 64]
            channel = Grid(3, None)
            errors = [
                (fake_quantize(part, channel, ScaleSearch(gamma=gamma)) - part).abs().pow(norm).sum()
                for gamma in ScaleSearch.GAMMAS
            ]
            torch.testing.assert_close(found[row, group], min(errors))


def test_importance_moves_the_search_to_the_important_columns():
    w, grid = weight(16, 64), Grid(2, 64)
    importance = torch.ones(64)
    importance[:8] = 1000
    error = []
    for weights in (None, importance):
        scale, _ = choose_scale(w, grid, ScaleSearch("search"), weights)
        difference = dequantize(quantize(w, scale, None, grid), scale, None, torch.float32) - w
        error.append(difference[:, :8].square().sum())
    assert error[1] < error[0]


def test_gamma_scales_the_range():
    w, grid = weight(), Grid(4, 64, scale_dtype=torch.float32)
    full, _ = choose_scale(w, grid, ScaleSearch())
    shrunk, _ = choose_scale(w, grid, ScaleSearch(gamma=0.5))
    torch.testing.assert_close(shrunk, full * 0.5)


def test_a_group_of_zeros_stays_zero():
    for symmetric in (True, False):
        assert torch.equal(fake_quantize(torch.zeros(2, 64), Grid(3, 32, symmetric)), torch.zeros(2, 64))


def test_the_scale_is_rounded_before_it_is_used():
    w, grid = weight(), Grid(4, 64)
    scale, _ = choose_scale(w, grid, ScaleSearch("search"))
    assert scale.dtype == torch.bfloat16
    assert torch.equal(
        dequantize(quantize(w, scale, None, grid), scale, None, torch.float32),
        fake_quantize(w, grid, ScaleSearch("search")),
    )


def test_group_size_must_divide_the_width():
    with pytest.raises(ValueError, match="128 does not divide a layer of 192"):
        choose_scale(weight(), Grid(4, 128), ScaleSearch())
