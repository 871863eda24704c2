# Checkpoint -> one result file per evaluation, all by one process that loads the model once. The results are not declared
# as outputs, since Snakemake deletes those of a job that runs again or fails: so an evaluation that was added runs alone,
# and what one process has finished is kept if it is killed.


rule evaluate:
    input:
        checkpoint=f"{CELL}/checkpoint",
        data=evaluation_inputs,
        text=ancient(TEXTS),
        code=code_of_evaluations,
    output:
        f"{CELL}/evals/done.json",
    log:
        f"{CELL_LOGS}/evaluate.log",
    benchmark:
        f"{CELL_LOGS}/evaluate.benchmark.tsv"
    threads: threads_of
    resources:
        gpu=gpus_of,
        mem_mb=mem_mb(needs_of_evaluations),
        runtime=runtime(needs_of_evaluations),
        torch_threads=torch_threads_of,
    params:
        evaluations=lambda w: MATRIX.evaluation_arguments(w.model),
        folder=subpath(output[0], parent=True),
    message:
        "Evaluating {wildcards.model}, {wildcards.scheme}, {wildcards.method}, {wildcards.replicate}"
    shell:
        "python -m evals {params.evaluations:q} --checkpoint {input.checkpoint:q} --threads {resources.torch_threads} "
        "--log {log:q} --output {params.folder:q} 2>&1 | tee {log:q}"
