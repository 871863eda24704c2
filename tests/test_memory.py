"""The estimate of training memory against the tensors that autograd really keeps, and a 7B shape."""

import pytest
import torch
from transformers import LlamaConfig

from methods import dl_qat, lr_qat
from methods.core.formats.integer import Integer
from methods.core.model.anatomy import checkpoint_blocks, decoder_blocks
from methods.core.model.checkpoint import load_model
from methods.core.training.layers import TrainedLinear, insert
from tests.bench.memory import ROWS, activation_bytes, counts, training_peak


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
    model.requires_grad_(False)
    insert(model, lambda _, linear: TrainedLinear(linear, kinds[name](linear, Integer(4, 32), configs[name])))
    for n, p in model.named_parameters():
        p.requires_grad_("parametrization" in n)
    blocks = len(decoder_blocks(model)[1])
    expected = blocks * tokens.numel() * activation_bytes(model.config, dtype.itemsize)
    assert kept(model, tokens) == pytest.approx(expected, rel=0.15)


def test_checkpointing_keeps_little(tiny, tokens):
    model = load_model(tiny, torch.float32)
    insert(model, lambda _, linear: TrainedLinear(linear, lr_qat.LowRank(linear, Integer(4, 32), lr_qat.Config())))
    whole = kept(model, tokens)
    checkpoint_blocks(model)
    assert kept(model, tokens) < 0.3 * whole


def test_the_peak_grows_with_what_is_trained_and_kept():
    config = LlamaConfig()  # the shape of LLaMA-7B
    peak = training_peak(config, 1024, 2, static=7e9, trained=80_000_000)
    assert training_peak(config, 1024, 2, static=7e9, trained=80_000_000, checkpointing=True) < peak - 4e9
    assert training_peak(config, 2048, 2, static=7e9, trained=80_000_000) > peak + 4e9
    # Full-weight training: fp32 weights, gradients and two moments are 16 bytes per weight.
    weights = 6_476_005_376
    assert training_peak(config, 1024, 2, static=4 * weights, trained=weights) > 16 * weights


def test_dl_qat_trains_less_than_one_percent_of_a_7b_shape():
    row = next(row for row in ROWS if row.module is dl_qat)
    for group_size in (128, 4096):
        weights, other, trained = counts(LlamaConfig(), row, group_size)
        assert weights + other == 6_738_415_616 and trained < 0.01 * (weights + other)
