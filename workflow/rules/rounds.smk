# Rounds of training: pairs of a model's own responses, weights that momentum carries on, types of annotators.


rule pair_samples:
    """Label a model's own responses by reward models or the oracle, as pairs."""
    input:
        spec=ancient(spec("sampled_pairs")),
        pairs=ancient(parent("sampled_pairs", "pairs")),
        tokens=ancient(parent("sampled_pairs", "tokens")),
        samples=ancient(parent("sampled_pairs", "samples")),
        rewards=ancient(parents("sampled_pairs", "reward")),
    output:
        **made(
            "sampled_pairs",
            pairs="pairs.parquet",
            advantages="advantages.parquet",
            refused="refused.parquet",
        ),
    log:
        record(f"{RESULTS}/logs/sampled_pairs/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/sampled_pairs/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: row_threads("sampled_pairs")
    resources:
        mem_mb=row_memory("sampled_pairs"),
        runtime=minutes(120),
        gpu=row_gpus("sampled_pairs"),
        device=DEVICE,
        processes=processes("sampled_pairs"),
        micro_batch=micro_batch,
    shell:
        job(
            EACH
            + "python -m prefopt pair-samples --spec {input.spec:q} --device {resources.device}"
            " --processes {resources.processes} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"
        )


rule extrapolate_weights:
    """Move a policy's weights on, away from earlier ones."""
    input:
        spec=ancient(spec("extrapolated")),
        model=ancient(parent("extrapolated", "model")),
        before=ancient(parent("extrapolated", "before")),
    output:
        **made("extrapolated", weights="weights"),
    log:
        record(f"{RESULTS}/logs/extrapolated/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/extrapolated/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: EXECUTION.threads
    resources:
        mem_mb=memory(8),
        runtime=minutes(30),
        gpu=EXECUTION.gpus,
        device=DEVICE,
    shell:
        job(
            "python -m prefopt extrapolate-weights --spec {input.spec:q} --device {resources.device} >> {log:q} 2>&1"
        )


rule assign_types:
    """Say which type each annotator is of, and weigh the pairs by that."""
    input:
        spec=ancient(spec("responsibilities")),
        pairs=ancient(parent("responsibilities", "pairs")),
        tokens=ancient(parent("responsibilities", "tokens")),
        reference=ancient(parent("responsibilities", "reference")),
        before=ancient(parent("responsibilities", "before")),
        scores=ancient(parents("responsibilities", "scores")),
    output:
        **made(
            "responsibilities",
            types="types.json",
            responsibilities="responsibilities.parquet",
            weights="weights.parquet",
        ),
    log:
        record(f"{RESULTS}/logs/responsibilities/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/responsibilities/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(30),
    shell:
        job("python -m prefopt assign-types --spec {input.spec:q} >> {log:q} 2>&1")


rule mix_policies:
    """Weigh the policies of annotator types by what each is worth to every type."""
    input:
        spec=ancient(spec("mixtures")),
        model=ancient(parent("mixtures", "model")),
        responsibilities=ancient(parent("mixtures", "responsibilities")),
        policies=ancient(parents("mixtures", "policy")),
        samples=ancient(parents("mixtures", "samples")),
    output:
        **made("mixtures", mixture="mixture.json"),
    log:
        record(f"{RESULTS}/logs/mixtures/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/mixtures/{{id}}.tsv")
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
        job(
            "python -m prefopt mix-policies --spec {input.spec:q} --device {resources.device} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"
        )
