"""Quantization methods. One public module in this folder is one method; the folder is the registry.

A method's module has three names, nothing to inherit and nothing to register:

    Config    frozen dataclass: the method's options and their defaults
    DATA      which tokens it receives: "none", "calibration", or to train on "training" (text) or "generated" (by the
              model itself); a configuration may give a method that trains the other of the two
    quantize(model, scheme, config, tokens, log) -> model
              the same model with every linear layer of its decoder blocks replaced by a QuantizedLinear;
              tokens, int64, is None, (samples, sequence) or, for training, (steps, accumulation, batch, sequence);
              log is a methods.core.job.log.RunLog

and, where it needs them,

    check(scheme, config)   raises ValueError for a combination it cannot do, before any job starts
    QUANTIZES = False       for a method that leaves the weights in full precision (the reference, training controls)
    INIT_FROM = True        for a method that can start from the checkpoint of another that quantizes: its layers are then
                            QuantizedLinear already, on the scheme's grid. (From a training control's, which are
                            ordinary layers, any method can.)
    PAPER = {...}           the paper's values of options whose defaults here may be others; learning rates, which belong to a
                            training budget, are not among them. The report marks the rows that have them all
"""

from __future__ import annotations

import ast
import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

FOLDER = Path(__file__).parent
OPTIONS = "methods.core.job.options"
TRAINING_DATA = ("training", "generated")
DATA = ("none", "calibration", *TRAINING_DATA)


def available(folder: Path = FOLDER) -> list[str]:
    """Names of the methods: every module in the folder without a leading underscore."""
    return sorted(p.stem for p in folder.glob("*.py") if not p.name.startswith("_"))


def load(name: str) -> ModuleType:
    """The module of a method."""
    return importlib.import_module(f"methods.{name}")


def _is_literal(value: ast.expr | None) -> bool:
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError):
        return False
    return True


@cache
def declaration(path: Path) -> SimpleNamespace:
    """`Config`, `DATA`, `check` and the optional constants of a method or evaluation, without importing torch.

    Checking a configuration must not cost the seconds that importing torch costs, so only these names and the module's
    imports from the standard library and from methods.core.job.options, which has no torch, are executed. ValueError if the
    file does not satisfy the protocol.
    """
    keep: list[ast.stmt] = []
    for node in ast.parse(path.read_text(), str(path)).body:
        if isinstance(node, ast.Import):
            standard = all(a.name.partition(".")[0] in sys.stdlib_module_names for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            standard = (node.module or "").partition(".")[0] in sys.stdlib_module_names or node.module == OPTIONS
        else:
            standard = False
        named = getattr(node, "name", None) in ("Config", "check")
        constant = isinstance(node, ast.Assign | ast.AnnAssign) and _is_literal(node.value)
        if standard or named or constant:
            keep.append(node)
    module = ModuleType(f"{path.stem}_declaration")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(ast.Module(keep, []), str(path), "exec"), module.__dict__)
    except Exception as error:
        raise ValueError(
            f"{path}: Config and check may use the standard library, {OPTIONS} and literal constants only: {error}"
        ) from None
    for name in ("Config", "DATA"):
        if not hasattr(module, name):
            raise ValueError(f"{path} has no {name}; see the docstring of {path.parent / '__init__.py'}")
    return SimpleNamespace(
        Config=module.Config,
        DATA=module.DATA,
        check=getattr(module, "check", None),
        QUANTIZES=getattr(module, "QUANTIZES", True),
        INIT_FROM=getattr(module, "INIT_FROM", False),
        PAPER=getattr(module, "PAPER", None),
        OF_THE_MACHINE=getattr(module, "OF_THE_MACHINE", False),
    )
