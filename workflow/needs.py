"""What a job will need, predicted from the model's shape: memory of host and GPU, operations.

A prediction follows from the model's config.json, the options, and what a step's module declares (`held`); nothing is loaded.
tests/bench/needs.py compares it with what jobs took.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from methods.core.job import ranks, registry
from methods.core.job.options import build_config
from workflow.configuration import EvaluationEntry, Model
from workflow.matrix import Cell, Matrix
from workflow.recipes import Step
from workflow.shapes import Shape, shape_of

FP32 = 4
MOMENTS, GRADIENT = 8, 4  # bytes of a trained value, besides itself
LIBRARIES = 450e6  # bytes of a process that has imported torch and transformers
LM_EVAL = 140e6  # more bytes of one that has imported lm-eval
OVERHEAD = 0.1  # bytes beside the code of a weight: scale and zero point of a group of 32 at least
# Quantized layers of a model of more weights stay packed, and what a step is not working on stays in files.
LARGEST_EXPANDED = registry.constants("methods.core.model", "layers")["LARGEST_EXPANDED"]
LARGEST_FILE = registry.constants("methods.core.model", "checkpoint")["LARGEST_FILE"]
LOGITS = registry.constants("methods.core.job", "runtime")["LOGITS"]  # that are in fp32 or fp64 at a time
SNAKEMAKE = 800e6  # a cluster counts the two Snakemake processes that start a job on its node as the job's
CUDA = 2.5e9  # more bytes in the memory of the host, of a process that uses a GPU
HEAD_ROOM = 1.12  # of what is worked with: what an allocator cannot use again
MORE = 0.6  # of memory and minutes, which each further attempt asks for in addition
# Operations per second that a job has at least, and minutes that it has whatever it does. A cluster ends it when its minutes
# are over, so these are pessimistic.
CORE_RATE, GPU_RATE, START = 2e10, 2e13, 10
SEARCH = 20_000  # operations that take as long as searching the scale of a weight
CHARACTER = 150  # bytes that a tokenizer takes for one of its text
PIECE = registry.constants("workflow.prepare", "tokenize")["PIECE"]  # characters that are tokenized at a time
# Where there is no limit: items of a task of lm-eval, tokens of an item's choices together, windows of a text.
ITEMS, ITEM_TOKENS, WINDOWS = 5_000, 512, 250


@dataclass(frozen=True)
class Needs:
    """Of a job: bytes in the memory of the host, head room included, and of the GPU, floating-point operations, and how many
    GPUs."""

    host: float
    device: float
    operations: float
    gpus: int

    def mem_mb(self, attempt: int = 1) -> int:
        """Memory of the host to ask for, in 10^6 bytes; more after a kill."""
        return math.ceil((SNAKEMAKE + self.host * (1 + MORE * (attempt - 1))) / 1e6)

    def runtime(self, threads: int, attempt: int = 1) -> int:
        """Minutes to ask for; more after a kill."""
        rate = self.gpus * GPU_RATE or threads * CORE_RATE
        return math.ceil((START + self.operations / rate / 60) * (1 + MORE * (attempt - 1)))


NOTHING = Needs(0, 0, 0, 0)


def of_step(matrix: Matrix, cell: Cell) -> Needs:
    """Of the last step of a cell; of all its processes together on the host, of one on each GPU."""
    processes = matrix.processes(cell)
    needs = _of_process(matrix, cell, processes)
    if processes == 1:
        return needs
    return replace(needs, host=needs.host * processes, gpus=needs.gpus * processes)


def _of_process(matrix: Matrix, cell: Cell, processes: int) -> Needs:
    """Of one of the processes that share the tokens of a step, with the operations of all."""
    model, step, amount = matrix.configuration.models[cell.model], matrix.recipe(cell).last, matrix.amount(cell)
    shape, held = shape_of_model(model), _held(step, amount)
    source = _source(matrix, cell, shape, held)
    tokens = amount.get("samples", 0) * amount.get("sequence_length", 0)
    operations = SEARCH * shape.weights if step.of.needs_scheme else 0
    operations += (3 * held.rounds + held.teacher) * 2 * shape.visited * tokens
    # Rounding alone, or a compensation, which solves with Hessians and leaves what rounding left, a byte.
    rounds = step.of.quantizes and held.blockwise and not held.trained
    solves = rounds and tokens > 0
    # What a step makes is there beside maps of files, and in the place of other weights. A large model stays packed, unless
    # several processes go through its blocks (methods/core/model/resume.py).
    keeps = source.mapped and (not _packed(shape) or (held.blockwise and processes > 1))
    made = shape.weights * (source.code + solves + keeps * source.width) if step.of.quantizes else 0

    if step.of.trains and not held.blockwise:
        batch = amount["accumulation"] * amount["batch_size"] * amount["sequence_length"]
        batch //= ranks.passes(amount["accumulation"], processes)
        divided = processes if held.trained or _packed(shape) else 1  # as methods/core/training/layers.py does
        checkpointing = matrix.configuration.training.gradient_checkpointing
        working = training_peak(shape, held, batch, source.width, checkpointing, divided)
        if not model.on_gpu:  # it takes the place of what was loaded, but for files, of which it may use a part
            return _placed(model, source.files, working, operations, source.reading)
        # The first process has the state whole, to save it.
        state = (FP32 + MOMENTS) * trained_values(shape, held) if divided > 1 else 0
        needs = _placed(model, source.loaded + made, working, operations, source.reading)
        return replace(needs, host=needs.host + HEAD_ROOM * state / processes)

    working = _block_peak(shape, held, tokens / processes, source.width, solves) if step.of.kind != "reference" else 0
    if rounds and source.untouched and processes == 1 and _stays_in_files(shape):
        # A block with what it becomes, one that is on its way into a file, and a file of weights that is written. The rest is
        # in the files of the model, or in those of the blocks that are done.
        blocks = 2 * shape.weights / shape.layers * (source.width + 2)
        return _placed(model, shape.others * source.width + blocks + 2 * LARGEST_FILE, working, operations)
    return _placed(model, source.loaded + made, working, operations, source.reading)


@dataclass(frozen=True)
class _Source:
    """The model that a step is applied to. width: bytes of a number as it computes; code: of a weight's code in the scheme.

    mapped: whether its weights are memory maps of files, which stay there to the end; untouched: whether these are the files
    of the model itself. In bytes, loaded: all of it; reading: while it is read; files: what stays of it beside a training
    that takes the place of the rest.
    """

    width: int
    code: float
    mapped: bool
    untouched: bool
    loaded: float
    reading: float
    files: float


def _source(matrix: Matrix, cell: Cell, shape: Shape, held: registry.Held) -> _Source:
    step, start = matrix.recipe(cell).last, matrix.start(cell)
    before = matrix.recipe(start).steps if start else ()
    scheme = matrix.configuration.schemes[cell.scheme].scheme.weights
    code = max(scheme.widths) / 8 + OVERHEAD if scheme else 0
    # Transformed weights are exact in fp32 only: methods/core/step/run.py computes and stores them so.
    transforms, transformed = step.of.kind == "transform", any(each.of.kind == "transform" for each in before)
    exact = transforms or (transformed and not step.of.trains)
    width = FP32 if exact else _width(matrix.configuration.models[cell.model], shape)
    # A transform may give the head a matrix of its own.
    others = shape.others * (2 if shape.tied and (transforms or transformed) else 1)
    whole = (shape.weights + others) * width
    if before and matrix.recipe(start).quantizes:
        codes = shape.weights * code
        loaded = shape.others * width + codes + (0 if _packed(shape) else shape.weights * width)
        return _Source(width, code, False, False, loaded, loaded + held.teacher * whole, codes)
    stored = FP32 if before and before[-1].of.kind == "transform" else shape.numbers
    mapped = width == stored
    # A training computes with the embedding as it is, and with weights that it leaves in the dtype that it computes in.
    used = shape.others + (shape.weights if held.frozen is None and not held.trained else 0)
    files = whole - used * width if mapped else 0
    return _Source(width, code, mapped, mapped and not before, whole, _reading(shape, width, stored), files)


def _packed(shape: Shape) -> bool:
    """Whether quantized layers stay packed."""
    return shape.weights > LARGEST_EXPANDED


def _stays_in_files(shape: Shape) -> bool:
    """Whether what a step is not working on stays in files. Experts are put together in memory while they are loaded."""
    return _packed(shape) and shape.experts == 1


def _held(step: Step, amount: dict[str, int]) -> registry.Held:
    declared = registry.declaration("methods", step.module)
    if declared.held is None:
        return registry.Held()
    return declared.held(build_config(declared.Config, step.options, step.module), amount.get("samples", 0))


def training_peak(
    shape: Shape, held: registry.Held, tokens: int, width: int, checkpointing: bool, processes: int = 1
) -> float:
    """Bytes that tensors hold at most in a training end to end, with `tokens` tokens per forward pass.

    width: bytes of a number in the dtype that it computes in. processes: how many divide the model among them; the bytes are
    then of one, which has two blocks whole at a time, and what is outside the blocks.

    The optimizer's moments are always there; activations and logits are highest when the loss is computed, gradients when the
    backward pass has ended, and both move linearly in between, so the peak is at one of the two ends.
    """
    trained = trained_values(shape, held)
    frozen = shape.weights * (width if held.frozen is None else held.frozen)
    if held.trained and width == FP32 and held.frozen is None:
        frozen = 0  # the trained weight itself is multiplied; in another dtype autograd keeps a cast copy of it
    teacher = held.teacher * (shape.weights + shape.others) * width
    static = (shape.others * width + frozen + teacher + (FP32 + MOMENTS) * trained) / processes
    if processes > 1:
        static += shape.others * width + 2 * (frozen + (FP32 + GRADIENT) * trained) / shape.layers
    block = tokens * activation_bytes(shape, width)
    kept = shape.layers * (tokens * shape.hidden * width if checkpointing else block)
    # The logits, their gradient, and the teacher's logits.
    logits = tokens * shape.vocabulary * width * (3 if held.teacher else 2)
    # A layer's weight is computed in fp32 from its parts, and its gradient taken back to them, ten such tensors at a time.
    temporaries = 10 * FP32 * shape.largest
    at_loss = kept + max(logits, block if checkpointing else 0)
    at_end = GRADIENT * trained / processes + (block if checkpointing else 0)
    return static + max(at_loss, at_end) + temporaries


def trained_values(shape: Shape, held: registry.Held) -> float:
    """How many there are: all weights, or low-rank terms, and a scale for 64 weights."""
    return held.trained * shape.weights + shape.low_rank(held.rank) + shape.weights / 64


def activation_bytes(shape: Shape, width: int) -> int:
    """What a block keeps per token for the backward pass, its layers frozen or trained.

    Two norms keep their input in fp32 and hand on their output; attention keeps queries, keys, values and its output, which
    the output layer reads; the MLP keeps both projections, the activation and their product.
    """
    mlp = 4 * shape.inner * shape.active
    return 2 * shape.hidden * FP32 + width * (2 * shape.hidden + 2 * shape.queries + 2 * shape.keys + mlp)


def _block_peak(shape: Shape, held: registry.Held, tokens: float, width: int, solves: bool) -> float:
    """Bytes of the work on one block: its tokens on the way through it, what is trained of it, Hessians if it `solves`."""
    # Inputs of the layers are kept unless the block is trained as a whole.
    inputs = 0 if held.trained else 3 * shape.widest
    states = held.streams * tokens * (4 * shape.hidden + inputs) * width
    hessians = 8 * FP32 * shape.widest**2 if solves else 0
    trained = held.trained * shape.weights / shape.layers * (2 * FP32 + MOMENTS + GRADIENT)
    return states + hessians + trained + 8 * FP32 * shape.largest


def of_evaluations(matrix: Matrix, model: str, scheme: str) -> Needs:
    """Of all evaluations of a checkpoint, which one process does one after the other."""
    configuration = matrix.configuration
    weights = configuration.schemes[scheme].scheme.weights
    codes = max(weights.widths) / 8 + OVERHEAD if weights else 0
    each = [_evaluation(configuration.models[model], entry, codes) for entry in configuration.evaluations.values()]
    host, device = LM_EVAL + max(needs.host for needs in each), max(needs.device for needs in each)
    return Needs(host, device, sum(needs.operations for needs in each), each[0].gpus)


def _evaluation(model: Model, entry: EvaluationEntry, codes: float) -> Needs:
    shape = shape_of_model(model)
    options = entry.options
    width = FP32 if options.get("dtype") == "float32" else _width(model, shape)
    if entry.given == "tasks":
        items = len(entry.tasks) * min(options.get("limit") or ITEMS, ITEMS) * len(options.get("shots", (0,)))
        return _forward(model, shape, items * ITEM_TOKENS, ITEM_TOKENS, ITEM_TOKENS, width, codes)
    if entry.module == "throughput" and not _packed(shape):  # a larger model is refused
        return _timed(model, shape, entry.config, width, codes)
    window = options.get("window", ITEM_TOKENS)
    tokens = window * (options.get("max_windows") or WINDOWS)
    batch, logits = window * options.get("batch_size", 1), LOGITS["cuda" if model.on_gpu else "cpu"]
    more = 0
    if entry.given == "reference":
        # The head that its states are multiplied with, what that gives, and five tensors of the divergence, in fp64.
        more = (shape.hidden + window) * shape.vocabulary * width + 5 * logits * 2 * FP32
    return _forward(model, shape, tokens, batch, logits // shape.vocabulary, width, codes, more=more)


def _timed(model: Model, shape: Shape, config: Any, width: int, codes: float) -> Needs:
    """Of timing a model: it is there as it is evaluated, in 16 and in 32 bits, packed, and as llama.cpp's export, which a
    process of its own has packed once more."""
    values, packed = shape.weights + shape.others, shape.weights * (codes or 2) + shape.others * 2
    tokens = 5 * (config.repeats + 1) * sum(config.batch_sizes) * (config.prompt + config.new_tokens)
    host = LIBRARIES + values * (width + 2 + FP32) + 3 * packed
    return _placed(model, host, values * (2 + FP32) + packed if model.on_gpu else 0, 2 * shape.visited * tokens)


def _forward(
    model: Model,
    shape: Shape,
    tokens: int,
    batch: int,
    window: int,
    width: int,
    codes: float = 0,
    passes: float = 1,
    more: float = 0,
) -> Needs:
    """Of predicting `tokens` tokens, of which `batch` go through the model together and `window` are judged together.

    width: bytes of a number. codes: of a packed weight, if the model is quantized; they are there beside the weights, and a
    large model has nothing else. more: further bytes that are worked on.
    """
    states = 2 * batch * (2 * shape.hidden + 2 * shape.keys + 3 * shape.inner) * width
    logits = batch * shape.vocabulary * width + 3 * window * shape.vocabulary * FP32
    loaded = shape.others * width + shape.weights * (width + codes)
    if codes and _packed(shape):
        loaded = shape.others * width + shape.weights * codes + shape.largest * (width + 3 * FP32)
    working = states + logits + more + (loaded if model.on_gpu else 0)
    reading = 0 if codes else _reading(shape, width, shape.numbers)
    return _placed(model, loaded, working, passes * 2 * shape.visited * tokens, reading)


def of_tokenizing(size: int) -> Needs:
    """Of tokenizing a text of so many bytes."""
    return Needs(LIBRARIES + HEAD_ROOM * (CHARACTER * min(size, PIECE) + 2 * size), 0, 0, 0)


def of_pretraining(model: Model, size: int) -> Needs:
    """Of training a model from nothing in fp32, on a text of so many bytes."""
    shape, budget = shape_of_model(model), model.spec["train"]["training"]
    values, tokens = shape.weights + shape.others, budget["batch_size"] * budget["sequence_length"]
    working = (FP32 + MOMENTS + GRADIENT) * values
    working += tokens * (shape.layers * activation_bytes(shape, FP32) + 3 * shape.vocabulary * FP32)
    operations = 6 * shape.visited * tokens * budget["steps"]
    return Needs(LIBRARIES + HEAD_ROOM * max(working, CHARACTER * size), 0, operations, 0)


def of_generation(matrix: Matrix, model: str) -> Needs:
    """Of generating the text that methods are trained on."""
    configuration = matrix.configuration
    entry, batch = configuration.models[model], configuration.generation.batch_size
    shape = shape_of_model(entry)
    cached = batch * configuration.training.sequence_length * shape.layers * 2 * shape.keys
    passes = 10  # a token at a time is that much slower than many at once
    width = _width(entry, shape)
    return _forward(entry, shape, matrix.generated, batch, batch, width, passes=passes, more=cached * width)


def of_reference(matrix: Matrix, model: str, entry: EvaluationEntry) -> Needs:
    """Of predicting with the full-precision model what an evaluation compares checkpoints with."""
    return _evaluation(matrix.configuration.models[model], entry, codes=0)


def of_sensitivity(matrix: Matrix, model: str, scheme: str) -> Needs:
    """Of measuring what errors in each unit of layers cost; there are about four in a block."""
    configuration = matrix.configuration
    entry, budget = configuration.models[model], configuration.allocation
    shape = shape_of_model(entry)
    widths = len(configuration.schemes[scheme].scheme.weights.widths)
    tokens = budget.samples * budget.sequence_length
    passes = 4 * shape.layers * widths
    hessians = 4 * FP32 * shape.widest**2  # of a block, and what solving with one takes
    return _forward(entry, shape, tokens, tokens, budget.sequence_length, FP32, passes=passes, more=hessians)


def _reading(shape: Shape, width: int, stored: int) -> float:
    """Bytes of a model while it is read: what it is converted to, beside the files, which stay open until all is."""
    return (shape.weights + shape.others) * (width if width == stored else width + stored)


def _placed(model: Model, host: float, device: float, operations: float, reading: float = 0) -> Needs:
    """host: bytes of what is there before and after the work; device: of what is worked on, by a GPU if the job has one;
    reading: of a model while it is read, before that."""
    if model.on_gpu:
        return Needs(LIBRARIES + CUDA + HEAD_ROOM * max(host, reading), device, operations, 1)
    return Needs(LIBRARIES + HEAD_ROOM * max(host + device, reading), 0, operations, 0)


def shape_of_model(model: Model) -> Shape:
    """FileNotFoundError for a model that has not been fetched yet."""
    if not model.sizes:
        return shape_of(f"resources/models/{model.name}")
    stored = {"dtype": model.spec["dtype"]} if "dtype" in model.spec else {}
    return Shape.of({**model.sizes, **stored})


def _width(model: Model, shape: Shape) -> int:
    """Bytes of a number in the dtype that jobs compute in; on a processor, that of this machine."""
    return shape.numbers if model.on_gpu or _multiplies_bf16() else FP32


@cache
def _multiplies_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively, as methods/core/job/runtime.py asks torch, without torch."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    restricted = os.environ.get("ATEN_CPU_CAPABILITY", "avx512") != "avx512"
    return not restricted and ("avx512_bf16" in flags or "amx_bf16" in flags)
