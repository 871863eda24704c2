"""Full QAT: LSQ's gradient, the grids that it starts on, and its teacher."""

import json

import pytest
import torch

from methods.core.compensation import solve
from methods.core.formats import make
from methods.core.job.log import RunLog
from methods.core.job.options import CompensationOptions
from methods.core.job.runtime import compute_dtype
from methods.core.model.checkpoint import load_model
from methods.core.model.layers import QuantizedLinear
from methods.core.scales import ScaleSearch, choose_scale
from methods.core.scheme import Scheme
from methods.core.tokens import sample_windows
from methods.core.training.losses import distillation_loss
from methods.core.training.parametrizations import FullWeight, Recomputed
from methods.full_qat import Config, _over_all_levels, apply, check
from tests.test_qat import batches, cell, weight

SEARCH = ScaleSearch("search", norm=2.0)


def linear(w):
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = w.clone()
    return layer


@pytest.mark.parametrize("form", [make("integer", 3, 64), make("e2m1", 4, 64), make("stretched", 2, 64)])
def test_the_gradients_are_those_of_lsq(form):
    """Eq. 3 for the scale, times the gradient scale of section 2.2; eq. 5 for the weights: 1 inside the range, 0 outside. The
    range ends at the outermost levels, of ParetoQ's levels half a step beyond."""
    w = weight()
    made = FullWeight(linear(w), form, SEARCH, learned=True)
    with torch.no_grad():
        made.log_ratio += 0.1 * torch.randn(made.log_ratio.shape, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(2))
    made().backward(upstream)

    s0 = choose_scale(w, form, SEARCH)[0].float().unsqueeze(-1)
    s = s0 * made.log_ratio.detach().exp().unsqueeze(-1)
    v, largest = w.view(*s.shape[:2], -1) / s, form.clip(torch.tensor(torch.inf)).item()
    smallest = form.clip(torch.tensor(-torch.inf)).item()
    rounded, beyond = form.round(v), 0.5 * (form.name == "stretched")
    inside = (v > smallest - beyond) & (v < largest + beyond)
    assert 0.005 < 1 - inside.float().mean() < 0.3
    by_scale = torch.where(inside, rounded - v, form.clip(rounded))  # eq. 3
    g = upstream.view_as(v)
    expected = (g * by_scale).sum(-1) * s.squeeze(-1) / (64 * largest) ** 0.5  # of log s: s times that of s
    torch.testing.assert_close(made.log_ratio.grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.steps.grad.view_as(v), g * inside * s0, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "form", [make("integer", 3, 64, symmetric=False), make("integer", 2, None), make("stretched", 2, 64)]
)
def test_step_0_is_the_start(form):
    """Rounding to nearest, or the codes of the step before, whatever it had before it rounded."""
    w = weight()
    scale, zero_point = choose_scale(w, form, SEARCH)
    start = form.quantize(w, scale, zero_point)
    made = FullWeight(linear(w), form, SEARCH, learned=True)
    assert torch.equal(made.rounded().codes, start.codes) and torch.equal(made.rounded().scale, scale.float())
    assert torch.equal(made().detach(), start.value(torch.float32))

    before = QuantizedLinear(start, None, torch.float32)
    before.residual = torch.randint(-127, 128, w.shape).to(torch.int8)
    made = FullWeight(before, form, SEARCH, learned=False)
    assert torch.equal(made.rounded().codes, start.codes)
    fraction = made.steps.detach().view(*scale.shape, -1) - start.levels(torch.float32)
    assert torch.equal(fraction.flatten(1), before.residual / 256)


def test_step_0_from_gptq_is_its_codes_on_uneven_levels():
    """Between levels that are half a step apart a residual in 256ths of a step may lie beyond the boundary."""
    w, form, x = weight(), make("e2m1", 4, 64), torch.randn(400, 128)
    solution = solve(w, x.T @ x / 200, form, CompensationOptions())
    before = QuantizedLinear(solution.rounded, None, torch.float32)
    before.residual = solution.residual
    assert solution.residual.float().std() > 20
    made = FullWeight(before, form, SEARCH, learned=True)
    assert torch.equal(made.rounded().codes, solution.rounded.codes)


def test_recomputed_scales_do_not_fit_everywhere():
    config = Config(scales="recomputed")
    with pytest.raises(ValueError, match="symmetric grids only"):
        check(Scheme.from_dict("s", {"weights": {"bits": 4, "symmetric": False}}), config)
    with pytest.raises(ValueError, match="would ignore the grid that the step before has left"):
        config.require_defaults()


@pytest.mark.parametrize(("bits", "levels"), [(2, 3), (4, 15)])
def test_a_recomputed_scale_spreads_the_range_over_all_levels(bits, levels):
    """torchao's: the largest weight of a group lies half way between the ends of the grid."""
    w, form = weight(), make("integer", bits, 64)
    made = Recomputed(w, form, _over_all_levels(Config(scales="recomputed", scale="minmax"), form))
    expected = 2 * w.unflatten(1, (-1, 64)).abs().amax(-1) / levels
    torch.testing.assert_close(made.rounded().scale.float(), expected, rtol=2**-8, atol=0)
    form = make("stretched", 2, 64)  # it has as many levels above zero as below
    assert _over_all_levels(Config(scales="recomputed", scale="minmax"), form).gamma == 1
    assert _over_all_levels(Config(scales="recomputed"), form).gamma == 1


def test_a_frozen_scale_leaves_no_weight_without_a_gradient(tiny, tmp_path):
    """At 2 bits LSQ's rule gives none to a fifth of the weights. What rounds beyond the range, GPTQ does not leave."""
    moved = {}
    for scales in ("frozen", "learned"):
        torch.manual_seed(0)
        log, scheme = RunLog(tmp_path / scales), Scheme.from_dict("s", {"weights": {"bits": 2, "group_size": 64}})
        config = Config(scales=scales, learning_rate=1e-3, warm_up=0.0)
        apply(load_model(tiny, torch.float32), scheme, config, batches(steps=2), log)
        moved[scales] = log.training["moved"]
    assert moved["frozen"] > 0.95 and moved["learned"] < 0.9


def test_the_teacher_is_the_full_precision_model(tiny, tmp_path):
    """Also where training starts from codes: the first loss is that of GPTQ's model against full precision."""
    options = json.dumps({"loss": "distillation", "scales": "frozen"})
    cell(tiny, tmp_path, "gptq", "gptq")
    run = cell(tiny, tmp_path, "qad", "full_qat", "--init-from", tmp_path / "gptq/checkpoint", "--options", options)
    assert [step["module"] for step in run["steps"]] == ["gptq", "full_qat"]
    first = json.loads((tmp_path / "qad/training/metrics.jsonl").read_text().splitlines()[0])["loss"]
    dtype = compute_dtype(tiny)
    teacher, student = load_model(tiny, dtype), load_model(tmp_path / "gptq/checkpoint", dtype)
    batch = sample_windows(tmp_path / "t.safetensors", 8, 32, seed=0)[0][:4]
    with torch.no_grad():
        expected = distillation_loss(teacher)(student, batch).item()
        own = distillation_loss(student)(student, batch).item()
    assert first == pytest.approx(expected, abs=1e-4) and abs(first - own) > 1e-3
