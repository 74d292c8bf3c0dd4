# Answers to held-out prompts, judgements in both orders, win rates.


rule generate:
    """Answer the test prompts with a model."""
    input:
        spec=ancient(spec("generations")),
        pairs=ancient(parent("generations", "pairs")),
        tokens=ancient(parent("generations", "tokens")),
        model=ancient(parent("generations", "model")),
    output:
        **made("generations", outputs="outputs.json", responses="responses.parquet"),
    log:
        record(f"{RESULTS}/logs/generations/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/generations/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: row_threads("generations")
    resources:
        mem_mb=row_memory("generations"),
        runtime=minutes(240),
        gpu=row_gpus("generations"),
        device=DEVICE,
        processes=processes("generations"),
    shell:
        job(
            EACH
            + "python -m prefopt generate --spec {input.spec:q} --device {resources.device}"
            " --processes {resources.processes} >> {log:q} 2>&1"
        )


rule judge:
    """Compare two sets of answers in both orders with the oracle or a held-out reward model."""
    input:
        spec=ancient(spec("judgements")),
        pairs=ancient(parent("judgements", "pairs")),
        generations=ancient(parent("judgements", "generations")),
        baseline=ancient(parent("judgements", "baseline")),
        judges=ancient(parents("judgements", "judge")),
    output:
        **made(
            "judgements",
            annotations="annotations.json",
            judgements="judgements.parquet",
        ),
    log:
        record(f"{RESULTS}/logs/judgements/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/judgements/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: row_threads("judgements")
    resources:
        mem_mb=row_memory("judgements"),
        runtime=minutes(120),
        gpu=row_gpus("judgements"),
        device=DEVICE,
        processes=processes("judgements"),
        micro_batch=micro_batch,
    shell:
        job(
            EACH
            + "python -m prefopt judge --spec {input.spec:q} --device {resources.device}"
            " --processes {resources.processes} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"
        )


rule train_classifier:
    """Fit the sentiment classifier that judges answers, on pairs that no policy learns from."""
    input:
        spec=ancient(spec("classifier")),
        pairs=ancient(parent("classifier", "pairs")),
    output:
        **made("classifier", classifier="classifier.json"),
    log:
        record(f"{RESULTS}/logs/classifier/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/classifier/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    shell:
        job("python -m prefopt train-classifier --spec {input.spec:q} >> {log:q} 2>&1")


rule win_rate:
    """Win rate and reward advantage with intervals over prompts."""
    input:
        spec=ancient(spec("metrics")),
        judgements=ancient(parent("metrics", "judgements")),
    output:
        **made("metrics", metrics="metrics.json", prompts="prompts.parquet"),
    log:
        record(f"{RESULTS}/logs/metrics/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/metrics/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    shell:
        job("python -m prefopt win-rate --spec {input.spec:q} >> {log:q} 2>&1")
