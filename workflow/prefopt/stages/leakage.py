"""Evaluation prompts that a model has learned from: looked for in the artifacts that it was made from, and refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prefopt.errors import FailedCheck
from prefopt.pairs import normal_prompt
from prefopt.report import ancestors
from prefopt.stages.common import log
from prefopt.stages.tables import PROMPTS
from prefopt.store.builds import Build
from prefopt.tables import read_table


def _behind(build: Build, roles: Iterable[str], *stages: str) -> Iterator[Path]:
    """Folders of all artifacts of these stages that the parents in these roles were made from."""
    manifests: dict[str, dict[str, Any]] = {}
    absent: set[str] = set()
    for role in roles:
        ancestors(build.results, build.node.parents[role], manifests, absent)
    if absent:
        log.warning("%d artifacts behind the model are not here: their prompts are not looked at", len(absent))
    return (build.results / ref for ref, manifest in manifests.items() if manifest["stage"] in stages)


def check_unseen(build: Build, roles: Iterable[str], asked: Iterable[int]) -> None:
    """FailedCheck where a prompt_id to be answered stands in the train split of token ids behind these parents."""
    wanted = set(asked)
    for folder in _behind(build, roles, "tokens"):
        seen = wanted.intersection(read_table(folder / "tokens.parquet", ("prompt_id",), "train")["prompt_id"])
        if seen:
            raise FailedCheck(
                f"{len(seen)} of {len(wanted)} evaluation prompts are in the train split of {folder}, first prompt_id "
                f"{min(seen)}; give both data sets the same splits and split_seed"
            )


def check_unseen_texts(build: Build, model: str, asked: str) -> None:
    """FailedCheck where a prompt of the set ``asked`` is, up to case and spacing, one that ``model`` was trained on.

    Nothing is compared where ``asked`` is no prompt set: pairs hold every prompt in one split.
    """
    path = build.parent(asked) / PROMPTS
    if not path.is_file():
        return
    wanted = {normal_prompt(prompt): prompt for prompt in read_table(path, ("prompt",))["prompt"]}
    for folder in _behind(build, [model], "pairs", "relabelled"):
        trained = read_table(folder / "pairs.parquet", ("prompt_id", "prompt"), "train").drop_duplicates("prompt_id")
        seen = wanted.keys() & set(map(normal_prompt, trained["prompt"]))
        if seen:
            text = wanted[min(seen)][-1]["content"]
            raise FailedCheck(
                f"{len(seen)} of {len(wanted)} prompts to answer are in the train split of {folder}, for example "
                f"{text[:60]!r}; take them out of the prompt set"
            )
