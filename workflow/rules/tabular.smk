# Exact studies: mathematics on small tables, no language model.


rule run_study:
    """Compute one exact study: its numbers, tables and figures."""
    input:
        spec=ancient(spec("studies")),
    output:
        **made("studies", values="values.json"),
    log:
        record(f"{RESULTS}/logs/studies/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/studies/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(20),
    shell:
        job("python -m prefopt run-study --spec {input.spec:q} >> {log:q} 2>&1")
