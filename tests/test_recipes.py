"""Recipes in a configuration: their steps, the cells of their prefixes, and the mistakes in them."""

import copy
import re
import shutil

import pytest
import yaml

from methods.core.job import registry
from tests.test_config import edited, merged
from workflow import matrix
from workflow.configuration import ROOT
from workflow.errors import ConfigError
from workflow.matrix import Cell

TURN = """
from dataclasses import dataclass

from methods.core.job.registry import Method

METHOD = Method("transform")


@dataclass(frozen=True)
class Config:
    angle: float = 1.0
"""


@pytest.fixture(autouse=True)
def transform(tmp_path, monkeypatch):
    """A module `turn` that changes weights and not the function, beside the project's own."""
    for folder in ("methods", "evals", "methods/core/formats"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for path in (ROOT / folder).glob("*.py"):
            shutil.copy(path, tmp_path / folder)
    (tmp_path / "methods/turn.py").write_text(TURN)
    monkeypatch.setattr(registry, "ROOT", tmp_path)


@pytest.fixture(scope="module")
def default():
    return merged(ROOT / "workflow/config/default.yaml")


@pytest.fixture
def load(default):
    """Load the default configuration with other entries under methods and a matrix of some methods and schemes."""

    def load(methods, names, schemes=("w4-g64",)):
        config = copy.deepcopy(default)
        config["methods"] |= methods
        config["matrix"] = [{"models": ["micro"], "schemes": list(schemes), "methods": list(names)}]
        return matrix.load(config)

    return load


def paths(cells):
    return [cell.path for cell in cells]


def names_of(loaded):
    """The methods of each step of the only cell."""
    (cell,) = loaded.to_json()["cells"]
    return [step["method"] for step in cell["steps"]]


def test_three_steps_are_three_checkpoints(load):
    loaded = load({"long": {"steps": ["turn", "gptq", "peqa"]}}, ["long"])
    (cell,) = loaded.cells
    expected = ["micro/unquantized/turn/seed0", "micro/w4-g64/turn+gptq/seed0", "micro/w4-g64/long/seed0-tokens8192"]
    assert paths(loaded.chain(cell)) == expected and set(paths(loaded.jobs)) == set(expected)
    assert [loaded.module(each.method) for each in loaded.chain(cell)] == ["turn", "gptq", "peqa"]
    (record,) = loaded.to_json()["cells"]
    assert {key: record[key] for key in ("method", "kind", "as_in_paper", "path")} == {
        "method": "long",
        "kind": "qat",
        "as_in_paper": False,
        "path": expected[-1],
    }
    turn, gptq, peqa = record["steps"]
    assert turn == {
        "method": "turn",
        "path": expected[0],
        "module": "turn",
        "options": {"angle": 1.0},
        "tokens": None,
    }
    assert [gptq["path"], peqa["path"]] == expected[1:]
    assert (gptq["method"], gptq["module"], gptq["tokens"]["dataset"]) == ("turn+gptq", "gptq", "calibration")
    assert (peqa["method"], peqa["module"], peqa["tokens"]["dataset"]) == ("long", "peqa", "training")
    assert gptq["options"]["damp"] == 0.01 and loaded.datasets == ["calibration", "training", "squad"]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (["turn", "gptq", "peqa"], "turn"),
        (["turn", "fine_tune", "gptq", "peqa", "lr_qat"], "turn+fine_tune"),
        (["turn", "gptq"], None),  # what it starts from is what it rounds
        (["gptq", "peqa"], None),  # the model itself
        (["gptq"], None),
        (["turn", "fine_tune"], None),
    ],
)
def test_the_weights_that_codes_were_rounded_from_are_of_the_last_step_before_codes(load, steps, expected):
    scheme = "unquantized" if steps[-1] == "fine_tune" else "w4-g64"
    loaded = load({"x": {"steps": steps}}, ["x"], [scheme])
    cell = loaded.rounded_from(loaded.cells[0])
    budget = 8192 if "fine_tune" in steps[:-1] else None
    assert cell == (expected and Cell("micro", "unquantized", expected, 0, budget))
    assert cell is None or cell in loaded.jobs


def test_recipes_share_the_checkpoint_of_their_common_steps(load):
    methods = {"a": {"steps": ["turn", "gptq", "peqa"]}, "b": {"steps": ["turn", "gptq", "lr_qat"]}}
    loaded = load(methods, ["a", "b"])
    assert loaded.start(loaded.cells[0]) == loaded.start(loaded.cells[1]) == Cell("micro", "w4-g64", "turn+gptq", 0)
    assert len(loaded.jobs) == 4


@pytest.mark.parametrize(
    "entry",
    [
        {"steps": ["turn", "gptq"]},
        {"steps": ["turn", {"use": "gptq"}]},
        {"use": "gptq", "init_from": "turn", "options": {"damp": 0.01}},
    ],
)
def test_common_steps_have_the_name_of_the_entry_that_is_just_these(load, entry):
    loaded = load({"turned": entry, "long": {"steps": ["turn", "gptq", "peqa"]}}, ["long"])
    assert names_of(loaded) == ["turn", "turned", "long"]
    other = load({"turned": {"steps": ["turn", "gptq-minmax"]}, "long": {"steps": ["turn", "gptq", "peqa"]}}, ["long"])
    assert names_of(other) == ["turn", "turn+gptq", "long"]


def test_a_recipe_inside_a_recipe_stands_for_its_steps(load):
    methods = {"turned": {"steps": ["turn", "gptq"]}, "long": {"steps": ["fine_tune", "turned", "peqa-warm"]}}
    methods["peqa-warm"] = {"use": "peqa", "options": {"warm_up": 0.2}}
    loaded = load(methods, ["long"])
    assert names_of(loaded) == ["fine_tune", "fine_tune+turn", "fine_tune+turn+gptq", "long"]
    assert [cell.scheme for cell in loaded.chain(loaded.cells[0])] == ["unquantized"] * 2 + ["w4-g64"] * 2


def test_schemes_share_the_steps_in_full_precision(load):
    loaded = load({"turned": {"steps": ["turn", "gptq"]}}, ["turned"], ["w4-g64", "w3-g64"])
    assert len(loaded.cells) == 2 and len(loaded.jobs) == 3
    assert {loaded.start(cell) for cell in loaded.cells} == {Cell("micro", "unquantized", "turn", 0)}


def test_a_scheme_has_its_own_start_where_that_depends_on_it(load):
    """AWQ's factors are chosen for the scheme; the rotation before it is of the model alone."""
    methods = {"chain": {"steps": ["rotate", "awq", {"use": "gptq"}]}}
    loaded = load(methods, ["chain"], ["w4-g64", "w3-g64"])
    first, second = (loaded.chain(cell) for cell in loaded.cells)
    assert [cell.scheme for cell in first] == ["unquantized", "w4-g64", "w4-g64"]
    assert [cell.scheme for cell in second] == ["unquantized", "w3-g64", "w3-g64"]
    assert loaded.rounded_from(first[-1]) is None
    for scheme in ("w4-g64", "unquantized"):
        with pytest.raises(ConfigError, match="'awq' prepares weights for rounding, but no later step rounds them"):
            load({}, ["awq"], [scheme])


def test_steps_may_come_from_variants_under_other_names(load):
    """A prefix of one step has the name of its entry, whose options it has."""
    methods = {
        "turn-far": {"use": "turn", "options": {"angle": 2.0}},
        "x": {"steps": ["turn-far", "gptq-minmax", "peqa"]},
    }
    loaded = load(methods, ["x"])
    assert names_of(loaded) == ["turn-far", "turn-far+gptq-minmax", "x"]
    steps = loaded.to_json()["cells"][0]["steps"]
    assert steps[0]["options"] == {"angle": 2.0} and steps[1]["options"]["scale"] == "minmax"


def test_the_last_step_may_be_written_out_and_init_from_is_the_same(load):
    last = {"use": "lr_qat", "data": "generated", "options": {"rank": 8}}
    listed, linked = ({"steps": ["gptq", last]}, last | {"init_from": "gptq"})
    records = [load({"late": entry}, ["late"]).to_json()["cells"] for entry in (listed, linked)]
    assert records[0] == records[1]
    step = records[0][0]["steps"][1]
    assert step["method"] == "late" and step["options"]["rank"] == 8 and step["tokens"]["dataset"] == "generated"


@pytest.mark.parametrize(
    ("steps", "scheme", "kind"),
    [
        (["full_precision"], "unquantized", "reference"),
        (["turn"], "unquantized", "transform"),
        (["turn", "fine_tune"], "unquantized", "control"),
        (["turn", "rtn"], "w4-g64", "ptq"),
        (["fine_tune", "rtn"], "w4-g64", "control_ptq"),
        (["gptq", "peqa"], "w4-g64", "qat"),
    ],
)
def test_the_kind_of_a_cell_is_that_of_its_whole_chain(load, steps, scheme, kind):
    loaded = load({"x": {"steps": steps}}, ["x"], [scheme])
    assert loaded.to_json()["cells"][0]["kind"] == kind
    other, message = ("w4-g64", "cannot have") if scheme == "unquantized" else ("unquantized", "needs")
    with pytest.raises(ConfigError, match=f"method 'x' {message} a scheme with weights, but scheme '{other}'"):
        load({"x": {"steps": steps}}, ["x"], [other])


def test_an_entry_with_one_step_is_as_in_its_paper_and_one_with_more_is_not(load):
    methods = {"x": {"steps": [{"use": "rtn", "options": {"scale": "minmax"}}]}, "y": {"steps": ["turn", "rtn-minmax"]}}
    marks = {cell["method"]: cell["as_in_paper"] for cell in load(methods, ["x", "y"]).to_json()["cells"]}
    assert marks == {"x": True, "y": False}


def test_a_configuration_without_an_empty_scheme_cannot_have_steps_in_full_precision(load, default):
    config = copy.deepcopy(default) | {"matrix": [{"models": ["micro"], "schemes": ["w4-g64"], "methods": ["x"]}]}
    config["methods"]["x"] = {"steps": ["turn", "gptq"]}
    config["schemes"] = {name: spec for name, spec in config["schemes"].items() if spec}
    with pytest.raises(
        ConfigError, match=r"^schemes: a recipe has a step in full precision .* no scheme is empty \({}\)"
    ):
        matrix.load(config)


MISTAKES = {
    "codes to a step that takes weights": (
        {"x": {"steps": ["gptq", "rtn"]}},
        r"^methods.x.steps: 'rtn' takes weights, but 'gptq' before it leaves codes \(steps: gptq, rtn; .*peqa\)",
    ),
    "the same by init_from": (
        {"x": {"use": "rtn", "init_from": "gptq"}},
        "^methods.x.init_from: 'x' takes weights, but 'gptq' before it leaves codes",
    ),
    "codes inside a longer recipe": (
        {"x": {"steps": ["gptq", "turn", "rtn"]}},
        r"^methods.x.steps: 'turn' takes weights, but 'gptq' before it leaves codes \(steps: gptq, turn;",
    ),
    "a step after the model itself": (
        {"x": {"steps": ["full_precision", "gptq"]}},
        "^methods.x.steps: 'full_precision' is the model itself, which every recipe starts from",
    ),
    "a misspelt step": (
        {"x": {"steps": ["turn", "gtpq", "peqa"]}},
        r"^methods.x.steps.1: unknown method 'gtpq'; valid: .*gptq-minmax.*\. Did you mean 'gptq'",
    ),
    "a circle": (
        {"x": {"steps": ["turn", "y"]}, "y": {"steps": ["x", "gptq"]}},
        "^methods.y.steps.0: a circle: x -> y -> x$",
    ),
    "a recipe with the name of its own step": (
        {"gptq": {"steps": ["turn", "gptq"]}},
        "^methods.gptq.steps.1: a circle: gptq -> gptq; the module gptq itself is {use: gptq}, as the last step$",
    ),
    "a step in the middle that is written out": (
        {"x": {"steps": ["turn", {"use": "gptq"}, "peqa"]}},
        "^methods.x.steps.1: only the last step may be written out, .*Give the step a name under methods:",
    ),
    "steps and init_from": (
        {
            "peqa-from-gptq": {
                "steps": ["gptq", "peqa"],
                "use": "peqa",
                "init_from": "turn",
                "options": {"warm_up": 0.0},
            }
        },
        "^methods.peqa-from-gptq: steps and use, init_from, options stand in one entry; .*"
        r"Write the whole list, steps: \[turn, {use: peqa, options: {warm_up: 0.0}}\], or choose another name",
    ),
    "steps and options": (
        {"x": {"steps": ["turn", "gptq-minmax"], "options": {"damp": 0.1}}},
        r"^methods.x: steps and options stand .*steps: \[turn, {use: gptq, options: {damp: 0.1}}\], or",
    ),
    "no steps": ({"x": {"steps": []}}, r"^methods.x.steps: \[\]"),
    "a step without its module": (
        {"x": {"steps": ["turn", {"options": {}}]}},
        "^methods.x.steps.1: 'use' is a required",
    ),
    "a misspelt key of a step": (
        {"x": {"steps": ["turn", {"use": "gptq", "optoins": {}}]}},
        "^methods.x.steps.1: unknown key 'optoins'; valid: data, options, use. Did you mean 'options'",
    ),
    "a list within a step": (
        {"x": {"steps": ["turn", {"use": "gptq", "steps": []}]}},
        "^methods.x.steps.1: unknown key 'steps'",
    ),
    "neither a name nor a step": ({"x": {"steps": ["turn", 3]}}, "^methods.x.steps.1: 3 is not of type"),
    "a misspelt option of a step": (
        {"x": {"steps": ["turn", {"use": "gptq", "options": {"dampp": 0.1}}]}},
        "^methods.x.steps.1.options: unknown option .*'dampp'.*Did you mean 'damp'",
    ),
    "data of a step that does not train": (
        {"x": {"steps": ["turn", {"use": "gptq", "data": "generated"}]}},
        "^methods.x.steps.1.data: 'gptq' does not train, its data is calibration",
    ),
    "scales beside those of the codes": (
        {"x": {"steps": ["gptq", {"use": "peqa", "options": {"scale": "minmax"}}]}},
        "^methods.x.steps: 'x' after 'gptq': option scale minmax would be ignored",
    ),
    "scales beside those of the codes, by the entry of a step": (
        {"mm": {"use": "peqa", "options": {"scale": "minmax"}}, "x": {"steps": ["gptq", "mm"]}},
        "^methods.x.steps: 'mm' after 'gptq': option scale minmax would be ignored",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_place_the_value_and_the_choices(load, mistake):
    methods, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        load(methods, ["rtn"])


def modules_of(loaded, method):
    return [step.module for step in loaded.configuration.methods[method].steps]


def test_a_recipe_of_the_default_configuration_ends_with_the_module_whatever_the_entry_of_its_name_says(load):
    loaded = load({"gptq": {"init_from": "fine_tune"}}, ["gptq", "gptq-after-fine_tune", "rotated-gptq"])
    assert modules_of(loaded, "gptq") == modules_of(loaded, "gptq-after-fine_tune") == ["fine_tune", "gptq"]
    assert modules_of(loaded, "rotated-gptq") == ["rotate", "gptq"]
    coarse = load({"gptq": {"options": {"damp": 0.1}}}, ["gptq", "gptq-after-fine_tune"]).configuration.methods
    assert coarse["gptq"].last.options["damp"] == 0.1 and coarse["gptq-after-fine_tune"].last.options["damp"] == 0.01


@pytest.mark.parametrize("name", ["peqa", "lr_qat"])
def test_a_recipe_may_have_the_name_of_its_last_module(load, name):
    loaded = load({name: {"init_from": "gptq"}}, [name])
    assert names_of(loaded) == ["gptq", name] and modules_of(loaded, f"{name}-from-gptq") == ["gptq", name]


WRONG = {
    "a": {"steps": ["gptq", "rtn"]},
    "b": {"steps": ["gptq", "llm_qat"]},
    "c": {"steps": ["d"]},
    "d": {"steps": ["c"]},
}


@pytest.mark.parametrize(
    ("names", "used", "message"),
    [
        ("ab", "a", "^methods.a.steps: 'rtn' takes weights"),
        ("ab", "b", "^methods.b.steps: 'llm_qat' takes weights"),
        ("ab", "gptq", "^methods.a.steps: 'rtn' takes weights"),  # then the rest of the library
        ("cd", "c", "^methods.d.steps.0: a circle: c -> d -> c$"),
        ("cd", "d", "^methods.c.steps.0: a circle: d -> c -> d$"),
    ],
)
def test_of_two_mistakes_that_in_a_recipe_of_the_matrix_is_told(load, names, used, message):
    with pytest.raises(ConfigError, match=message):
        load({name: WRONG[name] for name in names}, [used])


def test_a_module_cannot_do_the_scheme_of_a_recipe_that_uses_it(load):
    """What a module says of a combination is asked for every step, also of one that no cell of the matrix is."""
    loose = {"use": "gptq", "options": {"static_groups": False}}
    with pytest.raises(ConfigError, match=r"matrix: method 'turn\+loose' with scheme 'w4-g64': .*static_groups"):
        load({"loose": loose, "x": {"steps": ["turn", "loose", "peqa"]}}, ["x"])


def test_bits_by_sensitivity_are_not_for_a_model_that_a_step_changed(load):
    long = {"long": {"steps": ["fine_tune", "turn", "gptq", "peqa"]}}
    message = (
        "^matrix: method 'long' with scheme 'mixed3.25-g64': average_bits .*, but step 'turn' changes the weights first"
    )
    with pytest.raises(ConfigError, match=message):
        load(long, ["long"], ["mixed3.25-g64"])
    assert load(long, ["long"], ["w3-g64"]) and load({}, ["gptq-after-fine_tune"], ["mixed3.25-g64"])


def test_the_code_of_a_cell_includes_the_format_that_its_scheme_names(default):
    loaded = matrix.load(default)
    assert loaded.format_files("w4-g64") == ["methods/core/formats/integer.py"] and not loaded.format_files(
        "unquantized"
    )
    with pytest.raises(ConfigError, match="schemes.w4a6: activations: unknown number format.*'fp9'; valid: .*integer"):
        matrix.load(edited(default, "schemes.w4a6.activations", {"format": "fp9", "bits": 6}))


def test_the_recipes_of_the_readme_are_valid(load):
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "workflow/README.md").read_text(), re.DOTALL)[1]
    methods = yaml.safe_load(block)["methods"]
    assert names_of(load(methods, ["tuned"])) == ["fine_tune", "fine_tune+gptq-coarse", "tuned"]
