"""Imports run in one direction: workflow -> methods, evals and reports; these -> methods.core, which imports itself only.

All are absolute: methods/core/job/sources.py reads them to tell what code a result depends on, and follows no others.
"""

import ast

import pytest

from workflow.configuration import ROOT

# Which of the project's packages the files of a folder may import.
ALLOWED = {
    "methods/*.py": ("methods.core",),
    "methods/core/**/*.py": ("methods.core",),
    "methods/export/**/*.py": ("methods.core", "methods.export"),
    "evals/**/*.py": ("methods.core", "evals"),
    "reports/**/*.py": ("methods.core", "reports"),
    "workflow/**/*.py": ("methods", "evals", "reports", "workflow"),
}
PROJECT = ("methods", "evals", "reports", "workflow", "tests")


def imported(path):
    """Names of the project's modules that a file imports anywhere in it: `a.b` for `import a.b` and for `from a import b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in PROJECT)


def relative(path):
    """Lines of a file with a relative import."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node.lineno for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


def wrong(pattern):
    """Imports of the files of a folder that are not allowed there."""
    return {
        (str(path.relative_to(ROOT)), name)
        for path in ROOT.glob(pattern)
        for name in imported(path)
        if not any(f"{name}.".startswith(f"{allowed}.") for allowed in ALLOWED[pattern])
    }


@pytest.mark.parametrize("pattern", ALLOWED)
def test_a_file_imports_what_is_below_it_only(pattern):
    assert list(ROOT.glob(pattern)), pattern
    assert wrong(pattern) == set()


@pytest.mark.parametrize("folder", PROJECT)
def test_no_import_is_relative(folder):
    lines = {str(path.relative_to(ROOT)): relative(path) for path in (ROOT / folder).glob("**/*.py")}
    assert not {path: numbers for path, numbers in lines.items() if numbers}


def test_a_relative_import_is_noticed(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from . import a\nfrom .a import b\nfrom methods import c\n\n\ndef f():\n    from ..d import e\n")
    assert relative(file) == [1, 2, 7]


def test_every_file_has_a_rule():
    files = {path for folder in PROJECT[:-1] for path in (ROOT / folder).glob("**/*.py")}
    assert files == {path for pattern in ALLOWED for path in ROOT.glob(pattern)}


def test_an_import_in_the_wrong_direction_is_found(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "import torch\nimport methods.rtn\nfrom evals import mmlu\n\n\ndef f():\n    from reports.cells import Cell\n"
    )
    assert list(imported(file)) == ["methods.rtn", "evals.mmlu", "reports.cells.Cell"]
