"""Reconstruction of blocks: what a block is given, AutoRound and Block-AP."""

import pytest
import torch

from methods import auto_round, block_ap, rtn
from methods.core.formats import make
from methods.core.job.log import RunLog
from methods.core.model.anatomy import checkpoint_blocks
from methods.core.model.blocks import Block, blocks_with_targets
from methods.core.model.checkpoint import load_model
from methods.core.model.layers import quantized_layers
from methods.core.model.resume import Resume
from methods.core.scales import ScaleSearch, choose_scale
from methods.core.scheme import Scheme
from methods.core.training.loop import Schedule
from methods.core.training.parametrizations import FullWeight
from methods.core.training.reconstruction import _loss, _train_block
from tests.test_qat import batches, cell, weight

SCHEMES = {
    "symmetric": {"weights": {"bits": 3, "group_size": 32}},
    "asymmetric": {"weights": {"bits": 2, "group_size": 32, "symmetric": False}},
    "float": {"weights": {"bits": 4, "group_size": 32, "format": "e2m1"}},
}


def run(tiny, module, scheme="symmetric", tokens=None, **options):
    torch.manual_seed(0)
    log = RunLog()
    model = load_model(tiny, torch.float32)
    model = module.apply(model, Scheme.from_dict("s", SCHEMES[scheme]), module.Config(**options), tokens, log)
    return model, log


def text():
    """(samples, sequence)"""
    return batches(steps=4).flatten(0, 2)


@torch.no_grad()
def test_a_block_is_given_what_enters_now_and_what_left_it_then(tiny):
    """Against hidden states of the whole model, with the first block changed on the way."""
    ids = text()
    original = load_model(tiny, torch.float32)(input_ids=ids, output_hidden_states=True).hidden_states
    model = load_model(tiny, torch.float32)
    seen = []
    for block in blocks_with_targets(
        model, ids, Resume(model, RunLog()), batch_size=4, device=torch.device("cpu"), log=RunLog()
    ):
        seen.append((block.name, torch.cat(block.inputs), torch.cat(block.targets)))
        if len(seen) == 1:
            block.module.mlp.down_proj.weight.mul_(0.5)
    changed = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert [name for name, _, _ in seen] == ["model.layers.0", "model.layers.1"]
    for index, (_, inputs, _) in enumerate(seen):
        torch.testing.assert_close(inputs, changed[index])
    torch.testing.assert_close(seen[0][2], original[1])  # the last one has the final norm in transformers
    last = model.model.norm(seen[1][2])
    torch.testing.assert_close(last, original[2])


def test_a_token_of_huge_states_does_not_hide_the_others():
    """Half the mean of each token's relative error and half that of the whole, which here is nothing: the first token's
    states are right, and a hundred times as large."""
    g = torch.Generator().manual_seed(0)
    targets = torch.randn(2, 5, 8, generator=g)
    targets[:, 0] *= 100
    errors = torch.randn(2, 5, 8, generator=g)
    errors[:, 0] = 0
    block = Block("block", torch.nn.Identity(), [lambda x: x], [targets + errors], [targets])
    each = sum(float(e @ e / (t @ t)) for e, t in zip(errors.flatten(0, 1), targets.flatten(0, 1), strict=True)) / 10
    whole = float(errors.square().sum() / targets.square().sum())
    assert _loss(block, 0).item() == pytest.approx((each + whole) / 2, rel=1e-5)
    assert whole < each / 1000
    block.targets[0][0, 1] = 0  # a token that is all zeros in full precision
    assert torch.isfinite(_loss(block, 0))


@pytest.mark.parametrize(("keep_best", "sign"), [(True, 1), (False, 1), (False, -1)])
def test_a_block_ends_no_worse_than_it_began(keep_best, sign):
    """A training that ascends leaves the start; one that descends, the last step, or the best."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 8), torch.randn(2, 5, 8)
    start = layer.weight.detach().clone()
    block = Block("block", layer, [layer], [x], [layer(x).detach() + torch.randn(2, 5, 8)])
    optimizer = torch.optim.SGD([{"params": [layer.weight], "lr": 0.1}], maximize=sign > 0)
    schedule = Schedule("linear", warm_up=0.0)
    before, after, _ = _train_block(block, optimizer, 4, schedule, keep_best, torch.Generator())
    assert torch.equal(layer.weight, start) == (sign > 0)
    if sign < 0:
        assert after < before
    else:  # with the best step kept that is the start, else what the last step would have left
        assert after == before if keep_best else after > before


def test_block_ap_at_a_ruinous_rate_is_rounding(tiny):
    rounded, _ = run(tiny, rtn)
    made, log = run(tiny, block_ap, tokens=batches(steps=2), learning_rate=1.0, scale_learning_rate=1.0)
    assert all(facts["block_error"] == 1 for facts in log.layers.values())
    for name, layer in quantized_layers(rounded).items():
        assert torch.equal(layer.rounded().codes, made.get_submodule(name).rounded().codes)
    assert [d.split(": ", 1)[1] for d in log.departures] == [
        "training made it worse, so it stays as it started; lower the learning rate"
    ] * len(made.model.layers)


def test_gradient_checkpointing_stays_on(tiny):
    model = load_model(tiny, torch.float32)
    checkpoint_blocks(model)
    own = [block.forward for block in model.model.layers]
    for _ in blocks_with_targets(
        model, text(), Resume(model, RunLog()), batch_size=4, device=torch.device("cpu"), log=RunLog()
    ):
        assert [block.forward for block in model.model.layers] == own


@pytest.mark.parametrize("scale", ["search", "minmax"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_auto_round_without_steps_is_rounding_to_nearest(tiny, scheme, scale):
    rounded, _ = run(tiny, rtn, scheme, scale=scale)
    made, log = run(tiny, auto_round, scheme, text(), steps=0, scale=scale)
    for name, layer in quantized_layers(rounded).items():
        other = made.get_submodule(name)
        assert torch.equal(layer.scale, other.scale)
        # A zero point is of the range here, and of gamma times it there: one that lies between two may go either way.
        assert (layer.rounded().codes == other.rounded().codes).float().mean() > (
            0.9 if scheme == "asymmetric" else 0.99999
        )
    assert all(facts["block_error"] == 1 for facts in log.layers.values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_auto_round_reproduces_blocks_better_than_rounding(tiny, scheme):
    made, log = run(tiny, auto_round, scheme, text(), steps=40)
    assert all(facts["block_error"] < 0.9 for facts in log.layers.values())
    assert 0.01 < min(facts["codes_changed"] for facts in log.layers.values())
    rounded, _ = run(tiny, rtn, scheme)
    with torch.no_grad():
        wanted = load_model(tiny, torch.float32)(input_ids=text()).logits
        errors = [(model(input_ids=text()).logits - wanted).square().mean().item() for model in (made, rounded)]
    assert errors[0] < 0.9 * errors[1]


def test_auto_rounds_weight_is_the_papers():
    """Eq. 3: s clip(round(W / s + V)), s of the range that alpha and beta leave; V never moves a code by more than one."""
    w, form = weight(), make("integer", 3, 64, symmetric=False, scale_dtype=torch.float32)
    made = auto_round.Rounding(w, form, ScaleSearch("minmax"))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.offset.copy_(torch.rand(w.shape, generator=g) - 0.5)
        made.low_share.fill_(0.8)
        made.high_share.fill_(0.9)
    groups = w.view(w.shape[0], -1, 64)
    low, high = 0.8 * groups.amin(-1, keepdim=True), 0.9 * groups.amax(-1, keepdim=True)
    s = (high - low) / 7
    zero = torch.round(-low / s)
    expected = s * (torch.clamp(torch.round(groups / s + made.offset.view_as(groups)) + zero, 0, 7) - zero)
    torch.testing.assert_close(made().detach().view_as(groups), expected)
    torch.testing.assert_close(made.rounded().value(torch.float32).view_as(groups), expected)


def test_auto_rounds_gradients_are_straight_through_the_rounding():
    """Of the sum of all weights, by hand. Inside the range W_hat = s L, with L - W / s constant for alpha and beta and
    s = (alpha high - beta low) / 7; at its ends W_hat is beta low or alpha high, but for the rounding of the zero point."""
    w, form = weight(), make("integer", 3, 64, symmetric=False, scale_dtype=torch.float32)
    made = auto_round.Rounding(w, form, ScaleSearch("minmax"))
    torch.nn.init.constant_(made.low_share, 0.7), torch.nn.init.constant_(made.high_share, 0.6)
    made().sum().backward()
    groups = w.view(w.shape[0], -1, 64)
    low, high = groups.amin(-1), groups.amax(-1)
    s = ((0.6 * high - 0.7 * low) / 7).unsqueeze(-1)
    point = -0.7 * low.unsqueeze(-1) / s
    zero = torch.round(point)
    code = torch.round(groups / s) + zero
    inside = (code >= 0) & (code <= 7)
    torch.testing.assert_close(made.offset.grad.view_as(groups), torch.where(inside, s, 0))
    rest = torch.where(inside, code - zero - groups / s, point - zero).sum(-1)  # per change of s
    below, above = (code < 0).sum(-1), (code > 7).sum(-1)
    assert below.sum() > 10 and above.sum() > 10
    torch.testing.assert_close(made.high_share.grad, rest * high / 7 + above * high, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made.low_share.grad, -rest * low / 7 + below * low, rtol=1e-3, atol=1e-4)


def test_auto_round_refuses_hqqs_zero_points():
    auto_round.check(Scheme.from_dict("s", SCHEMES["symmetric"]), auto_round.Config(scale="hqq"))
    with pytest.raises(ValueError, match="hqq fits zero points"):
        auto_round.check(Scheme.from_dict("s", SCHEMES["asymmetric"]), auto_round.Config(scale="hqq"))


def test_signed_descent_steps_by_the_sign_and_stays_in_its_bounds():
    p = torch.nn.Parameter(torch.tensor([0.0, 0.45, -0.2]))
    optimizer = auto_round.SignedDescent([{"params": [p], "lr": 0.1, "bounds": (-0.5, 0.5)}])
    p.grad = torch.tensor([3.0, -1e-6, 0.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.1, 0.5, -0.2]))


def test_block_ap_reproduces_blocks_better_than_rounding_and_its_start(tiny):
    form = make("integer", 3, 32)
    w = weight()
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = w.clone()
    start = form.quantize(w, *choose_scale(w, form, ScaleSearch("search")))
    assert torch.equal(FullWeight(layer, form, ScaleSearch("search"), True).rounded().codes, start.codes)

    # The default rate is for a real model and text.
    made, log = run(tiny, block_ap, tokens=batches(steps=10), epochs=4, learning_rate=0.03, scale_learning_rate=0.01)
    assert all(facts["block_error"] < 0.8 for facts in log.layers.values())
    assert log.training["tokens"] == 4 * 10 * 4 * 32 and log.training["steps"] == 40 and log.training["moved"] > 0.5
    rounded, _ = run(tiny, rtn)
    with torch.no_grad():
        wanted = load_model(tiny, torch.float32)(input_ids=text()).logits
        errors = [(model(input_ids=text()).logits - wanted).square().mean().item() for model in (made, rounded)]
    assert errors[0] < 0.8 * errors[1]


def test_efficient_qat_is_two_steps(tiny, tmp_path):
    cell(tiny, tmp_path, "first", "block_ap")
    second = cell(tiny, tmp_path, "second", "peqa", "--init-from", tmp_path / "first/checkpoint")
    assert [step["module"] for step in second["steps"]] == ["block_ap", "peqa"]
    assert second["chain"]["kind"] == "qat" and second["chain"]["training_tokens"] == 3 * 256
    assert second["chain"]["text_tokens"] == 256  # two epochs of the blocks and one of the scales, on one text
    assert all(layer["codes_changed"] == 0 for layer in second["layers"])


def test_auto_round_is_ptq(tiny, tmp_path):
    run = cell(tiny, tmp_path, "auto_round", "auto_round", "--options", "{steps: 2}")
    assert run["chain"]["kind"] == "ptq" and run["chain"]["training_tokens"] == 0
