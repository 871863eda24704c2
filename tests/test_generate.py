"""Text that a model generates for its own training, with LLM-QAT's hybrid sampling."""

import sys

import pytest
import torch

from methods.core.job.files import read_json, write_json
from methods.core.model.checkpoint import load_model
from methods.core.tokens import read_tokens, sample_windows, write_tokens
from workflow.prepare import generate as generating


@pytest.fixture(scope="module")
def model(tiny):
    model = load_model(tiny, torch.float32)
    model.generation_config.eos_token_id = None
    return model


def batch(model, count=6, length=24, seed=0):
    return generating.generate_batch(model, count, length, torch.Generator().manual_seed(seed))


def test_the_beginning_is_greedy_and_the_rest_is_sampled(model):
    """With and without the cache; 64 sequences, so that each number of greedy positions occurs."""
    sequences = torch.tensor(batch(model, 64, 16))
    with torch.no_grad():
        best = model(input_ids=sequences).logits.argmax(-1)[:, :-1]
    agrees = best == sequences[:, 1:]
    assert agrees[:, :3].all() and not agrees[:, 5:].all()
    greedy = agrees[:, :5].int().cumprod(-1).sum(-1)
    assert set(greedy.tolist()) == {3, 4, 5}
    assert len(set(sequences[:, 0].tolist())) > 40


def test_samples_follow_the_softmax(model):
    """The token after the greedy ones against its probabilities: the mean log-likelihood is minus the entropy."""
    sequences = torch.tensor(batch(model, 2000, 8))
    with torch.no_grad():
        logs = model(input_ids=sequences[:, :-1]).logits[:, -1].log_softmax(-1)
    found = logs.gather(-1, sequences[:, -1:]).mean()
    expected = (logs.exp() * logs).sum(-1).mean()
    assert abs(found - expected) < 0.1 and expected < -0.5


def test_a_sequence_ends_with_the_end_token_and_the_others_go_on_unchanged(tiny):
    """Those that have ended leave the batch; the rest still follow the model, as a pass without a cache shows."""
    model = load_model(tiny, torch.float32)
    model.generation_config.eos_token_id = None
    common = torch.tensor(batch(model, 64, 24)).flatten().bincount().argmax().item()
    model.generation_config.eos_token_id = [common]
    sequences = batch(model, 64, 24)
    lengths = [len(s) for s in sequences]
    assert min(lengths) < 24 == max(lengths)
    for sequence in sequences:
        assert common not in sequence[1:-1] and (sequence[-1] == common or len(sequence) == 24)
        with torch.no_grad():
            best = model(input_ids=torch.tensor([sequence])).logits[0].argmax(-1)
        assert best[:3].tolist()[: len(sequence) - 1] == sequence[1:4]


def run(tiny, output, *more):
    arguments = ["--model", tiny, "--tokens", 500, "--sequence-length", 32, "--batch-size", 4, "--threads", 1]
    sys.argv = ["generate", *map(str, [*arguments, "--output", output, *more])]
    generating.main()
    return read_tokens(output)[0]


def test_interrupted_and_resumed_gives_the_same_tokens(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    real, calls, stop = generating.generate_batch, [], []

    def counted(*arguments):
        calls.append(1)
        if len(calls) in stop:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(generating, "generate_batch", counted)
    whole = run(tiny, tmp_path / "whole.safetensors")
    batches = len(calls)
    stop.append(batches + 3)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "cut.safetensors")
    assert not (tmp_path / "cut.safetensors").exists()
    assert torch.equal(run(tiny, tmp_path / "cut.safetensors"), whole)
    assert len(calls) == batches + 3 + batches - 2 and batches > 3  # two finished ones were not generated again
    assert 500 <= len(whole) < 500 + 32
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == [
        "cut.json", "cut.safetensors", "whole.json", "whole.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("spoil", ["seed", "settings"])
def test_what_others_began_is_not_resumed(tiny, tmp_path, monkeypatch, spoil):
    """Parts of another seed, or parts without their settings (killed while they were being removed)."""
    monkeypatch.setattr(sys, "argv", [])
    whole = run(tiny, tmp_path / "whole.safetensors")
    parts = tmp_path / "cut.parts/batches"
    parts.mkdir(parents=True)
    write_tokens(parts / "000000.safetensors", torch.zeros(600), {"sequences": "1", "ended": "0", "milliseconds": "1"})
    if spoil == "seed":
        write_json(tmp_path / "cut.parts/settings.json", {"seed": 1})
    assert torch.equal(run(tiny, tmp_path / "cut.safetensors"), whole)


def test_the_manifest_and_the_windows(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    ids = run(tiny, tmp_path / "a.safetensors")
    manifest = read_json(tmp_path / "a.json")
    assert (
        manifest["tokens"] == len(ids) >= 500
        and manifest["model_sha256"] == read_json(tiny / "manifest.json")["sha256"]
    )
    windows, info = sample_windows(tmp_path / "a.safetensors", 15, 32, 0)
    assert windows.shape == (15, 32) and info["dataset"] == "generated"
    assert info["text_sha256"] == manifest["text_sha256"]


def test_longer_than_the_context_is_an_error(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(ValueError, match="longer than the model's context of 256"):
        run(tiny, tmp_path / "a.safetensors", "--sequence-length", 257)
