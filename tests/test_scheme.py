"""Schemes from a configuration or a command line: a slip is an error, never another scheme."""

from argparse import ArgumentTypeError

import pytest

from methods.core.job.options import mapping
from methods.core.scheme import Scheme


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"weights": {"bits": 4}, "activation": {"bits": 8}}, "activation.*Did you mean 'activations'"),
        ({"weights": {"bits": 4, "groupsize": 64}}, "groupsize.*Did you mean 'group_size'"),
        ({"weights": {"bits": 4, "symmetric": "false"}}, "symmetric is 'false'; it must be bool"),
        ({"weights": {"bits": "4"}}, "bits is '4'; it must be int"),
        ({"weights": {"bits": 4, "group_size": 0}}, "group_size is 0"),
        ({"weights": {"bits": 4, "group_size": 64, "other_group_size": 1}}, "other_group_size is 1"),
        ({"weights": {"bits": 4, "group_size": 64, "other_group_size": "chanel"}}, "'chanel'.*Did you mean 'channel'"),
        ({"weights": {"bits": 4, "scale_dtype": "bf16"}}, "scale_dtype is 'bf16'.*'bfloat16'"),
        ({"weights": {"average_bits": 3.25, "choices": 4}}, "choices is 4; it must be a list"),
        ({"weights": 4}, "weights is 4; it must be a mapping"),
        ({"weights": {"bits": 4}, "kv_cache": {"bit": 8}}, "kv_cache.*bit"),
    ],
)
def test_a_slip_is_an_error_that_names_it(spec, message):
    with pytest.raises(ValueError, match=message):
        Scheme.from_dict("s", spec)


def test_what_means_the_same_is_the_same():
    assert Scheme.from_dict("s", {"weights": {"bits": 4, "group_size": "channel"}}).weights.group_size is None
    mixed = {"average_bits": 3.25, "group_size": 64}
    orders = [Scheme.from_dict("s", {"weights": mixed | {"choices": c}}) for c in ([4, 2, 3], (2, 3, 4, 4))]
    assert orders[0] == orders[1]


@pytest.mark.parametrize(("text", "message"), [("{bits: 4", "is no YAML"), ("[4]", "is not a YAML or JSON mapping")])
def test_an_argument_that_is_no_mapping_is_refused(text, message):
    with pytest.raises(ArgumentTypeError, match=message):
        mapping(text)
