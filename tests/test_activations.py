"""Per-token quantization of activations and of the KV cache."""

import pytest
import torch
import transformers

from methods.core.job import registry
from methods.core.job.log import RunLog
from methods.core.model.activations import fake_quantize_tokens, mark_layers
from methods.core.model.checkpoint import load_model, save_checkpoint
from methods.core.scheme import Scheme, TokenScheme

SCHEMES = {
    "w4a8kv8": {"weights": {"bits": 4}, "activations": {"bits": 8}, "kv_cache": {"bits": 8}},
    "w4a8kv4": {"weights": {"bits": 4}, "activations": {"bits": 8}, "kv_cache": {"bits": 4}},
    "w8a8kv8": {"weights": {"bits": 8}, "activations": {"bits": 8}, "kv_cache": {"bits": 8}},
    "w4a6": {"weights": {"bits": 4}, "activations": {"bits": 6}},
    "asymmetric": {
        "weights": {"bits": 4},
        "activations": {"bits": 6, "symmetric": False},
        "kv_cache": {"bits": 4, "symmetric": False},
    },
}


def quantized(folder, name, method="rtn", tokens=None):
    model, scheme, module = (
        load_model(folder, torch.float32),
        Scheme.from_dict(name, SCHEMES[name]),
        registry.load("methods", method),
    )
    mark_layers(model, scheme)
    options = {"steps": 3} if method == "auto_round" else {}
    return module.apply(model, scheme, module.Config(**options), tokens, RunLog())


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_symmetric_is_the_formula_of_llm_qat(bits):
    x = torch.randn(3, 5, 64)
    expected = torch.empty_like(x)
    for i in range(3):
        for j in range(5):
            s = x[i, j].abs().max() / (2 ** (bits - 1) - 1)
            expected[i, j] = torch.round(x[i, j] / s) * s
    assert torch.equal(fake_quantize_tokens(x, TokenScheme(bits)), expected)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_asymmetric_uses_all_levels_and_keeps_zero(bits):
    x = torch.randn(7, 64).abs() + 0.5
    x[:, 0] = 0
    y = fake_quantize_tokens(x, TokenScheme(bits, symmetric=False))
    step = x.amax(-1, keepdim=True) / (2**bits - 1)
    assert (y[:, 0] == 0).all()
    assert ((y - x).abs() <= 0.501 * step).all()
    codes = y / step
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)


def test_tokens_do_not_influence_each_other():
    x = torch.randn(2, 6, 32)
    y = x.clone()
    y[:, 3] *= 1000
    a, b = (fake_quantize_tokens(v, TokenScheme(8)) for v in (x, y))
    keep = [0, 1, 2, 4, 5]
    assert torch.equal(a[:, keep], b[:, keep])


def test_a_token_of_zeros_stays_zero():
    for symmetric in (True, False):
        assert torch.equal(fake_quantize_tokens(torch.zeros(2, 8), TokenScheme(4, symmetric)), torch.zeros(2, 8))


def test_inputs_and_caches_are_quantized_where_the_scheme_says(tiny, tokens):
    """Against a plain model whose weights are the dequantized ones, with the quantization done by hooks."""
    model, plain = quantized(tiny, "w4a8kv4"), load_model(tiny, torch.float32)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.weight.data = model.get_submodule(name).weight
            module.register_forward_pre_hook(lambda m, args: (fake_quantize_tokens(args[0], TokenScheme(8)),))
            if name.endswith(("k_proj", "v_proj")):
                module.register_forward_hook(lambda m, args, out: fake_quantize_tokens(out, TokenScheme(4)))
    assert torch.equal(logits(model, tokens), logits(plain, tokens))
    assert not torch.equal(logits(model, tokens), logits(quantized(tiny, "w4a8kv8"), tokens))


@pytest.mark.parametrize("method", ["rtn", "gptq", "qronos", "auto_round"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_checkpoint_says_so_and_the_loader_applies_it(tiny, tokens, tmp_path, name, method):
    model = quantized(tiny, name, method, tokens)
    save_checkpoint(model, tiny, tmp_path / "c")
    assert torch.equal(logits(load_model(tmp_path / "c", torch.float32), tokens), logits(model, tokens))


def test_generation_with_a_cache_gives_the_logits_of_one_pass(tiny, tokens):
    model = quantized(tiny, "w4a8kv4")
    whole, cache, steps = logits(model, tokens), None, []
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            out = model(input_ids=tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    difference = (torch.cat(steps, 1) - whole).abs()
    # The same numbers in another order of additions; a value on a rounding boundary may fall to the other side.
    assert difference.median() < 1e-4 * whole.abs().max()
    assert (difference.amax((0, 2)) < 0.05 * whole.abs().max()).all()


def test_a_model_without_separate_keys_is_an_error(tiny):
    model = load_model(tiny, torch.float32)
    for block in model.model.layers:
        block.self_attn = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="quantizes the KV cache, but no layer is called"):
        mark_layers(model, Scheme.from_dict("s", SCHEMES["w4a8kv8"]))


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3"])
def test_keys_that_are_normalized_after_k_proj_are_an_error(family):
    config = {"Qwen3": transformers.Qwen3Config, "Gemma3": transformers.Gemma3TextConfig}[family](
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with pytest.raises(ValueError, match=r"normalizes keys after k_proj \(model.layers.0.self_attn.k_norm\)"):
        mark_layers(model, Scheme.from_dict("s", SCHEMES["w4a8kv8"]))
    mark_layers(model, Scheme.from_dict("s", SCHEMES["w4a6"]))
    assert model.model.layers[0].self_attn.k_proj.output_tokens is None


def test_tokens_without_weights_are_an_error():
    with pytest.raises(ValueError, match="need weights"):
        Scheme.from_dict("s", {"activations": {"bits": 8}})
