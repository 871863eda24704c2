"""Scoring with shared prefixes against one plain forward pass per sequence, and against lm-eval's own model class."""

import random

import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evals.core import prefix
from evals.core.language_model import PrefixSharingLM
from evals.core.prefix import Trie, log_likelihoods
from methods.core.job.log import RunLog
from methods.core.model.activations import mark_layers
from methods.core.model.anatomy import block_linears, replace_module
from methods.core.model.checkpoint import load_model
from methods.core.model.layers import QuantizedLinear
from methods.core.scales import ScaleSearch, choose_scale
from methods.core.scheme import Scheme


def requests(vocabulary=256, seed=0):
    """Requests that share beginnings of all lengths; some are equal, some a prefix of another."""
    generator = random.Random(seed)
    roots = [[generator.randrange(vocabulary) for _ in range(30)] for _ in range(3)]
    found = []
    for _ in range(40):
        root = generator.choice(roots)
        context = root[: generator.randrange(1, 30)] + [generator.randrange(vocabulary)] * generator.randrange(3)
        found.append((context, [generator.randrange(vocabulary) for _ in range(generator.randrange(1, 6))]))
    long = found[0][0] + found[0][1]
    return [*found, found[5], (long, [1, 2]), (long[:-1], [3]), (long[:-1], [4]), ([7], [8])]


def plain(model, pairs):
    """One forward pass per request."""
    found = []
    for context, continuation in pairs:
        ids = torch.tensor([context + continuation])
        with torch.inference_mode():
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
        rows = logits[len(context) - 1 :]
        target = torch.tensor(continuation)
        values = rows.gather(-1, target[:, None]).double().sum().item()
        found.append((values, bool((rows.argmax(-1) == target).all())))
    return found


def assert_equal(mine, theirs, tolerance=2e-4):
    assert [m[0] for m in mine] == pytest.approx([t[0] for t in theirs], abs=tolerance)
    assert [m[1] for m in mine] == [t[1] for t in theirs]


def test_frequencies_that_depend_on_the_longest_request_are_an_error():
    """A short request has one answer, whatever stands beside it."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Phi3Config(
        vocab_size=64,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_scaling=rope,
        pad_token_id=0,
        **sizes,
    )
    model = transformers.Phi3ForCausalLM(config).eval()
    short, long = ([1, 2, 3], [4]), (list(range(30)), [5])
    assert_equal(log_likelihoods(model, [short], RunLog()), plain(model, [short]))
    with pytest.raises(ValueError, match="passes of more than 16 tokens, and a request has 30"):
        log_likelihoods(model, [short, long], RunLog())


def test_the_trie_has_each_distinct_prefix_once_and_knows_its_ancestors():
    sequences = [c + k for c, k in requests()]
    trie = Trie.of(sequences, [2 if len(s) > 1 else 1 for s in sequences])
    prefixes = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert len(trie) == len(prefixes)
    paths = []
    for i in range(len(trie)):
        ancestors = [j for j in range(i + 1) if i < trie.end[j]]
        assert trie.depth[i] == len(ancestors) - 1
        paths.append(tuple(trie.tokens[ancestors]))
    assert set(paths) == prefixes
    for sequence, tail in zip(sequences, trie.tails, strict=True):
        assert paths[tail[-1]] == tuple(sequence) and paths[tail[0]] == tuple(sequence)[: len(sequence) - len(tail) + 1]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_same_as_one_sequence_at_a_time(tiny, chunk, monkeypatch):
    monkeypatch.setitem(prefix.MINIMUM_CHUNK, "cpu", chunk)
    model = load_model(tiny, torch.float32)
    assert_equal(log_likelihoods(model, requests(), RunLog()), plain(model, requests()))


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_logits_stay_below_their_limit(tiny, rows, monkeypatch):
    """With a vocabulary of 262,144 those of a chunk of contexts and answers would fill a small card."""
    monkeypatch.setitem(prefix.MINIMUM_CHUNK, "cpu", 64)
    monkeypatch.setattr(prefix, "LARGEST_LOGITS", rows * 256)
    model, kept = load_model(tiny, torch.float32), []
    model.lm_head.register_forward_pre_hook(lambda _module, args: kept.append(args[0].shape[-2]))
    assert_equal(log_likelihoods(model, requests(), RunLog()), plain(load_model(tiny, torch.float32), requests()))
    assert max(kept) == rows


def test_greedy_continuations_are_recognized(tiny):
    model = load_model(tiny, torch.float32)
    context = [5, 6, 7]
    with torch.inference_mode():
        greedy = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)[0, 3:].tolist()
    wrong = [*greedy[:2], (greedy[2] + 1) % 256]
    answers = log_likelihoods(model, [(context, greedy), (context, wrong), (context, greedy[:1])], RunLog())
    assert [a[1] for a in answers] == [True, False, True]


@pytest.mark.parametrize("symmetric", [True, False])
def test_with_quantized_activations_and_cache(tiny, symmetric, monkeypatch):
    """Tokens are quantized one by one, so it changes nothing in which chunk they are."""
    monkeypatch.setitem(prefix.MINIMUM_CHUNK, "cpu", 16)
    tokens = {"bits": 4, "symmetric": symmetric}
    scheme = Scheme.from_dict("s", {"weights": {"bits": 4}, "activations": tokens, "kv_cache": tokens})
    model = load_model(tiny, torch.float32)
    mark_layers(model, scheme)
    for name, linear in block_linears(model).items():
        grid = scheme.number_format(name, linear.in_features)
        scale, zero_point = choose_scale(linear.weight.detach().float(), grid, ScaleSearch("minmax"))
        replace_module(
            model, name, QuantizedLinear.replacing(linear, grid.quantize(linear.weight.detach(), scale, zero_point))
        )
    answers = log_likelihoods(model, requests(), RunLog())
    expected = plain(model, requests())
    # A value on the edge between two codes may fall to either side with another order of summation.
    far = [abs(a[0] - e[0]) for a, e in zip(answers, expected, strict=True)]
    assert np.median(far) < 1e-4 and max(far) < 0.5
    full = plain(load_model(tiny, torch.float32), requests())
    assert np.median([abs(a[0] - f[0]) for a, f in zip(answers, full, strict=True)]) > 0.1


SHAPE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
OTHERS = {
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 64},
    "GPTNeoX": {},
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE, **OTHERS[name], initializer_range=0.2)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    assert_equal(log_likelihoods(model, requests(), RunLog()), plain(model, requests()))


def test_attention_that_no_mask_describes_is_an_error():
    config = transformers.Llama4TextConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=1, layer_types=["chunked_attention"]
    )
    chunked = torch.nn.Module()
    chunked.config, chunked.forward = config, lambda input_ids, position_ids: None
    with pytest.raises(ValueError, match="has layers of chunked_attention"):
        log_likelihoods(chunked, requests(), RunLog())
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ValueError, match="takes no position_ids"):
        log_likelihoods(mamba.eval(), requests(), RunLog())


def test_what_cannot_be_scored_is_an_error(tiny):
    model = load_model(tiny, torch.float32)
    with pytest.raises(ValueError, match="empty context or continuation"):
        log_likelihoods(model, [([1], [])], RunLog())
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="1 of 1 log-likelihoods are not finite"):
        log_likelihoods(model, [([1], [2])], RunLog())


TEXTS = [
    ("The cat sat on", " the mat"),
    ("The cat sat on", " a chair"),
    ("The cat sat on ", "the mat"),  # the space goes to the continuation
    ("The cat", " slept"),
    ("", "No context"),
    ("Ünïcödé und ", "mehr"),
    ("long " * 60, "tail"),  # longer than the context of 256 tokens
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_as_lm_eval(tiny, dtype):
    model = load_model(tiny, dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"eos_token": "!", "pad_token": "!"})
    mine = PrefixSharingLM(model, tokenizer, RunLog())
    stock = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, softmax_dtype="float32")
    asked = [Instance("loglikelihood", {}, text, 0) for text in TEXTS]
    expected = stock.loglikelihood(asked, disable_tqdm=True)
    tolerance = 1e-3 if dtype == torch.float32 else 1.0
    assert_equal(mine.loglikelihood(asked, disable_tqdm=True), expected, tolerance)
    assert mine.truncated == [False] * 6 + [True]
