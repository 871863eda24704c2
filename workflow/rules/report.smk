# Result files -> reports/, and the comparison with a baseline.

from reports.figures import titles as figure_titles


rule matrix:
    output:
        f"{MATRIX.results}/matrix.json",
    params:
        matrix=MATRIX.to_json() | {"configfiles": [os.path.relpath(path) for path in workflow.configfiles]},
    run:
        write_json(output[0], params.matrix)


RESULTS = {
    "matrix": f"{MATRIX.results}/matrix.json",
    "text": TEXTS,
    "runs": [f"{MATRIX.results}/{cell.path}/run.json" for cell in MATRIX.cells],
    "evaluations": [f"{MATRIX.results}/{cell.path}/evals/done.json" for cell in MATRIX.cells],
    "code": [
        # Tables and figures are found by their folders, so no import statement names them.
        *sources(
            "reports/build.py",
            "reports/regression.py",
            *glob.glob("reports/tables/*.py"),
            *glob.glob("reports/figures/*.py"),
        ),
        *glob.glob("reports/figures/*.rst"),
        "reports/render/page.html.j2",
        "reports/tables/papers.csv",
    ],
}


def figure(kind, title):
    """A folder of figures, one per model, shown in Snakemake's own report with its caption."""
    return report(
        directory(f"reports/summary/figures/{kind}"),
        patterns=["{model}.png"],
        caption=f"../../reports/figures/{kind}.rst",
        category=title,
        labels={"model": "{model}"},
    )


rule report:
    input:
        **RESULTS,
    output:
        summary="reports/summary.md",
        page=report("reports/summary.html", caption="../../reports/render/page.rst", category="The whole report"),
        results="reports/summary/results.parquet",
        tables=directory("reports/summary/tables"),
        figures=[figure(kind, title) for kind, title in figure_titles().items()],
    log:
        f"logs/{config['name']}/report.log",
    shell:
        "python -m reports.build {input.matrix:q} --output {output.summary:q} 2>&1 | tee {log:q}"


def baseline(wildcards):
    path = Path(f"tests/baselines/{config['name']}.csv")
    if not path.is_file():
        sys.exit(
            f"Error: there is no {path} to compare with. Make it from results that you trust:\n"
            f"  python -m reports.regression {path} {MATRIX.results} --update"
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
        "python -m reports.regression {input.baseline:q} {input.matrix:q} 2>&1 | tee {log:q}"
