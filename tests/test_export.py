"""An export holds the checkpoint's very numbers, in a form that programs which are not ours read."""

import importlib.metadata
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file

from methods.core.formats.integer import Integer
from methods.core.job.files import read_json, write_json
from methods.core.model import gguf
from methods.core.model.anatomy import block_linears, replace_module
from methods.core.model.checkpoint import load_model, save_checkpoint
from methods.core.model.layers import QuantizedLinear
from methods.core.scales import ScaleSearch, choose_scale
from methods.core.tokens import read_windows, write_tokens
from methods.export import available
from methods.export.__main__ import main
from methods.export._card import HEADINGS, format_value
from tests.test_checkpoint import logits, quantized

TEXT = "Nine of 2,125 people -- naïve ones! -- don't read this.\n\n  And 37 do."
FORMATS = ("compressed-tensors", "gptq", "gguf")


def saved(source, folder, **weights):
    save_checkpoint(quantized(source, weights), source, folder)
    return folder


def saved_mixed(source, folder):
    """A checkpoint whose layers have 2, 3, 4 and 8 bits in groups of 32 or one per channel."""
    model = load_model(source, torch.float32)
    for i, (name, linear) in enumerate(block_linears(model).items()):
        grid = Integer((2, 3, 4, 8)[i % 4], (32, None)[i % 2])
        scale, zero_point = choose_scale(linear.weight, grid, ScaleSearch())
        replace_module(
            model, name, QuantizedLinear.replacing(linear, grid.quantize(linear.weight.detach(), scale, zero_point))
        )
    save_checkpoint(model, source, folder)
    return folder


def exported(source, form, folder, *arguments):
    main([str(source), "--format", form, "--output", str(folder), *arguments])
    return folder


def edit(path, **changes):
    write_json(path, read_json(path) | changes)


@pytest.fixture(scope="module")
def cell(llama, tmp_path_factory):
    """A cell as the commands make it, 4 bits by RTN, and full precision beside it; perplexity is of 3 of 4 windows."""
    from evals.__main__ import main as evaluate
    from methods.__main__ import main as quantize

    root = tmp_path_factory.mktemp("results") / "model"
    ids = torch.randint(0, 380, (128,), generator=torch.Generator().manual_seed(1))
    tokens = root.parent / "noise.safetensors"
    write_tokens(tokens, ids, {"dataset": "noise", "text_sha256": "f" * 64})
    jobs = {"perplexity": {"data": str(tokens), "options": {"window": 32, "max_windows": 3}}, "footprint": {}}
    model = llama()
    cells = (
        ("full_precision", "unquantized", {}),
        ("rtn", "w4-g64", {"weights": {"bits": 4, "group_size": 64}}),
    )
    for method, name, scheme in cells:
        folder = root / name / method / "seed0"
        names = {"model": "llama", "scheme": name, "method": method}
        arguments = ["--scheme", json.dumps(scheme), "--cell", json.dumps(names), "--threads", "1"]
        quantize([method, "--model", str(model), "--output", str(folder), *arguments])
        paths = ["--checkpoint", str(folder / "checkpoint"), "--output", str(folder / "evals")]
        evaluate([json.dumps(jobs), *paths, "--threads", "1"])
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder to import from: transformers, compressed-tensors, torch and what they declare to need, nothing else."""
    folder = tmp_path_factory.mktemp("site")
    pending, done = ["transformers", "compressed-tensors", "torch"], set()
    while pending:
        if (name := canonicalize_name(pending.pop())) in done:
            continue
        done.add(name)
        distribution = importlib.metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name)
    return folder


ALONE = """
import importlib.util, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("methods") is None and importlib.util.find_spec("pytest") is None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[2]))
ids = load_file(sys.argv[3])["ids"]
found = {}
for folder in sys.argv[5:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found[folder] = model(input_ids=ids, use_cache=False).logits
save_file(found, sys.argv[4])
"""


def logits_alone(site, folders, ids, work):
    """What plain transformers computes in fp32 where neither this project nor its other dependencies can be imported."""
    save_file({"ids": ids}, work / "ids.safetensors")
    arguments = [site, torch.get_num_threads(), work / "ids.safetensors", work / "logits.safetensors", *folders]
    command = [sys.executable, "-I", "-S", "-c", ALONE, *map(str, arguments)]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(work / "logits.safetensors")


def as_transformers_loads_it(checkpoint):
    """Our model, with weights that have zero points rounded to bfloat16: that is the dtype transformers computes them in."""
    model = load_model(checkpoint, torch.float32)
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.zero_point is not None:
            module.expanded = module.rounded().value(torch.bfloat16).float()
    return model


def test_compressed_tensors_in_plain_transformers(tiny, tokens, site, tmp_path):
    """Exactly, for every width, grouping and symmetry, and for layers of different widths."""
    sources = {"mixed": saved_mixed(tiny, tmp_path / "mixed")}
    for bits in range(2, 9):
        for group_size in ("channel", 32):
            for symmetric in (True, False):
                name = f"{bits}-{group_size}-{symmetric}"
                grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
                sources[name] = saved(tiny, tmp_path / name, **grid)
    folders = {n: exported(source, "compressed-tensors", tmp_path / "out" / n) for n, source in sources.items()}
    found = logits_alone(site, folders.values(), tokens, tmp_path)
    for name, source in sources.items():
        assert torch.equal(found[str(folders[name])], logits(as_transformers_loads_it(source), tokens)), name


def test_another_architecture_in_plain_transformers(gemma, tokens, site, tmp_path):
    """Gemma 3 in the two formats that hold a model as transformers has it; the one that rebuilds it names what it knows."""
    source = saved(gemma, tmp_path / "c", bits=4, group_size=32)
    folder = exported(source, "compressed-tensors", tmp_path / "ct")
    found = logits_alone(site, [folder], tokens, tmp_path)[str(folder)]
    assert torch.equal(found, logits(load_model(source, torch.float32), tokens))
    with pytest.raises(SystemExit, match="no GGUF export of Gemma3ForCausalLM; supported: LlamaForCausalLM"):
        exported(source, "gguf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def read_gguf(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("bits", "symmetric", "kind"),
    [
        *zip(range(2, 9), [True] * 7, ["Q4_0"] * 3 + ["Q5_0"] + ["Q8_0"] * 3, strict=True),
        *zip(range(2, 8), [False] * 6, ["Q4_0"] * 2 + ["Q5_0"] + ["Q8_0"] * 3, strict=True),
    ],
)
def test_gguf_in_plain_transformers(tiny, tokens, tmp_path, bits, symmetric, kind):
    """Exactly: the type of a grid holds all its levels."""
    from gguf import GGUFReader

    for group_size in ("channel", 32, 64):
        source = tmp_path / f"{group_size}"
        saved(tiny, source, bits=bits, group_size=group_size, symmetric=symmetric)
        folder = exported(source, "gguf", tmp_path / f"{group_size}-out")
        assert torch.equal(logits(read_gguf(folder), tokens), logits(load_model(source, torch.float32), tokens))
        types = {t.name.split(".")[-2]: t.tensor_type.name for t in GGUFReader(folder / "model.gguf").tensors}
        assert (types["attn_q"], types["ffn_norm"], types["token_embd"]) == (kind, "F32", "BF16")


def test_mixed_widths_in_gguf(tiny, tokens, tmp_path):
    source = saved_mixed(tiny, tmp_path / "c")
    found = logits(read_gguf(exported(source, "gguf", tmp_path / "out")), tokens)
    assert torch.equal(found, logits(load_model(source, torch.float32), tokens))


def test_a_head_of_its_own_in_gguf(llama, tokens, tmp_path):
    source = saved(llama(), tmp_path / "c", bits=4, group_size=32)
    found = logits(read_gguf(exported(source, "gguf", tmp_path / "out")), tokens)
    assert torch.equal(found, logits(load_model(source, torch.float32), tokens))


def unpacked(words, bits):
    """Unsigned numbers (rows, columns) of int32 words (rows, columns * bits / 32), filled from the lowest bit on."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(stream.reshape(len(words), -1, bits).astype(np.int64) @ (1 << np.arange(bits)))


GPTQ_GRIDS = [
    (bits, size, symmetric) for bits in (2, 3, 4, 8) for size in ("channel", 32) for symmetric in (True, False)
]


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GPTQ_GRIDS)
def test_gptq_read_as_it_is_defined(tiny, tmp_path, bits, group_size, symmetric):
    check_gptq(tiny, tmp_path, bits, group_size, symmetric)


def test_gptq_of_another_architecture(gemma, tmp_path):
    """What is not quantized is there as it was, and no more."""
    state = check_gptq(gemma, tmp_path, 4, 32, symmetric=True)
    layers = block_linears(load_model(gemma, torch.float32))
    parts = {f"{name}.{part}" for name in layers for part in ("qweight", "qzeros", "scales", "g_idx")}
    others = {
        k: t for k, t in load_file(gemma / "model.safetensors").items() if k.removesuffix(".weight") not in layers
    }
    assert state.keys() == parts | others.keys() and all(torch.equal(state[key], others[key]) for key in others)


def check_gptq(model, tmp_path, bits, group_size, symmetric):
    """scales * (codes - zero points) of what is in the file is the layer's weight exactly. The file's tensors."""
    source = saved(model, tmp_path / "c", bits=bits, group_size=group_size, symmetric=symmetric)
    folder = exported(source, "gptq", tmp_path / "out")
    config = read_json(folder / "config.json")
    assert "ptqat" not in config and read_json(folder / "quantize_config.json") == config["quantization_config"]
    settings = config["quantization_config"]
    assert (settings["bits"], settings["sym"], settings["desc_act"]) == (bits, symmetric, False)
    assert settings["group_size"] == (-1 if group_size == "channel" else group_size)
    assert settings["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    state = load_file(folder / "model.safetensors")
    for name, layer in load_model(source, torch.float32).named_modules():
        if isinstance(layer, QuantizedLinear):
            part = {key: state[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
            assert part["scales"].dtype == torch.float16
            codes = unpacked(part["qweight"].T, bits)
            zeros = unpacked(part["qzeros"], bits).T + (1 if symmetric else 0)
            weight = (codes - zeros[:, part["g_idx"]]) * part["scales"].float().T[:, part["g_idx"]]
            assert torch.equal(weight, layer.weight)
    return state


GPTQMODEL = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file, save_file
ids = load_file(sys.argv[1])["ids"]
found = {}
for folder in sys.argv[3:]:
    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.bfloat16).model
    with torch.no_grad():
        found[f"{folder}:logits"] = model(input_ids=ids, use_cache=False).logits
    for name, layer in model.named_modules():
        if hasattr(layer, "qweight"):
            layer.scales.data = layer.scales.data.float()  # to see the numbers before they are rounded for a product
            found[f"{folder}:{name}"] = layer.dequantize_weight().T.contiguous()
save_file(found, sys.argv[2])
"""


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
def test_gptq_in_gptqmodel(tiny, tokens, tmp_path):
    """Weights exactly, and so the logits that transformers computes with them; its own product is in bf16 only."""
    sources = {}
    # It takes ten seconds each; all grids are read by the definition above.
    for bits, group_size, symmetric in (
        (2, "channel", False),
        (3, 32, True),
        (4, 32, True),
        (4, 32, False),
        (8, 32, False),
    ):
        grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        source = saved(tiny, tmp_path / f"{bits}-{group_size}-{symmetric}", **grid)
        sources[str(exported(source, "gptq", tmp_path / "out" / source.name))] = source
    save_file({"ids": tokens}, tmp_path / "ids.safetensors")
    paths = [tmp_path / "ids.safetensors", tmp_path / "found.safetensors", *sources]
    command = [sys.executable, "-c", GPTQMODEL, *map(str, paths)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")
    for folder, source in sources.items():
        ours, plain = load_model(source, torch.float32), load_model(tiny, torch.float32)
        for name, linear in block_linears(plain).items():
            assert torch.equal(found[f"{folder}:{name}"], ours.get_submodule(name).weight)
            linear.weight.data = found[f"{folder}:{name}"]
        expected = logits(ours, tokens)
        assert torch.equal(logits(plain, tokens), expected)
        assert (found[f"{folder}:logits"].float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("rope", ["default", "llama3"])
def test_gguf_in_llama_cpp(llama, tmp_path, rope):
    """The same tokens; logits up to the rounding of activations to 8 bits that llama.cpp does."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from transformers import AutoTokenizer

    source = saved(llama(**LLAMA3 if rope == "llama3" else {}), tmp_path / "c", bits=4, group_size=32)
    folder = exported(source, "gguf", tmp_path / "out")
    program = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    ids = AutoTokenizer.from_pretrained(source)(TEXT).input_ids
    assert program.tokenize(TEXT.encode(), add_bos=False, special=True) == ids
    ids = torch.arange(200) % 380
    program.eval(ids.tolist())
    found = torch.tensor(np.array(program.scores[: len(ids)]))
    expected = logits(load_model(source, torch.float32), ids[None])[0]
    assert (found - expected).norm() < 0.03 * expected.norm()


LLAMA3 = {
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def test_the_rotary_frequencies_of_llama_3(llama, tmp_path):
    """Llama 3.1: as they are if the wave is short, divided by 8 if it is long, blended between."""
    from gguf import GGUFReader

    source = saved(llama(**LLAMA3), tmp_path / "c", bits=4, group_size=32)
    folder = exported(source, "gguf", tmp_path / "out")
    tensors = {t.name: t.data for t in GGUFReader(folder / "model.gguf").tensors}
    assert "llama.cpp reads that, transformers does not" in (folder / "README.md").read_text()
    expected = []
    for i in range(8):
        turns = 64 / (2 * math.pi * 10000.0 ** (2 * i / 16))  # that a frequency makes in the original context
        blend = min(1, max(0, (turns - 1) / (4 - 1)))
        expected.append(1 / (blend + (1 - blend) / 8))
    assert tensors["rope_freqs.weight"] == pytest.approx(expected, rel=1e-5)
    assert 1 in expected and 8 in expected


def test_the_tokenizer_in_gguf(llama, tmp_path):
    from transformers import AutoTokenizer

    source = saved(llama(), tmp_path / "c", bits=4, group_size=32)
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    folder = exported(source, "gguf", tmp_path / "out")
    ours, found = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    assert found(TEXT + "<|endoftext|>").input_ids == ours(TEXT + "<|endoftext|>").input_ids
    assert (found.eos_token, found.chat_template) == ("<|endoftext|>", "{{ messages[0]['content'] }}")
    assert len(found) == 384  # the ids that the model has beyond the tokenizer's


def test_how_text_is_split_has_llama_cpps_name():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    def name(*steps, model=models.BPE):
        tokenizer = Tokenizer(model())
        tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
        return gguf._pre_tokenizer(json.loads(tokenizer.to_str()))

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = {
        key: pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[key]), "isolated") for key in ("llama-bpe", "qwen2")
    }
    assert name(byte_level) == "gpt-2"
    assert name(pre_tokenizers.Digits(individual_digits=True), byte_level) == "smollm"
    assert name(split["llama-bpe"], plain) == "llama-bpe"
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for steps in ((split["qwen2"], plain), (plain,), (spaced,), (pre_tokenizers.Whitespace(),)):
        with pytest.raises(ValueError, match="no GGUF export of this tokenizer .* gpt-2, smollm, llama-bpe"):
            name(*steps)
    with pytest.raises(ValueError, match="WordLevel"):
        name(byte_level, model=models.WordLevel)


def perplexity(found, windows):
    """exp of the mean negative log-likelihood of the shifted tokens, of logits (windows, length, vocabulary)."""
    pairs = found[:, :-1].flatten(0, 1), windows[:, 1:].flatten()
    return math.exp(torch.nn.functional.cross_entropy(*pairs).item())


def test_the_export_has_the_perplexity_of_the_cell(cell, site, tmp_path):
    result = read_json(cell / "evals/perplexity.json")
    assert result["compute_dtype"] == "float32" or pytest.skip("the cell was evaluated in bf16")
    value = result["metrics"]["perplexity"]["value"]
    windows = read_windows(cell.parents[3] / "noise.safetensors", 32)[0][:3]
    folder = exported(cell, "compressed-tensors", tmp_path / "ct")
    found = logits_alone(site, [folder], windows, tmp_path)[str(folder)]
    assert perplexity(found, windows) == pytest.approx(value, rel=1e-6)
    found = logits(read_gguf(exported(cell, "gguf", tmp_path / "gguf")), windows)
    assert perplexity(found, windows) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_has_the_numbers_of_the_result_files(cell, tmp_path, form):
    from huggingface_hub import ModelCard

    folder = exported(cell, form, tmp_path / "out", "--license", "apache-2.0")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", None)
    assert "ptqat" in card.data.tags and form in card.data.tags and card.data.model_name == "llama-w4-g64-rtn"
    run = read_json(cell / "run.json")
    found = {(r.dataset_config, r.metric_type): r for r in card.data.eval_results}
    names = [("perplexity", "perplexity"), ("footprint", "bits_per_weight"), ("footprint", "size_mb")]
    assert sorted(found) == sorted(names)
    reference = cell.parents[2] / "unquantized/full_precision/seed0/evals"
    for evaluation, name in names:
        result, other = (read_json(path / f"{evaluation}.json") for path in (cell / "evals", reference))
        entry, shown = result["metrics"][name], found[evaluation, name]
        assert shown.metric_value == entry["value"] and shown.dataset_name == result["protocol"]
        values = [format_value(r["metrics"][name], r["partial"]) for r in (result, other)]
        assert f"| {HEADINGS[name]} | {values[0]} | {values[1]} | {result['protocol']} |" in card.text
    assert "† partial" in card.text and re.search(r"\| perplexity \| [\d.]+ ± [\d.]+ † \|", card.text)
    for fact in (
        run["checkpoint_sha256"],
        run["provenance"]["date"],
        run["model"]["sha256"],
        "quantized to 4 bits",
        "with `rtn`",
    ):
        assert fact in card.text
    weights = folder / ("model.gguf" if form == "gguf" else "model.safetensors")
    assert f"`{weights.name}`: {weights.stat().st_size / 1e6:,.1f} MB" in card.text
    assert "{" not in card.text.partition("## How it was made")[0].partition("\n---\n")[2]


def test_the_card_has_no_speeds(cell, tmp_path):
    """What reads an export has other kernels than the ones that were timed."""
    timed = read_json(cell / "evals/footprint.json") | {"evaluation": "throughput", "protocol": "prompt8"}
    write_json(cell / "evals/throughput.json", timed)
    try:
        assert "prompt8" not in (exported(cell, "gguf", tmp_path / "out") / "README.md").read_text()
    finally:
        (cell / "evals/throughput.json").unlink()


def test_the_card_tells_what_is_not_of_this_checkpoint(cell, tmp_path):
    copy = tmp_path / "model/w4-g64/rtn/seed0"
    shutil.copytree(cell, copy)
    edit(copy / "evals/perplexity.json", checkpoint_sha256="0" * 64)
    edit(copy / "run.json", departures=["layer 7 was skipped"])
    text = (exported(copy, "gguf", tmp_path / "out") / "README.md").read_text()
    assert "| perplexity |" not in text and "another checkpoint were left out: perplexity" in text
    assert "Departure from the plan: layer 7 was skipped." in text
    assert (
        "| bits per weight of the checkpoint | 4.25 bits |  | stored |" in text
    )  # there is no full precision beside it


def test_a_model_from_the_hub_is_named_as_the_base(cell, tmp_path):
    from huggingface_hub import ModelCard

    copy = tmp_path / "cell"
    shutil.copytree(cell, copy)
    model = read_json(copy / "run.json")["model"] | {"spec": {"path": "someone/something"}, "revision": "abc"}
    edit(copy / "run.json", model=model)
    data = ModelCard.load(exported(copy, "gptq", tmp_path / "out") / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("someone/something", "quantized")


@pytest.mark.parametrize("form", FORMATS)
def test_a_bare_checkpoint_is_exported_without_numbers(cell, tmp_path, form):
    from huggingface_hub import ModelCard

    shutil.copytree(cell / "checkpoint", tmp_path / "copy")
    card = ModelCard.load(exported(tmp_path / "copy", form, tmp_path / "out") / "README.md")
    assert card.data.eval_results is None and "What was measured" not in card.text
    assert "There was no run.json" in card.text


def test_an_export_has_nothing_of_ours_in_it(cell, tmp_path):
    folder = exported(cell, "compressed-tensors", tmp_path / "out")
    assert "ptqat" not in read_json(folder / "config.json")
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}
    assert (folder / "model.safetensors").read_bytes() == (cell / "checkpoint/model.safetensors").read_bytes()


def test_vllm_is_told_to_be_unable_where_it_is(tiny, tmp_path):
    source = saved_mixed(tiny, tmp_path / "c")
    text = (exported(source, "compressed-tensors", tmp_path / "out") / "README.md").read_text()
    assert "q_proj, k_proj, v_proj of a block have different grids" in text
    assert "vLLM's kernels for this format know 4 and 8 bits; whether its version has any for 2, 3 is" in text


@pytest.mark.parametrize(
    ("form", "weights", "message"),
    [
        ("gptq", {"bits": 5, "group_size": 32}, "cannot have 5 bits; valid: 2, 3, 4, 8"),
        ("gptq", {"bits": 4, "group_size": 8}, "cannot have groups of 8; valid: 16, 32"),
        (
            "gptq",
            {"bits": 4, "group_size": 192, "other_group_size": 32},
            "one grid for all layers.*use compressed-tensors",
        ),
        ("gguf", {"bits": 4, "group_size": 16}, "blocks of 32 columns; groups of 16"),
        ("gguf", {"bits": 8, "group_size": 32, "symmetric": False}, "no GGUF type holds 8-bit codes with zero points"),
        (
            "gptq",
            {"bits": 4, "scale_dtype": "float32"},
            "scales are not float16 numbers, for example .*scale_dtype: float16",
        ),
        ("gguf", {"bits": 4, "scale_dtype": "float32"}, "scales are not float16 numbers"),
    ],
)
def test_what_a_format_cannot_hold_is_an_error(tiny, tmp_path, form, weights, message):
    source = saved(tiny, tmp_path / "c", **weights)
    with pytest.raises(SystemExit, match=message):
        exported(source, form, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    exported(source, "compressed-tensors", tmp_path / "out")


@pytest.mark.parametrize("form", FORMATS)
def test_what_no_program_would_apply_is_an_error(tiny, tmp_path, form):
    with pytest.raises(SystemExit, match="nothing quantized to export"):
        exported(tiny, form, tmp_path / "out")
    source = saved(tiny, tmp_path / "c", bits=4)
    tokens = {"model.layers.0.mlp.up_proj": {"input_tokens": {"bits": 8, "symmetric": True}}}
    edit(source / "config.json", ptqat={"tokens": tokens})
    with pytest.raises(SystemExit, match="quantizes more than weights .ptqat: tokens"):
        exported(source, form, tmp_path / "out")


def test_zero_points_of_different_grids_are_an_error(tiny, tmp_path):
    source = saved(tiny, tmp_path / "c", bits=4, symmetric=False)
    quantization = read_json(source / "config.json")["quantization_config"]
    groups = quantization["config_groups"]
    edit(
        source / "config.json", quantization_config=quantization | {"config_groups": groups | {"b": groups["group_0"]}}
    )
    with pytest.raises(SystemExit, match="transformers cannot load zero points of 2 different grids"):
        exported(source, "compressed-tensors", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "no GGUF export of Qwen3ForCausalLM; supported: LlamaForCausalLM"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'; supported: default, llama3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; supported: silu"),
        ({"attention_bias": True}, "linear layers with a bias"),
        ({"vocab_size": 200}, "id 255, but the model's vocabulary is 200"),
    ],
)
def test_models_that_the_gguf_export_does_not_know(tiny, tmp_path, changes, message):
    source = saved(tiny, tmp_path / "c", bits=4, group_size=32)
    edit(source / "config.json", **changes)
    with pytest.raises(SystemExit, match=message):
        exported(source, "gguf", tmp_path / "out")


def test_mistakes_are_found_before_torch_is_imported(tiny, tmp_path):
    source = saved(tiny, tmp_path / "c", bits=8, group_size=16, symmetric=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    cases = (
        ([source, "ggufs", tmp_path / "out"], "valid: compressed-tensors, gguf, gptq. Did you mean 'gguf'?"),
        ([source, "gguf", tmp_path / "full"], "full exists; remove it or name another folder"),
        ([tmp_path / "none", "gguf", tmp_path / "out"], "none is neither a cell nor a checkpoint"),
        ([source, "gguf", tmp_path / "out"], "no GGUF type holds 8-bit codes"),
    )
    script = (
        "import sys\nfrom methods.export.__main__ import main\n"
        "try:\n    main([sys.argv[1], '--format', sys.argv[2], '--output', sys.argv[3]])\n"
        "except SystemExit as error:\n    print(error)\nassert 'torch' not in sys.modules"
    )
    for arguments, message in cases:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        assert done.returncode == 0 and message in done.stdout, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "full"]


def test_the_checkpoint_of_a_cell_stands_for_the_cell(cell, tmp_path):
    texts = [
        (exported(f, "gguf", tmp_path / n / "out") / "README.md").read_text()
        for n, f in (("a", cell), ("b", cell / "checkpoint"))
    ]
    assert re.sub("Exported: .*", "", texts[0]) == re.sub("Exported: .*", "", texts[1])


def test_a_checkpoint_that_run_json_does_not_describe_is_an_error(cell, tmp_path):
    shutil.copytree(cell, tmp_path / "cell")
    edit(tmp_path / "cell/run.json", checkpoint_sha256="0" * 64)
    with pytest.raises(SystemExit, match="is not the checkpoint that .*run.json describes"):
        exported(tmp_path / "cell", "gguf", tmp_path / "out")


def test_a_format_is_a_file():
    assert available() == ["compressed-tensors", "gguf", "gptq"]
