"""Properties over cases that hypothesis makes: configurations, number formats, checkpoints, text.

PTQAT_CASES=20000 python -m pytest tests/test_properties.py    # other cases at each run; the default is the same 1,000
"""

import copy
import json
import os
import re
import sys

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from methods.core.formats import make
from methods.core.job import registry
from methods.core.model import anatomy
from methods.core.model.checkpoint import load_model, save_checkpoint
from methods.core.model.layers import QuantizedLinear, quantized_layers
from methods.core.scheme import FORMATS
from methods.core.tokens import read_tokens
from tests.test_config import CONFIGS, merged
from workflow import matrix
from workflow.errors import ConfigError
from workflow.prepare import text, tokenize

CASES = int(os.environ.get("PTQAT_CASES", 1000))
BASES = [merged(path) for path in CONFIGS]


def cases(share=1.0):
    """The settings of a property: a share of CASES."""
    return settings(
        max_examples=round(CASES * share),
        deadline=None,
        derandomize="PTQAT_CASES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )


# Configurations

NONSENSE = [10**18, 10**30, -1, 0, 1e308, 1e-308, 0.5, "", " ", "\n", "\0", "a\n", "..", "/", "a/b", "{x}", "x" * 5000]
SCALARS = st.one_of(
    st.sampled_from(NONSENSE),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.dates(),
    st.binary(max_size=5),
)
KEYS = st.one_of(st.text(max_size=10), st.integers(), st.none(), st.booleans(), st.dates())
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


def places(value, path=()):
    """The keys to every value inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*path, key)
        yield from places(each, (*path, key))


PLACES = [list(places(base)) for base in BASES]


def at(config, path):
    for key in path:
        config = config[key]
    return config


@st.composite
def configurations(draw):
    """One of ours, in which one to three values are others, are those of another place, missing or new."""
    number = draw(st.integers(0, len(BASES) - 1))
    config = copy.deepcopy(BASES[number])
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(PLACES[number]))
        try:
            parent, own = at(config, path), at(config, [*path, key])
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
        action = draw(st.sampled_from(["replace", "replace", "copy", "remove", "add"]))
        if action == "remove":
            del parent[key]
        elif action == "add" and isinstance(own, dict):
            own[draw(KEYS)] = draw(VALUES)
        elif action == "copy":
            parent[key] = copy.deepcopy(at(BASES[number], draw(st.sampled_from(PLACES[number]))))
        else:
            parent[key] = draw(VALUES)
    return config


PLACE = re.compile(rf"^({'|'.join(BASES[0])}|the top level)\b")


@given(configurations())
@cases()
def test_a_configuration_gives_a_matrix_or_an_error_that_names_the_place(config):
    try:
        loaded = matrix.load(config)
    except ConfigError as error:
        assert PLACE.match(str(error)), str(error)
        return
    json.dumps(loaded.to_json(), allow_nan=False)
    for name in loaded.models:
        loaded.evaluation_arguments(name)
    for cell in loaded.jobs:
        assert matrix.Cell.at(*cell.path.split("/")) == cell
        assert max(len(part.encode()) for part in cell.path.split("/")) <= 255
        loaded.cell_arguments(cell), loaded.token_arguments(cell), loaded.format_files(cell.scheme)
        loaded.rounded_from(cell), loaded.allocation(cell.model, cell.scheme)
        if tokens := loaded.tokens(cell):
            loaded.token_file(cell.model, tokens)


# Number formats and checkpoints


@st.composite
def formats(draw):
    """A number format of any file in methods/core/formats, and how many columns its groups have."""
    name = draw(st.sampled_from(registry.names(FORMATS)))
    constants = registry.constants(FORMATS, name)
    symmetric = draw(st.booleans()) if constants["ASYMMETRIC"] else True
    scale_dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    width = draw(st.integers(1, 40))
    group_size = draw(st.sampled_from([None, width]))
    return make(name, draw(st.sampled_from(constants["BITS"])), group_size, symmetric, scale_dtype), width


NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 65504.0, 1e-38, -1e-45])


@st.composite
def rounded(draw):
    """A weight and its rounding, with the scale of its range."""
    form, width = draw(formats())
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    seed, spread = draw(st.integers(0, 1000)), draw(NUMBERS)
    weight = torch.randn(rows, groups * width, generator=torch.Generator().manual_seed(seed)) * spread
    for _ in range(draw(st.integers(0, 4))):
        weight[draw(st.integers(0, rows - 1)), draw(st.integers(0, groups * width - 1))] = draw(NUMBERS)
    weight = weight.clamp(-(2.0**100), 2.0**100)
    grouped = weight.view(rows, -1, form.width(weight.shape[1]))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    return form.quantize(weight, *form.scale_of_range(low, high)), weight


@given(rounded())
@cases()
def test_rounding_twice_is_rounding_once_and_packing_loses_nothing(case):
    once, weight = case
    form = once.format
    assert once.scale.isfinite().all() and (once.scale > 0).all()
    assert -(2 ** (form.bits - 1)) <= once.codes.int().min() and once.codes.int().max() < 2 ** (form.bits - 1)
    value = once.value(torch.float32)
    assert value.isfinite().all()
    assert torch.equal(form.quantize(value, once.scale, once.zero_point).codes, once.codes)
    packed = form.pack(once.codes)
    assert torch.equal(form.unpack(packed, once.codes.shape), once.codes)
    stored = [packed, once.scale]
    if once.zero_point is not None:
        stored.append(form.pack(once.zero_point, dim=0))
        assert torch.equal(form.unpack(stored[-1], once.scale.shape, dim=0), once.zero_point)
    assert form.stored_bits(*weight.shape) == 8 * sum(each.numel() * each.element_size() for each in stored)


@given(st.data())
@cases(0.1)
def test_a_checkpoint_is_loaded_as_it_was_saved(tiny, tmp_path_factory, data):
    """Each layer has a group size and values of its own; where there are zero points, all have one (WeightScheme)."""
    model = load_model(tiny, torch.float32)
    form, _ = data.draw(formats())
    for name, linear in anatomy.block_linears(model).items():
        width = data.draw(st.sampled_from([None, 16, 64])) if form.symmetric else None
        own = make(form.name, form.bits, width, form.symmetric, form.scale_dtype)
        weight = linear.weight.detach() * data.draw(st.floats(2**-10, 2**10))
        grouped = weight.view(len(weight), -1, own.width(weight.shape[1]))
        scale = own.scale_of_range(grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0))
        anatomy.replace_module(model, name, QuantizedLinear.replacing(linear, own.quantize(weight, *scale)))
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(model, tiny, folder)
    before, after = quantized_layers(model), quantized_layers(load_model(folder, torch.float32))
    assert before.keys() == after.keys()
    for name, layer in before.items():
        same = after[name]
        assert layer.format == same.format and torch.equal(layer.rounded().codes, same.rounded().codes)
        assert torch.equal(layer.scale, same.scale) and torch.equal(layer.weight, same.weight)
        assert (layer.zero_point is None) == (same.zero_point is None)
        assert layer.zero_point is None or torch.equal(layer.zero_point, same.zero_point)


# Text

LONG = "x" * 10**6  # without a blank
DOCUMENTS = st.lists(
    st.text(max_size=30) | st.sampled_from(["", "a", "\0", "\n", "\r\n", "\u2028", "\x85", "🙂👩‍👩‍👧", "\ufeff", " "]),
    min_size=1,
    max_size=8,
)


@given(DOCUMENTS, st.sampled_from(["\n\n", "", "\0", "🙂"]))
@example(["", LONG, "one"], "\n\n")
@example([""], "")
@cases(0.3)
def test_text_is_tokenized_as_it_is(tiny, tmp_path_factory, documents, join):
    """Through the files: what a tokenizer of bytes makes of a data set is decoded to its documents."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    text.write("mine", {"path": "json", "data_files": str(folder / "rows.jsonl")}, folder)
    with open(folder / "documents.jsonl", encoding="utf-8") as lines:
        assert [json.loads(line)["text"] for line in lines] == documents
    arguments = ["--model", tiny, "--text", folder / "documents.jsonl", "--dataset", "mine", "--join", join]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tokenize", *map(str, arguments), "--output", str(folder / "tokens.safetensors")])
        tokenize.main()
    ids, info = read_tokens(folder / "tokens.safetensors")
    assert int(info["tokens"]) == len(ids)
    from transformers import AutoTokenizer

    decoded = AutoTokenizer.from_pretrained(tiny).decode(ids, clean_up_tokenization_spaces=False)
    assert decoded == join.join(documents)


@given(DOCUMENTS, st.sampled_from(["\n\n", "", "--"]), st.integers(0, 40))
@cases(0.3)
def test_pieces_of_a_text_are_the_text(tmp_path_factory, documents, join, piece):
    path = tmp_path_factory.getbasetemp() / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "PIECE", piece)
        assert "".join(tokenize.pieces(path, join)) == join.join(documents)
