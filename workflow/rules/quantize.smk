# Model x scheme x recipe x seed -> checkpoint, one step at a time: each starts from the checkpoint of the steps before it. The
# code of a rule is what its program imports, so an edit of a method reruns its cells only. Before that, where layers differ
# in their bits: model -> what errors in each layer cost, model x scheme -> bits of each layer.


# Once for all budgets: minutes of measuring, where the choice of bits then takes a second.
rule sensitivity:
    input:
        model="resources/models/{model}",
        tokens=lambda w: MATRIX.token_file(w.model, CONFIG.calibration.dataset),
        code=code_of_sensitivity,
    output:
        "resources/sensitivity/{model}/{sensitivity}.json",
    log:
        "logs/sensitivity/{model}/{sensitivity}.log",
    wildcard_constraints:
        sensitivity=matrix.one_of({MATRIX.sensitivity(scheme) for scheme in MATRIX.mixed}),
    threads: threads_of
    resources:
        gpu=gpus_of,
        mem_mb=mem_mb(needs_of_sensitivity),
        runtime=runtime(needs_of_sensitivity),
        torch_threads=torch_threads_of,
    params:
        weights=weights_of,
        samples=CONFIG.allocation.samples,
        length=CONFIG.allocation.sequence_length,
    message:
        "Measuring how sensitive the layers of {wildcards.model} are: {wildcards.sensitivity}"
    shell:
        "python -m workflow.prepare.sensitivity --model {input.model:q} --weights {params.weights:q} --tokens {input.tokens:q} "
        "--samples {params.samples} --sequence-length {params.length} --threads {resources.torch_threads} "
        "--output {output:q} 2>&1 | tee {log:q}"


# One file for all methods of a scheme: they differ in how they round, not in which layer gets how many bits.
rule allocate:
    input:
        sensitivity=lambda w: f"resources/sensitivity/{w.model}/{MATRIX.sensitivity(w.scheme)}.json",
        text=ancient(TEXTS),
        code=sources("workflow/prepare/allocate.py"),
    output:
        f"{MATRIX.results}/{{model}}/{{scheme}}/allocation.json",
    log:
        f"{LOGS}/{{model}}/{{scheme}}/allocate.log",
    wildcard_constraints:
        scheme=matrix.one_of(MATRIX.mixed),
    params:
        average=lambda w: CONFIG.schemes[w.scheme].weights["average_bits"],
    message:
        "Allocating bits to the layers of {wildcards.model} for {wildcards.scheme}"
    shell:
        "python -m workflow.prepare.allocate --sensitivity {input.sensitivity:q} --average-bits {params.average} "
        "--output {output:q} 2>&1 | tee {log:q}"


rule quantize:
    input:
        model="resources/models/{model}",
        tokens=tokens_of,
        start=checkpoint_before,
        rounded_from=checkpoint_rounded_from,
        allocation=lambda w: MATRIX.allocation(w.model, w.scheme) or [],
        text=ancient(TEXTS),
        code=code_of_step,
    output:
        checkpoint=directory(f"{CELL}/checkpoint"),
        run=f"{CELL}/run.json",
    log:
        f"{CELL_LOGS}/quantize.log",
    benchmark:
        f"{CELL_LOGS}/quantize.benchmark.tsv"
    threads: threads_of
    resources:
        gpu=gpus_of_step,
        mem_mb=mem_mb(needs_of_step),
        runtime=runtime(needs_of_step),
        torch_threads=torch_threads_of,
    params:
        python=python_of_step,
        saving=saving_of_step,
        module=lambda w: MATRIX.module(w.method),
        arguments=lambda w: MATRIX.cell_arguments(cell_of(w)),
        seed=lambda w: cell_of(w).seed,
        tokens=token_arguments,
        start=lambda w, input: ["--init-from", input.start] if input.start else [],
        allocation=lambda w, input: ["--allocation", input.allocation] if input.allocation else [],
        folder=subpath(output.run, parent=True),
    message:
        "Quantizing {wildcards.model} to {wildcards.scheme} with {wildcards.method}, {wildcards.replicate}"
    shell:
        "{params.python:q} methods {params.module:q} --model {input.model:q} --cell {params.arguments[cell]:q} "
        "--scheme {params.arguments[scheme]:q} --options {params.arguments[options]:q} {params.tokens:q} "
        "{params.saving:q} {params.allocation:q} {params.start:q} --seed {params.seed} --threads {resources.torch_threads} "
        "--log {log:q} --output {params.folder:q} 2>&1 | tee {log:q}"
