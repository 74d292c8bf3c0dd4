"""From declarations to artifacts: every item becomes nodes with ids and parents. No torch, so that planning is fast."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.artifacts import Node
from prefopt.errors import BadInput, nearest
from prefopt.files import json_text, write_text
from prefopt.planning.annotators import plan_disagreement, plan_vote_weight
from prefopt.planning.config import AnyItem, item_files, load_config, load_item
from prefopt.planning.grids import GridPlanner
from prefopt.planning.items import ItemPlanner
from prefopt.specs import Config, DisagreementItemSpec, ExactItemSpec, GridItemSpec, VoteWeightItemSpec
from prefopt.studies import get_study

# Part of every id: raised when the meaning of a stage's output changes, so that old results are not taken for new ones.
STAGE_VERSIONS = {
    "pairs": 1,
    "base": 1,
    "tokens": 1,
    "prompts": 1,
    "relabelled": 1,
    "sft": 1,
    "reference": 1,
    "samples": 1,
    "dispersion": 1,
    "reward": 1,
    "rewards": 1,
    "ensemble": 1,
    "win_rates": 1,
    "policy": 1,
    "sampled_pairs": 1,
    "extrapolated": 1,
    "responsibilities": 1,
    "mixtures": 1,
    "classifier": 1,
    "trials": 1,
    "vote_trials": 1,
    "vote_weights": 1,
    "disagreement": 1,
    "generations": 1,
    "judgements": 1,
    "metrics": 1,
    "studies": 1,
    "papers": 1,
}


_LONGEST_NAME = 200


def readable_name(text: str) -> str:
    """What a file or folder is called, as the part of an id that people read: lower case, digits, dots and dashes.

    At most 200 letters, since files are named by ids and file systems take 255 bytes.
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:_LONGEST_NAME].rstrip("-.") or "unnamed"


@dataclass
class Plan:
    """All planned nodes by ``stage/id`` and the item nodes by their file below experiments, ``paper/name``."""

    config: Config
    nodes: dict[str, Node] = field(default_factory=dict)
    items: dict[str, Node] = field(default_factory=dict)
    papers: list[str] = field(default_factory=list)  # all that have declarations, also those that no item names

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

    def scored_together(self) -> list[list[Node]]:
        """Scores of reward models, in groups that the same ensembles use: who wants one of a group wants all of it."""
        users: dict[str, list[str]] = {ref: [] for ref, node in self.nodes.items() if node.stage == "rewards"}
        for node in self.nodes.values():
            for ref in node.parents.values() if node.stage == "ensemble" else ():
                if self.nodes[ref].stage == "rewards":
                    users[ref].append(node.ref)
        groups: dict[tuple[str, ...], list[Node]] = {}
        for ref, ensembles in users.items():  # those that no ensemble uses, such as an oracle's, stay alone
            groups.setdefault(tuple(ensembles) or (ref,), []).append(self.nodes[ref])
        return list(groups.values())

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
        """Write each node's spec file where it is missing or says something else.

        Every stage and paper gets its folder: dvc.yaml names them all, and DVC refuses an output that is not there.
        """
        for folder in (*STAGE_VERSIONS, *(f"papers/{paper}" for paper in self.papers)):
            (results / folder).mkdir(parents=True, exist_ok=True)
        for node in self.nodes.values():
            path = results / "specs" / f"{node.ref}.json"
            text = json_text(node.to_json())
            if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
                write_text(path, text)


def load_plan(config_file: Path, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Plan everything that a config file (with overrides) asks for."""
    config = load_config(config_file, overrides)
    plan = Plan(config)
    plan.papers = sorted(path.name for path in (config_file.parent / "experiments").glob("*") if path.is_dir())
    for path in item_files(config_file.parent, config.items):
        item = load_item(path)
        try:
            node = plan_item(plan, item, Path(config.data_root))
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
        plan.items[path.relative_to(config_file.parent / "experiments").with_suffix("").as_posix()] = node
    return plan


def plan_item(plan: Plan, item: AnyItem, data_root: Path) -> Node:
    """Plan one paper item down to its data, or to its study; returns the item's node."""
    if isinstance(item, ExactItemSpec):
        return _plan_exact(plan, item)
    if isinstance(item, GridItemSpec):
        return GridPlanner(plan, item, data_root).item_node()
    if isinstance(item, DisagreementItemSpec):
        return plan_disagreement(plan, item, data_root)
    if isinstance(item, VoteWeightItemSpec):
        return plan_vote_weight(plan, item, data_root)
    return ItemPlanner(plan, item, data_root).item_node()


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
