"""AWQ and SmoothQuant: which layers feed which, the papers' factors, and the same function in the end."""

import pytest
import torch

from methods import awq, smooth_quant
from methods.__main__ import main
from methods.core.job.files import read_json
from methods.core.job.log import RunLog
from methods.core.model.checkpoint import load_model
from methods.core.model.feeders import linear_feeders, norm_gain, set_norm_gain
from methods.core.model.walk import walk
from methods.core.scales import ScaleSearch, choose_scale
from methods.core.scheme import Scheme
from tests.test_qat import batches, cell

SCHEME = Scheme.from_dict("s", {"weights": {"bits": 3, "group_size": 32}})


def text():
    """(samples, sequence)"""
    return batches(steps=2).flatten(0, 2)


def stages(model):
    """The stages of the first block, with their inputs."""
    blocks = walk(model, text(), batch_size=4, sequential=False, device=torch.device("cpu"), log=RunLog())
    return list(next(iter(blocks)))


def test_what_feeds_a_layer_is_found_by_trying(tiny):
    model = load_model(tiny, torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    feeders = linear_feeders(model)
    assert feeders["mlp.down_proj"] == "mlp.up_proj"
    config = model.config  # values of several heads in one feed no other layer channel by channel
    assert ("self_attn.o_proj" in feeders) == (config.num_key_value_heads == config.num_attention_heads)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_values_feed_the_output_where_every_head_has_its_own():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    assert linear_feeders(model) == {"mlp.down_proj": "mlp.up_proj", "self_attn.o_proj": "self_attn.v_proj"}


@pytest.mark.parametrize("one", [0.0, 1.0])
def test_a_norms_gain_is_read_and_set(one):
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(16))

        def forward(self, x):
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (one + self.weight)

    norm = Norm()
    torch.testing.assert_close(norm_gain(norm, "n"), one + norm.weight.detach())
    wanted = torch.rand(16) + 0.5
    set_norm_gain(norm, wanted, "n")
    torch.testing.assert_close(norm_gain(norm, "n"), wanted)
    with pytest.raises(ValueError, match="n is not an RMSNorm"):
        norm_gain(torch.nn.LayerNorm(16, bias=False), "n")


@pytest.mark.parametrize("module", [awq, smooth_quant])
@torch.no_grad()
def test_the_function_stays_and_the_weights_do_not(tiny, module):
    model, ids = load_model(tiny, torch.float32), text()
    before, down = model(input_ids=ids).logits, model.model.layers[0].mlp.down_proj.weight.clone()
    up = model.model.layers[0].mlp.up_proj.weight.clone()
    module.apply(model, SCHEME, module.Config(), ids, RunLog())
    after = model(input_ids=ids).logits
    assert (after - before).norm() < 1e-4 * before.norm()
    changed = model.model.layers[0].mlp
    assert (changed.up_proj.weight / up - 1).abs().max() > 0.05
    # SmoothQuant moves channels of norms only, AWQ those of up_proj too.
    assert torch.equal(changed.down_proj.weight, down) == (module is smooth_quant)


def test_smooth_quants_factors_are_eq_4(tiny):
    stage = stages(load_model(tiny, torch.float32))[0]
    x = torch.cat([i.flatten(0, -2) for i in stage.inputs]).abs().amax(0)
    w = torch.cat([layer.weight.detach() for layer in stage.layers.values()]).abs().amax(0)
    torch.testing.assert_close(smooth_quant.factors(stage, 0.7), x**0.7 / w**0.3)


@torch.no_grad()
@pytest.mark.parametrize("scale", ["search", "minmax"])
def test_awqs_factors_are_the_best_power_of_the_mean_activation(tiny, scale):
    """Against the outputs themselves: the error of the rounded layers for every power, at the next step's scales."""
    stage = stages(load_model(tiny, torch.float32))[0]
    x = torch.cat([i.flatten(0, -2) for i in stage.inputs])
    mean = x.abs().mean(0)

    def error(factors):
        total = 0.0
        for name, layer in stage.layers.items():
            form = SCHEME.number_format(name, layer.in_features)
            scaled = layer.weight * factors
            groups = scaled.unflatten(1, (-1, 32))
            s = choose_scale(scaled, form, ScaleSearch(scale))[0].float().unsqueeze(-1)
            q = (s * (groups / s).round().clamp(form.q_min, form.q_max)).flatten(1)
            total += ((q / factors - layer.weight) @ x.T).square().sum().item()
        return total

    powers = {}
    for k in range(20):
        f = mean ** (k / 20)
        powers[k] = error(f / (f.max() * f.min()).sqrt())
    found = awq.best_factors(stage, SCHEME, awq.Config(scale=scale))
    assert error(found) == pytest.approx(min(powers.values()), rel=1e-3) and error(found) < powers[0]


def test_awq_and_then_rounding_in_cells(tiny, tmp_path):
    """AWQ's checkpoint is of the scheme, holds no codes, and rounding it is compared with its weights."""
    first = cell(tiny, tmp_path, "awq", "awq")
    assert first["chain"]["kind"] == "transform" and first["scheme"]["weights"]["bits"] == 3
    second = cell(tiny, tmp_path, "rtn", "rtn", "--init-from", tmp_path / "awq/checkpoint")
    assert second["chain"]["kind"] == "ptq" and second["weights"] == str(tmp_path / "awq/checkpoint")
    plain = cell(tiny, tmp_path, "plain", "rtn")
    assert plain["checkpoint_sha256"] != second["checkpoint_sha256"]
    with pytest.raises(SystemExit):
        other = "{weights: {bits: 4, group_size: 32}}"
        cell(tiny, tmp_path, "other", "rtn", "--init-from", tmp_path / "awq/checkpoint", scheme=other)
    assert "has another scheme" in read_json(tmp_path / "other/failed.json")["error"]
    with pytest.raises(SystemExit):
        main(["awq", "--model", str(tiny), "--output", str(tmp_path / "none")])
    assert "method awq needs a scheme with weights" in read_json(tmp_path / "none/failed.json")["error"]


def other_models():
    """Norms that multiply by one plus their weight, and norms and layers with a bias, in models of few parameters."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, intermediate_size=96, num_key_value_heads=2, head_dim=16))
    opt = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=64, ffn_dim=96, max_position_embeddings=64))
    for model in (gemma, opt):
        for p in model.parameters():
            if p.dim() == 1:  # gains and biases of a trained model are not ones and zeros
                p.data += 0.3 * torch.rand(p.shape)
    return {"gemma3": gemma.eval(), "opt": opt.eval()}


@pytest.mark.parametrize("module", [awq, smooth_quant])
@pytest.mark.parametrize("name", ["gemma3", "opt"])
@torch.no_grad()
def test_other_norms_and_biases(name, module):
    model, ids = other_models()[name], text()
    before = {n: p.clone() for n, p in model.named_parameters()}
    wanted = model(input_ids=ids).logits
    module.apply(model, SCHEME, module.Config(), ids, RunLog())
    logits = model(input_ids=ids).logits
    assert (logits - wanted).norm() < 1e-4 * wanted.norm()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any("norm" in n and n.endswith("weight") for n in moved) and any("q_proj.weight" in n for n in moved)
    if name == "opt":
        assert any("layer_norm.bias" in n for n in moved)


def test_a_model_without_anything_to_rescale_is_an_error(tiny):
    model = load_model(tiny, torch.float32)
    for block in model.model.layers:
        block.input_layernorm, block.post_attention_layernorm = torch.nn.Identity(), torch.nn.Identity()
    with pytest.raises(ValueError, match="no norm or layer was found"):
        smooth_quant.apply(model, SCHEME, smooth_quant.Config(), text(), RunLog())
