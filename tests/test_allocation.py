"""Bit allocation against brute force, the paper's closed form, exact Fisher information, and the bits on disk."""

import itertools
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from methods.__main__ import main
from methods.core import sensitivity
from methods.core.allocation import INTERACTION_PENALTY, allocate, with_interaction
from methods.core.formats.integer import Integer
from methods.core.job import registry
from methods.core.job.files import read_json, write_json
from methods.core.job.log import RunLog
from methods.core.model.anatomy import block_linears
from methods.core.model.checkpoint import load_model, stored_sizes
from methods.core.model.experts import separate
from methods.core.model.hessian import Hessian
from methods.core.model.walk import find_stages
from methods.core.scales import ScaleSearch, choose_scale
from methods.core.scheme import Scheme, WeightScheme
from methods.core.sensitivity import HELD_OUT, units_of
from methods.core.tokens import write_tokens
from workflow.prepare import allocate as allocate_command
from workflow.prepare import sensitivity as sensitivity_command

WEIGHTS = {"average_bits": 3.25, "choices": [2, 3, 4, 8], "group_size": 64}
SCHEME = Scheme.from_dict("mixed", {"weights": WEIGHTS})


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_within_the_budget_is_better(seed):
    random = torch.Generator().manual_seed(seed)
    count = 5
    sizes = torch.randint(1, 50, (count,), generator=random).tolist()
    stored = [{b: n * 64 * b + n for b in (2, 3, 4, 8)} for n in sizes]
    # Sorted falling, but not convex, as a real grid's error need not be.
    errors = torch.rand(count, 4, generator=random).sort(descending=True).values.tolist()
    distortion = [dict(zip((2, 3, 4, 8), e, strict=True)) for e in errors]
    budget = int(sum(s[2] for s in stored) * (1 + 2 * torch.rand(1, generator=random).item()))

    def total(table, chosen):
        return sum(row[b] for row, b in zip(table, chosen, strict=True))

    within = [c for c in itertools.product((2, 3, 4, 8), repeat=count) if total(stored, c) <= budget]
    best = min(total(distortion, c) for c in within)
    chosen = allocate(stored, distortion, budget)
    assert total(stored, chosen) <= budget
    assert total(distortion, chosen) == pytest.approx(best, rel=1e-9)


def test_a_budget_that_is_met_exactly_is_used():
    stored, distortion = [{2: 200, 3: 300}] * 3, [{2: 1.0, 3: 0.5}, {2: 2.0, 3: 0.5}, {2: 1.5, 3: 0.5}]
    assert allocate(stored, distortion, 800) == [2, 3, 3]
    assert allocate(stored, distortion, 799) == [2, 3, 2]


def test_a_budget_just_below_a_choice_excludes_it():
    """By less than the solver's tolerance, as average_bits 3.249999 does on a real model."""
    stored = [{2: 2 * 10**8, 3: 3 * 10**8, 4: 4 * 10**8}] * 6
    chosen = allocate(stored, [{2: 4.0, 3: 2.0, 4: 1.0}] * 6, 18 * 10**8 - 1)
    assert sum(s[b] for s, b in zip(stored, chosen, strict=True)) == 17 * 10**8


def test_small_differences_beside_a_large_one_count():
    distortion = [{2: 1.0, 3: 0.5}, {2: 3e-7, 3: 1e-7}, {2: 9e-7, 3: 1e-7}, {2: 5e-7, 3: 1e-7}]
    assert allocate([{2: 200, 3: 300}] * 4, distortion, 1000) == [3, 2, 3, 2]


def test_costs_that_do_not_differ_and_costs_that_are_no_numbers():
    stored = [{2: 200, 4: 400}] * 2
    assert sum(allocate(stored, [{2: 0.0, 4: 0.0}] * 2, 800)) <= 8
    with pytest.raises(ValueError, match="distortion of unit 1 at 4 bits is nan"):
        allocate(stored, [{2: 1.0, 4: 0.5}, {2: 1.0, 4: math.nan}], 800)


def test_where_the_bits_are_many_it_is_the_papers_closed_form():
    """b_l = B + 1/2 log2(alpha_l var_l / weighted geometric mean), to the nearest whole bits."""
    random = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 9, (30,), generator=random) * 1000
    spread = torch.randn(30, generator=random).exp()  # alpha_l * var_l
    average, choices = 8, range(1, 17)
    mean = (weights * spread.log2()).sum() / weights.sum()
    ideal = average + 0.5 * (spread.log2() - mean)
    stored = [{b: int(n) * b for b in choices} for n in weights]
    distortion = [{b: float(n * s) * 2.0 ** (-2 * b) for b in choices} for n, s in zip(weights, spread, strict=True)]
    chosen = torch.tensor(allocate(stored, distortion, average * int(weights.sum())))
    assert (chosen - ideal).abs().max() <= 1
    assert (chosen - ideal).abs().mean() < 0.4


def test_a_budget_below_the_smallest_choices_is_an_error():
    with pytest.raises(ValueError, match="the smallest choices take 400 bits, the budget is 399"):
        allocate([{2: 200, 4: 400}] * 2, [{2: 1.0, 4: 0.1}] * 2, 399)


def units(model, scheme=SCHEME):
    linears = block_linears(model)
    stages = find_stages(lambda x: model(input_ids=x), model, torch.zeros(1, 4, dtype=torch.long), tuple(linears))
    return units_of(linears, stages, scheme.weights, RunLog())


def test_layers_that_share_an_input_are_a_unit(tiny):
    found = units(load_model(tiny, torch.float32))
    assert [len(unit.layers) for unit in found] == [3, 1, 2, 1] * 2
    assert found[0].layers == tuple(f"model.layers.0.self_attn.{p}_proj" for p in "qkv")


def test_the_error_of_a_unit_is_that_of_rounding_it(tiny):
    model = load_model(tiny, torch.float32)
    unit = units(model)[3]
    original = model.get_submodule(unit.layers[0]).weight.detach().clone()
    uniform = Scheme.from_dict("w3", {"weights": {"bits": 3, "group_size": 64}})
    config = registry.load("methods", "rtn").Config(norm=2.0)
    rounded = (
        registry.load("methods", "rtn").apply(model, uniform, config, None, RunLog()).get_submodule(unit.layers[0])
    )
    assert unit.error[3] == pytest.approx(float((rounded.weight - original).square().sum()), rel=1e-5)
    assert unit.error[2] > unit.error[3] > unit.error[4] > unit.error[8]


def test_fisher_is_the_trace_of_the_exact_information(tiny):
    """Over all outcomes y of each token: sum p(y) ||grad log p(y)||^2."""
    model = load_model(tiny, torch.float32)
    found = units(model)[:2]
    ids = torch.randint(0, 256, (1, 6), generator=torch.Generator().manual_seed(1))
    layers = [model.get_submodule(name).weight.requires_grad_(True) for unit in found for name in unit.layers]
    logp = model(input_ids=ids).logits[0].log_softmax(-1)
    exact = torch.zeros(len(layers))
    for row in logp:
        for outcome in row:
            gradients = torch.autograd.grad(outcome, layers, retain_graph=True)
            exact += outcome.detach().exp() * torch.stack([g.square().sum() for g in gradients])
    exact /= ids.numel()
    alpha = [float(trace) / layer.numel() / 2 for trace, layer in zip(exact, layers, strict=True)]
    # Errors as unlike as those of q, k and v can be: each layer's own sensitivity is for its own error.
    found[0] = replace(
        found[0], errors={2: (1.0, 0.0, 0.0), 3: (0.0, 1.0, 0.0), 4: (0.0, 0.0, 1.0), 8: (0.0, 2.0, 3.0)}
    )
    found[1] = replace(found[1], errors={2: (1.0,), 3: (0.5,), 4: (0.25,), 8: (0.0,)})
    first, second = sensitivity.fisher(model, found, ids.expand(600, -1), SCHEME.weights, RunLog())
    assert [*first.values()] == pytest.approx([*alpha[:3], 2 * alpha[1] + 3 * alpha[2]], rel=0.1)
    assert second == pytest.approx({2: alpha[3], 3: alpha[3] / 2, 4: alpha[3] / 4, 8: 0}, rel=0.1)


def test_fisher_foretells_the_divergence_of_a_small_error(tiny):
    model = load_model(tiny, torch.float32)
    ids = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(1))
    found = units(model)
    # Noise of variance 1 in every weight is an error as large as the layer.
    sizes = [tuple(model.get_submodule(name).weight.numel() for name in unit.layers) for unit in found]
    noise = [replace(unit, errors={3: size}) for unit, size in zip(found, sizes, strict=True)]
    distortion = sensitivity.fisher(model, noise, ids.repeat(8, 1), SCHEME.weights, RunLog())
    with torch.no_grad():
        before = model(input_ids=ids).logits.log_softmax(-1)
        for unit, foretold in zip(found, distortion, strict=True):
            kl = []
            for seed in range(4):
                torch.manual_seed(seed)
                originals = {name: model.get_submodule(name).weight.clone() for name in unit.layers}
                for name, weight in originals.items():
                    model.get_submodule(name).weight.add_(torch.randn_like(weight) * 0.003)
                after = model(input_ids=ids).logits.log_softmax(-1)
                kl.append(float(F.kl_div(after, before, log_target=True, reduction="sum")) / ids.numel())
                for name, weight in originals.items():
                    model.get_submodule(name).weight.copy_(weight)
            assert sum(kl) / 4 == pytest.approx(foretold[3] * 0.003**2, rel=0.25)


def test_kl_is_that_of_the_model_with_one_unit_rounded(tiny, tokens):
    """Measured from the first changed block on; here the whole model is computed."""
    model, exact = load_model(tiny, torch.float32), load_model(tiny, torch.float32)
    found = units(model)

    with torch.no_grad():
        embedded = exact.model.embed_tokens(tokens[HELD_OUT:])
        first_inputs = exact.model.layers[0].input_layernorm(embedded).flatten(0, 1)
    hessians = []

    def rounding(weight, hessian, grid):
        hessians.append(hessian)
        return quantized_weight(weight, grid)

    distortion = sensitivity.kl(model, found, tokens, SCHEME.weights, RunLog(), rounding)
    assert torch.allclose(hessians[0], 2 / len(first_inputs) * first_inputs.T @ first_inputs, rtol=1e-4, atol=1e-6)
    ids = tokens[:HELD_OUT]
    with torch.no_grad():
        before = exact(input_ids=ids).logits.log_softmax(-1)
        assert torch.equal(model(input_ids=ids).logits.log_softmax(-1), before)  # it is left as it was
        for unit, by_bits in zip(found, distortion, strict=True):
            for bits in (2, 4):
                changed = load_model(tiny, torch.float32)
                for name in unit.layers:
                    weight = changed.get_submodule(name).weight
                    weight.copy_(quantized_weight(weight, Integer(bits, 64)))
                after = changed(input_ids=ids).logits.log_softmax(-1)
                kl = float(F.kl_div(after, before, log_target=True, reduction="sum")) / ids.numel()
                assert by_bits[bits] == pytest.approx(kl, rel=1e-3, abs=1e-7)
            assert by_bits[8] == pytest.approx(by_bits[4] * unit.error[8] / unit.error[4])


def test_layers_of_zeros_cost_nothing(tiny, tokens):
    """A pruned or zero-initialized layer rounds exactly: neither its error nor that of more bits may become NaN."""
    model = load_model(tiny, torch.float32)
    found = units(model)
    for name in found[0].layers:
        model.get_submodule(name).weight.data.zero_()
    of_zeros = units(model)
    distortion = sensitivity.kl(
        model, of_zeros, tokens, SCHEME.weights, RunLog(), lambda weight, hessian, form: quantized_weight(weight, form)
    )
    assert set(of_zeros[0].error.values()) == set(distortion[0].values()) == {0.0}
    assert all(value > 0 for value in distortion[-1].values())


def test_memory_holds_the_hessians_of_one_block(tiny, tokens, monkeypatch):
    """Those of all units at once are 328 GB for a model of 70B."""
    model = load_model(tiny, torch.float32)
    held = []

    def rounding(weight, hessian, grid):
        held.append(sum(made() is not None for made in matrices))
        return quantized_weight(weight, grid)

    def value(hessian):
        matrix = make(hessian)
        matrices.extend(weakref.ref(tensor) for tensor in (matrix, hessian.sum))
        return matrix

    matrices, make = [], Hessian.value
    monkeypatch.setattr(Hessian, "value", value)
    found = units(model)
    sensitivity.kl(model, found, tokens, SCHEME.weights, RunLog(), rounding)
    assert len(matrices) == 2 * len(found) == 8 * len(model.model.layers)
    assert max(held) <= 5  # the sums of a block's four units, and the matrix that is in use


def test_a_unit_that_breaks_the_model_is_an_error(tiny, tokens):
    model = load_model(tiny, torch.float32)

    def broken(weight, hessian, grid):
        return weight * (math.nan if grid.bits == 2 else 1)

    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.* at 2 bits: the divergence is nan"):
        sensitivity.kl(model, units(model), tokens, SCHEME.weights, RunLog(), broken)


@pytest.mark.parametrize("estimator", ["fisher", "kl"])
def test_an_expert_that_no_token_reaches_is_an_error(estimator):
    """Its errors would cost nothing, and it would get the fewest bits."""
    size = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_local_experts": 64,
    }
    model = separate(MixtralForCausalLM(MixtralConfig(**size, num_attention_heads=4, num_key_value_heads=4)))
    given = {"rounding": lambda weight, hessian, form: weight} if estimator == "kl" else {}
    few = torch.arange(HELD_OUT + 1)[:, None] + torch.arange(4)
    with pytest.raises(ValueError, match="no token reaches model.layers.0.mlp.experts..*: allocate on more samples"):
        getattr(sensitivity, estimator)(model, units(model), few, SCHEME.weights, RunLog(), **given)


def test_the_error_from_some_rows_is_near_that_of_all():
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 1024, bias=False)
    linear.weight.data *= 1 + torch.arange(1024)[:, None].remainder(2)  # rows at a stride would all be alike
    some = sensitivity.rounding_error(linear, SCHEME.weights, 3)
    weight = linear.weight.detach()
    error = (quantized_weight(weight, Integer(3, 64)) - weight).square().sum()
    assert some == pytest.approx(float(error), rel=0.15)


def quantized_weight(weight, grid):
    scale, zero_point = choose_scale(weight, grid, ScaleSearch("search"))
    return grid.quantize(weight, scale, zero_point).value(torch.float32)


def test_below_the_average_an_error_weighs_more():
    stored = {2: 2880, 3: 4160, 4: 5440}  # 2.25, 3.25 and 4.25 bits per weight
    assert with_interaction({2: 1.0, 3: 0.5, 4: 0.25}, stored, 1280, 3.25) == {2: INTERACTION_PENALTY, 3: 0.5, 4: 0.25}


@pytest.fixture
def allocation(tiny, tmp_path, tokens):
    """File of bits for the tiny model, by the commands that the workflow runs."""
    write_tokens(tmp_path / "tokens.safetensors", tokens.flatten(), {"dataset": "calibration"})
    arguments = ["--model", tiny, "--tokens", tmp_path / "tokens.safetensors", "--samples", 6, "--sequence-length", 32]

    def make(average_bits=WEIGHTS["average_bits"], **weights):
        measured, output = tmp_path / "sensitivity.json", tmp_path / f"allocation-{average_bits}.json"
        weights = {"choices": WEIGHTS["choices"], "group_size": 64, **weights}
        sensitivity_command.main(list(map(str, [*arguments, "--weights", weights, "--output", measured])))
        words = ["--sensitivity", measured, "--average-bits", average_bits, "--output", output]
        allocate_command.main(list(map(str, words)))
        return output

    return make


@pytest.mark.parametrize("sensitivity", ["kl", "fisher", "uniform"])
@pytest.mark.parametrize("average", [2.5, 3.25, 3.5])
def test_what_is_stored_is_within_the_budget(tiny, tmp_path, allocation, average, sensitivity):
    path = allocation(average_bits=average, sensitivity=sensitivity)
    weights = read_json(path)["weights"]
    main(
        [
            "rtn",
            "--model",
            str(tiny),
            "--scheme",
            str({"weights": weights}),
            "--allocation",
            str(path),
            "--output",
            str(tmp_path),
        ]
    )
    stored, count, _ = stored_sizes(load_model(tmp_path / "checkpoint", torch.float32), tmp_path / "checkpoint")
    assert stored / count == read_json(path)["bits_per_weight"]
    assert stored / count <= average
    if average < 3.5:  # nothing that is left over would have paid for one more bit anywhere
        layers = block_linears(load_model(tiny, torch.float32)).values()
        assert (average - stored / count) * count < 3 * max(layer.weight.numel() for layer in layers)
    bits = {row["layer"]: row["bits"] for row in read_json(tmp_path / "run.json")["layers"]}
    assert bits == {row["layer"]: row["bits"] for row in read_json(path)["layers"]}
    assert len(set(bits.values())) > 1 or sensitivity == "uniform"  # all random layers are alike


@pytest.mark.parametrize("method", ["gptq", "lr_qat", "dl_qat", "llm_qat"])
def test_every_method_keeps_to_the_allocation(tiny, tmp_path, allocation, tokens, method):
    path = allocation()
    scheme = Scheme.from_dict("mixed", {"weights": WEIGHTS}, {r["layer"]: r["bits"] for r in read_json(path)["layers"]})
    module, model = registry.load("methods", method), load_model(tiny, torch.float32)
    given = tokens if module.METHOD.reads == "calibration" else tokens.view(2, 1, 4, 32)
    model = module.apply(model, scheme, module.Config(), given, RunLog(tmp_path / "training"))
    assert {name: m.format.bits for name, m in block_linears(model).items()} == scheme.allocation
    codes = {name: m.rounded().codes for name, m in block_linears(model).items()}
    for name, bits in scheme.allocation.items():
        assert -(2 ** (bits - 1)) <= codes[name].min() and codes[name].max() < 2 ** (bits - 1)


def test_gptq_may_give_layers_of_one_input_different_bits(tiny, tokens):
    model = load_model(tiny, torch.float32)
    bits = {name: 2 + 2 * (i % 2) for i, name in enumerate(block_linears(model))}
    gptq = registry.load("methods", "gptq")
    model = gptq.apply(model, Scheme.from_dict("mixed", {"weights": WEIGHTS}, bits), gptq.Config(), tokens, RunLog())
    assert {name: m.format.bits for name, m in block_linears(model).items()} == bits


def test_plain_transformers_loads_layers_of_several_widths(tiny, tmp_path, tokens, allocation):
    from transformers import AutoModelForCausalLM

    path = allocation()
    main(
        [
            "rtn",
            "--model",
            str(tiny),
            "--scheme",
            str({"weights": WEIGHTS}),
            "--allocation",
            str(path),
            "--output",
            str(tmp_path),
        ]
    )
    ours = load_model(tmp_path / "checkpoint", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits)


def test_mistakes_are_found_before_anything_runs(tiny, tmp_path, allocation, capsys):
    scheme = {"weights": WEIGHTS}
    arguments = ["rtn", "--model", str(tiny), "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([*arguments, "--scheme", str(scheme)])
    assert "--allocation FILE belongs to a scheme with average_bits" in read_json(tmp_path / "failed.json")["error"]
    other = str({"weights": {**WEIGHTS, "average_bits": 3.5}})
    with pytest.raises(SystemExit):
        main([*arguments, "--scheme", other, "--allocation", str(allocation())])
    assert "has another scheme or another model" in read_json(tmp_path / "failed.json")["error"]
    path = allocation()
    write_json(path, read_json(path) | {"layers": read_json(path)["layers"][1:]})
    with pytest.raises(SystemExit):
        main([*arguments, "--scheme", str(scheme), "--allocation", str(path)])
    assert (
        "no allocation says how many bits model.layers.0.self_attn.q_proj has"
        in read_json(tmp_path / "failed.json")["error"]
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "either bits, or average_bits"),
        ({"bits": 4, "average_bits": 3.5, "choices": (2, 4)}, "either bits, or average_bits"),
        ({"bits": 4, "choices": (2, 4)}, "either bits, or average_bits"),
        ({"average_bits": 3.5}, "either bits, or average_bits"),
        ({"average_bits": 3.5, "choices": (4,)}, "at least two different"),
        ({"bits": 4, "average_bits": 3.5}, "belong to choices"),
        ({"average_bits": 3.5, "choices": (2, 16)}, "from 2 to 8"),
        ({"average_bits": 3.5, "choices": (2, 4), "sensitivity": "hessian"}, "none of kl, fisher, uniform"),
        ({"average_bits": 3.5, "choices": (2, 4), "symmetric": False}, "symmetric grid"),
    ],
)
def test_weights_that_do_not_fit_together(weights, message):
    with pytest.raises(ValueError, match=message):
        WeightScheme(**weights)
