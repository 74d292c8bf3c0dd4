# The reward-model ensemble: members, their scores, and the K columns side by side.


rule train_reward:
    """Train one reward model with its own initialisation, data order and subset."""
    input:
        spec=ancient(spec("reward")),
        tokens=ancient(parent("reward", "tokens")),
        model=ancient(parent("reward", "model")),
        pairs=ancient(parent("reward", "pairs")),
    output:
        **made("reward", weights="weights", curve="metrics.jsonl"),
    log:
        record(f"{RESULTS}/logs/reward/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/reward/{{id}}.tsv")
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
        job(trained_by("train-reward") + " >> {log:q} 2>&1")


# A job makes one bundle, so in a storage every model scores for itself.
SCORED = (
    [[node] for group in PLAN.scored_together() for node in group]
    if STORAGE
    else PLAN.scored_together()
)


rule score_rewards:
    """Score both responses of every pair with a reward model that no other belongs with."""
    input:
        spec=ancient(spec("rewards")),
        tokens=ancient(parent("rewards", "tokens")),
        reward=ancient(parent("rewards", "reward")),
    output:
        **made("rewards", scores="scores.parquet"),
    log:
        record(f"{RESULTS}/logs/rewards/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/rewards/{{id}}.tsv")
    wildcard_constraints:
        id=one_of(group[0].id for group in SCORED if len(group) == 1),
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
        job(
            EACH
            + "python -m prefopt score-rewards --spec {input.spec:q} --device {resources.device}"
            " --processes {resources.processes} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"
        )


# The members of an ensemble are scored in one job, which reads the pairs once.
for number, group in enumerate(g for g in SCORED if len(g) > 1):

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
            record(f"{RESULTS}/logs/{group[0].ref}.log"),
        benchmark:
            record(f"{RESULTS}/benchmarks/{group[0].ref}.tsv")
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
        spec=ancient(spec("ensemble")),
        tokens=ancient(parent("ensemble", "tokens")),
        members=ancient(parents("ensemble", "member")),
        heads=ancient(parent("ensemble", "heads")),
        pairs=ancient(parent("ensemble", "pairs")),
    output:
        **made("ensemble", scores="scores.parquet", diagnostics="diagnostics.json"),
    log:
        record(f"{RESULTS}/logs/ensemble/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/ensemble/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    shell:
        job("python -m prefopt collect-ensemble --spec {input.spec:q} >> {log:q} 2>&1")


rule calibrate_rewards:
    """Win rates of both responses of every train pair among reference samples for its prompt, by an ensemble."""
    input:
        spec=ancient(spec("win_rates")),
        tokens=ancient(parent("win_rates", "tokens")),
        ensemble=ancient(parent("win_rates", "ensemble")),
        samples=ancient(parent("win_rates", "samples")),
        rewards=ancient(parents("win_rates", "reward")),
    output:
        **made("win_rates", win_rates="win_rates.parquet"),
    log:
        record(f"{RESULTS}/logs/win_rates/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/win_rates/{{id}}.tsv")
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
        job(
            EACH
            + "python -m prefopt calibrate-rewards --spec {input.spec:q} --device {resources.device}"
            " --processes {resources.processes} --micro-batch {resources.micro_batch} >> {log:q} 2>&1"
        )
