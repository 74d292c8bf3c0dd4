# What the reference policy tells: its training, scores, samples, and the dispersion they imply.


rule train_sft:
    """Fine-tune the base model on the chosen responses: the reference policy."""
    input:
        spec=ancient(f"{RESULTS}/specs/sft/{{id}}.json"),
        tokens=ancient(parent("sft", "tokens")),
        base=ancient(parent("sft", "base")),
    output:
        weights=directory(f"{RESULTS}/sft/{{id}}/weights"),
        curve=f"{RESULTS}/sft/{{id}}/metrics.jsonl",
        manifest=f"{RESULTS}/sft/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/sft/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/sft/{{id}}.tsv"
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
        trained_by("train-sft") + " >> {log:q} 2>&1"


rule score_reference:
    """Log-probability and mean token entropy of both responses under the reference, in one pass."""
    input:
        spec=ancient(f"{RESULTS}/specs/reference/{{id}}.json"),
        tokens=ancient(parent("reference", "tokens")),
        model=ancient(parent("reference", "model")),
    output:
        scores=f"{RESULTS}/reference/{{id}}/scores.parquet",
        manifest=f"{RESULTS}/reference/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/reference/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/reference/{{id}}.tsv"
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
        EACH
        + "python -m prefopt score-reference --spec {input.spec:q} --device {resources.device}"
        " --processes {resources.processes} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"


rule sample_reference:
    """Draw responses from the reference, for forward KL and for sequence entropies."""
    input:
        spec=ancient(f"{RESULTS}/specs/samples/{{id}}.json"),
        tokens=ancient(parent("samples", "tokens")),
        model=ancient(parent("samples", "model")),
    output:
        samples=f"{RESULTS}/samples/{{id}}/samples.parquet",
        manifest=f"{RESULTS}/samples/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/samples/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/samples/{{id}}.tsv"
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
        EACH
        + "python -m prefopt sample-reference --spec {input.spec:q} --device {resources.device}"
        " --processes {resources.processes} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"


rule estimate_dispersion:
    """Prompt dispersion from token entropies, an ensemble's votes or the raters; phi_star from the training set once."""
    input:
        spec=ancient(f"{RESULTS}/specs/dispersion/{{id}}.json"),
        tokens=ancient(parent("dispersion", "tokens")),
        reference=ancient(parent("dispersion", "reference")),
        samples=ancient(parent("dispersion", "samples")),
        rewards=ancient(parent("dispersion", "rewards")),
        pairs=ancient(parent("dispersion", "pairs")),
        ratings=ancient(parent("dispersion", "ratings")),
    output:
        dispersion=f"{RESULTS}/dispersion/{{id}}/dispersion.parquet",
        calibration=f"{RESULTS}/dispersion/{{id}}/calibration.json",
        manifest=f"{RESULTS}/dispersion/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/dispersion/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/dispersion/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    shell:
        "python -m prefopt estimate-dispersion --spec {input.spec:q} >> {log:q} 2>&1"
