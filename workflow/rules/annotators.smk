# Several annotators per pair: estimates of dispersion beside their votes, and policies against held-out votes.


rule run_vote_trial:
    """Train a policy and score the held-out pairs that annotators voted on."""
    input:
        spec=ancient(f"{RESULTS}/specs/vote_trials/{{id}}.json"),
        model=ancient(parent("vote_trials", "model")),
        tokens=ancient(parent("vote_trials", "tokens")),
        reference=ancient(parent("vote_trials", "reference")),
        dispersion=ancient(parent("vote_trials", "dispersion")),
        pairs=ancient(parent("vote_trials", "pairs")),
    output:
        margins=f"{RESULTS}/vote_trials/{{id}}/margins.parquet",
        curve=f"{RESULTS}/vote_trials/{{id}}/metrics.jsonl",
        manifest=f"{RESULTS}/vote_trials/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/vote_trials/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/vote_trials/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: EXECUTION.threads
    resources:
        mem_mb=memory(8),
        runtime=minutes(240),
        gpu=EXECUTION.gpus,
        device=DEVICE,
        micro_batch=micro_batch,
        checkpoint_steps=EXECUTION.checkpoint_steps,
    shell:
        "python -m prefopt run-vote-trial --spec {input.spec:q} --device {resources.device}"
        " --micro-batch {resources.micro_batch} --checkpoint-steps {resources.checkpoint_steps} >> {log:q} 2>&1"


rule compare_vote_trials:
    """Put all arms beside held-out votes: log-loss, calibration, accuracy, paired differences."""
    input:
        spec=ancient(f"{RESULTS}/specs/vote_weights/{{id}}.json"),
        pairs=ancient(parent("vote_weights", "pairs")),
        runs=ancient(parents("vote_weights", "run.")),
    output:
        values=f"{RESULTS}/vote_weights/{{id}}/values.json",
        manifest=f"{RESULTS}/vote_weights/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/vote_weights/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/vote_weights/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(20),
    shell:
        "python -m prefopt compare-vote-trials --spec {input.spec:q} >> {log:q} 2>&1"


rule compare_disagreement:
    """Put estimates of dispersion beside the annotators' disagreement, for every data set of an item."""
    input:
        spec=ancient(f"{RESULTS}/specs/disagreement/{{id}}.json"),
        parts=ancient(parents("disagreement")),
    output:
        values=f"{RESULTS}/disagreement/{{id}}/values.json",
        manifest=f"{RESULTS}/disagreement/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/disagreement/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/disagreement/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(20),
    shell:
        "python -m prefopt compare-disagreement --spec {input.spec:q} >> {log:q} 2>&1"
