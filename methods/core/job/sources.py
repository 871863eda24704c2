"""Which of the project's files a program is made of, read from its import statements: what a result depends on.

Snakemake takes them as a rule's inputs and results record their hash, so that an edit reruns what imports the file and
nothing else. Nothing is imported to find out, for torch takes seconds.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import subprocess
from functools import cache
from pathlib import Path

from methods.core.job.files import ROOT

PACKAGES = ("methods", "evals", "workflow", "reports")


def sources(*files: str | Path) -> list[str]:
    """The files, relative to the repository, and those that they import directly or through others; sorted.

    Imports inside functions count too, and so does the package of each module. What a program imports by a name that is
    computed, as `methods.load` does, is not seen: name that file beside the program's own.
    """
    return list(_reached(*files))


def code_sha256(*files: str | Path) -> str:
    """Hash of the names and contents of `sources(*files)`."""
    digest = hashlib.sha256()
    for name in sources(*files):
        digest.update(name.encode() + b"\0" + hashlib.sha256((ROOT / name).read_bytes()).digest())
    return digest.hexdigest()


def version_of(package: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(*paths: str) -> str | None:
    """Commit of this checkout, with `-dirty` if files of these (as git's paths) are other or further; None outside of one."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        found = git("rev-parse", "HEAD")
        return (found and found + ("-dirty" if git("status", "--porcelain", "--", *paths) else "")) or None
    except (OSError, subprocess.TimeoutExpired):
        return None


@cache
def _reached(*files: str | Path) -> tuple[str, ...]:
    todo = [ROOT / file for file in files]
    reached: set[Path] = set()
    while todo:
        path = todo.pop()
        if path not in reached:
            reached.add(path)
            todo += _imports(path)
    return tuple(sorted(str(path.relative_to(ROOT)) for path in reached))


@cache
def _imports(path: Path) -> tuple[Path, ...]:
    """Files of the project's modules that one file imports."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(file for module in modules for file in _files(module))


@cache
def _files(module: str) -> tuple[Path, ...]:
    """The file of a module of the project and those of the packages around it; none for other modules and for names."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return ()
    folders = [ROOT.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts) + 1)]
    own = ROOT.joinpath(*parts).with_suffix(".py")
    return tuple(path for path in (*folders, own) if path.is_file())
