"""A results folder in which the jobs that run a model over rows can be started, as earlier stages leave it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

import tiny
from judge_models import folder_of, judge_tokenizer, torn
from prefopt.artifacts import Node, tree_files
from prefopt.digests import file_sha256
from prefopt.engine.reward_models import new_reward_model
from prefopt.files import write_json
from prefopt.judges.identity import judge_identity
from prefopt.models import save_model
from prefopt.specs import LmJudgeSpec

PAIRS, PROMPTS = 11, 7
SAMPLING = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "batch_size": 3, "seed": 5}
VERBS = {
    "reference": "score-reference",
    "rewards": "score-rewards",
    "samples": "sample-reference",
    "sampled_pairs": "pair-samples",
    "win_rates": "calibrate-rewards",
    "generations": "generate",
    "judgements": "judge",
    "lm_judgements": "judge",
}


class RowJobs:
    """The folder, and the spec files of jobs in it by the keys of ``VERBS``."""

    def __init__(self, results: Path) -> None:
        self.results = results
        rows = {"prompt_ids": [[tiny.BOS, 3 + n % PROMPTS, *range(4, 4 + n % PROMPTS)] for n in range(PAIRS)]}
        for seed, side in enumerate(("chosen", "rejected")):
            rows[f"{side}_ids"] = tiny.responses(PAIRS, seed)
        splits = ["test" if n % PROMPTS > 2 else "train" for n in range(PAIRS)]
        ids = {"pair_id": [1000 + 7 * n for n in range(PAIRS)], "prompt_id": [n % PROMPTS for n in range(PAIRS)]}
        turns = [[{"role": "user", "content": f"prompt {n % PROMPTS}"}] for n in range(PAIRS)]
        texts = {
            "chosen": ["w1"] * PAIRS,
            "rejected": ["w2"] * PAIRS,
            "source": "made up",
            "source_row": 0,
            "meta": "{}",
        }
        table = pd.DataFrame({**ids, "prompt": turns, "split": splits, **texts})
        self.pairs = self._made("pairs", {"pairs": table})
        self.tokens = self._made("tokens", {"tokens": pd.DataFrame({**ids, **rows, "split": splits})})
        self.model = self._made("sft")
        self.members = [self._made("reward", number=number) for number in range(2)]
        self.ensemble = self._made("ensemble", {"scores": self._rewards(ids["pair_id"])})
        tiny.tokenizer().save_pretrained(results / self.tokens.ref / "tokenizer")
        save_model(tiny.causal_lm(), tiny.tokenizer(), results / self.model.ref / "weights")
        for number, node in enumerate(self.members):
            model = new_reward_model(results / self.model.ref / "weights", seed=number)
            save_model(model, tiny.tokenizer(), results / node.ref / "weights")
        self._seal(self.tokens, self.model, *self.members)
        rewards = {f"reward{number}": node for number, node in enumerate(self.members)}
        read = {"tokens": self.tokens, "model": self.model}
        self.nodes = {
            "reference": self._node("reference", {"precision": "fp32", "tokens": True}, read),
            "rewards": self._node("rewards", {}, {"tokens": self.tokens, "reward": self.members[0]}),
            "samples": self._node("samples", {"split": "train", "per_prompt": 3, "sampling": SAMPLING}, read),
            "generations": self._node(
                "generations", {"prompts": None, "sampling": {**SAMPLING, "batch_size": 1}}, read, pairs=self.pairs
            ),
            "baseline": self._node(
                "generations", {"prompts": None, "sampling": {**SAMPLING, "seed": 6}}, read, pairs=self.pairs
            ),
        }
        samples = {"tokens": self.tokens, "ensemble": self.ensemble, "samples": self.nodes["samples"]}
        self.nodes["win_rates"] = self._node("win_rates", {}, {**samples, **rewards})
        best = {"oracle": False, "prompts": None, "keep": False, "seed": 0, "choose": "extremes"}
        labelled = {"pairs": self.pairs, "tokens": self.tokens, "samples": self.nodes["samples"]}
        self.nodes["sampled_pairs"] = self._node("sampled_pairs", best, {**labelled, **rewards})
        answers = {"pairs": self.pairs, "generations": self.nodes["generations"], "baseline": self.nodes["baseline"]}
        judges = {f"judge{number}": node for number, node in enumerate(self.members)}
        self.nodes["judgements"] = self._node("judgements", {"judge": "reward_model"}, {**answers, **judges})
        judge, tokenizer = self._made("base"), judge_tokenizer()
        folder_of(torn(tokenizer, ["m", "M"]), tokenizer, results / judge.ref / "weights")
        self._seal(judge)
        identity, _ = judge_identity(LmJudgeSpec(kind="lm", model="judge"))
        self.nodes["lm_judgements"] = self._node("judgements", {"judge": identity}, {**answers, "judge": judge})
        self.nodes["oracle"] = self._node("judgements", {"judge": "oracle"}, answers)

    def spec(self, job: str) -> Path:
        """The spec file of a job."""
        return self.results / "specs" / f"{self.nodes[job].ref}.json"

    def out(self, job: str) -> Path:
        """The artifact that a job makes."""
        return self.results / self.nodes[job].ref

    def outputs(self, job: str) -> dict[str, str]:
        """sha256 of every file of a finished artifact but its manifest."""
        return {path.name: file_sha256(path) for path in tree_files(self.out(job))}

    def _node(self, stage: str, spec: Mapping[str, Any], parents: Mapping[str, Node], **more: Node) -> Node:
        node = Node(stage, 1, stage, spec, {role: parent.ref for role, parent in {**parents, **more}.items()})
        write_json(self.results / "specs" / f"{node.ref}.json", node.to_json())
        return node

    def _made(self, stage: str, tables: Mapping[str, pd.DataFrame] | None = None, number: int = 0) -> Node:
        node = Node(stage, 1, stage, {"number": number})
        (self.results / node.ref).mkdir(parents=True)
        for name, table in (tables or {}).items():
            table.to_parquet(self.results / node.ref / f"{name}.parquet")
        self._seal(node)
        return node

    def _seal(self, *nodes: Node) -> None:
        for node in nodes:
            outputs = {path.name: {"sha256": file_sha256(path)} for path in tree_files(self.results / node.ref)}
            write_json(self.results / node.ref / "manifest.json", node.to_json() | {"outputs": outputs})

    @staticmethod
    def _rewards(pair_ids: list[int]) -> pd.DataFrame:
        table = pd.DataFrame({"pair_id": pair_ids})
        for side in ("chosen", "rejected"):
            table[f"{side}_reward"] = [[0.1 * n, -0.1 * n] for n in range(len(pair_ids))]
        return table
