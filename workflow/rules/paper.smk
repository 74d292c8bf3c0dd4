# Paper items with their verdicts, the import into MLflow, and the report.


localrules:
    publish,
    report,


rule paper_item:
    """Put one table or figure together: arms over seeds, intervals, claims, verdict."""
    input:
        spec=ancient(spec("papers/{paper}")),
        parts=ancient(parents("papers/{paper}")),
    output:
        **shown(
            made(
                "papers/{paper}",
                item="item.json",
                table="table.csv",
                figure="figure.svg",
            ),
            table="../report/table.rst",
            figure="../report/figure.rst",
        ),
    log:
        record(f"{RESULTS}/logs/papers/{{paper}}/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/papers/{{paper}}/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    shell:
        job("python -m prefopt paper-item --spec {input.spec:q} >> {log:q} 2>&1")


rule publish:
    """Import every finished run into MLflow; a second import changes nothing."""
    input:
        finished=ancient(items()),
        below=ancient(bundles_below_items()),
    output:
        published=local(f"{RESULTS}/published.json"),
    log:
        record(f"{RESULTS}/logs/publish.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/publish.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(30),
    shell:
        OUT_OF_STORAGE
        + "python -m prefopt publish --out {output.published:q} "
        + FINISHED
        + " >> {log:q} 2>&1"


rule report:
    """Write report.html: items, verdicts, tables, learning curves, samples, one self-contained file."""
    input:
        finished=ancient(items()),
        below=ancient(bundles_below_items()),
    output:
        html=local(f"{RESULTS}/report.html"),
    log:
        record(f"{RESULTS}/logs/report.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/report.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    shell:
        OUT_OF_STORAGE
        + "python -m prefopt report --out {output.html:q} "
        + FINISHED
        + " >> {log:q} 2>&1"
