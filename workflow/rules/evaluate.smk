# Checkpoint -> one result file per evaluation, all by one process that loads the model once. The results are not declared
# as outputs, since Snakemake deletes those of a job that runs again or fails: so an evaluation that was added runs alone,
# and what one process has finished is kept if it is killed.


def evaluation_inputs(wildcards):
    paths = []
    for name in MATRIX.config["evaluations"]:
        data = MATRIX.evaluation_data(name, wildcards.model)
        paths += data if isinstance(data, list) else [data] if data else []
    return paths


rule evaluate:
    input:
        checkpoint=f"{MATRIX.results}/{{model}}/{{scheme}}/{{method}}/seed{{seed}}/checkpoint",
        data=evaluation_inputs,
        text=ancient(f"{MATRIX.results}/text.json"),
        code=sources("evals/__main__.py", *(f"evals/{name}.py" for name in MATRIX.config["evaluations"])),
    output:
        f"{MATRIX.results}/{{model}}/{{scheme}}/{{method}}/seed{{seed}}/evals/done.json",
    log:
        f"logs/{config['name']}/{{model}}/{{scheme}}/{{method}}/seed{{seed}}/evaluate.log",
    benchmark:
        f"logs/{config['name']}/{{model}}/{{scheme}}/{{method}}/seed{{seed}}/evaluate.benchmark.tsv"
    threads: lambda w: MATRIX.cores(w.model, CORES)["threads"]
    resources:
        gpu=1,
        torch_threads=lambda w: MATRIX.cores(w.model, CORES)["torch_threads"],
    params:
        evaluations=lambda w: MATRIX.evaluation_arguments(w.model),
        folder=subpath(output[0], parent=True),
    message:
        "Evaluating {wildcards.model}, {wildcards.scheme}, {wildcards.method}, seed {wildcards.seed}"
    shell:
        "python -m evals {params.evaluations:q} --checkpoint {input.checkpoint:q} --threads {resources.torch_threads} "
        "--log {log:q} --output {params.folder:q} 2>&1 | tee {log:q}"
