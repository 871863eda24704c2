"""Mistakes in a configuration that can be seen before any job starts: one function for each, in CHECKS in their order.

A function has the name of the sentence that it checks. It is given the matrix and raises ConfigError for the first place
where the sentence does not hold. A job checks itself what it alone can see, such as a document that two texts share.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from methods.core import recipe
from methods.core.job import ranks, registry
from methods.core.job.options import choose
from methods.core.scheme import WeightScheme
from workflow.configuration import EMBEDDED, FROM_PACKAGE, Dataset
from workflow.errors import ConfigError, place
from workflow.prepare import GENERATED
from workflow.prepare.tasks import EMBEDDED as EMBEDDED_TASKS
from workflow.prepare.unpack import SOURCES

if TYPE_CHECKING:
    from workflow.matrix import Matrix

HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")  # a repository: owner/name, or a name alone
LONGEST = 200  # name of a folder; most file systems allow 255 bytes
TASK = re.compile(r"[\w-]{1,200}")
# The key of an evaluation's entry that names what it is given.
KEYS = {"tokens": "dataset", "reference": "dataset", "tasks": "tasks", "none": None}


def check(matrix: Matrix) -> None:
    """ConfigError for the first mistake."""
    for each in CHECKS:
        each(matrix)


def values_of_schemes_fit(matrix: Matrix) -> None:
    """The values of each scheme fit each other."""
    for entry in matrix.configuration.schemes.values():
        with place(f"schemes.{entry.name}"):
            _ = entry.scheme


def steps_take_what_is_left(matrix: Matrix) -> None:
    """Each step takes what the step before it left."""
    for each in matrix.configuration.methods.values():
        with place(each.place):
            try:
                recipe.check_chain([(step.name, step.of) for step in each.steps])
            except ValueError as error:
                able = [name for name in registry.names("methods") if registry.CODES in _method(name).takes]
                raise ValueError(
                    f"{error} (steps: {', '.join(step.name for step in each.steps)}; methods that take "
                    f"{registry.CODES}: {', '.join(able)})"
                ) from None


def steps_keep_the_scales_of_codes(matrix: Matrix) -> None:
    """A step that starts from codes keeps their scales, so no option may ask for others."""
    for each in matrix.configuration.methods.values():
        for before, step in itertools.pairwise(each.steps):
            if before.of.leaves == registry.CODES and hasattr(step.config, "require_defaults"):
                with place(f"{each.place}: {step.name!r} after {before.name!r}"):
                    step.config.require_defaults()


def steps_that_choose_data_train(matrix: Matrix) -> None:
    """A step that chooses its data is one that trains."""
    for step in itertools.chain.from_iterable(each.steps for each in matrix.configuration.methods.values()):
        if step.reads != step.of.reads and not step.of.trains:
            raise ConfigError(f"{step.place}.data: {step.module!r} does not train, its data is {step.of.reads}")


def recipes_quantize_if_schemes_do(matrix: Matrix) -> None:
    """A recipe quantizes exactly if its cell's scheme has weights; one that depends on the scheme has to."""
    for cell in matrix.cells:
        recipe = matrix.recipe(cell)
        quantizes = recipe.quantizes
        if recipe.needs_scheme and not quantizes:
            raise ConfigError(
                f"matrix: method {cell.method!r} prepares weights for rounding, but no later step rounds them; give it a "
                f"next step, as in {{steps: [{cell.method}, {{use: gptq}}]}}"
            )
        if quantizes != matrix.configuration.schemes[cell.scheme].quantizes:
            raise ConfigError(
                f"matrix: method {cell.method!r} {'needs' if quantizes else 'cannot have'} a scheme with weights, but scheme "
                f"{cell.scheme!r} {'has none' if quantizes else 'has'}"
            )


def steps_can_do_schemes(matrix: Matrix) -> None:
    """A step can do its cell's scheme with its options, as its module says."""
    for cell in matrix.jobs:
        step = matrix.recipe(cell).last
        if step.declared.check:
            with place(f"matrix: method {cell.method!r} with scheme {cell.scheme!r}"):
                step.declared.check(matrix.configuration.schemes[cell.scheme].scheme, step.config)


def mixed_schemes_have_no_transforms(matrix: Matrix) -> None:
    """The layers' sensitivities are those of the model as it is, so no step may change its weights before they are used."""
    for cell in matrix.jobs:
        for step in matrix.recipe(cell).steps if cell.scheme in matrix.mixed else ():
            if step.of.kind == "transform":
                raise ConfigError(
                    f"matrix: method {cell.method!r} with scheme {cell.scheme!r}: average_bits gives bits to layers by their "
                    f"sensitivity in the model as it is, but step {step.name!r} changes the weights first. Use a scheme "
                    "with the same bits for all layers, or a recipe without that step"
                )


def evaluations_name_their_data(matrix: Matrix) -> None:
    """An evaluation names what it is given, and nothing else."""
    for entry in matrix.configuration.evaluations.values():
        with place(f"evaluations.{entry.name}"):
            for key, value in (("dataset", entry.dataset), ("tasks", entry.source)):
                if (value is not None) != (key == KEYS[entry.given]):
                    raise ValueError(f"it needs the key {key}" if value is None else f"it takes no {key}")


def evaluations_read_different_texts(matrix: Matrix) -> None:
    """Entries of one module read different datasets, and the first has the module's name: methods are chosen by it."""
    entries = matrix.configuration.evaluations
    readers: dict[tuple[str, str | None], str] = {}
    for name, entry in entries.items():
        with place(f"evaluations.{name}"):
            if entry.module not in entries:
                raise ValueError(f"it is {entry.module} on one more text, and there is no {entry.module} for the first")
            first = readers.setdefault((entry.module, entry.dataset), name)
            if first != name:
                raise ValueError(
                    f"it reads the dataset {entry.dataset!r}, as {first} does; each further one is of another"
                )


def embedded_tasks_exist(matrix: Matrix) -> None:
    """The embedded package has the items of the tasks."""
    for entry in matrix.configuration.evaluations.values():
        with place(f"evaluations.{entry.name}"):
            for task in entry.tasks if entry.source == "embedded" else ():
                choose(task, EMBEDDED_TASKS, "task with embedded items")
                choose(FROM_PACKAGE, matrix.configuration.packages, "package")


def names_of_tasks_are_words(matrix: Matrix) -> None:
    """A task of the hub may be any that lm-eval defines, of which none has another character in its name."""
    for entry in matrix.configuration.evaluations.values():
        for task in entry.tasks if entry.source == "hub" else ():
            if not TASK.fullmatch(task):
                raise ConfigError(
                    f"evaluations.{entry.name}.options.tasks: {task!r} is not the name of a task of lm-eval"
                )


def heads_divide_widths(matrix: Matrix) -> None:
    """A model that is trained here can be built: heads divide its width evenly, and its layers are as wide as it says."""
    for name, model in matrix.configuration.models.items():
        if model.path is not None:
            continue
        where, hidden, heads = f"models.{name}", model.sizes["hidden_size"], model.sizes["num_attention_heads"]
        groups = model.sizes.get("num_key_value_heads", heads)
        if hidden % (2 * heads):
            raise ConfigError(
                f"{where}.train.architecture: hidden_size {hidden} is not an even number for each of {heads} heads"
            )
        if heads % groups:
            raise ConfigError(
                f"{where}.train.architecture: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
            )
        widths = {hidden, model.sizes["intermediate_size"]}
        if model.linear_widths and set(model.linear_widths) != widths:
            raise ConfigError(
                f"{where}.linear_widths: {list(model.linear_widths)}, but its architecture has {sorted(widths)}"
            )


def sequences_fit_contexts(matrix: Matrix) -> None:
    """No model reads a longer sequence than its context, where that is known."""
    for name in matrix.models:
        context = matrix.configuration.models[name].context
        for where, length in _lengths(matrix, name).items():
            if length > context:
                raise ConfigError(f"{where}: {length} tokens are more than the {context} of model {name!r}'s context")


def group_sizes_divide_widths(matrix: Matrix) -> None:
    """Group sizes divide the widths of the model's layers."""
    for weights, widths, where in _weights_of_models(matrix):
        with place(where):
            for width in widths:
                weights.group_size_for(width)


def averages_lie_between_choices(matrix: Matrix) -> None:
    """The average bits of a mixed scheme are at least what its smallest choice takes, and less than its largest."""
    for weights, widths, where in _weights_of_models(matrix):
        if not weights.mixed or not widths:
            continue
        forms = [[weights.number_format(bits, width) for bits in weights.widths] for width in widths]
        taken = [[f.stored_bits(1, width) / width for f in row] for row, width in zip(forms, widths, strict=True)]
        low, high = min(bits[0] for bits in taken), max(bits[-1] for bits in taken)
        if not low <= weights.average_bits < high:
            raise ConfigError(
                f"{where}: average_bits {weights.average_bits:g} counts scales too: with choices {list(weights.choices)} a "
                f"layer takes from {low:g} to {high:g} bits per weight, and the average must lie between"
            )


def named_datasets_exist(matrix: Matrix) -> None:
    """Datasets that are named exist."""
    config = matrix.configuration
    named = {f"evaluations.{name}.dataset": entry.dataset for name, entry in config.evaluations.items()}
    named |= {"calibration.dataset": config.calibration.dataset, "training.dataset": config.training.dataset}
    named |= {f"models.{model}.train.dataset": config.models[model].trained_on for model in config.models}
    for where, name in named.items():
        if name is not None:
            with place(where):
                choose(name, config.datasets, "dataset")


def no_dataset_is_called_generated(matrix: Matrix) -> None:
    """No dataset has the name of generated text, or one that its files may have."""
    for name in matrix.configuration.datasets:
        if name == GENERATED or name.startswith(f"{GENERATED}-"):
            raise ConfigError(f"datasets.{name}: this name is kept for what a model generates itself")


def names_of_recipes_fit_in_paths(matrix: Matrix) -> None:
    """The name of a recipe's first steps, which is theirs joined where no entry has them, can be that of a folder."""
    for each in matrix.configuration.methods.values():
        if len(each.name) > LONGEST:
            raise ConfigError(
                f"{each.place}: the first {len(each.steps)} steps make the name {each.name[:40]!r}..., which is longer than "
                f"{LONGEST} characters; give them an entry under methods: with a name of its own"
            )


def budgets_are_of_what_trains(matrix: Matrix) -> None:
    """A block with budgets has a method that trains."""
    configuration = matrix.configuration
    for i, block in enumerate(configuration.matrix):
        if block.budgets and not any(configuration.methods[name].trains for name in block.methods):
            raise ConfigError(f"matrix.{i}.budgets: none of {', '.join(block.methods)} trains")


def revisions_are_of_repositories(matrix: Matrix) -> None:
    """What has a revision is on the hub."""
    for name in matrix.models:
        spec = matrix.configuration.models[name].spec
        if "revision" in spec and ("train" in spec or _is_folder(spec["path"])):
            raise ConfigError(f"models.{name}.revision: {spec['revision']!r}, but the model is not on the hub")
    for name, dataset in _sources(matrix):
        if "revision" in dataset.spec and (dataset.local or Path(dataset.path).exists()):
            raise ConfigError(f"datasets.{name}.revision: {dataset.spec['revision']!r}, but the text is not on the hub")


def training_is_whole_steps(matrix: Matrix) -> None:
    """Each training budget is a whole number of optimizer steps."""
    training = matrix.configuration.training
    budgets = {"training.tokens": training.tokens}
    for i, block in enumerate(matrix.configuration.matrix):
        budgets |= {f"matrix.{i}.budgets.{k}": tokens for k, tokens in enumerate(block.budgets)}
    for where, tokens in budgets.items():
        if tokens % training.tokens_per_step:
            raise ConfigError(f"{where}: {tokens} is not a multiple of a step's {training.tokens_per_step} tokens")


def processes_share_equally(matrix: Matrix) -> None:
    """Where a model has several GPUs, its processes share the sequences of calibrations and of training steps equally."""
    for cell in matrix.jobs:
        count, amount = matrix.processes(cell), matrix.amount(cell)
        if not ranks.equal_shares(amount, count):
            what = f"calibration has {amount['samples']} samples"
            if "batch_size" in amount:
                what = f"a training step has {amount['accumulation']} x {amount['batch_size']} sequences"
            with place(f"models.{cell.model}.gpus"):
                raise ValueError(f"{count} processes of {cell.method} cannot share them equally: {what}")


def paths_of_datasets_are_possible(matrix: Matrix) -> None:
    """A dataset's path is a file format, a folder or a repository."""
    for name, dataset in _sources(matrix):
        if not dataset.local:
            _check_repository(dataset.path, f"datasets.{name}.path", "file format, folder")


def files_have_no_split_but_train(matrix: Matrix) -> None:
    """Files of a format are the split train."""
    for name, dataset in _sources(matrix):
        split = dataset.spec.get("split", "train")
        if dataset.local and split != "train":
            raise ConfigError(f"datasets.{name}.split: {split!r}, but data_files have the split train only")


def files_of_datasets_exist(matrix: Matrix) -> None:
    """Local files exist, or a rule makes them."""
    embedded = [f"{EMBEDDED}text/{source}.jsonl" for source in SOURCES]
    for name, dataset in _sources(matrix):
        if dataset.local and not dataset.listed:
            raise ConfigError(f"datasets.{name}: path {dataset.path!r} needs data_files")
        for file in dataset.listed:
            with place(f"datasets.{name}.data_files"):
                if file.startswith(EMBEDDED):
                    choose(file, embedded, "embedded file")
                    choose(FROM_PACKAGE, matrix.configuration.packages, "package")
                elif set("{}") & set(file):
                    raise ValueError(f"{file!r} has a brace, which Snakemake takes for a wildcard; rename the file")
                elif not Path(file).exists():
                    raise ValueError(f"there is no file {file!r}")
                elif not Path(file).is_file():
                    raise ValueError(f"{file!r} is a folder; list the files in it")
                elif not Path(file).stat().st_size:
                    raise ValueError(f"the file {file!r} is empty")


def files_have_their_columns(matrix: Matrix) -> None:
    """Files have the columns that hold the text and its key, as far as their first row tells."""
    for name, dataset in _sources(matrix):
        wanted = {"column": dataset.spec.get("column", "text"), "key": dataset.spec.get("key")}
        for file in dataset.listed:
            with place(f"datasets.{name}.data_files"):
                columns = ["text", "key"] if file.startswith(EMBEDDED) else _columns(Path(file), dataset.path)
            for which, column in wanted.items():
                if columns and column is not None:
                    with place(f"datasets.{name}.{which}"):
                        choose(column, columns, f"column of {file}")


def folders_of_models_exist(matrix: Matrix) -> None:
    """A local folder has the model, or a rule makes it."""
    for name in matrix.models:
        model = matrix.configuration.models[name]
        if model.path is None:
            continue
        if model.path.startswith(EMBEDDED):
            with place(f"models.{name}.path"):
                choose(model.path.removeprefix(EMBEDDED), matrix.configuration.packages, "package")
            if not re.fullmatch(r"[^/]+\.gguf", model.gguf_file or ""):
                raise ConfigError(
                    f"models.{name}.gguf_file: {model.gguf_file!r}, but the file of a package gets a name that ends in .gguf"
                )
            continue
        needed = model.gguf_file or "config.json"
        with place(f"models.{name}.path"):
            local = _is_folder(model.path)
            if local and set("{}") & set(model.path):
                raise ValueError(f"{model.path!r} has a brace, which Snakemake takes for a wildcard; rename the folder")
            if local and not (Path(model.path) / needed).is_file():
                raise ValueError(f"there is no model folder {model.path!r} (a folder with {needed})")
        if not local:
            _check_repository(model.path, f"models.{name}.path", "folder")


def models_in_packages_are_whole(matrix: Matrix) -> None:
    """A package that a model comes from has its file, or all parts of it."""
    packages = matrix.configuration.packages
    for name in matrix.models:
        model = matrix.configuration.models[name]
        if not (model.path or "").startswith(EMBEDDED):
            continue
        package = Path(model.path).name
        parts = packages[package].parts
        with place(f"packages.{package}.parts"):
            for part in parts:
                choose(part, packages, "package")
        for each in parts or (package,):
            if packages[each].model is None:
                raise ConfigError(f"packages.{each}: it needs the key model, since model {name!r} is made of its file")


def evaluation_text_is_unseen(matrix: Matrix) -> None:
    """No evaluation reads a dataset that something is calibrated or trained on."""
    config = matrix.configuration
    learned_from = {config.calibration.dataset, config.training.dataset, *matrix.trained_on}
    learned_from |= {part.name for name in learned_from for part in config.datasets[name].parts}
    if both := learned_from & set(matrix.evaluation_datasets):
        raise ConfigError(
            f"datasets.{min(both)}: {min(both)!r} is used for evaluation and for calibration or training; they must differ"
        )


def hash_ranges_have_a_length(matrix: Matrix) -> None:
    """The range of a dataset is not empty."""
    for name, dataset in _sources(matrix):
        low, high = dataset.hash_range
        if low >= high:
            raise ConfigError(f"datasets.{name}.hash_range: nothing hashes into [{low}, {high})")


def hash_ranges_are_disjoint(matrix: Matrix) -> None:
    """Datasets of the same source have disjoint ranges of it, and so have the parts of one."""
    datasets = [matrix.configuration.datasets[name] for name in matrix.datasets]
    for a, b in itertools.combinations([source for dataset in datasets for source in dataset.sources], 2):
        low, high = max(a.hash_range[0], b.hash_range[0]), min(a.hash_range[1], b.hash_range[1])
        if a.may_share_files(b) and low < high:
            raise ConfigError(
                f"datasets.{a.name} and datasets.{b.name} read the same source, and their hash_range overlaps in [{low}, "
                f"{high}): calibration, training and evaluation text must be disjoint"
            )


CHECKS = (
    values_of_schemes_fit,
    steps_take_what_is_left,
    steps_keep_the_scales_of_codes,
    steps_that_choose_data_train,
    recipes_quantize_if_schemes_do,
    steps_can_do_schemes,
    mixed_schemes_have_no_transforms,
    evaluations_name_their_data,
    evaluations_read_different_texts,
    embedded_tasks_exist,
    names_of_tasks_are_words,
    heads_divide_widths,
    group_sizes_divide_widths,
    averages_lie_between_choices,
    named_datasets_exist,
    no_dataset_is_called_generated,
    names_of_recipes_fit_in_paths,
    budgets_are_of_what_trains,
    training_is_whole_steps,
    processes_share_equally,
    paths_of_datasets_are_possible,
    files_have_no_split_but_train,
    files_of_datasets_exist,
    files_have_their_columns,
    folders_of_models_exist,
    models_in_packages_are_whole,
    revisions_are_of_repositories,
    sequences_fit_contexts,
    evaluation_text_is_unseen,
    hash_ranges_have_a_length,
    hash_ranges_are_disjoint,
)


def _method(module: str) -> registry.Method:
    return registry.declaration("methods", module).of


def _lengths(matrix: Matrix, model: str) -> dict[str, int]:
    """The lengths in tokens of the sequences that a model reads, by place."""
    config, jobs = matrix.configuration, [cell for cell in matrix.jobs if cell.model == model]
    reads = {matrix.recipe(cell).last.reads for cell in jobs}
    lengths = {}
    for name, entry in config.evaluations.items():
        options = entry.options
        lengths[f"evaluations.{name}.options.window"] = options.get("window", 0)
        lengths[f"evaluations.{name}.options.prompt"] = options.get("prompt", 0) + options.get("new_tokens", 0)
    if "calibration" in reads:
        lengths["calibration.sequence_length"] = config.calibration.sequence_length
    if reads & set(registry.TRAINING):
        lengths["training.sequence_length"] = config.training.sequence_length
    if any(cell.scheme in matrix.mixed for cell in jobs):
        lengths["allocation.sequence_length"] = config.allocation.sequence_length
    if config.models[model].trained_on:
        own = config.models[model].spec["train"]["training"]["sequence_length"]
        lengths[f"models.{model}.train.training.sequence_length"] = own
    return lengths


def _weights_of_models(matrix: Matrix) -> list[tuple[WeightScheme, tuple[int, ...], str]]:
    """A scheme's weights, a model's widths and the place, for each scheme with weights and each model that share a cell."""
    pairs = dict.fromkeys((cell.model, cell.scheme) for cell in matrix.cells)
    schemes, models = matrix.configuration.schemes, matrix.configuration.models
    return [
        (schemes[name].scheme.weights, models[model].widths, f"schemes.{name}.weights with model {model!r}")
        for model, name in pairs
        if schemes[name].quantizes
    ]


def _sources(matrix: Matrix) -> list[tuple[str, Dataset]]:
    """The datasets in use that are read from one source, those of parts taken apart, by name."""
    used = itertools.chain.from_iterable(matrix.configuration.datasets[name].sources for name in matrix.datasets)
    return [(dataset.name, dataset) for dataset in used]


def _is_folder(path: str) -> bool:
    """Whether the path of a model is of this machine: a repository on the hub is `owner/name`, with one slash at most."""
    return path.startswith(("/", "./", "../")) or Path(path).exists() or path.count("/") > 1


def _check_repository(path: str, where: str, others: str) -> None:
    """ConfigError for what neither is there nor can be the name of a repository."""
    with place(where):
        if not Path(path).exists() and not HUB.fullmatch(path):
            raise ValueError(f"{path!r} is no {others} or repository on the hub (owner/name)")


def _columns(file: Path, loader: str) -> list[str]:
    """The columns of a file; empty where its first row does not tell. ValueError for a file of another format."""
    if loader == "text":
        return ["text"]
    if loader == "parquet":
        import pyarrow.parquet as pq

        return pq.read_schema(file).names
    if loader not in ("json", "csv") or file.suffix not in (".json", ".jsonl", ".csv"):
        return []  # it may be compressed
    with open(file, encoding="utf-8-sig") as lines:
        if loader == "csv":
            return next(csv.reader([lines.readline()]), [])
        try:
            row = json.loads(lines.readline())
        except json.JSONDecodeError:
            return []  # one document for all rows
        return list(row) if isinstance(row, dict) else []
