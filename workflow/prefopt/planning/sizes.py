"""Rows, tokens and parameters of planned artifacts: as finished ones tell, else from specs and named assumptions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.artifacts import MANIFEST, Node, read_manifest
from prefopt.plan import Plan

# Assumed where no artifact tells: tokens of the embedded world, rows of hub data sets, sizes that names do not give.
WORLD_TOKENS = (12.4, 19.0)
HUB_PAIRS = {"Anthropic/hh-rlhf": 160_000, "princeton-nlp/llama3-ultrafeedback-armorm": 60_000}
HUB_PARAMETERS = {"openai-community/gpt2-large": 774e6}
UNKNOWN_PAIRS, UNKNOWN_PROMPTS, UNKNOWN_PARAMETERS = 50_000, 1_000, 1e9
_MADE_OF_PAIRS = ("relabelled", "sampled_pairs")
BYTES_PER_FILE_PAIR = {".gz": 400.0, ".parquet": 1200.0}


@dataclass(frozen=True)
class Texts:
    """Rows of a table of tokens: pairs by split, mean tokens of a prompt and of one response."""

    pairs: Mapping[str, float]
    prompt: float
    response: float

    def rows(self, split: str | None = None) -> float:
        """Pairs of a split, or of all splits."""
        return sum(self.pairs.values()) if split is None else self.pairs.get(split, 0.0)

    @property
    def pair(self) -> float:
        """Tokens through the model for a pair: the prompt is read once for both responses."""
        return self.prompt + 2 * self.response


@dataclass(frozen=True)
class Model:
    """Parameters, and the shape that activations depend on."""

    parameters: float
    layers: float
    hidden: float


@dataclass
class Sizes:
    """Reads sizes from finished artifacts where there are some, else from specs; ``assumed`` says what was guessed."""

    plan: Plan
    results: Path
    assumed: dict[str, None] = field(default_factory=dict)  # ordered, each once
    _summaries: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def summary(self, node: Node) -> Mapping[str, Any]:
        """The summary of a finished artifact; empty where it is not there."""
        if node.ref not in self._summaries:
            path = self.results / node.ref / MANIFEST
            self._summaries[node.ref] = read_manifest(path, "summary")["summary"] if path.is_file() else {}
        return self._summaries[node.ref]

    def parent(self, node: Node, *roles: str) -> Node:
        """The first parent in one of these roles."""
        return self.plan.node(next(node.parents[role] for role in roles if role in node.parents))

    def texts(self, node: Node) -> Texts:
        """Sizes of a table of tokens, of pairs or of prompts."""
        known = self.summary(node)
        if "mean_prompt_tokens" in known and "mean_response_tokens" in known:
            return Texts(known["pairs"], known["mean_prompt_tokens"], known["mean_response_tokens"])
        if node.stage == "prompts":
            limits = node.spec["tokens"]
            rows = known.get("prompts", UNKNOWN_PROMPTS)
            return Texts({"test": rows}, limits["max_prompt_tokens"] / 2, limits["max_length"] / 4)
        pairs = self.parent(node, "pairs")
        rows = self.pairs(pairs)
        if self._source(pairs).get("kind") == "world":
            return Texts(rows, *WORLD_TOKENS)
        self.assumed["prompts and responses fill half of the tokens they may have"] = None
        prompt, longest = node.spec["max_prompt_tokens"], node.spec["max_length"]
        return Texts(rows, prompt / 2, (longest - prompt) / 2)

    def pairs(self, node: Node) -> dict[str, float]:
        """Pairs by split of a table of pairs, also of one that a reward model labelled anew."""
        found = self.summary(node).get("splits")
        if found:
            return {split: one["pairs"] for split, one in found.items()}
        if node.stage in _MADE_OF_PAIRS:
            below = self.pairs(self.parent(node, "pairs"))
            known = below.get("train", 0.0)
            size = node.spec.get("size") or node.spec.get("prompts")
            if size is None and "samples" in node.parents:
                size = self.parent(node, "samples").spec.get("prompts")
            return below | {"train": known + (size or 0.0) if node.spec.get("keep") else size or known}
        source = node.spec["source"]
        if source["kind"] == "world":
            rows = float(source["pairs"])
        elif source["kind"] == "hub":
            rows = HUB_PAIRS.get(source["repo"], UNKNOWN_PAIRS)
            self.assumed[f"{source['repo']} has {rows:,.0f} pairs"] = None
        else:
            rows = self._rows_of_files(node)
        rows = min(rows, node.spec.get("limit") or rows)
        return {split: share * rows for split, share in node.spec["splits"].items()}

    def _rows_of_files(self, node: Node) -> float:
        rows = 0.0
        for path in map(Path, node.execution.get("paths", ())):
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            rows += sum(file.stat().st_size / BYTES_PER_FILE_PAIR.get(file.suffix, 2000.0) for file in files)
        self.assumed[f"{node.name} has {rows:,.0f} pairs, from the size of its files"] = None
        return rows

    def _source(self, node: Node) -> Mapping[str, Any]:
        while node.stage in _MADE_OF_PAIRS:
            node = self.parent(node, "pairs")
        return node.spec.get("source", {})

    def model(self, node: Node) -> Model:
        """The model that a job reads, down to the starting model."""
        while node.stage != "base":
            node = self.parent(node, "model", "base", "reward")
        spec = node.spec
        if spec["kind"] == "scratch":
            width, inner = spec["hidden"], spec["intermediate"]
            counted = spec["tokenizer"]["vocab_size"] * width + spec["layers"] * (4 * width**2 + 3 * width * inner)
            return Model(self.summary(node).get("parameters", counted), spec["layers"], width)
        number = self.summary(node).get("parameters") or self._parameters(spec.get("repo") or node.execution["path"])
        width = (128 * number / 12) ** (1 / 3)  # N = 12 layers width^2, heads of 128 and as many layers as heads
        return Model(number, width / 128, width)

    def _parameters(self, name: str) -> float:
        match = re.search(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", name.rsplit("/", 1)[-1].lower())
        number = HUB_PARAMETERS.get(name, UNKNOWN_PARAMETERS)
        if match and name not in HUB_PARAMETERS:
            number = float(match[1]) * (1e9 if match[2] == "b" else 1e6)
        self.assumed[f"{name} has {number / 1e9:.3g} billion parameters"] = None
        return number

    def kept_share(self, node: Node) -> float:
        """Share of train pairs in a reward model's subsample D_rho,b: min(rho / b, (1 - rho) / (1 - b))."""
        bias, pairs = node.spec.get("longer_wins"), self.parent(self.parent(node, "tokens"), "pairs")
        rho = pairs.spec.get("rho", self._source(pairs).get("rho"))
        if bias is None or rho is None:
            return node.spec.get("subset", 1.0)
        return min(rho / bias if bias else 1.0, (1 - rho) / (1 - bias) if bias < 1 else 1.0, 1.0)
