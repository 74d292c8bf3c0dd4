"""What planned artifacts ask of a machine: FLOPs, tokens, memory, disk. Formulas and check: docs/performance.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.artifacts import Node
from prefopt.planning.sizes import Model, Sizes, Texts

# Exact studies have no model: seconds as measured.
STUDY_SECONDS = {
    "mallows_context": 72.0,
    "mallows_bandit_frontier": 22.0,
    "mallows_bandit_arms": 19.0,
    "mallows_bandit_average": 16.0,
    "dpo_degeneracy": 2.0,
    "p_dpo_confidence_set": 1.8,
    "mallows_estimator": 0.6,
    "mallows_theta_links": 0.5,
    "mallows_laws": 0.5,
    "tabular_rounds": 0.5,
    "mallows_phi_links": 0.2,
}


@dataclass
class Work:
    """What a job does: FLOPs of training (6N a token) and reading (2N), tokens written, bytes in memory and on disk."""

    fixed: float = 0.2  # CPU seconds
    train: float = 0.0
    read: float = 0.0
    written: float = 0.0  # tokens
    model: Model | None = None
    state: float = 0.0  # bytes of weights, gradients and optimiser
    activations: float = 0.0  # bytes for one micro-batch
    rows: float = 1.0  # of that micro-batch
    batch: float = 1.0  # answers written at the same time
    answer: float = 1.0  # tokens of one answer, the steps a batch takes
    bf16: bool = False
    disk: float = 0.0
    checkpoint: float = 0.0  # bytes while it runs
    dollars: float = 0.0


def work_of(sizes: Sizes, node: Node) -> Work:
    """The work of one planned artifact."""
    return WORK[node.stage.split("/", maxsplit=1)[0]](sizes, node)


def _steps(train: Mapping[str, Any], pairs: float) -> float:
    return train["steps"] or math.ceil(train["epochs"] * pairs / train["batch_size"])


def _training(sizes: Sizes, node: Node, tokens: float, share: float = 1.0, split: str = "train") -> Work:
    """Steps over the train split, ``tokens`` through the model for a row."""
    train, model = node.spec["train"], sizes.model(node)
    steps = _steps(train, share * sizes.texts(sizes.parent(node, "tokens")).rows(split))
    size, bf16 = model.parameters, train["precision"] == "bf16"
    held = (16 if train["optimizer"] == "adamw" else 12) * size
    trained = size
    if train.get("adapter"):  # A and B of seven matrices a layer, of width x rank each
        trained = 14 * model.layers * model.hidden * train["adapter"]["rank"]
        held = 4 * size + 16 * trained
    execution = sizes.plan.config.execution
    kept = 36 if execution.gradient_checkpointing else 34 * model.layers  # bytes per token and width, 2 per value
    kept += 2 * model.layers if execution.gradient_checkpointing else 0
    rows = min(execution.micro_batch, train["batch_size"])
    factor = 4 if train.get("adapter") else 6
    factor += 2 if execution.gradient_checkpointing else 0
    return Work(
        fixed=0.3,
        train=steps * train["batch_size"] * tokens * factor * size,
        model=model,
        state=held + (2 * size if bf16 else 0),
        rows=rows,
        activations=rows * tokens * model.hidden * kept * (1 if bf16 else 2),
        bf16=bf16,
        disk=4 * trained + 20e3 + 100 * steps,
        checkpoint=12 * trained,
    )


def _reading(sizes: Sizes, node: Node, tokens: float, disk: float, fixed: float = 0.3) -> Work:
    """One pass without gradients."""
    model, bf16 = sizes.model(node), node.spec.get("precision") == "bf16"
    return Work(
        fixed, read=tokens * 2 * model.parameters, model=model, state=4 * model.parameters, bf16=bf16, disk=disk
    )


def _pairs(sizes: Sizes, node: Node) -> Work:
    rows = sum(sizes.pairs(node).values())
    return Work(0.3 + 1.7e-4 * rows, disk=20e3 + 90 * rows)


def _base(sizes: Sizes, node: Node) -> Work:
    model = sizes.model(node)
    return Work(0.4, model=model, disk=model.parameters * (4 if node.spec["kind"] == "scratch" else 2))


def _tokens(sizes: Sizes, node: Node) -> Work:
    texts = sizes.texts(node)
    return Work(0.2 + 2.6e-4 * texts.rows(), disk=10e3 + 1.3 * texts.rows() * texts.pair)


def _sft(sizes: Sizes, node: Node) -> Work:
    texts = sizes.texts(sizes.parent(node, "tokens"))
    return _training(sizes, node, texts.prompt + texts.response)


def _reward(sizes: Sizes, node: Node) -> Work:
    texts = sizes.texts(sizes.parent(node, "tokens"))
    return _training(sizes, node, texts.pair, sizes.kept_share(node), node.spec.get("split", "train"))


def _policy(sizes: Sizes, node: Node) -> Work:
    texts = sizes.texts(sizes.parent(node, "tokens"))
    regulariser = node.spec.get("regulariser") or {}
    return _training(sizes, node, texts.pair + (texts.prompt + texts.response if "forward_kl" in regulariser else 0))


def _scores(sizes: Sizes, node: Node) -> Work:
    texts = sizes.texts(sizes.parent(node, "tokens"))
    return _reading(sizes, node, texts.rows() * texts.pair, 43 * texts.rows())


def _written(
    work: Work, sizes: Sizes, node: Node, *, texts: Texts, sampling: Mapping[str, Any], answers: float
) -> None:
    """Add answers of half the tokens they may have, and the reading of their prompts."""
    work.answer = sampling["max_new_tokens"] / 2
    work.written += answers * work.answer
    work.read += answers * texts.prompt * 2 * sizes.model(node).parameters
    work.batch = sampling["batch_size"]
    work.disk += answers * (20 + 2 * work.answer)
    sizes.assumed["answers have half of the tokens they may have"] = None


def _samples(sizes: Sizes, node: Node) -> Work:
    texts = sizes.texts(sizes.parent(node, "tokens"))
    work = _reading(sizes, node, 0.0, 0.0)
    prompts = texts.rows(node.spec["split"])
    answers = min(prompts, node.spec.get("prompts", prompts)) * node.spec["per_prompt"]
    _written(work, sizes, node, texts=texts, sampling=node.spec["sampling"], answers=answers)
    return work


def _generations(sizes: Sizes, node: Node) -> Work:
    texts = sizes.texts(sizes.parent(node, "tokens", "pairs"))
    work = _reading(sizes, node, 0.0, 0.0)
    rows = node.spec.get("prompts") or texts.rows("test")
    answers = min(rows, texts.rows("test") or rows)
    _written(work, sizes, node, texts=texts, sampling=node.spec["sampling"], answers=answers)
    work.disk = answers * (80 + 10 * work.answer)  # text and token ids
    return work


def _sampled_pairs(sizes: Sizes, node: Node) -> Work:
    drawn = work_of(sizes, sizes.parent(node, "samples"))
    texts = sizes.texts(sizes.parent(node, "tokens"))
    answers = drawn.written / drawn.answer
    members = sum(role.startswith("reward") for role in node.parents)
    tokens = members * answers * (texts.prompt + drawn.answer)
    work = Work(0.5 + 1e-4 * answers, disk=20e3 + 90 * sum(sizes.pairs(node).values()))
    if members:
        work.model = sizes.model(sizes.parent(node, "reward0"))
        work.read, work.state = tokens * 2 * work.model.parameters, 4 * work.model.parameters
    return work


def _extrapolated(sizes: Sizes, node: Node) -> Work:
    model = sizes.model(node)
    return Work(0.3, model=model, state=8 * model.parameters, disk=4 * model.parameters + 20e3)


def _mixtures(sizes: Sizes, node: Node) -> Work:
    """Every policy's samples under every policy and the reference."""
    count = sum(role.startswith("policy") for role in node.parents)
    samples = sizes.parent(node, "samples0")
    drawn, texts = work_of(sizes, samples), sizes.texts(sizes.parent(samples, "tokens"))
    tokens = count * (count + 1) * drawn.written / drawn.answer * (texts.prompt + drawn.answer)
    return _reading(sizes, node, tokens, 10e3)


def _trials(sizes: Sizes, node: Node) -> Work:
    work = _policy(sizes, node) if node.spec["train"] else _reading(sizes, node, 0.0, 0.0)
    work.disk, work.fixed = 300.0 * _trial_steps(sizes, node), 0.5  # a trial keeps no weights
    evaluate, size = node.spec["evaluate"], sizes.model(node).parameters
    for name, one in evaluate["sets"].items():
        texts = sizes.texts(sizes.plan.node(node.parents[f"set.{name}.tokens"]))
        answers = one["prompts"] * evaluate["draws"] * len(evaluate["at"])
        _written(work, sizes, node, texts=texts, sampling=evaluate["sampling"], answers=answers)
        work.read += answers * (texts.prompt + work.answer) * 2 * size * (2 if one["kl"] else 0)
    return work


def _trial_steps(sizes: Sizes, node: Node) -> float:
    train = node.spec["train"]
    return _steps(train, sizes.texts(sizes.parent(node, "tokens")).rows("train")) if train else 0


def _vote_trials(sizes: Sizes, node: Node) -> Work:
    work = _policy(sizes, node) if node.spec.get("train") else _scores(sizes, node)
    work.disk = 100e3
    return work


def _judgements(sizes: Sizes, node: Node) -> Work:
    made = sizes.parent(node, "generations")
    answers = work_of(sizes, made)
    rows = answers.written / answers.answer
    texts = sizes.texts(sizes.parent(made, "tokens", "pairs"))
    tokens = 2 * rows * (texts.prompt + 2 * answers.answer)  # both orders
    work = Work(0.3, disk=500 * rows)
    judge = node.spec["judge"]
    if prices := node.execution.get("judge", {}).get("prices"):
        answered = 2 * rows * judge.get("answer_tokens", 1)
        work.dollars = (tokens * prices["input"] + answered * prices["output"]) / 1e6
    if roles := [role for role in node.parents if role.startswith("judge")]:  # a model that judges, or members
        work.model = model = sizes.model(sizes.parent(node, *roles))
        work.read, work.state = tokens * 2 * model.parameters * len(roles), 4 * model.parameters
    return work


def _paper(_: Sizes, node: Node) -> Work:
    return Work(0.03 + 0.012 * (len(node.parents) - 1), disk=40e3 + 4500 * len(node.parents))


def _score_rewards(sizes: Sizes, node: Node) -> Work:
    texts = sizes.texts(sizes.parent(node, "tokens"))
    return _reading(sizes, node, texts.rows() * texts.pair, 27 * texts.rows())


def _studied(_: Sizes, node: Node) -> Work:
    return Work(STUDY_SECONDS.get(node.spec["name"], 1.0), disk=150e3)


def _small(seconds: float, disk: float) -> Callable[[Sizes, Node], Work]:
    return lambda _, __: Work(seconds, disk=disk)


WORK: dict[str, Callable[[Sizes, Node], Work]] = {
    "pairs": _pairs,
    "base": _base,
    "tokens": _tokens,
    "prompts": _small(2.0, 1e6),
    "relabelled": _small(1.0, 3e6),
    "sft": _sft,
    "reference": _scores,
    "samples": _samples,
    "dispersion": _small(0.25, 75e3),
    "reward": _reward,
    "rewards": _score_rewards,
    "ensemble": _small(0.08, 160e3),
    "win_rates": _small(1.0, 160e3),
    "policy": _policy,
    "sampled_pairs": _sampled_pairs,
    "extrapolated": _extrapolated,
    "responsibilities": _small(0.5, 160e3),
    "mixtures": _mixtures,
    "classifier": _small(0.4, 10e3),
    "trials": _trials,
    "vote_trials": _vote_trials,
    "vote_weights": _small(5.0, 500e3),
    "disagreement": _small(5.0, 500e3),
    "generations": _generations,
    "judgements": _judgements,
    "metrics": _small(0.3, 10e3),
    "studies": _studied,
    "papers": _paper,
}
