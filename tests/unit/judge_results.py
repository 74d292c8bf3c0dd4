"""A results folder in which two sets of answers wait for their judgement, as earlier stages leave it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from prefopt.artifacts import Node
from prefopt.files import write_json
from prefopt.judges.identity import judge_identity
from prefopt.specs import LmJudgeSpec, ServerJudgeSpec

Texts = list[dict[str, str]]


def texts(*words: str) -> Texts:
    return [{"text": word} for word in words]


def rows(count: int) -> tuple[Texts, Texts, Texts]:
    """Prompts, the baseline's answers, the model's answers."""
    draw = random.Random(0)
    prompts = texts(*(f"prompt {n}" for n in range(count)))
    return prompts, *(texts(*(f"{side} {n} " + "x" * draw.randrange(30) for n in range(count))) for side in "ab")


def waiting_judgement(
    results: Path,
    count: int,
    judge: LmJudgeSpec | ServerJudgeSpec,
    parents: Mapping[str, Node] | None = None,
) -> Path:
    """Write pairs, answers and the spec file of their judgement, which is returned; ``parents`` are the judge's.

    The chosen answer is the longer one in three pairs of four.
    """
    prompts, baseline, model = rows(count)
    pairs, *sides = (Node(stage, 1, stage, {"n": n}) for n, stage in enumerate(["pairs", "generations", "generations"]))
    nodes = {"pairs": pairs, "generations": sides[0], "baseline": sides[1], **(parents or {})}
    for role, answers in {"generations": model, "baseline": baseline}.items():
        ids = [[n % 7] * 3 for n in range(count)]
        table = pd.DataFrame({"prompt_id": range(count), "prompt_ids": ids, "response_ids": ids})
        outputs = [{"prompt_id": n, "output": a["text"], "generator": role} for n, a in enumerate(answers)]
        write_json(results / nodes[role].ref / "outputs.json", outputs)
        table.to_parquet(results / nodes[role].ref / "responses.parquet")
    for node in nodes.values():
        write_json(results / node.ref / "manifest.json", {"outputs": {}})
    turns = [[{"role": "user", "content": p["text"]}] for p in prompts]
    table = pd.DataFrame({"prompt_id": range(count), "prompt": turns, "split": "test"})
    labels = {"chosen": [f"{n} " + "y" * 40 * (n % 4 > 0) for n in range(count)], "rejected": ["n" * 20] * count}
    table.assign(**labels).to_parquet(results / pairs.ref / "pairs.parquet")
    spec, execution = judge_identity(judge)
    refs = {role: node.ref for role, node in nodes.items()}
    node = Node("judgements", 1, "arm", {"judge": spec}, refs, {"judge": execution} if execution else {})
    write_json(results / "specs" / f"{node.ref}.json", node.to_json())
    return results / "specs" / f"{node.ref}.json"
