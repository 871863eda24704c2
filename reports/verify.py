"""Re-check a finished result tree from its files: that each result is of the checkpoint, the text and the configuration that
it names, and that what is stored is what the scheme says. Nothing is changed.

python -m reports.verify results/default

Each deviation is printed with the file and the cause, and the exit code is 1; without any, a line says how much was checked.
What is not there any more, such as checkpoints that were deleted to save space, is counted as not checked.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from methods.core.job import registry
from methods.core.job.files import (
    CHECKPOINT_FILES,
    RESIDUALS,
    model_hashes,
    read_json,
    sha256_file,
    sha256_files,
    sha256_folder,
)
from reports import stored
from reports.cells import read_matrix
from reports.items import UNREADABLE, Stratum, read_samples
from reports.run import mismatch


@dataclass
class Verification:
    """What was found of a tree. missing: results that the matrix asks for. deviations: all else that is not as it should be,
    each with its file. checked, absent: paths by kind. items: of all results.

    texts: the hash of each text in use, by dataset. runs: run.json by path of the cell. protocols: of each model's results of
    an evaluation, each with the first file that has it.
    """

    folder: Path
    matrix: dict[str, Any]
    missing: list[str] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    checked: dict[str, set[Path]] = field(default_factory=lambda: defaultdict(set))
    absent: dict[str, set[Path]] = field(default_factory=lambda: defaultdict(set))
    items: int = 0
    texts: dict[str, str] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    known: dict[tuple[Callable[[Path], Any], Path], Any] = field(default_factory=dict)
    protocols: dict[tuple[str, str], dict[str, Path]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def resources(self) -> Path:
        """What the results were made of, in the folder that has results/NAME."""
        return self.folder.parent.parent / "resources"

    def expect(self, right: bool, path: Path, cause: str) -> None:
        if not right:
            self.deviations.append(f"{path}: {cause}")

    def expect_none(self, causes: Iterable[str], path: Path) -> None:
        self.deviations += [f"{path}: {cause}" for cause in causes]

    def there(self, path: Path, kind: str) -> bool:
        """Whether a file or folder can be checked; counts it."""
        (self.checked if path.exists() else self.absent)[kind].add(path)
        return path.exists()

    def once(self, read: Callable[[Path], Any], path: Path) -> Any:
        """What `read` makes of a file that many cells have in common."""
        if (read, path) not in self.known:
            self.known[read, path] = read(path)
        return self.known[read, path]

    @contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Make a deviation of an error of a file that is not what it should be."""
        try:
            yield
        except (*UNREADABLE, SafetensorError) as error:
            self.expect(False, path, f"it cannot be read: {type(error).__name__}: {error}")

    def summary(self) -> str:
        """How much was checked, and what was not."""
        done = ", ".join([*(_counted(paths, kind) for kind, paths in self.checked.items()), f"{self.items:,} items"])
        left = ", ".join(_counted(paths, kind) for kind, paths in self.absent.items())
        return done + (f"; not checked, since they are not there: {left}" if left else "")


def _counted(paths: set[Path], kind: str) -> str:
    return f"{len(paths):,} {kind if len(paths) > 1 else kind.removesuffix('s')}"


def verify(folder: Path, tensors: bool = True) -> Verification:
    """Check a result tree. tensors: also the files of models and checkpoints, which takes some seconds per gigabyte.

    ValueError or FileNotFoundError if the folder has no matrix.json.
    """
    v = Verification(folder, read_matrix(folder / "matrix.json"))
    _texts(v)
    for model in dict.fromkeys(cell["model"] for cell in v.matrix["cells"]):
        _model(v, model, tensors)
    for path, (steps, cell) in tqdm(_jobs(v.matrix).items(), desc="verifying", unit="cell", file=sys.stderr):
        file = v.folder / path / "run.json"
        if not file.is_file():
            v.missing.append(f"{file}: there is none, the cell has not run")
            continue
        with v.reading(file):
            v.runs[path] = run = read_json(file, sealed=True)
            v.checked["runs"].add(file)
            _run(v, file, run, steps)
            if cell:
                v.expect(not (reason := mismatch(run, cell, v.matrix["config"])), file, reason)
                _done(v, file.parent / "evals/done.json")
                for name, options in v.matrix["evaluations"].items():
                    _evaluation(v, file.parent / f"evals/{name}.json", run, cell, options)
            if tensors:
                _checkpoint(v, file.parent / "checkpoint", run)
    _protocols(v)
    return v


def _jobs(matrix: dict[str, Any]) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None]]:
    """The steps that lead to each path, and its cell where the matrix has one: those before a recipe's last first."""
    jobs: dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None]] = {}
    for cell in matrix["cells"]:
        for number, step in enumerate(cell["steps"], 1):
            if path := step.get("path"):  # an older matrix.json does not name it
                jobs.setdefault(path, (cell["steps"][:number], None))
    return jobs | {cell["path"]: (cell["steps"], cell) for cell in matrix["cells"]}


def _texts(v: Verification) -> None:
    """The texts in use share no document, and are still those that were used."""
    file = v.folder / "text.json"
    documents: dict[str, set[str]] = {}
    with v.reading(file):
        for name, facts in read_json(file).items():
            v.texts[name], folder = facts["sha256"], v.resources / "text" / name
            manifest = folder / "manifest.json"
            if v.there(folder, "texts"):
                with v.reading(manifest):
                    now = read_json(manifest)
                    documents[name] = set(now["document_sha256"])
                    v.expect(all(now[key] == facts[key] for key in facts), manifest, f"not what {file} says of it")
                with v.reading(folder / "documents.jsonl"):
                    same = sha256_file(folder / "documents.jsonl") == facts["sha256"]
                    v.expect(same, folder / "documents.jsonl", f"its hash is not that in {file}")
    for a, b in itertools.combinations(documents, 2):
        shared = len(documents[a] & documents[b])
        v.expect(not shared, file, f"datasets {a} and {b} share {shared} documents")


def _model(v: Verification, name: str, tensors: bool) -> None:
    """The files of a prepared model are those of its manifest."""
    folder = v.resources / "models" / name
    if tensors and v.there(folder, "models"):
        with v.reading(folder / "manifest.json"):
            manifest = read_json(folder / "manifest.json")
            for key, now in model_hashes(folder).items():
                v.expect(manifest.get(key, now) == now, folder, f"its {key} is not that of its manifest")


def _run(v: Verification, file: Path, run: dict[str, Any], plans: list[dict[str, Any]]) -> None:
    """A run is of the model that is there, and each step started from what the step before it left."""
    steps = run["steps"]
    v.expect(run["checkpoint_sha256"] == steps[-1]["checkpoint_sha256"], file, "its hash is not that of its last step")
    for step, plan in zip(steps[:-1], plans, strict=False):
        if before := v.runs.get(plan.get("path")):
            for key in ("checkpoint_sha256", "residuals_sha256"):
                same = step[key] == before["steps"][-1][key]
                v.expect(same, file, f"it started from another {key[:-7]} than that of {v.folder / plan['path']}")
    manifest = v.resources / "models" / run["cell"]["model"] / "manifest.json"
    if manifest.is_file():
        v.expect(run["model"] == v.once(read_json, manifest), file, f"the model is not that of {manifest}")
    if run["allocation"]:
        allocation = file.parents[2] / "allocation.json"
        bits = {row["layer"]: row["bits"] for row in v.once(read_json, allocation)["layers"]}
        same = bits == {row["layer"]: row["bits"] for row in run["layers"]}
        same = same and v.once(_sha256, allocation) == run["allocation"]["sha256"]
        v.expect(same, file, f"its bits are not those of {allocation}")
    for step in steps:
        if step["tokens"]:
            _tokens(v, file, step["tokens"])
    metrics, recorded = file.parent / "training/metrics.jsonl", (steps[-1]["training"] or {}).get("metrics_sha256")
    if recorded and v.there(metrics, "losses"):
        v.expect(sha256_file(metrics) == recorded, metrics, f"its hash is not that in {file}")


def _tokens(v: Verification, file: Path, recorded: dict[str, Any]) -> None:
    """The tokens that a step has read are of a text in use, and are still there as they were."""
    dataset, folder = recorded["dataset"], v.resources / "tokens" / recorded["model"]
    own = "model_sha256" in recorded  # the model generated it
    same = own or v.texts.get(dataset) == recorded["text_sha256"]
    v.expect(same, file, f"the text {dataset} that it read is not that of {v.folder / 'text.json'}")
    tokenizer = v.resources / "models" / recorded["model"] / "tokenizer.json"
    if tokenizer.is_file() and "tokenizer_sha256" in recorded:
        v.expect(v.once(_sha256, tokenizer) == recorded["tokenizer_sha256"], file, f"its tokens are not of {tokenizer}")
    # A model's own text has its size in its name, and there may be several.
    there = folder.glob(f"{dataset}-*.safetensors") if own else [folder / f"{dataset}.safetensors"]
    found = []
    for path in there:
        if v.there(path, "token files"):
            with v.reading(path):
                facts = v.once(_metadata, path) | {"sha256": v.once(_sha256, path)}
                # An older run.json does not have the hash of the file.
                found.append(all(recorded.get(key, value) == value for key, value in facts.items()))
                v.expect(own or found[-1], path, f"it is not what {file} says that it has read")
    v.expect(any(found) or not found, file, f"its tokens of {dataset} are not those of {folder}")


def _done(v: Verification, file: Path) -> None:
    """All evaluations ended, in the run that made the results."""
    if not file.is_file():
        v.missing.append(f"{file}: there is none, the evaluations have not ended")
        return
    with v.reading(file):
        v.expect(read_json(file) == sorted(v.matrix["evaluations"]), file, "it has other evaluations than matrix.json")


def _evaluation(
    v: Verification, file: Path, run: dict[str, Any], cell: dict[str, Any], options: dict[str, Any]
) -> None:
    """A result is of the cell's checkpoint, its options and data, and its metrics follow from its items."""
    failed = file.with_suffix(".failed.json")
    if not file.is_file() or failed.is_file():
        why = f"the evaluation failed, see {failed}" if failed.is_file() else "there is none"
        v.missing.append(f"{file}: {why}")
        return
    with v.reading(file):
        result = read_json(file, sealed=True)
        v.checked["results"].add(file)
        v.expect(result["checkpoint_sha256"] == run["checkpoint_sha256"], file, "it is of another checkpoint")
        v.expect(all(cell[key] == value for key, value in result["cell"].items()), file, "it is of another cell")
        v.expect(result["options"] == options, file, "its options are not those of matrix.json")
        v.protocols[cell["model"], file.stem].setdefault(result["protocol"], file)
        _data(v, file, result, cell["model"])
        made_of_items = any({"over", "items"} & metric.keys() for metric in result["metrics"].values())
        if made_of_items or file.with_suffix(".parquet").is_file():
            _items(v, file, result)


def _data(v: Verification, file: Path, result: dict[str, Any], model: str) -> None:
    """The data of a result are still there as they were."""
    entry = v.matrix["config"]["evaluations"][file.stem]
    module, declared = registry.declared_evaluation(file.stem)
    dataset, given = entry.get("dataset"), declared.of.given
    text = result["data"].get("text_sha256")
    v.expect(text in (None, v.texts.get(dataset)), file, f"its text is not {dataset} of {v.folder / 'text.json'}")
    if given == "tokens":
        paths = [v.resources / "tokens" / model / f"{dataset}.safetensors"]
    elif given == "reference":
        options = "-".join(f"{key}{value}" for key, value in result["options"].items())
        paths = [v.resources / "reference" / model / f"{dataset}-{options}.safetensors"]
    else:
        tasks = result["options"].get("tasks", [module])
        paths = [v.resources / "tasks" / entry["tasks"] / task for task in tasks] if given == "tasks" else []
    for path, recorded in zip(paths, result["data_sha256"], strict=True):
        if v.there(path, {"tokens": "token files", "reference": "references", "tasks": "tasks"}[given]):
            v.expect(v.once(_sha256, path) == recorded, file, f"its data are not those of {path} any more")
            if given == "reference":
                manifest = v.resources / "models" / model / "manifest.json"
                of = json.loads(v.once(_metadata, path)["info"])["model_sha256"]
                same = not manifest.is_file() or of == v.once(read_json, manifest)["sha256"]
                v.expect(same, path, f"it is of another model than {manifest}")
            elif given == "tasks":
                _task_files(v, path)


def _task_files(v: Verification, folder: Path) -> None:
    """The items of benchmarks are still those that were scored."""
    for file in sorted(folder.glob("**/task.json")):
        if file not in v.checked["benchmarks"]:
            v.checked["benchmarks"].add(file)
            with v.reading(file):
                for split, facts in read_json(file)["splits"].items():
                    items = file.with_name(f"{split}.parquet")
                    v.expect(sha256_file(items) == facts.get("file_sha256"), items, f"its hash is not that in {file}")


def _items(v: Verification, file: Path, result: dict[str, Any]) -> None:
    """There are as many items as the result says, and its metrics are made of them."""
    items = file.with_suffix(".parquet")
    with v.reading(items):
        v.expect(result["items_sha256"] == sha256_file(items), items, f"its hash is not that in {file.name}")
        rows = pq.read_table(items).num_rows
        v.items += rows
        # Divergence counts the tokens of its windows.
        counts = (rows, rows * result["options"].get("window", 1))
        v.expect(result["n"] in counts, items, f"it has {rows:,} rows, but {file.name} has {result['n']:,} items")
        for name, strata in read_samples(items, result["metrics"]).items():
            metric = result["metrics"][name]
            value = _value(strata, metric.get("items", {}).get("change"))
            same = math.isclose(metric["value"], value, rel_tol=1e-5, abs_tol=1e-9)
            v.expect(same, file, f"{name} is {metric['value']}, but its items give {value}")


def _value(strata: Iterable[Stratum], change: str | None) -> float:
    """A metric of its items."""
    means = [float(stratum.values.mean()) for stratum in strata]
    return math.exp(means[0]) if change == "relative" else sum(means) / len(means)


def _protocols(v: Verification) -> None:
    """All cells of a model were scored alike."""
    for (model, evaluation), files in v.protocols.items():
        first, *others = files.items()
        for protocol, file in others:
            v.expect(False, file, f"{evaluation} of {model} is {protocol}, but {first[0]} in {first[1]}")


def _checkpoint(v: Verification, folder: Path, run: dict[str, Any]) -> None:
    """The files of a checkpoint are those that were evaluated, and hold what the scheme says. Each is read once."""
    if not v.there(folder, "checkpoints"):
        return
    from safetensors.torch import load

    hashes, tensors, size, forms = [], {}, 0, stored.formats(run)
    for file in sorted({path for pattern in CHECKPOINT_FILES for path in folder.glob(pattern)}):
        data = file.read_bytes()
        hashes.append((file.name, hashlib.sha256(data).hexdigest()))
        if file.suffix == ".safetensors":
            with v.reading(file):
                found = load(data)
                v.expect_none(stored.values(found, forms), file)
                tensors |= found
            size += len(data)
    v.expect(sha256_files(hashes) == run["checkpoint_sha256"], folder, "its hash is not that of run.json")
    recorded, residuals = run["steps"][-1]["residuals_sha256"], folder / RESIDUALS
    if recorded and v.there(residuals, "residuals"):
        v.expect(sha256_file(residuals) == recorded, residuals, "its hash is not that of run.json")
    footprint = folder.parent / "evals/footprint.json"
    with v.reading(folder):
        v.expect_none(stored.layers(tensors, forms, run), folder)
        if run["layers"] and footprint.is_file():
            v.expect_none(stored.footprint(tensors, forms, run, size, read_json(footprint)["metrics"]), footprint)


def _sha256(path: Path) -> str:
    """Hash of a file, or of a folder of tasks as evaluations record it."""
    return sha256_folder(path, ("**/task.json",)) if path.is_dir() else sha256_file(path)


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reports.verify", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of a result tree, as results/default")
    args = parser.parse_args()
    try:
        v = verify(args.results)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if found := [*v.missing, *v.deviations]:
        sys.exit("\n".join([*found, f"{args.results}: {len(found)} deviations in {v.summary()}"]))
    print(f"{args.results}: no deviation in {v.summary()}")


if __name__ == "__main__":
    main()
