"""The beginning-of-sequence token: who adds it, and that every window of every purpose begins with it, or none."""

import json
import math
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from evals import perplexity
from methods.core.formats import make
from methods.core.job import runtime
from methods.core.job.files import read_json
from methods.core.job.log import RunLog
from methods.core.model.checkpoint import load_model, save_checkpoint
from methods.core.model.layers import QuantizedLinear
from methods.core.scales import ScaleSearch, choose_scale
from methods.core.tokens import added_bos, read_tokens, read_windows, sample_windows, write_tokens
from workflow.prepare import generate as generating
from workflow.prepare import model as preparing
from workflow.prepare import tokenize as tokenizing

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BOS = ALPHABET.index("!")  # any token will do
FACTS = {"dataset": "noise", "text_sha256": "f" * 64}
TEXT = "Some text, longer than a window. " * 20


def make_tokenizer(template=None, **special):
    """Bytes as tokens; `template` as in Llama's and Gemma's tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("!", BOS), ("?", ALPHABET.index("?"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TOKENIZERS = {
    "adds": make_tokenizer("! $A", bos_token="!"),
    "adds both": make_tokenizer("! $A ?", bos_token="!", eos_token="?"),
    "knows": make_tokenizer(bos_token="!"),
    "has none": make_tokenizer(),
}


@pytest.fixture
def source(tiny, tmp_path):
    """Makes the folder of the tiny model with one of the tokenizers, unprepared."""

    def make(kind):
        folder = tmp_path / "source"
        load_model(tiny, torch.bfloat16).save_pretrained(folder)
        TOKENIZERS[kind].save_pretrained(folder)
        return folder

    return make


def prepare(source, output, **spec):
    preparing.prepare({"path": str(source), **spec}, output)
    return output


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.mark.parametrize(("kind", "bos"), [("adds", BOS), ("adds both", BOS), ("knows", None), ("has none", None)])
def test_who_adds_it(kind, bos):
    assert added_bos(TOKENIZERS[kind]) == bos


def test_another_beginning_is_an_error():
    with pytest.raises(ValueError, match=r"makes '\?a' of 'a'"):
        added_bos(make_tokenizer("? $A", bos_token="!"))


@pytest.mark.parametrize(
    ("kind", "spec", "bos"),
    [
        ("adds", {}, BOS),
        ("adds", {"bos": True}, BOS),
        ("adds", {"bos": False}, None),
        ("knows", {}, None),
        ("knows", {"bos": True}, BOS),
        ("has none", {"bos": False}, None),
    ],
)
def test_the_prepared_tokenizer_does_it_and_so_do_the_checkpoints(source, tmp_path, kind, spec, bos):
    folder = prepare(source(kind), tmp_path / "m", **spec)
    save_checkpoint(load_model(folder, torch.float32), folder, tmp_path / "c")
    for place in (folder, tmp_path / "c"):
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert added_bos(tokenizer) == bos and tokenizer("ab").input_ids[-1] == ALPHABET.index("b")
    assert read_json(folder / "manifest.json")["spec"].get("bos") == spec.get("bos")


def test_one_without_it_cannot_add_it(source, tmp_path):
    with pytest.raises(ValueError, match="bos is true in the configuration, but the tokenizer has no BOS token"):
        prepare(source("has none"), tmp_path / "m", bos=True)


@pytest.fixture
def tokenized(source, tmp_path, monkeypatch):
    """Makes the token file of TEXT by the tokenizer of a prepared model."""

    def make(kind, **spec):
        folder, output = prepare(source(kind), tmp_path / "m", **spec), tmp_path / "t.safetensors"
        (tmp_path / "documents.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
        text = tmp_path / "documents.jsonl"
        run(tokenizing, monkeypatch, "--model", folder, "--text", text, "--dataset", "text", "--output", output)
        return output

    return make


@pytest.mark.parametrize("kind", ["adds", "adds both"])
def test_every_window_begins_with_it(tokenized, kind):
    path = tokenized(kind)
    plain = TOKENIZERS["has none"](TEXT).input_ids
    ids, info = read_tokens(path)
    assert ids.tolist() == plain and info["bos_token_id"] == info["tokenizer_bos_token_id"] == str(BOS)
    windows, _ = read_windows(path, 32)
    assert windows.shape == (len(plain) // 31, 32) and (windows[:, 0] == BOS).all()
    assert windows[:, 1:].flatten().tolist() == plain[: windows.shape[0] * 31]
    samples, _ = sample_windows(path, 4, 32, seed=0)
    assert (samples[:, 0] == BOS).all()
    # The papers' windows: of the text as its tokenizer makes it, once.
    first, _ = read_windows(path, 32, "first")
    assert first.flatten().tolist() == [BOS, *plain][: first.numel()] and len(first) == (len(plain) + 1) // 32


@pytest.mark.parametrize(("kind", "spec"), [("knows", {}), ("has none", {}), ("adds", {"bos": False})])
def test_without_it_windows_are_those_of_the_text(tokenized, kind, spec):
    path = tokenized(kind, **spec)
    plain = TOKENIZERS["has none"](TEXT).input_ids
    for bos in ("each", "first"):
        windows, info = read_windows(path, 32, bos)
        assert windows.flatten().tolist() == plain[: len(plain) // 32 * 32] and info["bos_token_id"] == ""
    assert info["tokenizer_bos_token_id"] == ("" if kind == "has none" else str(BOS))


def test_a_window_of_nothing_but_it_is_an_error(tokenized):
    with pytest.raises(ValueError, match="fewer than one window of 1"):
        read_windows(tokenized("adds"), 1)


def test_generated_sequences_follow_it(tiny):
    """With the cache and without: the greedy tokens are the model's own after BOS and the random one."""
    model = load_model(tiny, torch.float32)
    model.generation_config.eos_token_id = None
    sequences = torch.tensor(generating.generate_batch(model, 8, 16, torch.Generator().manual_seed(0), BOS))
    assert sequences.shape == (8, 15)
    with torch.no_grad():
        whole = torch.nn.functional.pad(sequences, (1, 0), value=BOS)
        best = model(input_ids=whole).logits.argmax(-1)[:, 1:-1]
        without = model(input_ids=sequences).logits.argmax(-1)[:, :-1]
    assert (best == sequences[:, 1:])[:, :3].all() and not (without == sequences[:, 1:])[:, :3].all()


@pytest.mark.parametrize("bos", [True, False])
def test_windows_of_generated_text_are_its_sequences(source, tmp_path, monkeypatch, bos):
    """If the model ends none: the greedy tokens of each window are then those that the model predicts."""
    folder, output = prepare(source("knows"), tmp_path / "m", bos=bos), tmp_path / "g.safetensors"
    monkeypatch.setattr(generating, "end_tokens", lambda model: [])
    monkeypatch.setattr(runtime, "compute_dtype", lambda folder: torch.float32)
    arguments = ["--model", folder, "--tokens", 256, "--sequence-length", 32, "--batch-size", 4, "--threads", 1]
    run(generating, monkeypatch, *arguments, "--output", output)
    windows, info = read_windows(output, 32)
    assert len(windows) >= 8 and read_json(output.with_suffix(".json"))["bos_token_id"] == (BOS if bos else None)
    assert ((windows[:, 0] == BOS).all()) == bos and info["bos_token_id"] == (str(BOS) if bos else "")
    with torch.no_grad():
        best = load_model(folder, torch.float32)(input_ids=windows).logits.argmax(-1)
    first = 1 if bos else 0
    assert torch.equal(best[:, first : first + 3], windows[:, first + 1 : first + 4])


@pytest.fixture
def stream(tmp_path):
    """A token file with or without BOS, of 10 windows of 32 tokens, 310 tokens of text."""

    def make(**facts):
        ids = torch.randint(0, 256, (310,), generator=torch.Generator().manual_seed(1))
        write_tokens(tmp_path / "t.safetensors", ids, FACTS | facts)
        return tmp_path / "t.safetensors", ids

    return make


def perplexity_of(model, path, **options):
    checkpoint = None  # perplexity reads the model only
    return perplexity.evaluate(model, checkpoint, perplexity.Config(window=32, **options), path, RunLog())


def test_perplexity_scores_it_as_context_only_and_says_so(tiny, stream):
    """exp of the mean of transformers' own loss on windows that begin with BOS, over their 31 further tokens."""
    path, ids = stream(bos_token_id="7", tokenizer_bos_token_id="7")
    model = load_model(tiny, torch.float32)
    result = perplexity_of(model, path)
    windows = torch.nn.functional.pad(ids.view(10, 31), (1, 0), value=7)
    with torch.no_grad():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows]
    assert result.metrics["perplexity"]["value"] == pytest.approx(math.exp(sum(losses) / 10), rel=1e-5)
    assert (result.protocol, result.n) == ("gptq-32+bos/noise@ffffffff", 10)


def test_the_papers_protocol_has_it_once(tiny, stream):
    path, ids = stream(bos_token_id="7", tokenizer_bos_token_id="7")
    model = load_model(tiny, torch.float32)
    result = perplexity_of(model, path, bos="papers")
    windows = torch.cat([torch.tensor([7]), ids])[:288].view(9, 32)
    with torch.no_grad():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows]
    assert result.items["nll"] == pytest.approx(losses, rel=1e-5)
    assert (result.protocol, result.n) == ("gptq-32+bos-once/noise@ffffffff", 9)


def dependent(model, factor):
    """The model with its logits multiplied by `factor` where no BOS is before them: a random one is wrong more loudly."""

    def hook(module, args, kwargs, output):
        if (kwargs["input_ids"][:, 0] != 7).any():
            output.logits = output.logits * factor

    model.register_forward_hook(hook, with_kwargs=True)
    return model


def test_a_model_that_lacks_it_is_an_error_that_says_what_to_set(tiny, stream):
    path, _ = stream(bos_token_id="", tokenizer_bos_token_id="7")
    model = dependent(load_model(tiny, torch.float32), 1.5)
    with pytest.raises(
        ValueError, match=r"perplexity of 4 windows is [\d.]+ without and [\d.]+ with it.*bos: true"
    ) as e:
        perplexity_of(model, path)
    without, with_bos = (
        float(n) for n in str(e.value).split("windows is ")[1].split(" with it")[0].split(" without and ")
    )
    assert with_bos < 0.95 * without
    assert perplexity_of(model, path, bos="papers").protocol == "gptq-32/noise@ffffffff"
    path, _ = stream(bos_token_id="7", tokenizer_bos_token_id="7")
    assert perplexity_of(model, path).protocol == "gptq-32+bos/noise@ffffffff"


def test_a_model_that_does_not_is_none(tiny, stream):
    """Nor one that gains a little, one that has no BOS token, or one that is quantized."""
    path, _ = stream(bos_token_id="", tokenizer_bos_token_id="7")
    assert perplexity_of(load_model(tiny, torch.float32), path).protocol == "gptq-32/noise@ffffffff"
    perplexity_of(dependent(load_model(tiny, torch.float32), 1.005), path)
    needs = dependent(load_model(tiny, torch.float32), 1.5)
    path, _ = stream()
    perplexity_of(needs, path)
    path, _ = stream(bos_token_id="", tokenizer_bos_token_id="7")
    mlp, form = needs.model.layers[0].mlp, make("integer", 8, None)
    weight = mlp.up_proj.weight.detach()
    mlp.up_proj = QuantizedLinear.replacing(
        mlp.up_proj, form.quantize(weight, *choose_scale(weight, form, ScaleSearch()))
    )
    perplexity_of(needs, path)


def test_the_check_compares_the_same_tokens(tiny, stream, monkeypatch):
    path, ids = stream(bos_token_id="", tokenizer_bos_token_id="7")
    model, log, said = load_model(tiny, torch.float32), RunLog(), []
    monkeypatch.setattr(log, "info", said.append)
    perplexity.evaluate(model, tiny, perplexity.Config(window=32), path, log)
    windows = ids[: 9 * 32].view(9, 32)[:4]
    with torch.no_grad():
        without = model(input_ids=windows).logits[:, :30]
        after = model(input_ids=torch.nn.functional.pad(windows, (1, 0), value=7)).logits[:, 1:31]
    targets = windows[:, 1:31].flatten()
    before, after = (math.exp(torch.nn.functional.cross_entropy(x.flatten(0, 1), targets)) for x in (without, after))
    assert "worse than by a guess" in said.pop(0)  # a random model
    assert said == [f"perplexity of the first 4 windows: {before:.4g}, and {after:.4g} after a BOS token"]
