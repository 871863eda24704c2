# Checkpoint x evaluation -> one result file each.


def evaluation_of(wildcards):
    return MATRIX.config["evaluations"][wildcards.evaluation]


def evaluation_tokens(wildcards):
    dataset = evaluation_of(wildcards).get("dataset")
    return f"resources/tokens/{wildcards.model}/{dataset}.safetensors" if dataset else []


rule evaluate:
    input:
        checkpoint=f"{MATRIX.results}/{{model}}/{{scheme}}/{{method}}/seed{{seed}}/checkpoint",
        tokens=evaluation_tokens,
        text=ancient(f"{MATRIX.results}/text.json"),
        code=["evals/{evaluation}.py", "evals/__init__.py", "evals/__main__.py"],
    output:
        f"{MATRIX.results}/{{model}}/{{scheme}}/{{method}}/seed{{seed}}/evals/{{evaluation}}.json",
    log:
        f"logs/{config['name']}/{{model}}/{{scheme}}/{{method}}/seed{{seed}}/{{evaluation}}.log",
    benchmark:
        f"logs/{config['name']}/{{model}}/{{scheme}}/{{method}}/seed{{seed}}/{{evaluation}}.benchmark.tsv"
    threads: lambda w: MATRIX.cores(w.model, CORES)["threads"]
    resources:
        gpu=1,
        torch_threads=lambda w: MATRIX.cores(w.model, CORES)["torch_threads"],
    params:
        options=lambda w: json.dumps(evaluation_of(w).get("options", {})),
        tokens=lambda w, input: ["--tokens", input.tokens] if input.tokens else [],
    message:
        "Evaluating {wildcards.evaluation} of {wildcards.model}, {wildcards.scheme}, {wildcards.method}, seed {wildcards.seed}"
    shell:
        "python -m evals {wildcards.evaluation:q} --checkpoint {input.checkpoint:q} --options {params.options:q} "
        "{params.tokens:q} --threads {resources.torch_threads} --log {log:q} --output {output:q} 2>&1 | tee {log:q}"
