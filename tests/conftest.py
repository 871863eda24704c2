"""A tiny random Llama in a prepared-model folder, enough for contracts, and the smoke run, whose numbers mean something."""

import functools
import os
import re
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from methods.core.job.cores import available_cores

# Several processes share the cores; before torch counts them.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // int(workers))))

import torch

from methods.core.job.files import model_hashes, read_json, sha256_folder, write_json
from tests.smoke import copy_checkout, snakemake


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the tracked files."""
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def smoke(request, checkout, tmp_path_factory):
    """The checkout after the whole smoke configuration has run; its numbers are those of the committed baseline.

    Of several test processes (pytest-xdist) the first that asks for it makes it, once even if it fails; each has a copy.
    """
    own = tmp_path_factory.getbasetemp()
    made = (own.parent if hasattr(request.config, "workerinput") else own) / "smoke"
    failure = made.with_name("smoke.failure")
    with FileLock(f"{made}.lock"):
        if not made.exists():
            done = snakemake(checkout, targets=("reports/summary.md", "regression"))
            failure.write_text((done.stdout[-5000:] or "it failed") if done.returncode else "")
            checkout.rename(made)
    assert not failure.read_text(), failure.read_text()
    shutil.rmtree(checkout, ignore_errors=True)
    return shutil.copytree(made, checkout, symlinks=True)


def pytest_collection_modifyitems(config, items):
    """Of several processes one makes the smoke run while others do what does without it; the other tests of it are last."""
    if hasattr(config, "workerinput"):
        first = next((item.path for item in items if uses_smoke(item.path)), None)
        items.sort(key=lambda item: (item.path != first, uses_smoke(item.path)))


@functools.cache
def uses_smoke(file):
    return bool(re.search(r"def \w+\([^)]*\bsmoke\b", file.read_text()))


SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a two-block model, 64 and 192 wide, with a tokenizer of bytes, as workflow/prepare/model.py leaves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2))
    return prepared(model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    """Folder of a Gemma 3 of the same widths. Its first and third block of three attend to the last 16 tokens only."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        **SHAPE, num_hidden_layers=3, head_dim=16, query_pre_attn_scalar=16, sliding_window=16, layer_types=kinds
    )
    return prepared(Gemma3ForCausalLM(config), tmp_path_factory.mktemp("models") / "gemma")


def prepared(model, folder):
    """The model in bfloat16 in a folder with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    write_json(folder / "manifest.json", {"spec": {}, "parameters": model.num_parameters()})
    return described(folder)


def described(folder):
    """A prepared model whose files were changed, with a manifest of what is there."""
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | model_hashes(folder))
    return folder


def flip(path):
    """Another byte in the middle of a file, whose time is kept, as bit rot keeps it."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Makes the folder of a two-block Llama with a byte-level BPE of 384 tokens; arguments are of its configuration."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def make(**settings):
        folder = tmp_path_factory.mktemp("llama") / "llama"
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=380, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
        end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)
        config = LlamaConfig(
            **{
                "vocab_size": 384,
                "hidden_size": 64,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "initializer_range": 0.1,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "tie_word_embeddings": False,
                **settings,
            }
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        manifest = {"spec": {"path": "made by a test"}, "revision": None, "parameters": 1}
        write_json(folder / "manifest.json", manifest | {"sha256": sha256_folder(folder, ("*.safetensors",))})
        return folder

    return make


@pytest.fixture
def tokens():
    """Token ids (8, 32) for the tiny model."""
    return torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
