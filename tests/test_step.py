"""One step of a recipe, as `python -m methods` plans it."""

import subprocess
import sys

import pytest

from methods.core.job.files import read_json
from workflow.configuration import ROOT

SCRIPT = """
import sys
from methods.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as error:
    print(error.code)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["gtpq"], "Did you mean 'gptq'?"),
        (["gptq", "--options", "{static_groups: false}"], "act_order with groups needs static_groups"),
        (["gptq"], "method gptq needs calibration tokens: --tokens FILE"),
        (["rtn", "--init-from", "nowhere/checkpoint"], "there is no nowhere/run.json"),
    ],
)
def test_a_mistake_is_refused_before_torch_is_imported(tiny, tmp_path, arguments, error):
    weights = "{weights: {bits: 4, group_size: 32}}"
    command = [sys.executable, "-c", SCRIPT, *arguments, "--model", str(tiny), "--scheme", weights]
    done = subprocess.run([*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "1\n", done.stderr
    assert error in read_json(tmp_path / "failed.json")["error"]
