# Several annotators per pair: estimates of dispersion beside their votes, and policies against held-out votes.


rule run_vote_trial:
    """Train a policy and score the held-out pairs that annotators voted on."""
    input:
        spec=ancient(spec("vote_trials")),
        model=ancient(parent("vote_trials", "model")),
        tokens=ancient(parent("vote_trials", "tokens")),
        reference=ancient(parent("vote_trials", "reference")),
        dispersion=ancient(parent("vote_trials", "dispersion")),
        pairs=ancient(parent("vote_trials", "pairs")),
    output:
        **made("vote_trials", margins="margins.parquet", curve="metrics.jsonl"),
    log:
        record(f"{RESULTS}/logs/vote_trials/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/vote_trials/{{id}}.tsv")
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
        job(
            "python -m prefopt run-vote-trial --spec {input.spec:q} --device {resources.device}"
            " --micro-batch {resources.micro_batch} --checkpoint-steps {resources.checkpoint_steps} >> {log:q} 2>&1"
        )


rule compare_vote_trials:
    """Put all arms beside held-out votes: log-loss, calibration, accuracy, paired differences."""
    input:
        spec=ancient(spec("vote_weights")),
        pairs=ancient(parent("vote_weights", "pairs")),
        runs=ancient(parents("vote_weights", "run.")),
    output:
        **made("vote_weights", values="values.json"),
    log:
        record(f"{RESULTS}/logs/vote_weights/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/vote_weights/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(20),
    shell:
        job(
            "python -m prefopt compare-vote-trials --spec {input.spec:q} >> {log:q} 2>&1"
        )


rule compare_disagreement:
    """Put estimates of dispersion beside the annotators' disagreement, for every data set of an item."""
    input:
        spec=ancient(spec("disagreement")),
        parts=ancient(parents("disagreement")),
    output:
        **made("disagreement", values="values.json"),
    log:
        record(f"{RESULTS}/logs/disagreement/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/disagreement/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(20),
    shell:
        job(
            "python -m prefopt compare-disagreement --spec {input.spec:q} >> {log:q} 2>&1"
        )
