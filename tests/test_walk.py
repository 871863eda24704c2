"""The walk through the blocks: the order of the stages, and whose inputs a layer sees."""

import pytest
import torch

from methods.core.job.log import RunLog
from methods.core.model.activations import fake_quantize_tokens, mark_layers
from methods.core.model.anatomy import block_linears, decoder_blocks
from methods.core.model.blocks import block_inputs
from methods.core.model.checkpoint import load_model
from methods.core.model.hessian import Hessian
from methods.core.model.walk import walk
from methods.core.scheme import Scheme

CPU = torch.device("cpu")


def run(model, tokens, replace, sequential=True, batch_size=4):
    """Walk through the model; `replace` is given a stage's layers and their Hessian."""
    options = {"batch_size": batch_size, "sequential": sequential, "device": CPU, "log": RunLog()}
    for block in walk(model, tokens, **options):
        for stage in block:
            hessian = Hessian(stage.inputs[0].shape[-1], CPU)
            for x in stage.inputs:
                hessian.add(x)
            stage.replace(replace(stage.layers, hessian.value()))


def halved(layers):
    """Stands for quantization: linear layers with half the weight."""
    new = {}
    for name, linear in layers.items():
        new[name] = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
        new[name].weight.data = linear.weight.data / 2
    return new


def inputs_of(model, tokens, names):
    """What each named layer receives in a plain forward pass."""
    seen = {}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: seen.__setitem__(n, args[0].detach()))
        for n in names
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_hessian_is_two_over_n_of_x_transposed_x():
    x = torch.randn(10, 7, 300)
    hessian = Hessian(300, CPU)
    for part in x.split(3):
        hessian.add(part)
    rows = x.flatten(0, 1)
    torch.testing.assert_close(hessian.value(), 2 / 70 * rows.T @ rows, rtol=1e-4, atol=1e-5)


def test_stages_are_the_layers_that_share_an_input(tiny, tokens):
    stages = []
    run(load_model(tiny, torch.float32), tokens, lambda layers, h: stages.append(list(layers)) or {})
    short = [[name.rpartition(".")[2] for name in stage] for stage in stages]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("sequential", [True, False])
def test_hessians_come_from_the_quantized_prefix(tiny, tokens, sequential, batch_size):
    """Sequential: every layer's inputs are those of the finally quantized model. Otherwise its own block is unquantized."""
    model, hessians = load_model(tiny, torch.float32), {}

    def replace(layers, hessian):
        hessians.update(dict.fromkeys(layers, hessian))
        return halved(layers)

    run(model, tokens, replace, sequential, batch_size)
    names = list(block_linears(model))
    if sequential:
        expected = inputs_of(model, tokens, names)
    else:
        expected = {}
        for index in range(2):
            prefix = load_model(tiny, torch.float32)
            for name, linear in block_linears(prefix).items():
                if int(name.split(".")[2]) < index:
                    linear.weight.data /= 2
            here = [n for n in names if int(n.split(".")[2]) == index]
            expected |= inputs_of(prefix, tokens, here)
    for name in names:
        x = expected[name].flatten(0, 1)
        torch.testing.assert_close(hessians[name], 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4)


def test_hessians_are_of_the_quantized_inputs_when_the_scheme_quantizes_them(tiny, tokens):
    scheme = Scheme.from_dict("s", {"weights": {"bits": 4}, "activations": {"bits": 4}})
    model, hessians = load_model(tiny, torch.float32), []
    mark_layers(model, scheme)
    run(model, tokens, lambda layers, h: hessians.append(h) or {})
    first = "model.layers.0.self_attn.q_proj"
    x = fake_quantize_tokens(inputs_of(load_model(tiny, torch.float32), tokens, [first])[first], scheme.activations)
    x = x.flatten(0, 1)
    torch.testing.assert_close(hessians[0], 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4)


def test_the_model_is_left_with_the_replacements(tiny, tokens):
    model, reference = load_model(tiny, torch.float32), load_model(tiny, torch.float32)
    run(model, tokens, lambda layers, h: halved(layers))
    for name, linear in block_linears(reference).items():
        linear.weight.data /= 2
        assert "forward" not in vars(model.get_submodule(name))
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, reference(input_ids=tokens).logits)


def test_a_layer_that_is_never_reached_is_an_error(tiny, tokens):
    model = load_model(tiny, torch.float32)
    decoder_blocks(model)[1][0].mlp.unused = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="mlp.unused"):
        run(model, tokens, lambda layers, h: {})


@pytest.mark.parametrize("sequential", [True, False])
def test_inputs_in_full_precision_are_those_of_the_model_as_it_was(tiny, tokens, sequential):
    model, seen = load_model(tiny, torch.float32), {}
    options = {"batch_size": 4, "sequential": sequential, "device": CPU, "log": RunLog(), "full_precision": True}
    for block in walk(model, tokens, **options):
        for stage in block:
            seen |= dict.fromkeys(stage.layers, torch.cat(stage.full_precision_inputs))
            stage.replace(halved(stage.layers))
    reference = load_model(tiny, torch.float32)
    expected = inputs_of(reference, tokens, list(block_linears(reference)))
    for name, x in expected.items():
        torch.testing.assert_close(seen[name], x)


def test_an_error_on_the_way_leaves_the_layers_unpatched(tiny, tokens):
    model = load_model(tiny, torch.float32)

    def fail(layers, hessian):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run(model, tokens, fail)
    assert not [name for name, m in model.named_modules() if "forward" in vars(m)]


def test_a_block_that_is_left_out_is_an_error(tiny, tokens):
    options = {"batch_size": 4, "sequential": True, "device": CPU, "log": RunLog()}
    with pytest.raises(RuntimeError, match="block 0 was not iterated"):
        for _ in walk(load_model(tiny, torch.float32), tokens, **options):
            pass


def test_every_batch_keeps_its_own_arguments(tiny, tokens):
    """As blocks that are given something of each token, besides the hidden states, need it."""
    model = load_model(tiny, torch.float32)

    def embedded(module, args, kwargs):
        return args, kwargs | {"extra": model.model.embed_tokens(ids[0])}

    ids = [None]
    model.model.register_forward_pre_hook(lambda m, a, k: ids.__setitem__(0, k["input_ids"]), with_kwargs=True)
    model.model.layers[0].register_forward_pre_hook(embedded, with_kwargs=True)
    seen = []
    options = {
        "batch_size": 3,
        "sequential": True,
        "device": CPU,
        "log": RunLog(),
    }  # 3 does not divide 8: a smaller last batch
    arguments = block_inputs(model, decoder_blocks(model)[1], tokens, 3)[1][0]
    assert [kwargs["extra"].shape[0] for _, kwargs in arguments] == [3, 3, 2]
    assert not torch.equal(arguments[0][1]["extra"], arguments[1][1]["extra"])
    plain = load_model(tiny, torch.float32)
    for stages in walk(plain, tokens, **options):
        for stage in stages:
            seen.append(torch.cat(stage.inputs))
    expected = inputs_of(plain, tokens, list(block_linears(plain)))
    torch.testing.assert_close(seen[0], expected["model.layers.0.self_attn.q_proj"])


def test_gradients_are_the_callers_own_affair(tiny, tokens):
    options = {"batch_size": 4, "sequential": True, "device": CPU, "log": RunLog()}
    for stages in walk(load_model(tiny, torch.float32), tokens, **options):
        for stage in stages:
            assert torch.is_grad_enabled() and not stage.inputs[0].requires_grad
