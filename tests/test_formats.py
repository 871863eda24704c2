"""Number formats: exact round trips, the papers' formulas on small numbers, packing at every width."""

import dataclasses

import pytest
import torch

from methods.core.formats import Format, make
from methods.core.formats.integer import Integer
from methods.core.job import registry
from methods.core.scales import GAMMAS, ScaleSearch, choose_scale
from methods.core.scheme import TokenScheme

WIDTHS = range(2, 9)


def weight(rows=24, columns=192, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def fake_quantize(w, grid, search=None):
    search = search or ScaleSearch()
    scale, zero_point = choose_scale(w, grid, search)
    return grid.quantize(w, scale, zero_point).value(torch.float32)


@pytest.mark.parametrize("bits", WIDTHS)
def test_symmetric_minmax_is_the_formula(bits):
    w, grid = weight(), Integer(bits, 64, scale_dtype=torch.float32)
    groups = w.view(24, 3, 64)
    s = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    expected = s * torch.clamp(torch.round(groups / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(fake_quantize(w, grid), expected.view_as(w))


@pytest.mark.parametrize("bits", WIDTHS)
def test_asymmetric_is_the_unsigned_grid_of_the_papers(bits):
    """Levels 0 .. 2^b - 1 with an integer zero point, in its unsigned form."""
    w, grid = weight() + 0.03, Integer(bits, 64, symmetric=False, scale_dtype=torch.float32)
    groups = w.view(24, 3, 64)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    s = (high - low) / (2**bits - 1)
    z = torch.round(-low / s)
    expected = s * (torch.clamp(torch.round(groups / s) + z, 0, 2**bits - 1) - z)
    assert torch.equal(fake_quantize(w, grid), expected.view_as(w))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_quantizing_again_changes_nothing(bits, symmetric):
    w, grid = weight(), Integer(bits, 64, symmetric)
    scale, zero_point = choose_scale(w, grid, ScaleSearch("search"))
    codes = grid.quantize(w, scale, zero_point).codes
    again = grid.quantize(grid.quantize(w, scale, zero_point).value(torch.float32), scale, zero_point).codes
    assert torch.equal(codes, again)
    assert codes.min() >= grid.q_min and codes.max() <= grid.q_max


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_round_trips(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    grid = Integer(bits, None)
    codes = torch.randint(grid.q_min, grid.q_max + 1, (6, 100), dtype=torch.int8)
    assert torch.equal(unpack_from_int32(pack_to_int32(codes, bits), bits, codes.shape), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_zero_points_of_few_rows_are_packed(bits):
    """A column of them is then a single word."""
    grid = Integer(bits, 1, symmetric=False)
    zero_points = torch.randint(grid.q_min, grid.q_max + 1, (3, 5), dtype=torch.int8)
    assert torch.equal(grid.unpack(grid.pack(zero_points, dim=0), zero_points.shape, dim=0), zero_points)


@pytest.mark.parametrize("form", [make("integer", 2, None), make("e2m1", 4, None), make("stretched", 2, None)])
@pytest.mark.parametrize("size", [1e30, 1e5, 1e-38, 1e-45])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_finite_weight_has_a_scale(form, size, dtype):
    """Beyond the largest number of the scale's dtype it is that number, and what is too small for one is a group of zeros."""
    form, w = dataclasses.replace(form, scale_dtype=dtype), torch.tensor([[size, -size]])
    scale, _ = form.scale_of_range(-w.amax(-1, keepdim=True), w.amax(-1, keepdim=True))
    rounded = form.quantize(w, scale, None)
    assert scale.isfinite().all() and (scale > 0).all() and rounded.value(torch.float32).isfinite().all()
    assert torch.equal(form.quantize(rounded.value(torch.float32), scale, None).codes, rounded.codes)


def test_error_is_at_most_half_a_step_inside_the_range():
    w = weight()
    for symmetric in (True, False):
        grid = Integer(4, 64, symmetric, torch.float32)
        scale, zero_point = choose_scale(w, grid, ScaleSearch())
        error = (fake_quantize(w, grid) - w).abs().view(24, 3, 64)
        assert (error <= scale.unsqueeze(-1) * 0.5001).all()


@pytest.mark.parametrize("norm", [2.0, 2.4, 3.0, 4.0])
def test_search_is_the_best_of_its_candidates(norm):
    """Against a plain loop over gamma and over groups."""
    w, grid = weight(4, 128), Integer(3, 64)
    found = (fake_quantize(w, grid, ScaleSearch("search", norm=norm)) - w).abs().pow(norm).view(4, 2, 64).sum(-1)
    for row in range(4):
        for group in range(2):
            part = w[row : row + 1, group * 64 : (group + 1) * 64]
            errors = [
                (fake_quantize(part, Integer(3, None), ScaleSearch(gamma=gamma)) - part).abs().pow(norm).sum()
                for gamma in [*GAMMAS, *(-gamma for gamma in GAMMAS)]
            ]
            torch.testing.assert_close(found[row, group], min(errors))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_longer_side_of_a_group_has_the_level_more(bits):
    """A weight and its negative are rounded to the same codes: symmetric levels have one more below zero, and the searched
    scale has the sign that puts it where it is needed, mostly where the weight is larger. Min-max has none, as in papers."""
    w, grid = weight(), Integer(bits, 64)
    scale, _ = choose_scale(w, grid, ScaleSearch("search"))
    negative, _ = choose_scale(-w, grid, ScaleSearch("search"))
    assert torch.equal(scale, -negative)
    longer = w.view(24, 3, 64).amax(-1) > -w.view(24, 3, 64).amin(-1)
    assert ((scale < 0) == longer).float().mean() > (0.8 if bits < 4 else 0.99)
    assert torch.equal(grid.quantize(w, scale, None).codes, grid.quantize(-w, negative, None).codes)
    assert (choose_scale(w, grid, ScaleSearch())[0] > 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_four_levels_are_used_on_either_side(sign):
    w = sign * 0.25 * torch.tensor([-2.0, -1, 0, 1]).repeat(1, 16)
    assert torch.equal(fake_quantize(w, Integer(2, 64), ScaleSearch("search")), w)


def test_importance_moves_the_search_to_the_important_columns():
    w, grid = weight(16, 64), Integer(2, 64)
    importance = torch.ones(64)
    importance[:8] = 1000
    error = []
    for weights in (None, importance):
        scale, _ = choose_scale(w, grid, ScaleSearch("search"), weights)
        difference = grid.quantize(w, scale, None).value(torch.float32) - w
        error.append(difference[:, :8].square().sum())
    assert error[1] < error[0]


def test_gamma_scales_the_range():
    w, grid = weight(), Integer(4, 64, scale_dtype=torch.float32)
    full, _ = choose_scale(w, grid, ScaleSearch())
    shrunk, _ = choose_scale(w, grid, ScaleSearch(gamma=0.5))
    torch.testing.assert_close(shrunk, full * 0.5)


def test_a_group_of_zeros_stays_zero():
    for symmetric in (True, False):
        assert torch.equal(fake_quantize(torch.zeros(2, 64), Integer(3, 32, symmetric)), torch.zeros(2, 64))


@pytest.mark.parametrize("form", [Integer(4, 32), Integer(4, 32, symmetric=False), make("e2m1", 4, 32)])
def test_a_group_of_zeros_has_a_scale_like_the_others(form):
    """A training that moves weights in steps of the grid moves these no further."""
    w = weight().clone()
    w[:, :32] = 0
    scale = choose_scale(w, form, ScaleSearch())[0].float()
    torch.testing.assert_close(scale[:, 0], scale[:, 1:].mean().expand(len(w)), rtol=0.01, atol=0)


def test_the_scale_is_rounded_before_it_is_used():
    w, grid = weight(), Integer(4, 64)
    scale, _ = choose_scale(w, grid, ScaleSearch("search"))
    assert scale.dtype == torch.bfloat16
    assert torch.equal(
        grid.quantize(w, scale, None).value(torch.float32),
        fake_quantize(w, grid, ScaleSearch("search")),
    )


def test_group_size_must_divide_the_width():
    with pytest.raises(ValueError, match="128 does not divide a layer of 192"):
        choose_scale(weight(), Integer(4, 128), ScaleSearch())


# What holds for every format of the folder


def every_format():
    for name in registry.names("methods.core.formats"):
        declared = registry.constants("methods.core.formats", name)
        for bits in declared["BITS"]:
            for symmetric in (True, False) if declared["ASYMMETRIC"] else (True,):
                yield make(name, bits, 64, symmetric)


@pytest.fixture(params=every_format(), ids=lambda f: f"{f.name}-{f.bits}-{'sym' if f.symmetric else 'asym'}")
def form(request) -> Format:
    return request.param


def test_rounding_takes_the_nearest_of_all_levels(form):
    """Against the distance to every value that a code has."""
    w = weight()
    scale, zero_point = choose_scale(w, form, ScaleSearch(gamma=0.7))  # so that some values are clipped
    lowest = -(2 ** (form.bits - 1)) + (form.name == "e2m1")  # which has no code for a second zero
    codes = torch.arange(lowest, 2 ** (form.bits - 1), dtype=torch.int8).view(1, 1, -1)
    z = None if zero_point is None else zero_point.float().unsqueeze(-1)
    levels = form.decode(codes, z, torch.float32).expand(24, 3, -1)
    values = levels * scale.float().unsqueeze(-1)
    distance = (w.view(24, 3, 64, 1) - values.unsqueeze(2)).abs().amin(-1)
    rounded = form.quantize(w, scale, zero_point)
    torch.testing.assert_close((rounded.value(torch.float32) - w).abs().view(24, 3, 64), distance, rtol=0, atol=1e-7)


def test_codes_and_levels_are_one_to_one(form):
    w = weight()
    rounded = form.quantize(w, *choose_scale(w, form, ScaleSearch("search")))
    z = None if rounded.zero_point is None else rounded.zero_point.float().unsqueeze(-1)
    codes = rounded.codes.view(24, 3, 64)
    levels = form.decode(codes, z, torch.float32)
    assert torch.equal(form.encode(levels, z), codes)
    again = form.quantize(rounded.value(torch.float32), rounded.scale, rounded.zero_point)
    assert torch.equal(again.codes, rounded.codes)
    assert -(2 ** (form.bits - 1)) <= int(codes.min()) and int(codes.max()) < 2 ** (form.bits - 1)


def test_snapping_is_rounding_and_clipping(form):
    steps = torch.randn(4, 3, 64) * 2 ** (form.bits - 1)
    z = None if form.symmetric else torch.randint(-2, 2, (4, 3, 1)).float()
    expected = form.clip(form.round(steps), z)
    assert torch.equal(form.snap_(steps.clone(), z), expected)


def test_min_max_clips_nothing_by_more_than_the_rounding_of_its_scale(form):
    w = weight()
    rounded = form.quantize(w, *choose_scale(w, form, ScaleSearch()))
    largest = w.view(24, 3, 64).abs().amax(-1)
    kept = rounded.value(torch.float32).view(24, 3, 64).abs().amax(-1)
    assert ((kept / largest - 1).abs() < 0.01 + (0 if form.symmetric else 1 / (2**form.bits - 1))).all()


def test_a_scheme_knows_the_formats_and_their_bits():
    from methods.core.scheme import Scheme

    with pytest.raises(ValueError, match="unknown number format.*'e2m2'.*Did you mean 'e2m1'"):
        Scheme.from_dict("s", {"weights": {"bits": 4, "format": "e2m2"}})
    with pytest.raises(ValueError, match="format e2m1 has 4 bits, not 3"):
        Scheme.from_dict("s", {"weights": {"bits": 3, "format": "e2m1"}})
    with pytest.raises(ValueError, match="format e2m1 has no zero points"):
        Scheme.from_dict("s", {"weights": {"bits": 4, "format": "e2m1", "symmetric": False}})


def test_e2m1_has_the_levels_of_the_specification():
    """Every one of the sixteen bit patterns: sign, two bits of exponent with bias 1, one of mantissa."""
    form = make("e2m1", 4, None)
    for pattern in range(8):
        exponent, mantissa = pattern >> 1, pattern & 1
        value = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        assert form.decode(torch.tensor([pattern], dtype=torch.int8), None, torch.float32).item() == value
        assert form.encode(torch.tensor([-value])).item() == -pattern
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    assert form.clip(form.round(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]  # to the even mantissa


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_stored_bits_are_those_that_packing_takes(bits, symmetric, group_size):
    w, grid = weight(rows=10), Integer(bits, group_size, symmetric)
    rounded = grid.quantize(w, *choose_scale(w, grid, ScaleSearch()))
    stored = [grid.pack(rounded.codes), rounded.scale]
    stored += [] if symmetric else [grid.pack(rounded.zero_point, dim=0)]
    assert grid.stored_bits(*w.shape) == sum(8 * t.nbytes for t in stored)


@pytest.mark.parametrize("heavy", [False, True])
def test_half_quadratic_scales_lower_the_norm_that_they_are_for(form, heavy):
    """The l_0.7 norm of each group's error is at most that of min-max, and less where groups have outliers."""
    w = weight()
    if heavy:
        w[:, ::64] *= 8
    errors = {}
    for kind in ("minmax", "hqq"):
        rounded = form.quantize(w, *choose_scale(w, form, ScaleSearch(kind))).value(torch.float32)
        errors[kind] = (rounded - w).view(24, 3, 64).abs().pow(0.7).sum(-1)
    assert (errors["hqq"] <= errors["minmax"] * 1.0001).all()
    if heavy and form.bits <= 4:
        assert errors["hqq"].mean() < 0.99 * errors["minmax"].mean()


def test_stretched_levels_are_those_of_paretoq():
    """alpha (floor(2 clip(w / alpha, -1, 1 - e)) + 1/2) / 2, with alpha = 2 s; and a group of zeros stays one."""
    w, form = weight(), make("stretched", 2, 64, scale_dtype=torch.float32)
    scale, _ = choose_scale(w, form, ScaleSearch(gamma=0.75))  # alpha is then the largest magnitude
    alpha = w.view(24, 3, 64).abs().amax(-1, keepdim=True)
    torch.testing.assert_close(2 * scale.unsqueeze(-1), alpha)
    clipped = (w.view(24, 3, 64) / alpha).clamp(-1, 1 - 1e-6)
    expected = alpha * (torch.floor(2 * clipped) + 0.5) / 2
    torch.testing.assert_close(form.quantize(w, scale, None).value(torch.float32).view(24, 3, 64), expected)
    with pytest.raises(ValueError, match="stretched has no level of zero, which activations need"):
        TokenScheme(2, format="stretched")
    zeros = torch.zeros(2, 64)
    assert form.quantize(zeros, *choose_scale(zeros, form, ScaleSearch())).value(torch.float32).abs().max() < 1e-30
