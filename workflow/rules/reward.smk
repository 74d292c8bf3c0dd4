# The reward-model ensemble: members, their scores, and the K columns side by side.


rule train_reward:
    """Train one reward model with its own initialisation, data order and subset."""
    input:
        spec=ancient(f"{RESULTS}/specs/reward/{{id}}.json"),
        tokens=ancient(parent("reward", "tokens")),
        model=ancient(parent("reward", "model")),
    output:
        weights=directory(f"{RESULTS}/reward/{{id}}/weights"),
        curve=f"{RESULTS}/reward/{{id}}/metrics.jsonl",
        manifest=f"{RESULTS}/reward/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/reward/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/reward/{{id}}.tsv"
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
        "python -m prefopt train-reward --spec {input.spec:q} --device {resources.device}"
        " --micro-batch {resources.micro_batch} --checkpoint-steps {resources.checkpoint_steps} >> {log:q} 2>&1"


rule score_rewards:
    """Score both responses of every pair with one reward model."""
    input:
        spec=ancient(f"{RESULTS}/specs/rewards/{{id}}.json"),
        tokens=ancient(parent("rewards", "tokens")),
        reward=ancient(parent("rewards", "reward")),
    output:
        scores=f"{RESULTS}/rewards/{{id}}/scores.parquet",
        manifest=f"{RESULTS}/rewards/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/rewards/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/rewards/{{id}}.tsv"
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
        "python -m prefopt score-rewards --spec {input.spec:q} --device {resources.device} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"


rule collect_ensemble:
    """Join the members' scores on pair_id into K columns, or take the oracle's one; with diagnostics."""
    input:
        spec=ancient(f"{RESULTS}/specs/ensemble/{{id}}.json"),
        tokens=ancient(parent("ensemble", "tokens")),
        members=ancient(parents("ensemble", "member")),
        pairs=ancient(parent("ensemble", "pairs")),
    output:
        scores=f"{RESULTS}/ensemble/{{id}}/scores.parquet",
        diagnostics=f"{RESULTS}/ensemble/{{id}}/diagnostics.json",
        manifest=f"{RESULTS}/ensemble/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/ensemble/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/ensemble/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    shell:
        "python -m prefopt collect-ensemble --spec {input.spec:q} >> {log:q} 2>&1"
