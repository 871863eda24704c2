"""QAT methods against their papers: step 0, gradients, folding, memory formats; and the training loop they share."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from methods import dl_qat, fine_tune, llm_qat, lr_qat, peqa
from methods.__main__ import main
from methods.core.compensation import solve
from methods.core.formats import Rounded
from methods.core.formats.integer import Integer
from methods.core.job import registry, runtime
from methods.core.job.files import RESIDUALS, read_json
from methods.core.job.log import RunLog
from methods.core.job.options import CompensationOptions
from methods.core.job.tensors import read_sealed, write_sealed
from methods.core.model.activations import mark_layers
from methods.core.model.anatomy import block_linears, checkpoint_blocks
from methods.core.model.checkpoint import load_model
from methods.core.model.layers import QuantizedLinear
from methods.core.scales import ScaleSearch, choose_scale
from methods.core.scheme import Scheme
from methods.core.training import losses
from methods.core.training.layers import TrainedLinear, fold, insert, quantized_by, trained
from methods.core.training.loop import EPSILON, Schedule, rate_at, subsample, train
from methods.core.training.losses import distillation_loss, next_token_loss
from methods.core.training.parametrizations import FullWeight, Recomputed
from tests.conftest import described, flip


def weight(rows=24, columns=128):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1


def layer(w=None):
    w = weight() if w is None else w
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(w, requires_grad=False)
    return linear


def rtn(w, grid, search):
    scale, zero_point = choose_scale(w, grid, search)
    return grid.quantize(w, scale, zero_point).value(torch.float32)


def gradients(parametrization, upstream):
    parametrization.zero_grad()
    (parametrization() * upstream).sum().backward()
    return {name: p.grad for name, p in parametrization.named_parameters() if p.requires_grad}


# Step 0


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("downcast", ["float32", "bfloat16", "float16", "fixed", "int"])
def test_lr_qat_starts_as_rtn(bits, group_size, downcast):
    if downcast == "int" and bits > 4:
        return
    grid = Integer(bits, group_size)
    made = lr_qat.LowRank(layer(), grid, lr_qat.Config(downcast=downcast))
    assert torch.equal(made(), rtn(weight(), grid, ScaleSearch("search")))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("downcast", ["float32", "bfloat16", "float16", "fixed"])
def test_no_downcast_leaves_a_weight_where_the_least_change_flips_its_code(downcast, bits):
    """Every code and every boundary between two, from both sides: the code stays, and A B of 1e-7 steps changes none."""
    grid = Integer(bits, None)
    boundaries = torch.arange(grid.q_min, grid.q_max + 1).view(-1, 1) + torch.tensor(
        [0.0, 0.5, 0.499, 0.501, -0.499, 0.25]
    )
    codes = boundaries.round().clamp(grid.q_min, grid.q_max)
    kept = lr_qat.restore(lr_qat.store(boundaries, grid, downcast), grid, downcast, 6)
    for change in (0, 1e-7, -1e-7):
        assert torch.equal((kept + change).round().clamp(grid.q_min, grid.q_max), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_peqa_starts_as_rtn(bits, symmetric):
    grid = Integer(bits, 64, symmetric)
    made = peqa.Scaled(layer(), grid, peqa.Config())
    torch.testing.assert_close(made(), rtn(weight(), grid, ScaleSearch("search")), rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dl_qat_starts_as_rtn(bits, symmetric):
    grid = Integer(bits, 64, symmetric)
    made = dl_qat.Decomposed(layer(), grid, dl_qat.Config())
    torch.testing.assert_close(made(), rtn(weight(), grid, ScaleSearch("search")), rtol=1e-6, atol=0)


def test_llm_qat_is_rtn_min_max_of_its_current_weights():
    grid = Integer(3, None)
    made = Recomputed(weight(), grid, llm_qat.Config())
    made.weight.data *= torch.linspace(0.5, 3, 128)
    assert torch.equal(made(), rtn(made.weight.data, grid, ScaleSearch()))


# Gradients against the formulas


def test_gradients_of_lr_qat():
    """dL/ds = sum(dL/dW_hat * W_int), ds/dt = s; A and B get the straight-through gradient inside the range, none outside."""
    made = lr_qat.LowRank(layer(), Integer(3, 64), lr_qat.Config(alpha=1.0, downcast="float32"))
    torch.nn.init.normal_(made.low_rank.a, std=1000.0)  # so that some weights are clipped
    upstream = torch.randn(24, 128)
    found = gradients(made, upstream)
    codes = made.levels().detach()
    expected = (upstream * codes).view(24, 2, 64).sum(-1)
    torch.testing.assert_close(found["scale.log_ratio"], expected * made.scale().detach())
    sign = made.scale().detach().sign().repeat_interleave(64, 1)
    moved = torch.round(made.phi + sign * (made.low_rank.a @ made.low_rank.b) / 32)
    inside = (moved >= -4) & (moved <= 3)
    assert 0.05 < (~inside).float().mean() < 0.95
    inner = upstream * made.scale().detach().abs().repeat_interleave(64, 1) * inside / 32
    torch.testing.assert_close(found["low_rank.a"], (inner @ made.low_rank.b.T).detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["low_rank.b"], (made.low_rank.a.T @ inner).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_dl_qat(symmetric):
    """dL/dm = sum(dL/dW_hat * s (code - z)); inside the range A and B see m times the upstream gradient."""
    made = dl_qat.Decomposed(layer(), Integer(3, 64, symmetric), dl_qat.Config())
    made.magnitude.data.uniform_(0.5, 2)
    torch.nn.init.normal_(made.low_rank.a, std=0.05)
    upstream = torch.randn(24, 128)
    found = gradients(made, upstream)
    scale = made.scale.float().repeat_interleave(64, 1)
    zero = 0 if symmetric else made.zero_point.repeat_interleave(64, 1)
    levels = made.levels().detach().flatten(1)
    torch.testing.assert_close(found["magnitude"], (upstream * scale * levels).view(24, 2, 64).sum(-1))
    unit = weight().square().mean().sqrt() * 128**0.5  # what A B is measured in
    moved = torch.round((weight() + unit * made.low_rank.a @ made.low_rank.b) / scale) + zero
    inside = (moved >= -4) & (moved <= 3)
    inner = unit * upstream * made.magnitude.detach().repeat_interleave(64, 1) * inside
    torch.testing.assert_close(found["low_rank.a"], (inner @ made.low_rank.b.T).detach(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("downcast", ["float32", "fixed", "int"])
def test_the_low_rank_term_is_in_the_direction_of_the_weights(downcast):
    """The negative of a weight has the same codes at negative scales; with the negative A B it stays the negative."""
    form, config = Integer(3, 64), lr_qat.Config(downcast=downcast)
    made, negative = (lr_qat.LowRank(layer(w), form, config) for w in (weight(), -weight()))
    start = made()
    made.low_rank.a.normal_(std=10.0)
    negative.low_rank.a.copy_(-made.low_rank.a)
    negative.low_rank.b.copy_(made.low_rank.b)
    assert torch.equal(made(), -negative()) and ((made() - start).abs() > 0.05).float().mean() > 0.1
    assert torch.equal(made.rounded().codes, negative.rounded().codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient_of_peqa(symmetric):
    """dL/dt = s * sum(dL/dW_hat * (code - z)) over the group; nothing else is trained."""
    made = peqa.Scaled(layer(), Integer(3, 64, symmetric), peqa.Config())
    made.scale.log_ratio.data.uniform_(-0.5, 0.5)
    upstream = torch.randn(24, 128)
    found = gradients(made, upstream)
    zero = 0 if symmetric else made.zero_point.repeat_interleave(64, 1)
    expected = (upstream * (made.codes - zero)).view(24, 2, 64).sum(-1) * made.scale().detach()
    torch.testing.assert_close(found, {"scale.log_ratio": expected})


ROWS_THAT_TRAIN = [(name, {}) for name in ("peqa", "lr_qat", "dl_qat", "llm_qat", "fine_tune")]
ROWS_THAT_TRAIN += [("fine_tune", {"variant": "full"})]
ROWS_THAT_TRAIN += [("full_qat", {"scales": scales}) for scales in ("learned", "frozen", "recomputed")]


@pytest.mark.parametrize("factor", [2.0**-6, 2.0**4])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("name", "options"), ROWS_THAT_TRAIN)
def test_a_rate_means_the_same_at_any_width_and_for_any_size_of_the_weights(name, options, bits, factor, monkeypatch):
    """A model whose weights are a power of two larger or smaller, and whose inputs make up for it, trains to the same codes,
    and to scales that many times larger; a scale moves by the rate, relatively, at any number of bits. Layers and rates are
    those that the method itself makes."""
    module, given = registry.load("methods", name), {}
    scheme = Scheme.from_dict("s", {"weights": {"bits": bits, "group_size": 64}})
    monkeypatch.setattr(module, "train_weights", lambda _model, make, rates, *_: given.update(make=make, rates=rates))
    config = module.Config(learning_rate=0.01, **options)
    module.apply(torch.nn.Module(), scheme, config, torch.zeros(8, 1, 1, 1), RunLog())

    def trained_layer(factor):
        torch.manual_seed(0)
        made = given["make"]("layer", layer(weight() * factor))
        parametrization = getattr(made, "parametrization", made)
        first = parametrization.rounded().scale.float() if hasattr(parametrization, "rounded") else None
        groups = [{"params": list(parameters), "lr": rate} for parameters, rate in given["rates"](parametrization)]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPSILON, weight_decay=0.0)
        x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) / factor
        for _ in range(3):
            optimizer.zero_grad()
            made(x).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            return made.folded("layer", RunLog()), first

    (found, _), (expected, first) = trained_layer(factor), trained_layer(1.0)
    if first is None:  # the control, which is not quantized
        moved = (expected.weight - weight()).norm()
        assert 0.01 < moved / weight().norm() < 0.2
        assert (found.weight / factor - expected.weight).norm() < 0.001 * moved
        return
    assert (found.rounded().codes != expected.rounded().codes).float().mean() < 0.002
    scale = expected.scale.float()
    torch.testing.assert_close(found.scale.float() / factor, scale, rtol=0.01, atol=0)  # bfloat16 apart
    if options.get("scales") != "recomputed" and name != "llm_qat":  # where a scale follows its largest weight
        assert (scale / first - 1).abs().max() < 0.036  # three steps, and bfloat16


def test_gradient_of_llm_qat_passes_straight_through_everywhere():
    made = Recomputed(weight() * 100, Integer(3, None), llm_qat.Config())  # the released code drops it where |w| >= 2
    upstream = torch.randn(24, 128)
    assert torch.equal(gradients(made, upstream)["weight"], upstream)


def test_the_recomputing_layer_has_the_gradients_of_a_plain_one():
    linear = torch.nn.Linear(128, 24)
    made = dl_qat.Decomposed(linear, Integer(4, 64), dl_qat.Config())
    torch.nn.init.normal_(made.low_rank.a, std=0.01)
    layer, x, upstream = TrainedLinear(linear, made), torch.randn(2, 5, 128, requires_grad=True), torch.randn(2, 5, 24)
    linear.requires_grad_(False)
    y = layer(x)
    found = torch.autograd.grad(y, [x, *trained(made)], upstream)
    plain = F.linear(x, made(), linear.bias)
    expected = torch.autograd.grad(plain, [x, *trained(made)], upstream)
    assert torch.equal(y, plain)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Memory formats of LR-QAT


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_two_codes_share_a_byte(bits):
    grid = Integer(bits, None)
    codes = torch.randint(grid.q_min, grid.q_max + 1, (6, 64)).float()
    stored = lr_qat.store(codes, grid, "int")
    assert stored.dtype == torch.uint8 and stored.shape == (6, 32)
    assert torch.equal(lr_qat.restore(stored, grid, "int", 64), codes)


@pytest.mark.parametrize(("bits", "fraction"), [(4, 4), (3, 5), (2, 6)])
def test_fixed_point_has_8_minus_b_fractional_bits(bits, fraction):
    grid = Integer(bits, None)
    values = torch.linspace(grid.q_min, grid.q_max, 1000).view(10, 100)
    stored = lr_qat.store(values, grid, "fixed")
    assert stored.dtype == torch.int8
    error = (lr_qat.restore(stored, grid, "fixed", 100) - values).abs()
    near = (values - values.round()).abs() > 0.5 - 2**-fraction  # of a boundary: kept a unit away from it
    assert error[~near].max() <= 0.5 * 2**-fraction and error.max() <= 2**-fraction


def test_an_odd_column_is_packed_alone():
    linear = layer(weight(columns=63))
    packed = lr_qat.LowRank(linear, Integer(3, None), lr_qat.Config(downcast="int"))
    plain = lr_qat.LowRank(linear, Integer(3, None), lr_qat.Config(downcast="float32"))
    assert packed.phi.shape == (24, 32) and torch.equal(packed(), plain())


def test_packing_needs_at_most_4_bits():
    scheme = Scheme.from_dict("s", {"weights": {"bits": 8}})
    with pytest.raises(ValueError, match="downcast int packs two codes of up to 4 bits"):
        lr_qat.check(scheme, lr_qat.Config(downcast="int"))


@pytest.mark.parametrize("module", [lr_qat, llm_qat])
def test_symmetric_methods_refuse_asymmetric_grids(module):
    with pytest.raises(ValueError, match="symmetric"):
        module.check(Scheme.from_dict("s", {"weights": {"bits": 4, "symmetric": False}}), module.Config())


def test_full_precision_layers_reach_the_device_one_at_a_time(tiny, monkeypatch):
    """So the most that is there is what the method keeps, not the model that it starts from."""
    monkeypatch.setattr("methods.core.training.layers.device", lambda: torch.device("meta"))
    model = load_model(tiny, torch.float32)

    def make(name, linear):
        there = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.is_meta]
        assert there == [linear]
        return TrainedLinear(linear, peqa.Scaled(linear, Integer(4, 32), peqa.Config()))

    insert(model, make)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


# Starting from another method's checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "make",
    [
        lambda linear, grid: lr_qat.LowRank(linear, grid, lr_qat.Config(downcast="float32")),
        lambda linear, grid: lr_qat.LowRank(linear, grid, lr_qat.Config(downcast="fixed")),
        lambda linear, grid: dl_qat.Decomposed(linear, grid, dl_qat.Config()),
    ],
)
def test_training_starts_from_the_codes_and_scales_of_a_checkpoint(make, bits, dtype):
    """Random codes: no rounding of any weight by the method itself would give them."""
    grid = Integer(bits, 64)
    codes = torch.randint(grid.q_min, grid.q_max + 1, (24, 128), dtype=torch.int8)
    start = QuantizedLinear(Rounded(codes, torch.rand(24, 2) + 0.01, None, grid), None, dtype)
    rounded = make(start, grid).rounded()
    assert torch.equal(rounded.codes, codes) and torch.equal(rounded.scale.to(grid.scale_dtype), start.scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("downcast", ["float32", "fixed"])
def test_lr_qat_starts_from_what_gptq_had_before_it_rounded(downcast, bits, tmp_path):
    """Step 0 is GPTQ's codes; but a weight that GPTQ had near a boundary is near it still, through a saved checkpoint too."""
    w, grid = weight(), Integer(bits, 64)
    x = torch.randn(400, 128, generator=torch.Generator().manual_seed(1)) @ torch.randn(128, 128) * 0.1
    solution = solve(w, x.T @ x * 2 / 400, grid, CompensationOptions())
    codes, scale = solution.rounded.codes, solution.rounded.scale
    start = QuantizedLinear(solution.rounded, None, torch.float32)
    assert torch.equal(lr_qat.LowRank(start, grid, lr_qat.Config(downcast=downcast)).rounded().codes, codes)
    start.residual = solution.residual
    made = lr_qat.LowRank(start, grid, lr_qat.Config(downcast=downcast))
    assert torch.equal(made.rounded().codes, codes)
    phi = lr_qat.restore(made.phi, grid, downcast, 128)
    inside = (codes > grid.q_min) & (codes < grid.q_max)
    offset = (phi - codes)[inside]
    assert offset.std() > 0.2 and offset.abs().max() < 0.5  # as uniform as what rounding leaves
    assert not torch.equal(codes, grid.quantize(w, scale, None).codes)  # GPTQ's codes are not the rounded weights
    nearest = (phi + 0.1 * torch.sign(phi - codes)).round()
    assert 0.1 < (nearest != codes)[inside].float().mean() < 0.3  # a tenth of a step flips a fifth of them


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dl_qat_starts_from_what_gptq_had_before_it_rounded(bits):
    """The weight that low-rank terms are added to is off its codes by the residual, and rounds to them."""
    grid = Integer(bits, 64)
    codes = torch.randint(grid.q_min, grid.q_max + 1, (24, 128), dtype=torch.int8)
    start = QuantizedLinear(Rounded(codes, torch.rand(24, 2) + 0.01, None, grid), None, torch.bfloat16)
    start.residual = torch.randint(-127, 128, codes.shape).to(torch.int8)
    made = dl_qat.Decomposed(start, grid, dl_qat.Config())
    assert torch.equal(made.rounded().codes, codes)
    steps = (made.weight.view(24, 2, 64) / start.scale.float().unsqueeze(-1)).flatten(1)
    torch.testing.assert_close(steps - codes, start.residual / 256, rtol=0, atol=1e-4)


def test_zero_points_of_a_checkpoint_are_kept():
    grid = Integer(3, 64, symmetric=False)
    codes, zero_point = (torch.randint(-4, 4, shape, dtype=torch.int8) for shape in ((24, 128), (24, 2)))
    start = QuantizedLinear(Rounded(codes, torch.rand(24, 2) + 0.01, zero_point, grid), None, torch.float32)
    rounded = dl_qat.Decomposed(start, grid, dl_qat.Config()).rounded()
    assert torch.equal(rounded.codes, codes) and torch.equal(rounded.zero_point, zero_point)


# From training to integers


SCHEME = {"weights": {"bits": 3, "group_size": 32}, "activations": {"bits": 8}, "kv_cache": {"bits": 8}}


def batches(steps=6, batch=4, length=32, vocabulary=256):
    """A text that can be learned: counting upwards from a random start."""
    start = torch.randint(0, vocabulary, (steps, 1, batch, 1), generator=torch.Generator().manual_seed(0))
    return (start + torch.arange(length)) % vocabulary


MAKERS = {
    "peqa": lambda linear, grid: peqa.Scaled(linear, grid, peqa.Config()),
    "lr_qat": lambda linear, grid: lr_qat.LowRank(linear, grid, lr_qat.Config()),
    "dl_qat": lambda linear, grid: dl_qat.Decomposed(linear, grid, dl_qat.Config()),
    "llm_qat": lambda linear, grid: Recomputed(linear.weight.detach(), grid, llm_qat.Config()),
    "full_qat": lambda linear, grid: FullWeight(linear, grid, ScaleSearch(), learned=True),
}


@pytest.mark.parametrize("name", MAKERS)
def test_folding_keeps_the_trained_forward_pass(tiny, tokens, tmp_path, name):
    model, scheme = load_model(tiny, torch.float32), Scheme.from_dict("s", SCHEME)
    mark_layers(model, scheme)
    layers = insert(model, quantized_by(scheme, MAKERS[name]))
    made = [layer.parametrization for layer in layers.values()]
    groups = [{"params": [p for m in made for p in trained(m)], "lr": 1e-3}]
    train(model, groups, batches(), next_token_loss, Schedule(), RunLog(tmp_path))
    with torch.no_grad():
        before, codes = model(input_ids=tokens).logits, [m.rounded().codes for m in made]
        fold(model, layers, RunLog())
        after = model(input_ids=tokens).logits
    folded = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert all(torch.equal(m.rounded().codes, c) for m, c in zip(folded, codes, strict=True))
    assert not [m for m in model.modules() if isinstance(m, TrainedLinear)]
    # Learned scales are rounded to bf16 when they are stored: 2^-9 relative, and now and then a token's code.
    assert (after - before).norm() < 0.05 * before.norm()
    if name == "llm_qat":
        assert torch.equal(after, before)


@pytest.mark.parametrize("name", ["peqa", "lr_qat", "dl_qat", "llm_qat", "full_qat", "fine_tune"])
def test_training_learns_and_moves_what_it_trains(tiny, tmp_path, name):
    module, scheme = registry.load("methods", name), Scheme.from_dict("s", {"weights": {"bits": 4, "group_size": 32}})
    text = batches(steps=60)
    loss = {}
    for steps in (1, 60):
        torch.manual_seed(0)
        log = RunLog(tmp_path / str(steps))
        # The default rates are for a real model and text; on this one LR-QAT's would not reach the codes.
        options = {"learning_rate": 0.02, "scale_learning_rate": 0.02} if name == "lr_qat" else {}
        model = module.apply(load_model(tiny, torch.float32), scheme, module.Config(**options), text[:steps], log)
        with torch.no_grad():
            loss[steps] = next_token_loss(model, text[-1, 0]).item()
    assert log.training["tokens"] == 60 * 4 * 32 and log.training["moved"] > 0.9
    if name == "peqa":
        assert all(layer["codes_changed"] == 0 for layer in log.layers.values())
    elif name != "fine_tune":
        assert 0.001 < min(layer["codes_changed"] for layer in log.layers.values())
    if name == "llm_qat":  # its teacher knows nothing of this text; being near it is the aim
        teacher = load_model(tiny, torch.float32)
        gap = [json.loads(line)["loss"] for line in (tmp_path / "60/metrics.jsonl").read_text().splitlines()]
        own = distillation_loss(teacher)(teacher, text[-1, 0]).item()
        assert gap[-1] - own < 0.8 * (gap[0] - own)
    else:
        assert loss[60] < loss[1] - 0.3
    if module.METHOD.quantizes:
        assert all(
            isinstance(m, QuantizedLinear)
            for m in map(model.get_submodule, block_linears(load_model(tiny, torch.float32)))
        )


def test_a_scale_that_moves_by_more_than_half_is_a_departure(tiny):
    model = load_model(tiny, torch.float32)
    scheme = Scheme.from_dict("s", {"weights": {"bits": 4, "group_size": 32}})
    layers = insert(model, quantized_by(scheme, MAKERS["peqa"]))
    made = [layer.parametrization for layer in layers.values()]
    made[0].scale.log_ratio.data[0, 0] = 0.5  # exp(0.5) = 1.65
    made[0].scale.log_ratio.data[1, :] = 0.3
    made[1].scale.log_ratio.data[2, 1] = -0.8
    log = RunLog()
    fold(model, layers, log)
    assert len(log.departures) == 2
    assert "layers.0.self_attn.q_proj: training moved 1 of 128 scales by more than half" in log.departures[0]


@pytest.mark.parametrize("variant", ["low_rank", "full"])
def test_the_control_is_merged_into_what_it_trained(tiny, tokens, tmp_path, variant, monkeypatch):
    seen = {}

    def keep_logits(model, *arguments):
        train(model, *arguments)
        with torch.no_grad():
            seen["trained"] = model(input_ids=tokens).logits

    monkeypatch.setattr("methods.core.training.layers.train", keep_logits)
    model = load_model(tiny, torch.float32)
    before = {n: m.weight.clone() for n, m in block_linears(model).items()}
    fine_tune.apply(model, None, fine_tune.Config(variant=variant), batches(), RunLog(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, seen["trained"], rtol=1e-3, atol=1e-3)
    assert all(not torch.equal(m.weight, before[n]) for n, m in block_linears(model).items())


# The loop


@pytest.mark.parametrize("soft", [True, False])
def test_the_fused_loss_and_its_gradient(soft, monkeypatch):
    """Against PyTorch's in double precision; the chunk is small so that it does not divide the rows."""
    monkeypatch.setitem(runtime.LOGITS, "cpu", 3 * 50)
    logits, teacher = torch.randn(2, 7, 50, requires_grad=True), torch.randn(2, 7, 50)
    target = teacher if soft else torch.randint(0, 50, (2, 7))
    double = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(double.flatten(0, 1), (teacher.double().softmax(-1) if soft else target).flatten(0, 1))
    expected.backward()
    loss = losses._CrossEntropy.apply(logits, target)
    (loss * 3).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), 3 * double.grad, rtol=1e-5, atol=1e-8)


def test_gradient_checkpointing_changes_memory_only(tiny, tmp_path):
    results, forwards = [], []
    for checkpointed in (False, True):
        model, groups, text = setting(tiny, 3)
        if checkpointed:
            checkpoint_blocks(model)
            model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: forwards.append(1))
        train(model, groups, text, next_token_loss, Schedule(), RunLog(tmp_path / str(checkpointed)))
        results.append(groups[0]["params"])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(forwards) == 8  # each of three steps, and the one that counts operations, runs the block twice


def setting(tiny, steps=8):
    torch.manual_seed(0)
    model = load_model(tiny, torch.float32)
    scheme = Scheme.from_dict("s", {"weights": {"bits": 4, "group_size": 32}})
    made = [layer.parametrization for layer in insert(model, quantized_by(scheme, MAKERS["dl_qat"])).values()]
    return model, [{"params": [p for m in made for p in trained(m)], "lr": 1e-3}], batches(steps)


def test_small_gradients_train_as_fast_as_large_ones(tmp_path):
    """A loss of a 2^27th has the same steps. Gradients by steps of an 8-bit grid are of 1e-7."""
    found = []
    for factor in (2.0**-3, 2.0**-30):
        torch.manual_seed(0)
        model, x = torch.nn.Linear(8, 8), torch.randn(16, 8)
        groups = [{"params": [model.weight], "lr": 0.01}]
        log = RunLog(tmp_path / str(factor))
        log.folder.mkdir()
        tokens = torch.zeros(4, 1, 1, 1, dtype=torch.long)
        train(model, groups, tokens, lambda m, _, x=x, f=factor: f * m(x).square().mean(), Schedule(), log)
        found.append(model.weight.detach().clone())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


def test_killed_and_resumed_gives_the_same_parameters(tiny, tmp_path, monkeypatch):
    model, groups, text = setting(tiny)
    train(model, groups, text, next_token_loss, Schedule(), RunLog(tmp_path / "whole"))
    whole = groups[0]["params"]

    class Killed(Exception):
        pass

    calls = []

    def killed_at_the_sixth(model, batch):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return next_token_loss(model, batch)

    monkeypatch.setattr("methods.core.job.saves.SECONDS", 0)
    monkeypatch.setattr("methods.core.job.saves.SHARE", float("inf"))
    model, groups, text = setting(tiny)
    with pytest.raises(Killed):
        train(model, groups, text, killed_at_the_sixth, Schedule(), RunLog(tmp_path / "cut"))
    model, groups, text = setting(tiny)
    train(model, groups, text, next_token_loss, Schedule(), RunLog(tmp_path / "cut"))
    assert all(torch.equal(a, b) for a, b in zip(whole, groups[0]["params"], strict=True))
    files = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "cut")]
    assert files[0] == files[1] and len(files[0].splitlines()) == 8


def test_a_killed_cell_goes_on_with_the_same_settings_only(tiny, tmp_path, monkeypatch, capsys):
    """`python -m methods` from its command line: killed, resumed to the same checkpoint, and not resumed by other options."""
    ids = batches(8).flatten().int()
    save_file({"input_ids": ids}, tmp_path / "t.safetensors", metadata={"dataset": "training"})
    monkeypatch.setattr("methods.core.job.saves.SECONDS", 0)
    monkeypatch.setattr("methods.core.job.saves.SHARE", float("inf"))
    real = losses.next_token_loss

    def run(folder, options, killed_at=None):
        calls = []

        def loss(model, batch):
            calls.append(1)
            if len(calls) == killed_at:
                raise KeyboardInterrupt
            return real(model, batch)

        monkeypatch.setattr(lr_qat, "next_token_loss", loss)
        arguments = ["lr_qat", "--model", tiny, "--scheme", "{weights: {bits: 3, group_size: 32}}", "--threads", 1]
        arguments += ["--tokens", tmp_path / "t.safetensors", "--samples", 32, "--sequence-length", 32]
        main([str(a) for a in [*arguments, "--options", options, "--output", tmp_path / folder]])
        return read_json(tmp_path / folder / "run.json")["checkpoint_sha256"], len(calls)

    whole, steps = run("whole", "{rank: 4}")
    assert steps == 8 + 1  # the last one counts operations
    with pytest.raises(KeyboardInterrupt):
        run("cut", "{rank: 4}", killed_at=6)
    assert not (tmp_path / "cut/run.json").exists() and (tmp_path / "cut/training/state.safetensors").exists()
    state = tmp_path / "cut/training/state.safetensors"
    tensors, facts = read_sealed(state)
    write_sealed(state, tensors, facts | {"seconds": "1000"})
    assert run("cut", "{rank: 4}") == (whole, 3 + 1)
    resumed = read_json(tmp_path / "cut/run.json")  # has the time before the kill, too
    assert resumed["chain"]["seconds"] > 1000 and resumed["steps"][0]["seconds"]["total"] > 1000
    with pytest.raises(KeyboardInterrupt):
        run("cut", "{rank: 4}", killed_at=6)
    flip(state)
    assert run("cut", "{rank: 4}") == (whole, 8 + 1)  # from the start
    assert f"{state} has been changed or damaged" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        run("cut", "{rank: 4}", killed_at=6)
    other, steps = run("cut", "{rank: 4, learning_rate: 0.03}")
    assert steps == 8 + 1 and other != whole


def cell(tiny, tmp_path, name, method, *arguments, scheme="{weights: {bits: 3, group_size: 32}}"):
    """One cell of `python -m methods`; its run.json."""
    ids = torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(0)).int()
    save_file({"input_ids": ids}, tmp_path / "t.safetensors", metadata={"dataset": "text"})
    command = [method, "--model", tiny, "--scheme", scheme, "--threads", 1, "--tokens", tmp_path / "t.safetensors"]
    command += ["--samples", 8, "--sequence-length", 32, "--output", tmp_path / name, *arguments]
    main([str(a) for a in command])
    return read_json(tmp_path / name / "run.json")


def test_a_chain_of_cells_is_recorded_whole(tiny, tmp_path):
    """The control, GPTQ of the control, and PEQA from that: what each trained on, and the time of all."""
    control = cell(tiny, tmp_path, "control", "fine_tune", scheme="{}")
    quantized = cell(tiny, tmp_path, "gptq", "gptq", "--init-from", tmp_path / "control/checkpoint")
    last = cell(tiny, tmp_path, "peqa", "peqa", "--init-from", tmp_path / "gptq/checkpoint")
    assert [step["module"] for step in last["steps"]] == ["fine_tune", "gptq", "peqa"]
    assert last["steps"][:2] == quantized["steps"] and last["steps"][:1] == control["steps"]
    assert [step["kind"] for step in last["steps"]] == ["control", "ptq", "qat"]
    assert [run["chain"]["kind"] for run in (control, quantized, last)] == ["control", "control_ptq", "qat"]
    assert last["steps"][0]["training"]["tokens"] == 256 and last["steps"][1]["training"] is None
    assert last["chain"]["training_tokens"] == 512 and last["chain"]["trained_on"] == ["text"]
    assert last["chain"]["seconds"] == pytest.approx(sum(step["seconds"]["apply"] for step in last["steps"]))
    assert last["steps"][0]["checkpoint_sha256"] == control["checkpoint_sha256"]
    assert last["weights"] == str(tmp_path / "control/checkpoint")  # what the codes are compared with
    # GPTQ's errors are of the control's weights, which it was given, not of the original's.
    plain = cell(tiny, tmp_path, "plain", "gptq")
    errors = [sum(row["weight_error"] for row in run["layers"]) for run in (plain, quantized)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    assert plain["checkpoint_sha256"] != quantized["checkpoint_sha256"]


def test_residuals_that_are_gone_are_a_departure(tiny, tmp_path):
    """They are part of what a training starts from, and of no checkpoint's hash."""
    cell(tiny, tmp_path, "gptq", "gptq")
    with_residuals = cell(tiny, tmp_path, "first", "lr_qat", "--init-from", tmp_path / "gptq/checkpoint")
    assert not with_residuals["departures"]
    shutil.rmtree(tmp_path / "gptq/checkpoint/residuals")
    without = cell(tiny, tmp_path, "second", "lr_qat", "--init-from", tmp_path / "gptq/checkpoint")
    assert "the residuals of the rounding, which its run.json records, are not there" in without["departures"][0]


def test_what_a_training_starts_from_is_not_damaged(tiny, tmp_path, capsys):
    """The checkpoint, its residuals, and the weights that it was rounded from, which the teacher is."""
    cell(tiny, tmp_path, "control", "fine_tune", scheme="{}")
    cell(tiny, tmp_path, "gptq", "gptq", "--init-from", tmp_path / "control/checkpoint")
    start = ("--init-from", tmp_path / "gptq/checkpoint")
    for file in (
        "gptq/checkpoint/model.safetensors",
        "gptq/checkpoint/" + RESIDUALS,
        "control/checkpoint/model.safetensors",
    ):
        before = (tmp_path / file).read_bytes()
        flip(tmp_path / file)
        with pytest.raises(SystemExit):
            cell(tiny, tmp_path, "peqa", "peqa", *start)
        said = capsys.readouterr().err
        assert "has been changed or damaged" in said and str((tmp_path / file).parent) in said
        (tmp_path / file).write_bytes(before)
    assert cell(tiny, tmp_path, "peqa", "peqa", *start)["steps"][-1]["method"] == "peqa"


def test_weights_that_are_gone_are_an_error_before_training(tiny, tmp_path, capsys):
    """The table of layers compares codes with the weights that were rounded: it must not fail after hours of training."""
    cell(tiny, tmp_path, "control", "fine_tune", scheme="{}")
    cell(tiny, tmp_path, "gptq", "gptq", "--init-from", tmp_path / "control/checkpoint")
    shutil.rmtree(tmp_path / "control")
    with pytest.raises(SystemExit):
        cell(tiny, tmp_path, "peqa", "peqa", "--init-from", tmp_path / "gptq/checkpoint")
    assert "control/checkpoint, which is not there any more" in capsys.readouterr().err
    assert not (tmp_path / "peqa/training").exists()


def test_gptq_does_not_start_from_integers(tiny, tmp_path, capsys):
    cell(tiny, tmp_path, "rtn", "rtn")
    with pytest.raises(SystemExit):
        cell(tiny, tmp_path, "gptq", "gptq", "--init-from", tmp_path / "rtn/checkpoint")
    assert "'gptq' takes weights, but 'rtn' before it leaves codes" in capsys.readouterr().err


def test_a_weight_that_is_not_finite_is_named(tiny, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    model = load_model(broken, torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(broken)
    described(broken)
    with pytest.raises(SystemExit):
        cell(broken, tmp_path, "rtn", "rtn")
    assert "not finite in model.layers.1.mlp.up_proj" in capsys.readouterr().err


def test_a_sample_of_a_weight_has_all_columns():
    """4096 x 4096 values: a stride of 256 would see 16 of the columns."""
    columns = subsample(torch.arange(4096).float().expand(4096, -1))
    assert len(columns.unique()) == 4096 and 60_000 < len(columns) < 140_000
    assert torch.equal(subsample(torch.arange(9)), torch.arange(9))


def test_accumulation_is_a_larger_batch(tiny, tmp_path):
    results = []
    for shape in ((4, 1, 4, 32), (4, 2, 2, 32)):
        model, groups, text = setting(tiny, 4)
        train(model, groups, text.reshape(shape), next_token_loss, Schedule(), RunLog(tmp_path / str(shape[1])))
        results.append(torch.cat([p.detach().flatten() for p in groups[0]["params"]]))
    # Adam divides by tiny second moments, so single values differ by more than the additions' rounding.
    assert (results[0] - results[1]).norm() < 1e-3 * results[0].norm()


def test_a_loss_that_is_not_finite_stops_with_the_step(tiny, tmp_path):
    model, groups, text = setting(tiny)
    loss = lambda model, batch: next_token_loss(model, batch) * (torch.nan if batch[0, 0] == text[3, 0, 0, 0] else 1)  # noqa: E731
    with pytest.raises(FloatingPointError, match="nan at step 3 of 8"):
        train(model, groups, text, loss, Schedule(), RunLog(tmp_path))


def test_only_the_named_parameters_are_trained(tiny, tmp_path):
    model, groups, text = setting(tiny)
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, groups, text, next_token_loss, Schedule(), RunLog(tmp_path))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("low_rank" in n or "magnitude" in n for n in changed)


def test_the_schedule_warms_up_and_decays_to_zero():
    for decay in ("linear", "cosine"):
        factors = [Schedule(decay, warm_up=0.2).factor(i, 50) for i in range(50)]
        assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)
        assert max(factors) == factors[10] == 1 and factors[-1] < 0.03 and factors[0] > 0


def test_distillation_is_smallest_at_the_teacher(tiny, tokens):
    teacher, student = load_model(tiny, torch.float32), load_model(tiny, torch.float32)
    loss = distillation_loss(teacher)
    with torch.no_grad():
        own = loss(teacher, tokens)
        probabilities = teacher(input_ids=tokens).logits.double().softmax(-1)
        torch.testing.assert_close(
            own.double(), -(probabilities * probabilities.log()).sum(-1).mean(), rtol=1e-4, atol=0
        )
        student.model.layers[0].mlp.down_proj.weight += 0.05
        assert loss(student, tokens) > own


@pytest.mark.parametrize("scale", ["minmax", "search"])
@pytest.mark.parametrize("name", ["peqa", "lr_qat", "dl_qat", "llm_qat"])
def test_gamma_is_that_of_rtn_before_training(name, scale):
    """Step 0 of each method is RTN with the same factor of the min-max scale, or the same search."""
    linear = torch.nn.Linear(128, 32, bias=False)
    grid = Integer(3, 64)
    gamma = 0.8 if scale == "minmax" else 1.0
    config = registry.load("methods", name).Config(scale=scale, gamma=gamma)
    made = {
        "peqa": lambda: peqa.Scaled(linear, grid, config),
        "lr_qat": lambda: lr_qat.LowRank(linear, grid, config),
        "dl_qat": lambda: dl_qat.Decomposed(linear, grid, config),
        "llm_qat": lambda: Recomputed(linear.weight.detach(), grid, config),
    }[name]()
    expected, _ = choose_scale(linear.weight.detach(), grid, ScaleSearch(scale, gamma))
    found = made.rounded().scale
    assert torch.equal(found.to(grid.scale_dtype), expected)
    assert torch.equal(made.rounded().codes, grid.quantize(linear.weight.detach(), expected, None).codes)
    if scale == "minmax":
        largest, _ = choose_scale(linear.weight.detach(), grid, ScaleSearch("minmax"))
        assert found.float().sum() == pytest.approx(0.8 * float(largest.float().sum()), rel=0.01)


def test_the_searched_gamma_follows_the_weight():
    """LLM-QAT computes its scale anew at every step; each group keeps the factor it was given."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    made = Recomputed(weight, Integer(2, None), llm_qat.Config(scale="search"))
    before = made.rounded()
    with torch.no_grad():
        made.weight.mul_(4)  # a power of two changes no rounding
    after = made.rounded()
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(after.scale, before.scale * 4)


@pytest.mark.parametrize("method", ["rtn", "lr_qat", "dl_qat", "llm_qat"])
def test_a_gamma_that_would_be_ignored_is_an_error(method):
    with pytest.raises(ValueError, match="gamma 0.8 is for scale minmax"):
        registry.load("methods", method).Config(scale="search", gamma=0.8)
    with pytest.raises(ValueError, match="gamma is 1.2"):
        registry.load("methods", method).Config(scale="minmax", gamma=1.2)


def test_rates_fall_with_the_square_root_of_the_steps_beyond_32():
    assert rate_at(8, 0.4) == rate_at(32, 0.4) == 0.4
    assert rate_at(128, 0.4) == pytest.approx(0.2) and rate_at(512, 0.4) == pytest.approx(0.1)
