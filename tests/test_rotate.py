"""Rotations: Hadamard matrices, and a model that is the same function in another basis."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from methods import rotate
from methods.__main__ import main
from methods.core.job.files import read_json
from methods.core.job.log import RunLog
from methods.core.model.anatomy import block_linears
from methods.core.model.checkpoint import load_model
from methods.core.model.feeders import read_norms
from methods.core.model.hadamard import hadamard_orders, random_orthogonal
from methods.core.scheme import Scheme


@pytest.mark.parametrize("width", [2, 12, 20, 28, 36, 44, 64, 144, 576, 640, 896, 960, 1536])
def test_hadamard_matrices(width):
    matrix, made_of = random_orthogonal(width, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, width**-0.5), rtol=1e-12, atol=0)
    assert made_of.startswith("Hadamard")


@pytest.mark.parametrize("width", [6, 27, 54])
def test_a_width_without_a_hadamard_matrix_gets_an_orthogonal_one(width):
    assert hadamard_orders(width) is None
    matrix, made_of = random_orthogonal(width, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width).double(), rtol=0, atol=1e-12)
    assert made_of.startswith("random orthogonal")


def spread_gains(model):
    """Norms of a trained model have gains of many sizes; those of a new one are all 1."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            parameter.data.uniform_(0.2, 2)
    return model


def rotated(model, seed=0):
    torch.manual_seed(seed)
    return rotate.apply(model, Scheme("unquantized"), rotate.Config(), None, RunLog())


def test_the_norms_of_a_block_and_their_readers(tiny, tokens):
    readers = read_norms(load_model(tiny, torch.float32))
    assert readers["model.norm"] == ["lm_head"]
    assert [name.rpartition(".")[2] for name in readers["model.layers.1.input_layernorm"]] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]


def test_logits_are_the_same_and_weights_are_not(tiny, tokens):
    model, reference = spread_gains(load_model(tiny, torch.float32)), load_model(tiny, torch.float32)
    reference.load_state_dict(model.state_dict())
    assert model.config.tie_word_embeddings
    model = rotated(model)
    with torch.no_grad():
        before, after = (m(input_ids=tokens).logits for m in (reference, model))
    assert (after - before).norm() < 1e-4 * before.norm()
    for name, linear in block_linears(model).items():
        old = reference.get_submodule(name).weight
        assert (linear.weight - old).norm() > 0.5 * old.norm()
    assert not model.config.tie_word_embeddings


def test_pieces_of_a_matrix_make_the_whole(tiny, monkeypatch):
    """Of embedding, head, inputs and outputs of layers; pieces may be added up in another order."""
    whole = rotated(load_model(tiny, torch.float32)).state_dict()
    monkeypatch.setattr(rotate, "PIECE", 300)
    pieces = rotated(load_model(tiny, torch.float32)).state_dict()
    assert whole.keys() == pieces.keys()
    assert all(torch.allclose(pieces[name], tensor, rtol=1e-6, atol=1e-9) for name, tensor in whole.items())


def test_another_seed_is_another_rotation(tiny):
    first, second = (rotated(load_model(tiny, torch.float32), seed) for seed in (0, 1))
    name = next(iter(block_linears(first)))
    assert not torch.allclose(first.get_submodule(name).weight, second.get_submodule(name).weight)


def test_a_norm_that_subtracts_the_mean_is_refused(tiny):
    model = load_model(tiny, torch.float32)
    layer_norm = torch.nn.LayerNorm(model.config.hidden_size, bias=False)
    model.model.layers[1].input_layernorm = layer_norm
    with pytest.raises(ValueError, match="layers.1.input_layernorm is not an RMSNorm"):
        rotated(model)


def test_a_stream_with_another_writer_is_refused(tiny):
    model = load_model(tiny, torch.float32)
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda _m, _a, out: (out[0] + torch.linspace(0, 9, out[0].shape[-1]), *out[1:]))
    with pytest.raises(ValueError, match="is another function after the transform"):
        rotated(model)


def test_the_checkpoint_loads_in_plain_transformers_and_is_quantized_by_later_steps(tiny, tmp_path, tokens):
    source = ["--model", str(tiny), "--threads", "1"]
    main(["rotate", *source, "--output", str(tmp_path / "rotate"), "--cell", "{method: rotate}"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "rotate/checkpoint", dtype=torch.float32)
    reference = load_model(tiny, torch.float32)
    with torch.no_grad():
        before, after = (m(input_ids=tokens).logits for m in (reference, plain))
    assert (after - before).norm() < 1e-4 * before.norm()
    assert plain.get_output_embeddings().weight is not plain.get_input_embeddings().weight

    scheme = ["--scheme", "{weights: {bits: 4, group_size: 32}}", "--init-from", str(tmp_path / "rotate/checkpoint")]
    main(["rtn", *source, *scheme, "--output", str(tmp_path / "rtn"), "--cell", "{method: rotated-rtn}"])
    run = read_json(tmp_path / "rtn/run.json")
    assert [step["kind"] for step in run["steps"]] == ["transform", "ptq"] and run["chain"]["kind"] == "ptq"
    assert run["weights"] == str(tmp_path / "rotate/checkpoint")
    assert all(layer["weight_error"] < 0.2 for layer in run["layers"])
    loaded = load_model(tmp_path / "rtn/checkpoint", torch.float32)
    transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "rtn/checkpoint", dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(input_ids=tokens).logits
        torch.testing.assert_close(transformers(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-4)
    assert (logits - before).norm() < 0.5 * before.norm()
