"""What is evaluated is the checkpoint: it must hold the very numbers the method made, in a format others read."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open

from methods.core.job import registry
from methods.core.job.files import checkpoint_sha256
from methods.core.job.log import RunLog
from methods.core.model.anatomy import block_linears, decoder_blocks
from methods.core.model.checkpoint import load_model, save_checkpoint, stored_sizes
from methods.core.model.layers import QuantizedLinear
from methods.core.scheme import Scheme


def quantized(folder, weights, method="rtn", tokens=None, dtype=torch.float32, log=None, **options):
    module = registry.load("methods", method)
    model, scheme = load_model(folder, dtype), Scheme.from_dict("s", {"weights": weights})
    return module.apply(model, scheme, module.Config(**options), tokens, log or RunLog())


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", ["channel", 32])
@pytest.mark.parametrize("bits", range(2, 9))
def test_reloaded_checkpoint_gives_equal_weights_and_logits(tiny, tokens, tmp_path, bits, group_size, symmetric):
    model = quantized(tiny, {"bits": bits, "group_size": group_size, "symmetric": symmetric})
    save_checkpoint(model, tiny, tmp_path / "c")
    loaded = load_model(tmp_path / "c", torch.float32)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            again = loaded.get_submodule(name)
            assert torch.equal(again.rounded().codes, module.rounded().codes) and torch.equal(again.scale, module.scale)
            assert torch.equal(again.weight, module.weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", ["channel", 64])
@pytest.mark.parametrize("bits", range(2, 9))
def test_plain_transformers_loads_it(tiny, tokens, tmp_path, bits, group_size, symmetric):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    model = quantized(tiny, weights, dtype=torch.bfloat16)
    save_checkpoint(model, tiny, tmp_path / "c")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert AutoTokenizer.from_pretrained(tmp_path / "c")("abc").input_ids


def test_layers_of_two_group_sizes_in_one_checkpoint(tiny, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    model = quantized(tiny, {"bits": 4, "group_size": 192, "other_group_size": 32})
    grids = {m.format.group_size for m in model.modules() if isinstance(m, QuantizedLinear)}
    assert grids == {192, 32}
    save_checkpoint(model, tiny, tmp_path / "c")
    assert torch.equal(logits(load_model(tmp_path / "c", torch.float32), tokens), logits(model, tokens))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32)
    assert torch.equal(logits(plain, tokens), logits(model, tokens))


def test_full_precision_goes_the_same_road(tiny, tokens, tmp_path):
    model = load_model(tiny, torch.float32)
    save_checkpoint(model, tiny, tmp_path / "c")
    assert torch.equal(logits(load_model(tmp_path / "c", torch.float32), tokens), logits(model, tokens))


def test_the_file_holds_packed_codes_and_16_bit_scales(tiny, tmp_path):
    model = quantized(tiny, {"bits": 3, "group_size": 64})
    save_checkpoint(model, tiny, tmp_path / "c")
    with safe_open(tmp_path / "c/model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        packed = file.get_tensor("model.layers.0.mlp.down_proj.weight_packed")
        scale = file.get_tensor("model.layers.0.mlp.down_proj.weight_scale")
    assert packed.dtype == torch.int32 and packed.shape == (64, 192 * 3 // 32)
    assert scale.dtype == torch.bfloat16 and scale.shape == (64, 3)
    assert not any("codes" in k or "lm_head" in k for k in keys)
    config = json.loads((tmp_path / "c/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 3 and config["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"bits": 4, "group_size": 64}, 4 + 16 / 64),
        ({"bits": 3, "group_size": 32}, 3 + 16 / 32),
        ({"bits": 4, "group_size": 64, "symmetric": False}, 4 + (16 + 4) / 64),
        ({"bits": 8, "group_size": 64, "scale_dtype": "float32"}, 8 + 32 / 64),
    ],
)
def test_true_bits_per_weight(tiny, tmp_path, weights, expected):
    model = quantized(tiny, weights)
    save_checkpoint(model, tiny, tmp_path / "c")
    bits, count, parameters = stored_sizes(model, tmp_path / "c")
    assert bits / count == expected
    assert parameters == load_model(tiny, torch.float32).num_parameters()


def test_the_hash_depends_on_the_numbers_only(tiny, tmp_path):
    for name, scale in (("a", "search"), ("b", "search"), ("c", "minmax")):
        save_checkpoint(quantized(tiny, {"bits": 4}, scale=scale), tiny, tmp_path / name)
    a, b, c = (checkpoint_sha256(tmp_path / name) for name in "abc")
    assert a == b != c


def test_fake_quantized_equals_dequantized(tiny):
    """The weight that the in-memory layer multiplies with is the one its integers give."""
    model = quantized(tiny, {"bits": 3, "group_size": 32, "symmetric": False}, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.weight, module.rounded().value(torch.bfloat16))


def test_gptq_is_closer_than_rtn_on_its_calibration_text(tiny):
    tokens = torch.randint(0, 256, (32, 64), generator=torch.Generator().manual_seed(0))
    reference = logits(load_model(tiny, torch.float32), tokens)
    grid = {"bits": 4, "group_size": 64}
    error = {m: (logits(quantized(tiny, grid, m, tokens), tokens) - reference).norm() for m in ("rtn", "gptq")}
    assert error["gptq"] < 0.9 * error["rtn"]


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        load_model(tmp_path, torch.float32)


def test_the_decoder_blocks_are_the_text_models():
    """Not those of a vision tower that comes first and is as deep."""
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    heads = {"num_attention_heads": 4}
    config = transformers.Gemma3Config(text_config=text | heads, vision_config=vision | heads, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config)
    assert len(model.model.vision_tower.encoder.layers) == 2
    name, blocks = decoder_blocks(model)
    assert name == "model.language_model.layers" and blocks is model.model.language_model.layers
    assert all(n.startswith(name) for n in block_linears(model))


@pytest.mark.parametrize("method", ["rtn", "gptq", "peqa", "dl_qat", "llm_qat"])
def test_a_float_format_goes_through_every_method_and_the_checkpoint(tiny, tmp_path, tokens, method):
    weights = {"bits": 4, "format": "e2m1", "group_size": 32}
    given = tokens.view(2, 1, 4, 32) if method.endswith(("qat", "peqa")) else tokens
    model = quantized(tiny, weights, method, given, torch.bfloat16, RunLog(tmp_path))
    save_checkpoint(model, tiny, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", torch.bfloat16)
    levels = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}
    for name, layer in block_linears(model).items():
        again = loaded.get_submodule(name)
        assert again.format == layer.format and again.format.name == "e2m1"
        assert torch.equal(again.rounded().codes, layer.rounded().codes) and torch.equal(again.weight, layer.weight)
        steps = again.weight.float().unflatten(1, (-1, 32)) / again.scale.float().unsqueeze(-1)
        assert set(steps.abs().round(decimals=1).unique().tolist()) <= levels
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    with pytest.raises(ValueError):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved"
        )  # no program that reads integers may take it for them
