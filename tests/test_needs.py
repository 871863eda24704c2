"""What jobs are predicted to need: against the tensors that autograd really keeps, and by hand for shapes of 7B and more."""

import os
import platform
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import LlamaConfig

from methods import dl_qat, lr_qat
from methods.core.formats.integer import Integer
from methods.core.job.registry import Held
from methods.core.model.anatomy import checkpoint_blocks, decoder_blocks
from methods.core.model.checkpoint import load_model
from methods.core.training.layers import TrainedLinear, insert
from workflow.configuration import ROOT, Model
from workflow.needs import HEAD_ROOM, activation_bytes, of_pretraining, of_tokenizing, trained_values, training_peak
from workflow.shapes import Shape, UnknownShape, shape_of


def kept(model, tokens):
    """Bytes of the distinct tensors that a forward pass keeps for the backward pass, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(input_ids=tokens, use_cache=False)
    assert output.logits.requires_grad
    return sum(s.nbytes() for s in seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lr_qat", "dl_qat"])
def test_activations_kept_by_a_block(tiny, tokens, name, dtype):
    model = load_model(tiny, dtype)
    kinds = {"lr_qat": lr_qat.LowRank, "dl_qat": dl_qat.Decomposed}
    configs = {"lr_qat": lr_qat.Config(), "dl_qat": dl_qat.Config()}
    insert(model, lambda _, linear: TrainedLinear(linear, kinds[name](linear, Integer(4, 32), configs[name])))
    blocks = len(decoder_blocks(model)[1])
    expected = blocks * tokens.numel() * activation_bytes(shape_of(tiny), dtype.itemsize)
    assert kept(model, tokens) == pytest.approx(expected, rel=0.15)


def test_checkpointing_keeps_little(tiny, tokens):
    model = load_model(tiny, torch.float32)
    insert(model, lambda _, linear: TrainedLinear(linear, lr_qat.LowRank(linear, Integer(4, 32), lr_qat.Config())))
    whole = kept(model, tokens)
    checkpoint_blocks(model)
    assert kept(model, tokens) < 0.3 * whole


SEVEN = Shape.of(LlamaConfig().to_dict())  # LLaMA-7B


def test_the_shape_of_llama_7b():
    assert SEVEN.weights == 6_476_005_376 and SEVEN.weights + SEVEN.others == 6_738_149_376  # all but the norms
    assert SEVEN.visited == SEVEN.weights + 32000 * 4096 and SEVEN.widest == 11008


def test_the_shape_of_a_mixture_of_experts():
    """Mixtral 8x7B: 46.7 billion parameters, of which a token visits 12.9 billion."""
    config = LlamaConfig(
        intermediate_size=14336, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2
    ).to_dict()
    shape = Shape.of(config)
    assert shape.weights + shape.others == pytest.approx(46.7e9, rel=0.002)
    assert shape.visited + 32000 * 4096 == pytest.approx(12.9e9, rel=0.003)


def test_experts_that_are_not_counted_are_an_unknown_shape():
    ernie = {"moe_num_experts": 8, "moe_k": 2, **LlamaConfig().to_dict()}
    assert (Shape.of(ernie).experts, Shape.of(ernie).active) == (8, 2)
    with pytest.raises(UnknownShape, match="it has num_experts_in_all, but no num_local_experts or num_experts"):
        Shape.of({"num_experts_in_all": 8, **LlamaConfig().to_dict()})


def test_what_tokenizing_and_training_from_nothing_ask_for():
    """A text of 4 million characters took 937 MB (SmolLM2's tokenizer, 2026-11-29), and no piece is longer than 16."""
    assert 0.9e9 < of_tokenizing(4_000_000).host < 1.3e9
    assert of_tokenizing(10**9).host - of_tokenizing(10**8).host == pytest.approx(HEAD_ROOM * 2 * 9e8)
    train = yaml.safe_load((ROOT / "workflow/config/default.yaml").read_text())["models"]["llama-1b-random"]["train"]
    llama = Model("llama-1b-random", {"train": train}, trained_on="squad")
    assert 16 * 1.0e9 < of_pretraining(llama, 10**6).host < 30e9  # weights, gradients and moments of a billion in fp32


def test_a_config_without_a_size_names_it():
    with pytest.raises(ValueError, match="no hidden_size or n_embd"):
        Shape.of({"num_hidden_layers": 2})


def test_the_peak_grows_with_what_is_trained_and_kept():
    low_rank, full = Held(frozen=1, rank=32), Held(frozen=0, trained=1)
    peak = training_peak(SEVEN, low_rank, 1024, 2, checkpointing=False)
    assert training_peak(SEVEN, low_rank, 1024, 2, checkpointing=True) < peak - 4e9
    assert training_peak(SEVEN, low_rank, 2048, 2, checkpointing=False) > peak + 4e9
    # fp32 weights, gradients and two moments are 16 bytes per weight.
    assert training_peak(SEVEN, full, 1024, 2, checkpointing=False) > 16 * SEVEN.weights


def test_a_training_that_is_divided_among_processes():
    """Full QAT of LLaMA-7B with a teacher: 120 GB on one GPU, on four below 40."""
    held = Held(frozen=0, trained=1, teacher=True)
    alone, of_four = (training_peak(SEVEN, held, 1024, 2, True, processes) for processes in (1, 4))
    assert alone > 110e9 and of_four < 40e9
    # What is divided is a quarter; activations, logits and two blocks are not.
    whole = 2 * SEVEN.others + 2 * 4 * trained_values(SEVEN, held) / SEVEN.layers
    assert alone / 4 < of_four < alone / 4 + whole + 4e9


def test_dl_qat_trains_less_than_one_percent_of_a_7b_shape():
    held = dl_qat.held(dl_qat.Config(), samples=1)
    scales = trained_values(SEVEN, Held())  # one for 64 weights; the paper has one for 128
    assert trained_values(SEVEN, held) - scales / 2 < 0.01 * (SEVEN.weights + SEVEN.others)


# Thirty times the divergence of some windows, of which a small tensor stays; prints how many MB more than before that took.
FREED = """
import torch
from methods.core.job import runtime

runtime.set_up(1, 0)
before, kept = runtime.peak_memory_mb()["host"], []
for _ in range(30):
    p = torch.ones(512, 4096).double()
    q = p.log_softmax(-1)
    kept.append((p.exp() * (p - q)).sum(-1))
    del p, q
print(runtime.peak_memory_mb()["host"] - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_freed_memory_is_used_again():
    """Else what a job takes would differ from run to run, by six times what it works on here."""
    (setting,) = re.findall(r"export GLIBC_TUNABLES=.*?; ", (ROOT / "Snakefile").read_text())
    command = setting.replace("{{", "{").replace("}}", "}") + shlex.join([sys.executable, "-c", FREED])
    environment = os.environ | {"PTQAT_DEVICE": "cpu"}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150  # five tensors of 17 MB, and libraries
