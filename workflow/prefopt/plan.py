"""From declarations to artifacts: every item becomes nodes with ids and parents. No torch, so that planning is fast."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.artifacts import Node, write_json
from prefopt.config import item_files, load_config, load_item
from prefopt.errors import BadInput, nearest
from prefopt.losses import COMPOSITIONS, get_loss
from prefopt.sources import data_identity, model_identity
from prefopt.specs import ArmSpec, Config, EnsembleSpec, ExactItemSpec, ItemSpec, SamplingSpec, ScratchModel
from prefopt.studies import get_study

# Part of every id: raised when the meaning of a stage's output changes, so that old results are not taken for new ones.
STAGE_VERSIONS = {
    "pairs": 1,
    "base": 1,
    "tokens": 1,
    "sft": 1,
    "reference": 1,
    "samples": 1,
    "dispersion": 1,
    "reward": 1,
    "rewards": 1,
    "ensemble": 1,
    "policy": 1,
    "generations": 1,
    "judgements": 1,
    "metrics": 1,
    "studies": 1,
    "papers": 1,
}


def readable_name(text: str) -> str:
    """What a file or folder is called, as the part of an id that people read: lower case, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unnamed"


@dataclass
class Plan:
    """All planned nodes by ``stage/id`` and the item nodes by ``paper/name``."""

    config: Config
    nodes: dict[str, Node] = field(default_factory=dict)
    items: dict[str, Node] = field(default_factory=dict)

    def add(
        self,
        stage: str,
        name: str,
        spec: Mapping[str, Any],
        parents: Mapping[str, Node] | None = None,
        execution: Mapping[str, Any] | None = None,
    ) -> Node:
        """Plan one artifact; the same spec with the same parents is the same node, whoever asks for it."""
        node = Node(
            stage=stage,
            version=STAGE_VERSIONS[stage.split("/", maxsplit=1)[0]],
            name=readable_name(name),
            spec=spec,
            parents={role: parent.ref for role, parent in (parents or {}).items()},
            execution=execution or {},
        )
        return self.nodes.setdefault(node.ref, node)

    def node(self, ref: str) -> Node:
        """The node ``stage/id``; BadInput for one that the configuration does not ask for."""
        if ref not in self.nodes:
            same_stage = [r for r in self.nodes if r.rsplit("/", 1)[0] == ref.rsplit("/", 1)[0]]
            raise BadInput(f"{ref} is not in the plan of the current configuration; {nearest(ref, same_stage)}")
        return self.nodes[ref]

    def reachable(self, roots: Iterable[Node]) -> list[Node]:
        """The roots and everything below them, parents before children."""
        ordered: dict[str, Node] = {}

        def visit(node: Node) -> None:
            if node.ref not in ordered:
                for ref in node.parents.values():
                    visit(self.nodes[ref])
                ordered[node.ref] = node

        for root in roots:
            visit(root)
        return list(ordered.values())

    def write_specs(self, results: Path) -> None:
        """Write each node's spec file where it is missing or says something else."""
        for node in self.nodes.values():
            path = results / "specs" / f"{node.ref}.json"
            content = node.to_json()
            if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != content:
                write_json(path, content)


def load_plan(config_file: Path, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Plan everything that a config file (with overrides) asks for."""
    config = load_config(config_file, overrides)
    plan = Plan(config)
    for path in item_files(config_file.parent, config.items):
        item = load_item(path)
        try:
            node = plan_item(plan, item, Path(config.data_root))
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
        plan.items[f"{item.item.paper}/{item.item.name}"] = node
    return plan


def plan_item(plan: Plan, item: ItemSpec | ExactItemSpec, data_root: Path) -> Node:
    """Plan one paper item down to its data, or to its study; returns the item's node."""
    if isinstance(item, ExactItemSpec):
        return _plan_exact(plan, item)
    return _ItemPlanner(plan, item, data_root).item_node()


def _plan_exact(plan: Plan, item: ExactItemSpec) -> Node:
    found = get_study(item.study.name)
    content = {"name": found.name, "version": found.version, "params": found.check_params(item.study.params)}
    parents = {"study": plan.add("studies", found.name, content)}
    spec = {
        "item": item.item.model_dump(),
        "study": {"name": content["name"], "params": content["params"]},
        "expect": [row.model_dump() for row in item.expect],
    }
    return plan.add(f"papers/{item.item.paper}", item.item.name, spec, parents)


def resolve_arm(arm: ArmSpec) -> tuple[str, dict[str, Any], dict[str, Any] | None, frozenset[str]]:
    """Loss name, parameters, regulariser and needs of an arm; a composition such as ``e_dpo`` is spelled out here.

    Raises BadInput for an unknown loss, an unknown or missing parameter, or a need that nothing can meet.
    """
    name, regulariser = arm.loss.name, arm.regulariser.model_dump() if arm.regulariser else None
    if name in COMPOSITIONS:
        name, default = COMPOSITIONS[name]
        regulariser = regulariser or dict(default) or None
    loss = get_loss(name)
    loss.check_params(arm.loss.params)
    needs = loss.needs | ({"reference_samples"} if regulariser else set())
    return name, arm.loss.params, regulariser, frozenset(needs)


def _check_lengths(item: ItemSpec) -> None:
    """Refuse, before anything runs, texts longer than the positions of a model from scratch."""
    if not isinstance(item.model, ScratchModel):
        return
    longest = item.tokens.max_length
    for sampling in (item.evaluate.sampling, *([item.samples] if item.samples else [])):
        longest = max(longest, item.tokens.max_prompt_tokens + sampling.max_new_tokens)
    if longest > item.model.max_positions:
        raise BadInput(
            f"texts of up to {longest} tokens (tokens.max_length, or a prompt with max_new_tokens), but the model has "
            f"max_positions {item.model.max_positions}; lower the former or raise the latter"
        )


class _ItemPlanner:
    """Builds the nodes of one item, from its data up."""

    def __init__(self, plan: Plan, item: ItemSpec, data_root: Path) -> None:
        self.plan, self.item = plan, item
        _check_lengths(item)
        data_spec, data_execution, name = data_identity(item.data, data_root)
        self.world = data_spec["source"]["kind"] == "world"
        self.pairs = plan.add("pairs", name, data_spec, execution=data_execution)
        model_spec, model_execution, name = model_identity(item.model, data_root)
        scratch = {"pairs": self.pairs} if model_spec["kind"] == "scratch" else {}
        self.base = plan.add("base", name, model_spec, scratch, model_execution)
        tokens_spec = item.tokens.model_dump()
        self.tokens = plan.add("tokens", self.pairs.name, tokens_spec, {"pairs": self.pairs, "base": self.base})
        self.model = self._sft()
        precision = {"precision": item.policy.precision}
        self.reference = plan.add("reference", self.model.name, precision, {"tokens": self.tokens, "model": self.model})

    def _sft(self) -> Node:
        if self.item.sft is None:
            return self.base
        spec = self.item.sft.model_dump()
        return self.plan.add("sft", f"sft-s{spec['seed']}", spec, {"tokens": self.tokens, "base": self.base})

    def _members(self, ensemble: EnsembleSpec) -> list[Node]:
        nodes = []
        for k, seed in enumerate(ensemble.seeds or range(ensemble.members)):
            bias = ensemble.longer_wins[k] if ensemble.longer_wins else None
            spec = {
                "train": ensemble.train.model_dump(),
                "split": ensemble.split,
                "subset": ensemble.subset,
                "longer_wins": bias,
                "seeds": {"init": seed, "order": seed, "subset": seed},
            }
            name = f"{ensemble.split}-b{bias:g}-s{seed}" if bias is not None else f"{ensemble.split}-s{seed}"
            nodes.append(self.plan.add("reward", name, spec, {"tokens": self.tokens, "model": self.model}))
        return nodes

    def _ensemble(self, name: str) -> Node:
        scores = {
            f"member{k}": self.plan.add("rewards", member.name, {}, {"tokens": self.tokens, "reward": member})
            for k, member in enumerate(self._members(self.item.rewards[name]))
        }
        return self.plan.add("ensemble", f"{name}-k{len(scores)}", {}, {"tokens": self.tokens, **scores})

    def _signals(self, arm_name: str, arm: ArmSpec, needs: frozenset[str]) -> dict[str, Node]:
        parents = {"tokens": self.tokens, "model": self.model}
        if "reference" in needs:
            parents["reference"] = self.reference
        if "dispersion" in needs:
            spec = arm.dispersion.model_dump()
            if arm.dispersion.control != "shuffled":
                spec["seed"] = None  # only the shuffled control draws
            name = arm.dispersion.control or arm.dispersion.estimator
            sources = {"tokens": self.tokens, "reference": self.reference}
            if arm.dispersion.samples is not None:
                sources["samples"] = self._samples(arm_name, "all", arm.dispersion.samples)
            parents["dispersion"] = self.plan.add("dispersion", name, spec, sources)
        if "rewards" in needs:
            parents["rewards"] = self._ensemble(self._rewards_of(arm_name, arm))
        if "reference_samples" in needs:
            parents["samples"] = self._samples(arm_name, "train", 1)
        return parents

    def _samples(self, arm_name: str, split: str, per_prompt: int) -> Node:
        if self.item.samples is None:
            raise BadInput(f"arms.{arm_name}: needs reference samples; declare 'samples' in the item")
        if (self.item.samples.temperature, self.item.samples.top_p) != (1.0, 1.0):
            raise BadInput(
                "samples: KL and entropy are estimated from the reference itself; set temperature and top_p to 1"
            )
        spec = {"sampling": self.item.samples.model_dump(), "split": split, "per_prompt": per_prompt}
        name = f"{self.model.name}-{split}"
        return self.plan.add("samples", name, spec, {"tokens": self.tokens, "model": self.model})

    def _rewards_of(self, arm_name: str, arm: ArmSpec) -> str:
        declared = self.item.rewards
        if arm.rewards is None and len(declared) == 1:
            return next(iter(declared))
        if arm.rewards is None:
            raise BadInput(f"arms.{arm_name}: its loss needs reward models; set 'rewards' to one of {sorted(declared)}")
        if arm.rewards not in declared:
            raise BadInput(f"arms.{arm_name}.rewards: no ensemble '{arm.rewards}'; {nearest(arm.rewards, declared)}")
        return arm.rewards

    def _policy(self, arm_name: str, seed: int) -> Node:
        arm = self.item.arms[arm_name]
        try:
            loss, params, regulariser, needs = resolve_arm(arm)
        except BadInput as error:
            raise BadInput(f"arms.{arm_name}.loss: {error}") from None
        spec = {
            "loss": {"name": loss, "params": params},
            "regulariser": regulariser,
            "train": (arm.train or self.item.policy).model_dump(),
            "seed": seed,
        }
        name = f"{arm.loss.name}-s{seed}"
        return self.plan.add("policy", name, spec, self._signals(arm_name, arm, needs))

    def _generations(self, model: Node, sampling: SamplingSpec) -> Node:
        spec = {"prompts": self.item.evaluate.prompts, "sampling": sampling.model_dump()}
        parents = {"pairs": self.pairs, "tokens": self.tokens, "model": model}
        return self.plan.add("generations", model.name, spec, parents)

    def _judge(self) -> tuple[dict[str, Any], dict[str, Node]]:
        judge = self.item.evaluate.judge
        if isinstance(judge, EnsembleSpec):
            if judge.split != "judge":
                raise BadInput("evaluate.judge: a held-out judge trains on 'split: judge', which no learner sees")
            if self.item.data.splits.judge == 0:
                raise BadInput("evaluate.judge: the data's 'splits' give the judge no share")
            return {"judge": "reward_model"}, {f"judge{k}": m for k, m in enumerate(self._members(judge))}
        if not self.world:
            raise BadInput("evaluate.judge: the oracle exists for the demo world only; declare a reward-model judge")
        return {"judge": "oracle"}, {}

    def item_node(self) -> Node:
        """Policies, evaluations and the item over all arms and seeds."""
        item = self.item
        against = item.evaluate.against
        if against != "reference" and against not in item.arms:
            raise BadInput(f"evaluate.against: no arm '{against}'; {nearest(against, [*item.arms, 'reference'])}")
        self._check_claims()
        judge_spec, judge_parents = self._judge()
        sampling = item.evaluate.sampling
        parents: dict[str, Node] = {"pairs": self.pairs, "tokens": self.tokens, "reference": self.reference}
        for seed in item.seeds:
            seeded = sampling.model_copy(update={"seed": sampling.seed + seed})
            policies = {arm: self._policy(arm, seed) for arm in item.arms}
            baseline_model = self.model if against == "reference" else policies[against]
            baseline = self._generations(baseline_model, sampling if against == "reference" else seeded)
            for arm, policy in policies.items():
                parents[f"policy.{arm}.{seed}"] = policy
                if arm == against:
                    parents[f"generations.{arm}.{seed}"] = baseline
                    continue
                generations = self._generations(policy, seeded)
                parents[f"generations.{arm}.{seed}"] = generations
                judgements = self.plan.add(
                    "judgements",
                    policy.name,
                    judge_spec,
                    {"pairs": self.pairs, "generations": generations, "baseline": baseline, **judge_parents},
                )
                parents[f"metrics.{arm}.{seed}"] = self.plan.add("metrics", policy.name, {}, {"judgements": judgements})
            parents[f"baseline.{seed}"] = baseline
        spec = {
            "item": item.item.model_dump(),
            "arms": {name: arm.loss.model_dump() for name, arm in item.arms.items()},
            "seeds": item.seeds,
            "against": against,
            "expect": [row.model_dump() for row in item.expect],
        }
        return self.plan.add(f"papers/{item.item.paper}", item.item.name, spec, parents)

    def _check_claims(self) -> None:
        known = [*self.item.arms, "reference"]
        for row in self.item.expect:
            for name in (row.arm, row.than):
                if isinstance(name, str) and name not in known:
                    raise BadInput(f"expect: no arm '{name}'; {nearest(name, known)}")
