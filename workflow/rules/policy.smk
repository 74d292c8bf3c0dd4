# Policy fine-tuning: the loss's declared needs decide which signals are inputs.


rule train_policy:
    """Fine-tune from the reference with one preference loss and its regulariser."""
    input:
        spec=ancient(spec("policy")),
        tokens=ancient(parent("policy", "tokens")),
        model=ancient(parent("policy", "model")),
        reference=ancient(parent("policy", "reference")),
        dispersion=ancient(parent("policy", "dispersion")),
        rewards=ancient(parent("policy", "rewards")),
        samples=ancient(parent("policy", "samples")),
        pairs=ancient(parent("policy", "pairs")),
        second_reference=ancient(parent("policy", "second_reference")),
        win_rates=ancient(parent("policy", "win_rates")),
        auxiliary=ancient(parent("policy", "auxiliary")),
        responsibilities=ancient(parent("policy", "responsibilities")),
        advantages=ancient(parent("policy", "advantages")),
    output:
        **made("policy", weights="weights", curve="metrics.jsonl"),
    log:
        record(f"{RESULTS}/logs/policy/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/policy/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: EXECUTION.threads * PROCESSES
    resources:
        mem_mb=memory(8 * PROCESSES),
        runtime=minutes(480),
        gpu=TRAINING_GPUS,
        device=DEVICE,
        micro_batch=micro_batch,
        checkpoint_steps=EXECUTION.checkpoint_steps,
    shell:
        job(trained_by("train-policy") + " >> {log:q} 2>&1")
