# Sources become pairs, a starting model with its tokenizer, and token ids.


rule prepare_pairs:
    """Read preference pairs into the canonical table; refuse what cannot be used, with a reason."""
    input:
        spec=ancient(f"{RESULTS}/specs/pairs/{{id}}.json"),
    output:
        pairs=f"{RESULTS}/pairs/{{id}}/pairs.parquet",
        refused=f"{RESULTS}/pairs/{{id}}/refused.parquet",
        manifest=f"{RESULTS}/pairs/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/pairs/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/pairs/{{id}}.tsv"
    priority: 10  # everything else waits for these
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(30),
    shell:
        "python -m prefopt prepare-pairs --spec {input.spec:q} >> {log:q} 2>&1"


rule prepare_model:
    """Start a small model from scratch with its own tokenizer, or pin a local or hub model."""
    input:
        spec=ancient(f"{RESULTS}/specs/base/{{id}}.json"),
        pairs=ancient(parent("base", "pairs")),
    output:
        manifest=f"{RESULTS}/base/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/base/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/base/{{id}}.tsv"
    priority: 10  # everything else waits for these
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(60),
    shell:
        "python -m prefopt prepare-model --spec {input.spec:q} >> {log:q} 2>&1"


rule tokenize:
    """Turn the pairs into token ids; refuse and count what does not fit."""
    input:
        spec=ancient(f"{RESULTS}/specs/tokens/{{id}}.json"),
        pairs=ancient(parent("tokens", "pairs")),
        base=ancient(parent("tokens", "base")),
    output:
        tokens=f"{RESULTS}/tokens/{{id}}/tokens.parquet",
        tokenizer=directory(f"{RESULTS}/tokens/{{id}}/tokenizer"),
        refused=f"{RESULTS}/tokens/{{id}}/refused.parquet",
        manifest=f"{RESULTS}/tokens/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/tokens/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/tokens/{{id}}.tsv"
    priority: 10  # everything else waits for these
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(60),
    shell:
        "python -m prefopt tokenize --spec {input.spec:q} >> {log:q} 2>&1"


rule prepare_prompts:
    """Read and tokenise prompts to answer, and a baseline's answers to them."""
    input:
        spec=ancient(f"{RESULTS}/specs/prompts/{{id}}.json"),
        base=ancient(parent("prompts", "base")),
    output:
        prompts=f"{RESULTS}/prompts/{{id}}/prompts.parquet",
        tokenizer=directory(f"{RESULTS}/prompts/{{id}}/tokenizer"),
        refused=f"{RESULTS}/prompts/{{id}}/refused.parquet",
        manifest=f"{RESULTS}/prompts/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/prompts/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/prompts/{{id}}.tsv"
    priority: 10  # everything else waits for these
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(60),
    shell:
        "python -m prefopt prepare-prompts --spec {input.spec:q} >> {log:q} 2>&1"


rule relabel_pairs:
    """Label pairs by a reward model, and keep training pairs of which the longer wins in a declared share."""
    input:
        spec=ancient(f"{RESULTS}/specs/relabelled/{{id}}.json"),
        pairs=ancient(parent("relabelled", "pairs")),
        tokens=ancient(parent("relabelled", "tokens")),
        rewards=ancient(parent("relabelled", "rewards")),
    output:
        pairs=f"{RESULTS}/relabelled/{{id}}/pairs.parquet",
        refused=f"{RESULTS}/relabelled/{{id}}/refused.parquet",
        manifest=f"{RESULTS}/relabelled/{{id}}/manifest.json",
    log:
        f"{RESULTS}/logs/relabelled/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/relabelled/{{id}}.tsv"
    conda:
        "../../envs/prefopt.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(30),
    shell:
        "python -m prefopt relabel-pairs --spec {input.spec:q} >> {log:q} 2>&1"
