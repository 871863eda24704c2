"""The perplexity protocol against plain formulas."""

import math

import pytest
import torch

from evals.perplexity import Config, evaluate
from methods.core.job.log import RunLog
from methods.core.model.checkpoint import load_model
from methods.core.tokens import read_windows, sample_windows, write_tokens


@pytest.fixture
def stream(tmp_path):
    """A token file of 10 windows of 32 tokens and a tail."""
    ids = torch.randint(0, 256, (330,), generator=torch.Generator().manual_seed(1))
    write_tokens(tmp_path / "t.safetensors", ids, {"dataset": "noise", "text_sha256": "f" * 64})
    return tmp_path / "t.safetensors", ids


def test_it_is_the_gptq_protocol(tiny, stream):
    """exp of the mean over windows of transformers' own loss, which is the mean over the shifted tokens."""
    path, ids = stream
    model = load_model(tiny, torch.float32)
    result = evaluate(model, tiny, Config(window=32, batch_size=3), path, RunLog())
    with torch.no_grad():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in ids[:320].view(10, 32)]
    value = result.metrics["perplexity"]["value"]
    assert value == pytest.approx(math.exp(sum(losses) / 10), rel=1e-5)
    assert result.items["nll"] == pytest.approx(losses, rel=1e-5)
    assert result.metrics["perplexity"]["items"] == {"column": "nll", "change": "relative"}
    assert value == pytest.approx(math.exp(sum(result.items["nll"]) / 10))
    spread = torch.tensor(losses).std() / 10**0.5
    assert result.metrics["perplexity"]["stderr"] == pytest.approx(float(value * spread), rel=1e-3)
    assert (result.protocol, result.n, result.partial) == ("gptq-32/noise@ffffffff", 10, False)


def test_a_limit_is_part_of_the_protocol(tiny, stream):
    result = evaluate(load_model(tiny, torch.float32), tiny, Config(window=32, max_windows=4), stream[0], RunLog())
    assert (result.protocol, result.n, result.partial) == ("gptq-32/noise@ffffffff/first-4-of-10", 4, True)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tiny, stream):
    model = load_model(tiny, torch.float32)
    model.model.norm.weight.data.zero_()
    result = evaluate(model, tiny, Config(window=32), stream[0], RunLog())
    assert result.metrics["perplexity"]["value"] == pytest.approx(256)


def test_windows_that_are_worse_than_a_guess_are_a_departure(tiny, stream):
    """At 2 bits single windows of a checkpoint may have a perplexity of millions, and make the mean."""
    path, ids = stream
    model = load_model(tiny, torch.float32)
    model.model.norm.weight.data.zero_()
    model.model.norm.weight.data[0] = 1
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[ids[1]] = 1000.0  # a word that is sure, or impossible, at each place
    log = RunLog()
    nll = evaluate(model, tiny, Config(window=32), path, log).items["nll"]
    broken = sum(value > math.log(256) for value in nll)
    assert broken and f"{broken} of 10 windows are predicted worse than by a guess" in log.departures[0]


def test_batch_size_does_not_matter(tiny, stream):
    model = load_model(tiny, torch.float32)
    values = [
        evaluate(model, tiny, Config(window=32, batch_size=b), stream[0], RunLog()).items["nll"] for b in (1, 4, 10)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0] == pytest.approx(values[2], rel=1e-5)


def test_a_window_longer_than_the_context_is_an_error(tiny, stream):
    with pytest.raises(ValueError, match="window is 512, longer than the model's context of 256"):
        evaluate(load_model(tiny, torch.float32), tiny, Config(window=512), stream[0], RunLog())


def test_samples_are_distinct_windows_in_an_order_given_by_the_seed(stream):
    path, ids = stream
    a, info = sample_windows(path, 6, 32, seed=0)
    b, _ = sample_windows(path, 6, 32, seed=0)
    c, _ = sample_windows(path, 6, 32, seed=1)
    assert torch.equal(a, b) and not torch.equal(a, c)
    rows = {tuple(r) for r in a.tolist()}
    assert len(rows) == 6 and rows <= {tuple(r) for r in ids[:320].view(10, 32).tolist()}
    assert info["samples"] == 6
    with pytest.raises(ValueError, match="10 windows of 32 tokens, fewer than the 11"):
        sample_windows(path, 11, 32, seed=0)
    with pytest.raises(ValueError, match="fewer than one window"):
        read_windows(path, 1000)


def test_a_loss_that_is_not_finite_is_an_error(tiny, stream):
    model = load_model(tiny, torch.float32)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="10 of 10 windows is not finite"):
        evaluate(model, tiny, Config(window=32), stream[0], RunLog())
