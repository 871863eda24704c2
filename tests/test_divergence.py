"""Divergence against the plain formula, and what it needs kept of the full-precision model."""

import math
import sys

import pytest
import torch
import transformers

from evals.core.reference import read_reference, reference, write_reference
from evals.divergence import Config, divergence, evaluate, noise_floor
from methods import rtn
from methods.core.job import runtime
from methods.core.job.log import RunLog
from methods.core.model.checkpoint import load_model
from methods.core.scheme import Scheme
from methods.core.tokens import write_tokens
from workflow.prepare import reference as making

OPTIONS = {"window": 32, "max_windows": 5, "dtype": "float32"}
INFO = {"dataset": "noise", "text_sha256": "f" * 64, "windows": 10, "options": OPTIONS, "kl_floor": 1e-9}


@pytest.fixture
def kept(tiny, tmp_path):
    """A reference of the tiny model on five of ten windows, and the windows."""
    windows = torch.randint(0, 256, (5, 32), generator=torch.Generator().manual_seed(3))
    tensors = reference(load_model(tiny, torch.float32), windows, RunLog()) | {"input_ids": windows.int()}
    write_reference(tmp_path / "r.safetensors", tensors, INFO)
    return tmp_path / "r.safetensors", windows


def test_it_is_the_formula(tiny, kept):
    path, windows = kept
    p, q = load_model(tiny, torch.float32), load_model(tiny, torch.float32)
    q.model.layers[0].mlp.down_proj.weight.data *= 0.8
    result = evaluate(q, tiny, Config(**OPTIONS), path, RunLog())
    with torch.no_grad():
        log_p, log_q = (m(input_ids=windows).logits.double().log_softmax(-1) for m in (p, q))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert result.metrics["kl_mean"]["value"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert result.metrics["kl_p99"]["value"] == pytest.approx(kl.flatten().quantile(0.99).item(), rel=1e-4)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert result.metrics["top1_agreement"]["value"] == pytest.approx(agreement)
    assert result.items["kl"] == pytest.approx(kl.mean(1).tolist(), rel=1e-4)
    assert result.metrics["kl_mean"]["items"] == {"column": "kl", "change": "difference"}
    assert result.metrics["kl_mean"]["value"] == pytest.approx(sum(result.items["kl"]) / 5)
    # Over windows, not over tokens, which depend on each other.
    assert result.metrics["kl_mean"]["stderr"] == pytest.approx(float(kl.mean(1).std() / 5**0.5), rel=1e-4)
    assert result.partial and result.protocol == "windows of 32, float32/noise@ffffffff/first-5-of-10"
    assert result.metrics["kl_floor"]["value"] == 1e-9


def test_a_model_does_not_diverge_from_itself(tiny, kept):
    result = evaluate(load_model(tiny, torch.float32), tiny, Config(**OPTIONS), kept[0], RunLog())
    assert [result.metrics[m]["value"] for m in ("kl_mean", "kl_p99", "top1_agreement")] == [0, 0, 1]


def test_the_reference_gives_the_logits_again(tiny, kept):
    path, windows = kept
    tensors, info = read_reference(path)
    with torch.inference_mode():
        logits = load_model(tiny, torch.float32)(input_ids=windows[:1]).logits[0]
    assert torch.equal(torch.nn.functional.linear(tensors["states"][0], tensors["head"]), logits) and info == INFO


def test_a_reference_in_another_dtype_is_an_error(tiny, kept):
    with pytest.raises(ValueError, match=r"computed in torch.float32, but this model computes in torch.bfloat16"):
        evaluate(load_model(tiny, torch.bfloat16), tiny, Config(**OPTIONS), kept[0], RunLog())


def test_known_distributions():
    """KL(p || q), which is not KL(q || p), 0.0920."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.7, 0.2, 0.1]]).log()
    assert divergence(p, q).item() == pytest.approx(
        0.5 * math.log(5 / 7) + 0.25 * math.log(5 / 4) + 0.25 * math.log(5 / 2)
    )
    assert divergence(p + 3, q - 7).item() == pytest.approx(divergence(p, q).item(), rel=1e-6)


def test_a_reference_of_other_options_is_an_error(tiny, kept):
    with pytest.raises(ValueError, match="was made with"):
        evaluate(load_model(tiny, torch.float32), tiny, Config(window=32), kept[0], RunLog())


def test_a_model_that_caps_its_logits_is_an_error():
    config = transformers.Gemma2Config(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, final_logit_softcapping=5.0, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    with pytest.raises(ValueError, match="changes the logits after its head"):
        reference(model, torch.arange(1, 9)[None], RunLog())


def test_logits_that_are_not_finite_are_an_error(tiny, kept):
    model = load_model(tiny, torch.float32)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="at 160 of 160 tokens is not finite"):
        evaluate(model, tiny, Config(**OPTIONS), kept[0], RunLog())


def rounded(model, bits):
    """The model with its weights rounded to the nearest, a scale per channel."""
    scheme = Scheme.from_dict("s", {"weights": {"bits": bits}})
    return rtn.apply(model, scheme, rtn.Config(), None, RunLog())


def test_the_noise_floor_is_far_below_8_bits(tiny, kept):
    """In float32, where the model is the very same: less than a tenth of what rounding its weights to 8 bits does."""
    path, windows = kept
    model = load_model(tiny, torch.float32)
    floor = noise_floor(model, windows, reference(model, windows, RunLog())["states"])
    eight = evaluate(rounded(model, 8), tiny, Config(**OPTIONS), path, RunLog()).metrics["kl_mean"]["value"]
    assert 0 <= floor < 0.1 * eight and floor < 1e-6


def test_the_noise_floor_compares_the_same_tokens(tiny, kept):
    """The first quarter of a window, the first third of two."""
    windows = kept[1]
    model = load_model(tiny, torch.float32)
    states = reference(model, windows, RunLog())["states"]
    changed = states.clone()
    changed[2:], changed[:, 11:] = torch.nan, torch.nan  # not looked at
    assert noise_floor(model, windows, changed) == noise_floor(model, windows, states) < 1e-6
    model.model.layers[0].mlp.down_proj.weight.data *= 0.8
    with torch.inference_mode():
        logits, expected_logits = model(input_ids=windows[:2]).logits, model.lm_head(states)
    found = []
    for count, length in ((1, 8), (2, 11)):
        expected = expected_logits[:count, :length]
        kl = divergence(expected.flatten(0, 1), logits[:count, :length].flatten(0, 1))
        found.append(kl.mean().item())
    assert noise_floor(model, windows, states) == pytest.approx(max(found), rel=1e-3) and min(found) > 1e-3


def test_one_window_has_a_floor_too(tiny):
    model, windows = load_model(tiny, torch.float32), torch.arange(1, 3)[None]
    assert noise_floor(model, windows, reference(model, windows, RunLog())["states"]) < 1e-6


def test_the_begin_of_sequence_token_is_in_the_protocol(tiny, kept, tmp_path):
    tensors, info = read_reference(kept[0])
    write_reference(tmp_path / "b.safetensors", tensors, info | {"bos_token_id": "7"})
    result = evaluate(load_model(tiny, torch.float32), tiny, Config(**OPTIONS), tmp_path / "b.safetensors", RunLog())
    assert result.protocol == "windows of 32+bos, float32/noise@ffffffff/first-5-of-10"


def test_the_command_writes_windows_and_floor(tiny, tmp_path, monkeypatch):
    ids = torch.randint(0, 256, (310,), generator=torch.Generator().manual_seed(1))
    facts = {"dataset": "noise", "text_sha256": "f" * 64, "bos_token_id": "7", "tokenizer_bos_token_id": "7"}
    write_tokens(tmp_path / "t.safetensors", ids, facts)
    arguments = ["--model", tiny, "--tokens", tmp_path / "t.safetensors", "--output", tmp_path / "r.safetensors"]
    monkeypatch.setattr(sys, "argv", ["reference", *map(str, arguments), "--options", "{window: 32}", "--threads", "1"])
    monkeypatch.setattr(runtime, "compute_dtype", lambda folder: torch.bfloat16)
    making.main()
    tensors, info = read_reference(tmp_path / "r.safetensors")
    assert tensors["input_ids"].shape == (10, 32) and (tensors["input_ids"][:, 0] == 7).all()
    assert tensors["states"].dtype == torch.float32 and info["compute_dtype"] == "float32" and info["kl_floor"] < 1e-6
    result = evaluate(load_model(tiny, torch.float32), tiny, Config(window=32), tmp_path / "r.safetensors", RunLog())
    assert result.metrics["kl_mean"]["value"] == 0 and result.protocol == "windows of 32+bos, float32/noise@ffffffff"
