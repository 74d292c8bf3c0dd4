# What the reference policy tells: its training, scores, samples, and the dispersion they imply.


rule train_sft:
    """Fine-tune the base model on the chosen responses: the reference policy."""
    input:
        spec=ancient(spec("sft")),
        tokens=ancient(parent("sft", "tokens")),
        base=ancient(parent("sft", "base")),
    output:
        **made("sft", weights="weights", curve="metrics.jsonl"),
    log:
        record(f"{RESULTS}/logs/sft/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/sft/{{id}}.tsv")
    priority: 10  # everything else waits for these
    conda:
        "../../envs/prefopt.yaml"
    threads: EXECUTION.threads * PROCESSES
    resources:
        mem_mb=memory(8 * PROCESSES),
        runtime=minutes(240),
        gpu=TRAINING_GPUS,
        device=DEVICE,
        micro_batch=micro_batch,
        checkpoint_steps=EXECUTION.checkpoint_steps,
    shell:
        job(trained_by("train-sft") + " >> {log:q} 2>&1")


rule score_reference:
    """Log-probability and mean token entropy of both responses under the reference, in one pass."""
    input:
        spec=ancient(spec("reference")),
        tokens=ancient(parent("reference", "tokens")),
        model=ancient(parent("reference", "model")),
    output:
        **made("reference", scores="scores.parquet"),
    log:
        record(f"{RESULTS}/logs/reference/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/reference/{{id}}.tsv")
    priority: 10  # everything else waits for these
    conda:
        "../../envs/prefopt.yaml"
    threads: row_threads("reference")
    resources:
        mem_mb=row_memory("reference"),
        runtime=minutes(120),
        gpu=row_gpus("reference"),
        device=DEVICE,
        processes=processes("reference"),
        micro_batch=micro_batch,
    shell:
        job(
            EACH
            + "python -m prefopt score-reference --spec {input.spec:q} --device {resources.device}"
            " --processes {resources.processes} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"
        )


rule sample_reference:
    """Draw responses from the reference, for forward KL and for sequence entropies."""
    input:
        spec=ancient(spec("samples")),
        tokens=ancient(parent("samples", "tokens")),
        model=ancient(parent("samples", "model")),
    output:
        **made("samples", samples="samples.parquet"),
    log:
        record(f"{RESULTS}/logs/samples/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/samples/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: row_threads("samples")
    resources:
        mem_mb=row_memory("samples"),
        runtime=minutes(120),
        gpu=row_gpus("samples"),
        device=DEVICE,
        processes=processes("samples"),
        micro_batch=micro_batch,
    shell:
        job(
            EACH
            + "python -m prefopt sample-reference --spec {input.spec:q} --device {resources.device}"
            " --processes {resources.processes} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"
        )


rule estimate_dispersion:
    """Prompt dispersion from token entropies, an ensemble's votes or the raters; phi_star from the training set once."""
    input:
        spec=ancient(spec("dispersion")),
        tokens=ancient(parent("dispersion", "tokens")),
        reference=ancient(parent("dispersion", "reference")),
        samples=ancient(parent("dispersion", "samples")),
        rewards=ancient(parent("dispersion", "rewards")),
        pairs=ancient(parent("dispersion", "pairs")),
        ratings=ancient(parent("dispersion", "ratings")),
    output:
        **made(
            "dispersion",
            dispersion="dispersion.parquet",
            calibration="calibration.json",
        ),
    log:
        record(f"{RESULTS}/logs/dispersion/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/dispersion/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    shell:
        job(
            "python -m prefopt estimate-dispersion --spec {input.spec:q} >> {log:q} 2>&1"
        )
