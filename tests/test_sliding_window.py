"""Layers that attend to the last tokens only, in longer texts: everything is as in the model's own forward pass."""

import pytest
import torch
import transformers

from evals.core import prefix
from evals.core.reference import reference
from evals.divergence import divergence
from evals.perplexity import token_nll
from methods.core.job.log import RunLog
from methods.core.model.anatomy import block_linears, decoder_blocks
from methods.core.model.blocks import block_inputs, blocks_with_targets
from methods.core.model.checkpoint import load_model
from methods.core.model.resume import Resume
from methods.core.model.walk import walk
from tests.test_prefix import OTHERS, SHAPE, assert_equal, plain, requests
from tests.test_walk import CPU, inputs_of

WINDOW = 16  # of `gemma`; the texts here have 64 tokens


@pytest.fixture
def ids():
    return torch.randint(0, 256, (6, 4 * WINDOW), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def one_by_one(model, ids):
    """Logits (tokens, vocabulary) of a text that is read as in generation: a token at a time, the others in the cache."""
    cache = transformers.DynamicCache()  # as in workflow/prepare/generate.py
    return torch.cat([model(input_ids=token[None], past_key_values=cache).logits[0] for token in ids.split(1)])


@torch.inference_mode()
def test_the_window_counts_and_perplexity_has_it(gemma, ids):
    model = load_model(gemma, torch.float32)
    logits = torch.stack([one_by_one(model, text) for text in ids])
    losses = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    nll = token_nll(model, ids, 4, RunLog())
    torch.testing.assert_close(nll.float(), losses, rtol=1e-4, atol=1e-4)

    model.config.sliding_window = 4 * WINDOW
    wide = token_nll(model, ids, 4, RunLog())
    torch.testing.assert_close(nll[:, : WINDOW - 1], wide[:, : WINDOW - 1])
    assert (nll - wide)[:, WINDOW:].abs().median() > 0.01


@torch.inference_mode()
def test_the_reference_of_a_divergence_has_it(gemma, ids):
    model = load_model(gemma, torch.float32)
    kept = reference(model, ids, RunLog())
    expected = torch.nn.functional.linear(kept["states"], kept["head"])
    logits = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(expected, logits, rtol=1e-4, atol=1e-4)
    assert divergence(expected.flatten(0, 1), logits.flatten(0, 1)).abs().max() < 1e-6


SLIDING = {
    "Mistral": {},  # every layer
    "Gemma2": {},  # every other one
    "Qwen3": {"use_sliding_window": True, "max_window_layers": 1},  # all but the first
}


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_shared_prefixes_have_it(gemma, chunk, monkeypatch):
    monkeypatch.setitem(prefix.MINIMUM_CHUNK, "cpu", chunk)
    model = load_model(gemma, torch.float32)
    assert max(len(context) for context, _ in requests()) > 1.5 * WINDOW
    answers = prefix.log_likelihoods(model, requests(), RunLog())
    assert_equal(answers, plain(model, requests()))
    model.config.sliding_window = 4 * WINDOW
    wide = plain(model, requests())
    assert max(abs(a[0] - w[0]) for a, w in zip(answers, wide, strict=True)) > 0.01


@pytest.mark.parametrize("name", SLIDING)
def test_shared_prefixes_have_it_in_other_architectures(name, monkeypatch):
    monkeypatch.setitem(prefix.MINIMUM_CHUNK, "cpu", 16)
    torch.manual_seed(0)
    settings = SHAPE | OTHERS[name] | SLIDING[name] | {"sliding_window": WINDOW, "initializer_range": 0.2}
    config = getattr(transformers, f"{name}Config")(**settings)
    assert name == "Mistral" or "sliding_attention" in config.layer_types
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    assert_equal(prefix.log_likelihoods(model, requests(), RunLog()), plain(model, requests()))


@pytest.mark.parametrize("sequential", [True, False])
def test_the_walk_has_it(gemma, ids, sequential):
    """Every layer's input is that of a plain forward pass."""
    model, seen = load_model(gemma, torch.float32), {}
    for stages in walk(model, ids, batch_size=4, sequential=sequential, device=CPU, log=RunLog()):
        for stage in stages:
            seen |= dict.fromkeys(stage.layers, torch.cat(stage.inputs))
    expected = inputs_of(model, ids, list(block_linears(model)))
    assert seen.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(seen[name], x, rtol=1e-4, atol=1e-4)


def test_reconstruction_has_it(gemma, ids):
    """What leaves a block is what enters the next in a plain forward pass."""
    model, entered = load_model(gemma, torch.float32), []
    blocks = decoder_blocks(model)[1]
    hooks = [block.register_forward_pre_hook(lambda _module, args: entered.append(args[0])) for block in blocks]
    with torch.no_grad():
        last = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
    for hook in hooks:
        hook.remove()
    for index, block in enumerate(
        blocks_with_targets(model, ids, Resume(model, RunLog()), batch_size=4, device=CPU, log=RunLog())
    ):
        torch.testing.assert_close(torch.cat(block.inputs), entered[index], rtol=1e-4, atol=1e-4)
        left = torch.cat(block.targets)
        if index == len(blocks) - 1:
            left, expected = model.model.norm(left), last
        else:
            expected = entered[index + 1]
        torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-4)


def test_blocks_of_each_kind_are_given_their_own_mask(gemma, ids):
    model = load_model(gemma, torch.float32)
    arguments = block_inputs(model, decoder_blocks(model)[1], ids, 4)[1]
    masks = [given[0][1]["attention_mask"] for given in arguments]
    assert masks[0] is not None and (masks[1] is None or not torch.equal(masks[0], masks[1]))
