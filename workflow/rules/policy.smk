# Policy fine-tuning: the loss's declared needs decide which signals are inputs.


rule train_policy:
    """Fine-tune from the reference with one preference loss and its regulariser."""
    input:
        spec=ancient(f"{RESULTS}/specs/policy/{{id}}.json"),
        tokens=ancient(parent("policy", "tokens")),
        model=ancient(parent("policy", "model")),
        reference=ancient(parent("policy", "reference")),
        dispersion=ancient(parent("policy", "dispersion")),
        rewards=ancient(parent("policy", "rewards")),
        samples=ancient(parent("policy", "samples")),
    output:
        weights=directory(f"{RESULTS}/policy/{{id}}/weights"),
        curve=f"{RESULTS}/policy/{{id}}/metrics.jsonl",
        manifest=f"{RESULTS}/policy/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/policy/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/policy/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: EXECUTION.threads
    resources:
        mem_mb=memory(8),
        runtime=minutes(480),
        gpu=EXECUTION.gpus,
        device=DEVICE,
        micro_batch=micro_batch,
        checkpoint_steps=EXECUTION.checkpoint_steps,
    shell:
        "python -m prefopt train-policy --spec {input.spec:q} --device {resources.device}"
        " --micro-batch {resources.micro_batch} --checkpoint-steps {resources.checkpoint_steps} >> {log:q} 2>&1"
