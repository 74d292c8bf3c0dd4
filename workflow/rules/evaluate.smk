# Answers to held-out prompts, judgements in both orders, win rates.


rule generate:
    """Answer the test prompts with a model."""
    input:
        spec=ancient(f"{RESULTS}/specs/generations/{{id}}.json"),
        pairs=ancient(parent("generations", "pairs")),
        tokens=ancient(parent("generations", "tokens")),
        model=ancient(parent("generations", "model")),
    output:
        outputs=f"{RESULTS}/generations/{{id}}/outputs.json",
        responses=f"{RESULTS}/generations/{{id}}/responses.parquet",
        manifest=f"{RESULTS}/generations/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/generations/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/generations/{{id}}.tsv"
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
        EACH
        + "python -m prefopt generate --spec {input.spec:q} --device {resources.device}"
        " --processes {resources.processes} >> {log:q} 2>&1"


rule judge:
    """Compare two sets of answers in both orders with the oracle or a held-out reward model."""
    input:
        spec=ancient(f"{RESULTS}/specs/judgements/{{id}}.json"),
        pairs=ancient(parent("judgements", "pairs")),
        generations=ancient(parent("judgements", "generations")),
        baseline=ancient(parent("judgements", "baseline")),
        judges=ancient(parents("judgements", "judge")),
    output:
        annotations=f"{RESULTS}/judgements/{{id}}/annotations.json",
        judgements=f"{RESULTS}/judgements/{{id}}/judgements.parquet",
        manifest=f"{RESULTS}/judgements/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/judgements/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/judgements/{{id}}.tsv"
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
        EACH
        + "python -m prefopt judge --spec {input.spec:q} --device {resources.device}"
        " --processes {resources.processes} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"


rule train_classifier:
    """Fit the sentiment classifier that judges answers, on pairs that no policy learns from."""
    input:
        spec=ancient(f"{RESULTS}/specs/classifier/{{id}}.json"),
        pairs=ancient(parent("classifier", "pairs")),
    output:
        classifier=f"{RESULTS}/classifier/{{id}}/classifier.json",
        manifest=f"{RESULTS}/classifier/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/classifier/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/classifier/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    shell:
        "python -m prefopt train-classifier --spec {input.spec:q} >> {log:q} 2>&1"


rule win_rate:
    """Win rate and reward advantage with intervals over prompts."""
    input:
        spec=ancient(f"{RESULTS}/specs/metrics/{{id}}.json"),
        judgements=ancient(parent("metrics", "judgements")),
    output:
        metrics=f"{RESULTS}/metrics/{{id}}/metrics.json",
        prompts=f"{RESULTS}/metrics/{{id}}/prompts.parquet",
        manifest=f"{RESULTS}/metrics/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/metrics/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/metrics/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    shell:
        "python -m prefopt win-rate --spec {input.spec:q} >> {log:q} 2>&1"
