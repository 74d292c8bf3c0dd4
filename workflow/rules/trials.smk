# Trials of grid items: a policy and its answers to the evaluation prompts, in one job.


rule run_trial:
    """Train a policy from the reference, or none, and answer the evaluation prompts along the way."""
    input:
        spec=ancient(spec("trials")),
        model=ancient(parent("trials", "model")),
        tokens=ancient(parent("trials", "tokens")),
        reference=ancient(parent("trials", "reference")),
        dispersion=ancient(parent("trials", "dispersion")),
        rewards=ancient(parent("trials", "rewards")),
        samples=ancient(parent("trials", "samples")),
        pairs=ancient(parent("trials", "pairs")),
        second_reference=ancient(parent("trials", "second_reference")),
        win_rates=ancient(parent("trials", "win_rates")),
        auxiliary=ancient(parent("trials", "auxiliary")),
        sets=ancient(parents("trials", "set.")),
        judges=ancient(parents("trials", "judge")),
        classifier=ancient(parent("trials", "classifier")),
        rounds=ancient(parents("trials", "round")),
    output:
        **made("trials", answers="answers.parquet", curve="metrics.jsonl"),
    log:
        record(f"{RESULTS}/logs/trials/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/trials/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: EXECUTION.threads
    resources:
        mem_mb=memory(8),
        runtime=minutes(480),
        gpu=EXECUTION.gpus,
        lane=4 if EXECUTION.gpus else 1,  # of the four of a submission
        device=DEVICE,
        micro_batch=micro_batch,
        checkpoint_steps=EXECUTION.checkpoint_steps,
    shell:
        job(one_process("run-trial") + " >> {log:q} 2>&1")
