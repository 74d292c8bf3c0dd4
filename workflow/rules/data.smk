# Sources become pairs, a starting model with its tokenizer, and token ids.


rule prepare_pairs:
    """Read preference pairs into the canonical table; refuse what cannot be used, with a reason."""
    input:
        spec=ancient(spec("pairs")),
    output:
        **made("pairs", pairs="pairs.parquet", refused="refused.parquet"),
    log:
        record(f"{RESULTS}/logs/pairs/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/pairs/{{id}}.tsv")
    priority: 10  # everything else waits for these
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(30),
    shell:
        job("python -m prefopt prepare-pairs --spec {input.spec:q} >> {log:q} 2>&1")


rule prepare_model:
    """Start a small model from scratch with its own tokenizer, or pin a local or hub model."""
    input:
        spec=ancient(spec("base")),
        pairs=ancient(parent("base", "pairs")),
    output:
        **made("base"),
    log:
        record(f"{RESULTS}/logs/base/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/base/{{id}}.tsv")
    priority: 10  # everything else waits for these
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(60),
    shell:
        job("python -m prefopt prepare-model --spec {input.spec:q} >> {log:q} 2>&1")


rule tokenize:
    """Turn the pairs into token ids; refuse and count what does not fit."""
    input:
        spec=ancient(spec("tokens")),
        pairs=ancient(parent("tokens", "pairs")),
        base=ancient(parent("tokens", "base")),
    output:
        **made(
            "tokens",
            tokens="tokens.parquet",
            tokenizer="tokenizer",
            refused="refused.parquet",
        ),
    log:
        record(f"{RESULTS}/logs/tokens/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/tokens/{{id}}.tsv")
    priority: 10  # everything else waits for these
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(60),
    shell:
        job("python -m prefopt tokenize --spec {input.spec:q} >> {log:q} 2>&1")


rule prepare_prompts:
    """Read and tokenise prompts to answer, and a baseline's answers to them."""
    input:
        spec=ancient(spec("prompts")),
        base=ancient(parent("prompts", "base")),
    output:
        **made(
            "prompts",
            prompts="prompts.parquet",
            tokenizer="tokenizer",
            refused="refused.parquet",
        ),
    log:
        record(f"{RESULTS}/logs/prompts/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/prompts/{{id}}.tsv")
    priority: 10  # everything else waits for these
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(60),
    shell:
        job("python -m prefopt prepare-prompts --spec {input.spec:q} >> {log:q} 2>&1")


rule relabel_pairs:
    """Label pairs by a reward model, and keep training pairs of which the longer wins in a declared share."""
    input:
        spec=ancient(spec("relabelled")),
        pairs=ancient(parent("relabelled", "pairs")),
        tokens=ancient(parent("relabelled", "tokens")),
        rewards=ancient(parent("relabelled", "rewards")),
    output:
        **made("relabelled", pairs="pairs.parquet", refused="refused.parquet"),
    log:
        record(f"{RESULTS}/logs/relabelled/{{id}}.log"),
    benchmark:
        record(f"{RESULTS}/benchmarks/relabelled/{{id}}.tsv")
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(30),
    shell:
        job("python -m prefopt relabel-pairs --spec {input.spec:q} >> {log:q} 2>&1")
