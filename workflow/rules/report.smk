# Result files -> reports/summary.md.


rule matrix:
    output:
        f"{MATRIX.results}/matrix.json",
    params:
        matrix=MATRIX.to_json() | {"configfiles": [os.path.relpath(path) for path in workflow.configfiles]},
    run:
        write_json(output[0], params.matrix)


rule report:
    input:
        matrix=f"{MATRIX.results}/matrix.json",
        text=f"{MATRIX.results}/text.json",
        runs=[f"{MATRIX.results}/{cell.path}/run.json" for cell in MATRIX.cells],
        evaluations=[f"{MATRIX.results}/{cell.path}/evals/done.json" for cell in MATRIX.cells],
        code=glob.glob("reports/*.py"),
    output:
        "reports/summary.md",
    log:
        f"logs/{config['name']}/report.log",
    shell:
        "python -m reports.build {input.matrix:q} --output {output:q} 2>&1 | tee {log:q}"
