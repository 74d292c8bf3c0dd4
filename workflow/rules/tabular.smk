# Exact studies: mathematics on small tables, no language model.


rule run_study:
    """Compute one exact study: its numbers, tables and figures."""
    input:
        spec=ancient(f"{RESULTS}/specs/studies/{{id}}.json"),
    output:
        values=f"{RESULTS}/studies/{{id}}/values.json",
        manifest=f"{RESULTS}/studies/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/studies/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/studies/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(20),
    shell:
        "python -m prefopt run-study --spec {input.spec:q} >> {log:q} 2>&1"
