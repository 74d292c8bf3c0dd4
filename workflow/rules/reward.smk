# The reward-model ensemble: members, their scores, and the K columns side by side.


rule train_reward:
    """Train one reward model with its own initialisation, data order and subset."""
    input:
        spec=ancient(f"{RESULTS}/specs/reward/{{id}}.json"),
        tokens=ancient(parent("reward", "tokens")),
        model=ancient(parent("reward", "model")),
        pairs=ancient(parent("reward", "pairs")),
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
    threads: EXECUTION.threads * PROCESSES
    resources:
        mem_mb=memory(8 * PROCESSES),
        runtime=minutes(240),
        gpu=TRAINING_GPUS,
        device=DEVICE,
        micro_batch=micro_batch,
        checkpoint_steps=EXECUTION.checkpoint_steps,
    shell:
        trained_by("train-reward") + " >> {log:q} 2>&1"


rule score_rewards:
    """Score both responses of every pair with a reward model that no other belongs with."""
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
    wildcard_constraints:
        id=one_of(group[0].id for group in PLAN.scored_together() if len(group) == 1),
    conda:
        "../../envs/prefopt.yaml"
    threads: row_threads("rewards")
    resources:
        mem_mb=row_memory("rewards"),
        runtime=minutes(120),
        gpu=row_gpus("rewards"),
        device=DEVICE,
        processes=processes("rewards"),
        micro_batch=micro_batch,
    shell:
        EACH
        + "python -m prefopt score-rewards --spec {input.spec:q} --device {resources.device}"
        " --processes {resources.processes} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"


# The members of an ensemble are scored in one job, which reads the pairs once.
for number, group in enumerate(g for g in PLAN.scored_together() if len(g) > 1):

    rule:
        name:
            f"score_rewards_{number}"
        input:
            specs=[ancient(f"{RESULTS}/specs/{node.ref}.json") for node in group],
            tokens=ancient(manifest(group[0].parents["tokens"])),
            reward=[ancient(manifest(node.parents["reward"])) for node in group],
        output:
            scores=[f"{RESULTS}/{node.ref}/scores.parquet" for node in group],
            manifest=[manifest(node.ref) for node in group],
        log:
            f"{RESULTS}/logs/{group[0].ref}.log",
        benchmark:
            f"{RESULTS}/benchmarks/{group[0].ref}.tsv"
        group:
            "rewards"
        conda:
            "../../envs/prefopt.yaml"
        threads: EXECUTION.threads * ROW_PROCESSES
        resources:
            mem_mb=memory(8 * ROW_PROCESSES),
            runtime=minutes(120),
            gpu=max(EXECUTION.gpus, ROW_PROCESSES) if EXECUTION.gpus else 0,
            device=DEVICE,
            processes=ROW_PROCESSES,
            micro_batch=micro_batch,
        shell:
            EACH
            + "python -m prefopt score-rewards --spec {input.specs:q} --device {resources.device}"
            " --processes {resources.processes} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"


rule collect_ensemble:
    """Join the members' scores on pair_id into K columns, or take the oracle's one; with diagnostics."""
    input:
        spec=ancient(f"{RESULTS}/specs/ensemble/{{id}}.json"),
        tokens=ancient(parent("ensemble", "tokens")),
        members=ancient(parents("ensemble", "member")),
        heads=ancient(parent("ensemble", "heads")),
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


rule calibrate_rewards:
    """Win rates of both responses of every train pair among reference samples for its prompt, by an ensemble."""
    input:
        spec=ancient(f"{RESULTS}/specs/win_rates/{{id}}.json"),
        tokens=ancient(parent("win_rates", "tokens")),
        ensemble=ancient(parent("win_rates", "ensemble")),
        samples=ancient(parent("win_rates", "samples")),
        rewards=ancient(parents("win_rates", "reward")),
    output:
        win_rates=f"{RESULTS}/win_rates/{{id}}/win_rates.parquet",
        manifest=f"{RESULTS}/win_rates/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/win_rates/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/win_rates/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: row_threads("win_rates")
    resources:
        mem_mb=row_memory("win_rates"),
        runtime=minutes(240),
        gpu=row_gpus("win_rates"),
        device=DEVICE,
        processes=processes("win_rates"),
        micro_batch=micro_batch,
    shell:
        EACH
        + "python -m prefopt calibrate-rewards --spec {input.spec:q} --device {resources.device}"
        " --processes {resources.processes} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"
