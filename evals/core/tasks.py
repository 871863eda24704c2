"""lm-eval's tasks on local items: prompts, choices and metrics are lm-eval's, the scoring is ours.

Items are Parquet files that workflow/prepare/tasks.py wrote. A task is lm-eval's own definition, except that its items are
read from these files. The model's answers are computed with shared prefixes (evals/core/language_model.py); the task's
definition turns them into scores.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zlib import crc32

import datasets
import numpy as np
import pyarrow.parquet as pq
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import env

from evals import mean_and_stderr
from evals.core.definitions import task_folder
from evals.core.language_model import PrefixSharingLM
from methods.core.job.files import read_json, sha256_file

OUTPUT_TYPES = ("multiple_choice", "loglikelihood")
MARGINS = {"column": "margin", "change": "difference"}  # how a metric of margins follows from `item_columns`
REQUESTS = 20_000  # requests that are scored under one progress bar; their token ids take a few hundred megabytes

# lm-eval compiles a task's template for each text it renders. Without the cache that took most of a minute for MMLU with
# examples.
env.from_string = cache(env.from_string)


class LocalTask(ConfigurableTask):
    """lm-eval's task whose splits are given instead of downloaded."""

    def __init__(self, config: dict[str, Any], splits: dict[str, datasets.Dataset]):
        self.splits = splits
        super().__init__(config=config)

    def download(self, dataset_kwargs=None, **kwargs) -> None:
        self.dataset = self.splits


@dataclass
class Item:
    """One question: its document and the requests (context, continuation) made of it."""

    row: int  # in the task's file
    doc: dict[str, Any]
    requests: list[Any]
    right: list[int]  # the choices that are right; none where the answer is no choice
    answers: list[tuple[float, bool]] = field(default_factory=list)
    truncated: bool = False  # whether a request was cut


@dataclass(frozen=True)
class LoadedTask:
    """A task and its items to be scored."""

    definition: LocalTask
    about: dict[str, Any]  # the contents of task.json
    total: int  # items that the task has
    items: list[Item]


@dataclass(frozen=True)
class ScoredTask:
    """A model's scores on the items of one task."""

    name: str
    version: str
    sha256: str  # of the rows of the scored split
    examples: str | None  # of those that the examples before a question are taken from; None without examples
    tags: list[str]
    total: int  # items that the task has
    item: list[int]  # row of each scored item in the task's file
    scores: dict[str, list[float]]  # metric -> one value per scored item
    log_likelihoods: list[list[float]]  # per scored item, of its choices
    truncated: int  # items with a request longer than the model's context, which is cut on the left
    bos: bool  # whether requests begin with a BOS token

    def mean(self, metric: str) -> tuple[float, float | None]:
        """The metric over the items and its standard error."""
        return mean_and_stderr(np.asarray(self.scores[metric]))


def score_tasks(
    lm: PrefixSharingLM, folders: list[Path], shots: int, limit: int | None, seed: int, log
) -> list[ScoredTask]:
    """Score the tasks in `folders`, at most `limit` items of each, drawn by `seed` and the task's name alone.

    ValueError for a folder without tasks, for a task that is not multiple choice or log-likelihood, and for an item of which
    the task's definition cannot make requests.
    """
    datasets.disable_progress_bars()
    paths = [path for folder in folders for path in sorted(folder.glob("**/task.json"))]
    if empty := [str(folder) for folder in folders if not any(path.is_relative_to(folder) for path in paths)]:
        raise ValueError(f"no tasks in {', '.join(empty)}: python -m workflow.prepare.tasks makes such a folder")
    tasks = [load_task(path.parent, shots, limit, seed) for path in paths]
    log.info(f"{sum(len(task.items) for task in tasks):,} items of {len(tasks)} tasks, {shots}-shot")
    asked = [(item, request) for task in tasks for item in task.items for request in item.requests]
    for i in range(0, len(asked), REQUESTS):
        part = asked[i : i + REQUESTS]
        answers = lm.loglikelihood([request for _, request in part], disable_tqdm=True)
        for (item, _), answer, truncated in zip(part, answers, lm.truncated, strict=True):
            item.answers.append(answer)
            item.truncated |= truncated
    return [_scores(task, bos=lm.bos is not None) for task in tasks]


def load_task(folder: Path, shots: int, limit: int | None, seed: int) -> LoadedTask:
    """The task in a folder, with `shots` examples before each question. ValueError as for `score_tasks`."""
    about = read_json(folder / "task.json")
    config = load_yaml(task_folder() / about["definition"])
    config = {key: value for key, value in config.items() if key not in ("tag", "group")}
    scored = config.get("test_split") or config["validation_split"]
    tables = {}
    for split, facts in about["splits"].items():
        file = folder / f"{split}.parquet"
        if facts.get("file_sha256") != sha256_file(file):
            raise ValueError(f"{file} has been changed or damaged: its hash is not that in task.json")
        tables[split] = pq.read_table(file)
    for split in ("training_split", "validation_split", "test_split"):
        if config.get(split) not in tables:
            config[split] = None  # neither scored nor a source of examples
    total = len(tables[scored])
    rows = chosen_rows(about["task"], total, limit, seed)
    tables[scored] = tables[scored].take(rows)
    try:
        task = LocalTask(config | {"num_fewshot": shots}, {s: datasets.Dataset(t) for s, t in tables.items()})
    except Exception as error:
        raise ValueError(f"task {about['task']}: {type(error).__name__}: {error}") from error
    if task.OUTPUT_TYPE not in OUTPUT_TYPES or "acc" not in task.aggregation():
        kind = f"{task.OUTPUT_TYPE} with {', '.join(task.aggregation())}"
        raise ValueError(f"task {about['task']} is {kind}; scored here are {' and '.join(OUTPUT_TYPES)} with acc")
    task.set_fewshot_seed(seed)
    items = [_item(task, doc, int(row)) for doc, row in zip(task.task_docs, rows, strict=True)]
    return LoadedTask(task, about, total, items)


def chosen_rows(task: str, total: int, limit: int | None, seed: int) -> np.ndarray:
    """The rows of a task's items that are scored: the same for every checkpoint."""
    if limit is None or limit >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng([seed, crc32(task.encode())]).choice(total, limit, replace=False))


def _item(task: LocalTask, doc: dict[str, Any], row: int) -> Item:
    """One document with its requests. ValueError naming its row if the definition cannot make them of it."""
    where = f"task {task.config.task}, item {row}"
    if empty := [name for name in _fields_read(task, doc) if doc[name] is None]:
        raise ValueError(f"{where}: no {empty[0]}")
    try:
        context = task.fewshot_context(doc, num_fewshot=task.config.num_fewshot, gen_prefix=task.doc_to_prefix(doc))
        requests = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, row, 1))
        choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else [task.doc_to_target(doc)]
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    except Exception as error:
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    if not choices or any(not str(choice).strip() for choice in choices):
        raise ValueError(f"{where}: an empty choice")
    right = []
    for answer in gold if isinstance(gold, list) else [gold]:
        if task.OUTPUT_TYPE != "multiple_choice":
            continue
        if answer not in choices and answer not in range(len(choices)):
            raise ValueError(f"{where}: the answer {answer!r} is none of its {len(choices)} choices")
        right.append(choices.index(answer) if answer in choices else answer)
    if right and len(set(right)) == len(choices):
        raise ValueError(f"{where}: no choice is wrong")
    return Item(row, doc, requests if isinstance(requests, list) else [requests], right)


def _fields_read(task: LocalTask, doc: dict[str, Any]) -> list[str]:
    """The fields of a document that its prompt, choices and answer are made of: all, where a function makes them."""
    templates = [task.config.doc_to_text, task.config.doc_to_choice, task.config.doc_to_target]
    if any(map(callable, templates)):
        return list(doc)
    text = " ".join(map(str, templates))
    return [name for name in doc if re.search(rf"\b{re.escape(name)}\b", text)]


def _scores(task: LoadedTask, bos: bool) -> ScoredTask:
    """What the definition makes of the items' answers. ValueError naming the item where it cannot."""
    definition, about = task.definition, task.about
    scores: dict[str, list[float]] = {}
    if definition.OUTPUT_TYPE == "multiple_choice":
        scores["margin"] = [_margin(item) for item in task.items]
    for item in task.items:
        where = f"task {about['task']}, item {item.row}"
        try:
            results = definition.process_results(item.doc, item.answers)
        except Exception as error:
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
        for metric, value in results.items():
            if metric in ("acc", "acc_norm") and value not in (0, 1):
                raise ValueError(f"{where}: {metric} is {value}; it must be right or wrong")
            if np.isscalar(value):  # others, such as F1, are not of one item
                scores.setdefault(metric, []).append(float(value))
    if "perplexity" in scores:
        scores["log_likelihood"] = scores.pop(
            "perplexity"
        )  # lm-eval's name for it; its exponential comes after the mean
    splits = {split: facts["sha256"] for split, facts in about["splits"].items()}
    return ScoredTask(
        name=about["task"],
        version=str((definition.config.metadata or {}).get("version", "")),
        sha256=splits[definition.config.test_split or definition.config.validation_split],
        examples=splits[definition.config.fewshot_split] if definition.config.num_fewshot else None,
        tags=about["tags"],
        total=task.total,
        item=[item.row for item in task.items],
        scores=scores,
        log_likelihoods=[[value for value, _ in item.answers] for item in task.items],
        truncated=sum(item.truncated for item in task.items),
        bos=bos,
    )


def _margin(item: Item) -> float:
    """Log-likelihood of the right choice less that of the best other one, in nats: above zero if the model would choose it.

    Two models that answer alike may differ in it: it says by how much a choice is right or wrong.
    """
    log_likelihoods = [value for value, _ in item.answers]
    others = [value for i, value in enumerate(log_likelihoods) if i not in item.right]
    return max(log_likelihoods[i] for i in item.right) - max(others)


def item_columns(tasks: list[ScoredTask], primary: Callable[[str], str], group: str | None = None) -> dict[str, list]:
    """The columns of a result's per-item file: which question, whether it was right, by which margin, and the choices'
    log-likelihoods.

    primary: gives for a task's name the metric that is its score. group: what the questions count for, each task by default.
    """
    names = ("group", "task", "item", "right", "acc", "margin", "log_likelihoods")
    columns: dict[str, list] = {name: [] for name in names}
    for task in tasks:
        columns["group"] += [group or task.name] * len(task.item)
        columns["task"] += [task.name] * len(task.item)
        columns["item"] += task.item
        columns["right"] += [bool(value) for value in task.scores[primary(task.name)]]
        columns["acc"] += [bool(value) for value in task.scores["acc"]]
        columns["margin"] += task.scores.get("margin", [float("nan")] * len(task.item))
        columns["log_likelihoods"] += task.log_likelihoods
    return columns


def describe(tasks: list[ScoredTask], shots: int | str, config, log) -> dict[str, Any]:
    """The fields of a Result that say what was scored; items that had to be cut are recorded in the log."""
    for task in tasks:
        if task.truncated:
            log.departure(f"{task.name}: {task.truncated} items are longer than the model's context, cut on the left")
    partial = any(len(task.item) < task.total for task in tasks)
    limit = f", at most {config.limit} items a task (seed {config.seed})" if partial else ""
    bos = "+bos" if tasks[0].bos else ""
    data = {}
    for task in tasks:
        data[task.name] = {"version": task.version, "items": task.total, "sha256": task.sha256}
        data[task.name] |= {"examples_sha256": task.examples} if task.examples else {}
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
    return {
        "protocol": f"lm-eval {version('lm_eval')}, {shots}-shot{bos}{limit}, items@{digest}",
        "n": sum(len(task.item) for task in tasks),
        "partial": partial,
        "data": data,
    }
