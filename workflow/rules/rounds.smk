# Rounds of training: pairs of a model's own responses, and weights that momentum carries on.


rule pair_samples:
    """Label a model's own responses by reward models or the oracle, as pairs."""
    input:
        spec=ancient(f"{RESULTS}/specs/sampled_pairs/{{id}}.json"),
        pairs=ancient(parent("sampled_pairs", "pairs")),
        tokens=ancient(parent("sampled_pairs", "tokens")),
        samples=ancient(parent("sampled_pairs", "samples")),
        rewards=ancient(parents("sampled_pairs", "reward")),
    output:
        pairs=f"{RESULTS}/sampled_pairs/{{id}}/pairs.parquet",
        advantages=f"{RESULTS}/sampled_pairs/{{id}}/advantages.parquet",
        refused=f"{RESULTS}/sampled_pairs/{{id}}/refused.parquet",
        manifest=f"{RESULTS}/sampled_pairs/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/sampled_pairs/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/sampled_pairs/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: EXECUTION.threads
    resources:
        mem_mb=memory(8),
        runtime=minutes(120),
        gpu=EXECUTION.gpus,
        device=DEVICE,
        micro_batch=micro_batch,
    shell:
        "python -m prefopt pair-samples --spec {input.spec:q} --device {resources.device} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"


rule extrapolate_weights:
    """Move a policy's weights on, away from earlier ones."""
    input:
        spec=ancient(f"{RESULTS}/specs/extrapolated/{{id}}.json"),
        model=ancient(parent("extrapolated", "model")),
        before=ancient(parent("extrapolated", "before")),
    output:
        weights=directory(f"{RESULTS}/extrapolated/{{id}}/weights"),
        manifest=f"{RESULTS}/extrapolated/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/extrapolated/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/extrapolated/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: EXECUTION.threads
    resources:
        mem_mb=memory(8),
        runtime=minutes(30),
        gpu=EXECUTION.gpus,
        device=DEVICE,
    shell:
        "python -m prefopt extrapolate-weights --spec {input.spec:q} --device {resources.device} >> {log:q} 2>&1"
