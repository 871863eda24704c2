"""Blocks that are not Llama's: fused projections, biases, norms of queries and keys, parallel residuals, experts, Conv1D."""

import pytest
import torch
import transformers
from safetensors.torch import save_file

from methods.__main__ import main
from methods.core.job.files import read_json
from methods.core.model.anatomy import block_linears
from methods.core.model.checkpoint import load_model, save_checkpoint, stored_sizes
from methods.core.model.containers import weight_groups
from methods.core.model.layers import QuantizedLinear
from tests.conftest import prepared

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
SMALL |= {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATED = SMALL | {"intermediate_size": 128, "num_key_value_heads": 2}
FAMILIES = {
    "Qwen2": GATED,  # biases of queries, keys and values
    "Qwen3": GATED | {"head_dim": 16},  # norms of queries and keys
    "Phi3": GATED,  # queries, keys and values are one layer, and so are gate and up
    "GPTNeoX": SMALL | {"intermediate_size": 128},  # biases everywhere, attention and MLP side by side, fused attention
    "Gemma2": GATED
    | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},  # norms after, caps of logits
    "Olmo2": GATED,  # norms after attention and MLP only
}
SPARSE = {"num_experts": 4, "moe_intermediate_size": 32}
EXPERTS = {
    "Mixtral": GATED | {"num_local_experts": 4},
    "Qwen3Moe": GATED
    | SPARSE
    | {"head_dim": 16, "num_experts_per_tok": 2, "mlp_only_layers": [0]},  # the first is dense
    "Qwen2Moe": GATED | SPARSE | {"shared_expert_intermediate_size": 64},  # an expert for all tokens besides
}
FAMILIES |= EXPERTS
STEPS = ("rtn", "gptq", "qronos", "auto_round", "peqa", "lr_qat", "dl_qat", "llm_qat", "full_qat", "block_ap")
OPTIONS = {"auto_round": "{steps: 4}"}


def model_of(family, size, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**size)
    return prepared(transformers.AutoModelForCausalLM.from_config(config), tmp_path / family)


def step(folder, method, tmp_path, *arguments):
    """The checkpoint that a step leaves, and its run.json."""
    ids = torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(0)).int()
    save_file({"input_ids": ids}, tmp_path / "t.safetensors", metadata={"dataset": "text"})
    scheme = "{}" if method in ("smooth_quant", "rotate") else "{weights: {bits: 4, group_size: 32}}"
    command = [method, "--model", folder, "--scheme", scheme, "--tokens", tmp_path / "t.safetensors", "--threads", 1]
    command += ["--samples", 8, "--sequence-length", 32, "--options", OPTIONS.get(method, "{}")]
    main([str(a) for a in [*command, "--output", tmp_path / method, *arguments]])
    return tmp_path / method / "checkpoint", read_json(tmp_path / method / "run.json")


@torch.no_grad()
def logits(folder):
    model = load_model(folder, torch.float32)
    return model, model(input_ids=torch.arange(40)[None] * 5 % 256, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", STEPS)
def test_every_method_quantizes_every_layer(family, method, tmp_path):
    folder = model_of(family, FAMILIES[family], tmp_path)
    plain, expected = logits(folder)
    checkpoint, run = step(folder, method, tmp_path)
    model, found = logits(checkpoint)
    layers = block_linears(model)
    assert layers.keys() == block_linears(plain).keys() == {row["layer"] for row in run["layers"]}
    assert all(isinstance(layer, QuantizedLinear) for layer in layers.values())
    biases = {name for name, layer in block_linears(plain).items() if layer.bias is not None}
    assert biases == {name for name, layer in layers.items() if layer.bias is not None}
    # Of a mixture, a token that goes to another expert changes more.
    most = 0.8 if family in EXPERTS else 0.6
    assert found.isfinite().all() and 0 < (found - expected).norm() / expected.norm() < most


REFUSED = {
    ("GPTNeoX", "rotate"): "gpt_neox.layers.0.input_layernorm is not an RMSNorm",
    ("Olmo2", "rotate"): "is another function after the transform",  # it normalizes what attention and MLP give
    ("Olmo2", "smooth_quant"): "no norm or layer was found that could take over the factors of an input",
    ("Mixtral", "rotate"): "rotate knows linear layers only",  # which routers are not
    ("Qwen3Moe", "rotate"): "rotate knows linear layers only",
    ("Qwen2Moe", "rotate"): "rotate knows linear layers only",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["awq", "smooth_quant", "rotate"])
def test_transforms_keep_the_function_or_refuse(family, method, tmp_path):
    folder = model_of(family, FAMILIES[family], tmp_path)
    if message := REFUSED.get((family, method)):
        with pytest.raises(SystemExit):
            step(folder, method, tmp_path)
        assert message in read_json(tmp_path / method / "failed.json")["error"]
    else:
        checkpoint, _ = step(folder, method, tmp_path)
        assert torch.allclose(logits(folder)[1], logits(checkpoint)[1], atol=1e-3)


def test_conv1d_is_an_error_that_says_so(tmp_path, capsys):
    folder = model_of("GPT2", {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}, tmp_path)
    with pytest.raises(SystemExit):
        step(folder, "rtn", tmp_path)
    assert "GPT2LMHeadModel have no nn.Linear layers to quantize" in capsys.readouterr().err


@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_experts_are_linear_layers_of_the_same_function(family, tmp_path):
    folder = model_of(family, EXPERTS[family], tmp_path)
    own, expected = logits(folder)
    assert sum(".experts.3.up_proj" in name for name in block_linears(own)) == (1 if family == "Qwen3Moe" else 2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(40)[None] * 5 % 256
    assert torch.allclose(theirs(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    # What is not quantized is saved as transformers has it.
    save_checkpoint(own, folder, tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved")[1], expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.allclose(theirs(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", EXPERTS)
def test_other_programs_refuse_quantized_experts(family, tmp_path):
    """They would fuse what they find under the names of full precision, and leave the rest as it was initialized."""
    checkpoint, run = step(model_of(family, EXPERTS[family], tmp_path), "rtn", tmp_path)
    with pytest.raises(ValueError, match="ptqat-int"):
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="experts of a mixture are not exported"):
        weight_groups(read_json(checkpoint / "config.json"))
    assert any(
        d.startswith("no linear layers, or routers, stay in full precision:") and ".gate" in d
        for d in run["departures"]
    )
    quantized = {row["layer"].rpartition(".")[2] for row in run["layers"]}
    assert quantized == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(("family", "size"), [("Phimoe", {}), ("GraniteMoe", {})])
def test_routers_and_names_of_other_mixtures(family, size, tmp_path):
    """Phimoe's router is a linear layer that returns three tensors; Granite's files call the fused experts something else."""
    folder = model_of(family, GATED | {"num_local_experts": 4, "num_experts_per_tok": 2} | size, tmp_path)
    if family == "GraniteMoe":
        with pytest.raises(SystemExit):
            step(folder, "gptq", tmp_path)
        assert "has no tensor for model.layers.1" in read_json(tmp_path / "gptq/failed.json")["error"]
    else:
        checkpoint, _ = step(folder, "gptq", tmp_path)
        assert logits(checkpoint)[1].isfinite().all()


@pytest.mark.parametrize("family", EXPERTS)
def test_gptq_of_an_expert_is_that_of_the_tokens_that_go_to_it(family, tmp_path):
    """Error of the weights, which run.json has, against files in transformers' own layout; and of the experts' outputs."""
    checkpoint, run = step(model_of(family, EXPERTS[family], tmp_path), "gptq", tmp_path)
    experts = [row for row in run["layers"] if ".experts." in row["layer"]]
    assert experts and all(0 < row["weight_error"] < 0.3 and 0 < row["output_error"] < 0.1 for row in experts)
    assert logits(checkpoint)[1].isfinite().all()


def test_awq_leaves_experts_alone_that_no_token_reaches(tmp_path):
    folder = model_of("Mixtral", EXPERTS["Mixtral"] | {"num_local_experts": 64}, tmp_path)
    checkpoint, run = step(folder, "awq", tmp_path, "--samples", 4, "--sequence-length", 4)
    assert torch.allclose(logits(folder)[1], logits(checkpoint)[1], atol=1e-3)
    assert any(d.endswith("one norm feeds all of a block, and its router") for d in run["departures"])


@pytest.mark.parametrize("method", ["gptq", "lr_qat", "auto_round"])
def test_experts_that_no_token_reaches(method, tmp_path):
    """16 tokens go to 32 of 64 experts at most: an error, or rounding to nearest with a departure."""
    folder = model_of("Mixtral", EXPERTS["Mixtral"] | {"num_local_experts": 64}, tmp_path)
    few = ["--samples", 4, "--sequence-length", 4, "--batch-size", 4]
    if method == "gptq":
        with pytest.raises(SystemExit):
            step(folder, method, tmp_path, *few)
        error = read_json(tmp_path / method / "failed.json")["error"]
        assert "no calibration token reaches model.layers.0.mlp.experts." in error and "unreached to rtn" in error
        few += ["--options", "{unreached: rtn}"]
    checkpoint, run = step(folder, method, tmp_path, *few)
    told = [d for d in run["departures"] if "reaches them" in d or "changed no scale" in d]
    assert len(told) >= 32 * 2 and all(".experts." in departure for departure in told)
    assert logits(checkpoint)[1].isfinite().all()


def test_experts_fused_in_another_way_stay_as_they_are_and_are_named(tmp_path):
    size = GATED | {"num_local_experts": 4, "head_dim": 16, "num_experts_per_tok": 2}
    checkpoint, run = step(model_of("GptOss", size, tmp_path), "rtn", tmp_path)
    assert len(run["layers"]) == 8  # attention
    # Their weights count as what they take: most of the blocks is in 16 bits.
    bits, weights, _ = stored_sizes(load_model(checkpoint, torch.float32), checkpoint)
    assert bits / weights > 10
    assert any("stay in full precision" in d and "experts.gate_up_proj" in d for d in run["departures"])
