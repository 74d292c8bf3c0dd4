# Paper items with their verdicts, the import into MLflow, and the report.


localrules:
    publish,
    report,


rule paper_item:
    """Put one table or figure together: arms over seeds, intervals, claims, verdict."""
    input:
        spec=ancient(f"{RESULTS}/specs/papers/{{paper}}/{{id}}.json"),
        parts=ancient(parents("papers/{paper}")),
    output:
        item=f"{RESULTS}/papers/{{paper}}/{{id}}/item.json",
        table=report(
            f"{RESULTS}/papers/{{paper}}/{{id}}/table.csv",
            caption="../report/table.rst",
            category="{paper}",
            subcategory="{id}",
        ),
        figure=report(
            f"{RESULTS}/papers/{{paper}}/{{id}}/figure.svg",
            caption="../report/figure.rst",
            category="{paper}",
            subcategory="{id}",
        ),
        manifest=f"{RESULTS}/papers/{{paper}}/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/papers/{{paper}}/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/papers/{{paper}}/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    shell:
        "python -m prefopt paper-item --spec {input.spec:q} >> {log:q} 2>&1"


rule publish:
    """Import every finished run into MLflow; a second import changes nothing."""
    input:
        finished=ancient(items()),
    output:
        published=f"{RESULTS}/published.json",
    log:
        f"{RESULTS}/logs/publish.log",
    benchmark:
        f"{RESULTS}/benchmarks/publish.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(30),
    shell:
        "python -m prefopt publish --out {output.published:q} {input.finished:q} >> {log:q} 2>&1"


rule report:
    """Write report.html: items, verdicts, tables, learning curves, samples, one self-contained file."""
    input:
        finished=ancient(items()),
    output:
        html=f"{RESULTS}/report.html",
    log:
        f"{RESULTS}/logs/report.log",
    benchmark:
        f"{RESULTS}/benchmarks/report.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    shell:
        "python -m prefopt report --out {output.html:q} {input.finished:q} >> {log:q} 2>&1"
