# Result files -> reports/, and the comparison with a baseline.


rule matrix:
    output:
        f"{MATRIX.results}/matrix.json",
    params:
        matrix=MATRIX.to_json() | {"configfiles": [os.path.relpath(path) for path in workflow.configfiles]},
    run:
        write_json(output[0], params.matrix)


RESULTS = {
    "matrix": f"{MATRIX.results}/matrix.json",
    "text": f"{MATRIX.results}/text.json",
    "runs": [f"{MATRIX.results}/{cell.path}/run.json" for cell in MATRIX.cells],
    "evaluations": [f"{MATRIX.results}/{cell.path}/evals/done.json" for cell in MATRIX.cells],
    "code": [
        *sources("reports/build.py", "reports/compare.py"),
        *glob.glob("reports/captions/*"),
        "reports/page.html.j2",
        "reports/papers.csv",
    ],
}


def figure(kind, category):
    """A folder of figures, one per model, shown in Snakemake's own report with its caption."""
    return report(
        directory(f"reports/figures/{kind}"),
        patterns=["{model}.png"],
        caption=f"../../reports/captions/{kind}.rst",
        category=category,
        labels={"model": "{model}"},
    )


rule report:
    input:
        **RESULTS,
    output:
        summary="reports/summary.md",
        page=report("reports/summary.html", caption="../../reports/captions/summary.rst", category="The whole report"),
        results="reports/results.parquet",
        tables=directory("reports/tables"),
        quality=figure("quality", "Quality against size"),
        cost=figure("cost", "Quality against cost"),
        training=figure("training", "Training"),
        layers=figure("layers", "Layers"),
        allocation=figure("allocation", "Mixed precision"),
        gamma=figure("gamma", "Scaling factor gamma"),
        speed=figure("speed", "Speed"),
        flips=figure("flips", "Flips"),
    log:
        f"logs/{config['name']}/report.log",
    shell:
        "python -m reports.build {input.matrix:q} --output {output.summary:q} 2>&1 | tee {log:q}"


def baseline(wildcards):
    path = Path(f"tests/baselines/{config['name']}.csv")
    if not path.is_file():
        sys.exit(
            f"Error: there is no {path} to compare with. Make it from results that you trust:\n"
            f"  python -m reports.compare {path} {MATRIX.results} --update"
        )
    return path


# The comparison stays where it is when it fails, since it is the log.
rule regression:
    input:
        **RESULTS,
        baseline=baseline,
    log:
        "reports/regression.md",
    shell:
        "python -m reports.compare {input.baseline:q} {input.matrix:q} 2>&1 | tee {log:q}"
