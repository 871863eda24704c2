"""What a chain of steps is, which chains are valid, and what they cost."""

import pytest

from methods.core.job.registry import CODES, WEIGHTS, Method
from methods.core.recipe import chain, chain_kind, check_chain


@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        (["reference"], "reference"),
        (["transform"], "transform"),
        (["control"], "control"),
        (["transform", "control"], "control"),
        (["ptq"], "ptq"),
        (["transform", "ptq"], "ptq"),
        (["control", "ptq"], "control_ptq"),
        (["ptq", "qat"], "qat"),
        (["control", "qat"], "qat"),
        (["qat", "ptq"], "qat"),
        (["trained transform", "ptq"], "qat"),
        (["trained transform"], "transform"),
    ],
)
def test_the_kind_of_a_chain(steps, kind):
    trains = {"control", "qat", "trained transform"}
    assert chain_kind([(step.removeprefix("trained "), step in trains) for step in steps]) == kind


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "ptq", "reads": "training"},
        {"kind": "qat", "reads": "calibration"},
        {"kind": "control"},
        {"kind": "reference", "reads": "training"},
        {"kind": "other"},
        {"kind": "ptq", "reads": "texts"},
        {"kind": "ptq", "takes": ("codes", "numbers")},
    ],
)
def test_a_method_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(ValueError):
        Method(**wrong)


def test_each_step_takes_what_the_one_before_left():
    ptq, qat = Method("ptq"), Method("qat", reads="training", takes=(WEIGHTS, CODES))
    check_chain([("rotate", Method("transform")), ("gptq", ptq), ("peqa", qat)])
    with pytest.raises(ValueError, match="'rtn' takes weights, but 'gptq' before it leaves codes"):
        check_chain([("gptq", ptq), ("rtn", ptq)])
    with pytest.raises(ValueError, match="'full_precision' is the model itself"):
        check_chain([("full_precision", Method("reference")), ("gptq", ptq)])


def step(kind, took, training=None, **tokens):
    return {
        "kind": kind,
        "tokens": (tokens and tokens | {"samples": (training or 0) // 10, "sequence_length": 10}) or None,
        "training": training and {"tokens": training},
        "seconds": {"apply": took},
        "peak_memory_mb": {"host": 100 * took},
    }


def test_a_chain_costs_what_its_steps_cost_and_a_text_is_generated_once():
    steps = [
        step("control", 3, 1000, dataset="generated", text_sha256="a", seconds="50"),
        step("ptq", 2, dataset="calibration"),
        step("qat", 4, 2000, dataset="generated", text_sha256="a", seconds="50"),
    ]
    total = chain(steps, {"seconds": 10})
    assert total["seconds"] == 3 + 2 + 4 + 50 + 10
    assert total["training_tokens"] == 3000 and total["trained_on"] == ["generated"]
    assert total["text_tokens"] == 2000  # the second step read what the first had read, and more
    assert total["peak_memory_mb"] == {"host": 400} and total["kinds"] == ["control", "ptq", "qat"]
