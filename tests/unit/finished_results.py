"""A results folder as a finished run leaves it, written with the real artifact code (small numbers, no training)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from prefopt.artifacts import Node
from prefopt.evaluation import exact, items
from prefopt.evaluation.exact import collect_exact
from prefopt.evaluation.items import collect_item
from prefopt.figures import arms_figure, drawing
from prefopt.files import read_json, write_json, write_lines
from prefopt.store.builds import building
from prefopt.tables import read_table, write_table

HOSTILE = "<script>alert('x')</script> & \"quoted\""
PROMPTS = 40
STEPS = 30


def make(results: Path, stage: str, name: str, spec: dict, parents: dict, fill=None, **summary) -> Node:  # noqa: PLR0917
    """One artifact with the given content, unless it is there already."""
    node = Node(stage, 1, name, spec, {role: parent.ref for role, parent in parents.items()})
    if not (results / node.ref).is_dir():
        with building(node, results) as build:
            build.summary |= summary
            if fill:
                fill(build.work)
    return node


def curve(seed: int, steps: int = STEPS) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    level = np.linspace(0.69, 0.45, steps) + rng.normal(0, 0.03, steps)
    return [
        {"step": t + 1, "loss": float(x), "accuracy": float(1.2 - x), "margin": float(0.7 - x)}
        for t, x in enumerate(level)
    ]


def shared_signals(results: Path) -> dict[str, Node]:
    """Data, model, reference, reward models and two dispersion estimates, as every item uses them."""
    refused = {"both responses are the same": 7, "the prompt is empty": 2}
    pairs = make(results, "pairs", "world", {"source": {"kind": "world"}}, {}, pairs=400, refused=refused)
    base = make(results, "base", "scratch", {"kind": "scratch", "layers": 2}, {"pairs": pairs}, vocabulary=300)
    tokens = make(
        results,
        "tokens",
        "world",
        {"max_length": 64},
        {"pairs": pairs, "base": base},
        pairs={"test": 80, "train": 320},
        refused={},
    )
    sft = make(
        results,
        "sft",
        "sft-s0",
        {"train": {"steps": STEPS}, "seed": 0},
        {"tokens": tokens, "base": base},
        lambda work: write_lines(work / "metrics.jsonl", [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}]),
        steps=2,
    )
    reference = make(results, "reference", "sft-s0", {"precision": "fp32"}, {"tokens": tokens, "model": sft})
    nodes = {"pairs": pairs, "base": base, "tokens": tokens, "model": sft, "reference": reference}
    rewards = [reward_model(results, nodes, k) for k in range(3)]
    held_out = {
        "accuracy": [0.71, 0.7, 0.68],
        "margin_std": [1.2, 1.3, 0.9],
        "vote_entropy": 0.21,
        "below_chance": [],
        "constant": [],
        "identical": [],
    }
    members = {f"member{k}": scores for k, scores in enumerate(rewards)}
    nodes["rewards"] = make(
        results, "ensemble", "main-k3", {}, {"tokens": tokens, **members}, members=3, held_out=held_out
    )
    for name in ("token-entropy", "shuffled"):
        nodes[name] = dispersion(results, nodes, name)
    return nodes


def reward_model(results: Path, nodes: dict[str, Node], k: int) -> Node:
    spec = {"train": {"steps": STEPS}, "seeds": {"init": k}, "split": "train"}
    parents = {"tokens": nodes["tokens"], "model": nodes["model"]}
    reward = make(
        results,
        "reward",
        f"train-s{k}",
        spec,
        parents,
        lambda work: write_lines(work / "metrics.jsonl", curve(k)),
        steps=STEPS,
        pairs=200 + k,
        held_out_accuracy=0.7 - k / 100,
    )
    accuracy = {"test": 0.7 - k / 100, "train": 0.8}
    return make(results, "rewards", reward.name, {}, {"tokens": nodes["tokens"], "reward": reward}, accuracy=accuracy)


def dispersion(results: Path, nodes: dict[str, Node], name: str) -> Node:
    weight = np.random.default_rng(len(name)).gamma(4, 0.25, 400)
    table = pd.DataFrame({"pair_id": np.arange(400), "split": "train", "dispersion_weight": weight})
    return make(
        results,
        "dispersion",
        name,
        {"control": name},
        {"tokens": nodes["tokens"], "reference": nodes["reference"]},
        lambda work: write_table(work / "dispersion.parquet", table),
        phi_star=0.2914,
        calibrated_on=400,
        mean_weight_train=float(weight.mean()),
        sd_weight_train=float(weight.std()),
        control=None if name == "token-entropy" else name,
    )


def policy(results: Path, nodes: dict[str, Node], loss: str, seed: int) -> Node:
    spec = {"loss": {"name": loss, "params": {"beta": 0.1}}, "train": {"steps": STEPS}, "seed": seed}
    parents = {role: nodes[role] for role in ("tokens", "model", "reference")}
    if loss.startswith("mallows"):
        parents["dispersion"] = nodes["token-entropy"]
    if loss.startswith("distill"):
        parents["rewards"] = nodes["rewards"]
    points = curve(seed + len(loss))
    return make(
        results,
        "policy",
        f"{loss}-s{seed}",
        spec,
        parents,
        lambda work: write_lines(work / "metrics.jsonl", points),
        steps=STEPS,
        last_tenth={"loss": 0.45},
    )


def generations(results: Path, nodes: dict[str, Node], model: Node, answer: str, seed: int) -> Node:
    records = [
        {"instruction": f"name a colour, number {p}", "output": f"{answer} {p}", "generator": model.id, "prompt_id": p}
        for p in range(PROMPTS)
    ]
    return make(
        results,
        "generations",
        model.name,
        {"prompts": PROMPTS, "seed": seed},
        {"tokens": nodes["tokens"], "model": model},
        lambda work: write_json(work / "outputs.json", records),
    )


def measured(results: Path, nodes: dict[str, Node], sides: tuple[Node, Node], gain: float, seed: int) -> Node:
    answers, baseline = sides
    judgements = make(
        results,
        "judgements",
        answers.name,
        {"judge": "oracle"},
        {"tokens": nodes["tokens"], "generations": answers, "baseline": baseline},
    )
    rng = np.random.default_rng(seed + int(1000 * gain))
    table = pd.DataFrame(
        {
            "prompt_id": np.arange(PROMPTS),
            "outcome": np.clip(np.round(2 * rng.normal(0.5 + gain, 0.3, PROMPTS)) / 2, 0, 1),
            "reward_model": rng.normal(1 + gain, 0.4, PROMPTS),
            "reward_baseline": rng.normal(1, 0.4, PROMPTS),
            "tokens_model": rng.integers(5, 20, PROMPTS),
            "tokens_baseline": rng.integers(5, 18, PROMPTS),
        }
    )
    values = {
        "win_rate": 100 * float(table["outcome"].mean()),
        "reward_advantage": float((table["reward_model"] - table["reward_baseline"]).mean()),
        "win_rate_interval": [40.0, 60.0],
        "n_missing": 0,
    }

    def fill(work: Path) -> None:
        write_json(work / "metrics.json", values)
        write_table(work / "prompts.parquet", table)

    return make(results, "metrics", answers.name, {}, {"judgements": judgements}, fill, **values)


def item(results: Path, name: str, gains: dict[str, float], expect: list[dict], seeds: tuple[int, ...], **head) -> Node:
    """A finished paper item with one arm per loss; a gain of None leaves the arm unmeasured."""
    nodes = shared_signals(results)
    against = head.pop("against", "dpo")
    parents = {role: nodes[role] for role in ("pairs", "tokens", "reference")}
    found: dict[tuple[str, int], dict] = {}
    for seed in seeds:
        policies = {arm: policy(results, nodes, arm.replace("-", "_"), seed) for arm in gains}
        root = policies.get(against, nodes["model"])
        baseline = generations(results, nodes, root, "red", seed)
        parents[f"baseline.{seed}"] = baseline
        for arm, gain in gains.items():
            parents[f"policy.{arm}.{seed}"] = policies[arm]
            found[arm, seed] = {"policy": policies[arm].ref}
            if arm == against or gain is None:
                continue
            answers = generations(results, nodes, policies[arm], f"{HOSTILE} {arm}", seed)
            metrics = measured(results, nodes, (answers, baseline), gain, seed)
            parents |= {f"generations.{arm}.{seed}": answers, f"metrics.{arm}.{seed}": metrics}
            folder = results / metrics.ref
            found[arm, seed] |= {
                "metrics_ref": metrics.ref,
                "metrics": read_json(folder / "metrics.json"),
                "prompts": read_table(folder / "prompts.parquet"),
            }
    spec = {
        "item": {"paper": "mallowspo", "name": name, "title": name, "arxiv": "2405.14953", "scale": "demo", "note": ""}
        | head,
        "arms": {arm: {"name": arm.replace("-", "_"), "beta": 0.1} for arm in gains},
        "seeds": list(seeds),
        "against": against,
        "expect": expect,
    }
    content = collect_item(spec, found)
    return make(
        results,
        "papers/mallowspo",
        name,
        spec,
        parents,
        lambda work: paper_files(work, content),
        verdict=content["verdict"],
    )


def paper_files(work: Path, content: dict) -> None:
    """What the stage paper-item writes; of an exact item the caller draws the figure."""
    write_json(work / "item.json", content)
    exactly = content["scale"] == "exact"
    (work / "table.csv").write_text((exact if exactly else items).table(content).to_csv(index=False))
    (work / "table.md").write_text((exact if exactly else items).markdown(content))
    if not exactly:
        (work / "figure.svg").write_text(arms_figure(content))


def claim(arm: str, than: str | float, metric: str = "win_rate", text: str = "the weighted loss wins more often"):
    row = {"claim": text, "arm": arm, "metric": metric, "than": than}
    return row | {"source": "table 2", "reported": "54.1 vs 50.0"}


def finished(results: Path) -> list[str]:
    """Two items over shared parents; returns their references."""
    first = item(
        results,
        "win-rates",
        {"dpo": 0.0, "mallows-theta": 0.35, "distill": 0.05, "ipo": None},
        [claim("mallows-theta", "dpo"), claim("mallows-theta", "distill", "reward_advantage"), claim("ipo", 50)],
        (0, 1),
        title="Win rates against DPO",
        note="A note with <b>markup</b> in it.",
    )
    second = item(
        results, "reference", {"dpo": 0.3}, [claim("dpo", "reference")], (0,), title="DPO alone", against="reference"
    )
    return [first.ref, second.ref]


def exact_item(results: Path) -> Node:
    """A finished exact item: two figures, one table, one claim that holds, one order, and one that fails."""
    values = {"margin": 1.25, "low": 1.1, "high": 1.4}

    def fill(work: Path) -> None:
        write_json(work / "values.json", values)
        (work / "tables").mkdir()
        rows = pd.DataFrame({"number": range(50), "name": HOSTILE, "x": 1 / 3})
        rows.to_csv(work / "tables" / "all_rows.csv", index=False)
        (work / "figures").mkdir()
        for name in ("second_by_name", "drawn_first"):
            with drawing(3, 2) as canvas:
                canvas.figure.subplots().plot([0, 1])
            (work / "figures" / f"{name}.svg").write_text(canvas.svg)

    order = ["second_by_name", "drawn_first"]
    spec = {"name": "example", "version": 1, "params": {"beta": 0.1}}
    study = make(results, "studies", "example", spec, {}, fill, figures=order, tables=["all_rows"])
    number = {"claim": "the margin", "value": "margin", "reported": 1.2, "tolerance": 0.1, "source": "table 4"}
    head = {
        "paper": "own",
        "name": "exact",
        "title": "Exact margins",
        "arxiv": None,
        "scale": "exact",
        "note": "A note.",
    }
    spec = {
        "item": head,
        "study": {"name": "example", "params": {"beta": 0.1, "places": [1, 2]}},
        "expect": [
            number,
            number | {"claim": "a stricter margin", "tolerance": 0.01},
            {
                "claim": "above one",
                "value": "margin",
                "above": 1.0,
                "interval": ["low", "high"],
                "source": "figure 5",
            },
        ],
    }
    content = collect_exact(spec, values, study.ref)

    def fill_item(work: Path) -> None:
        paper_files(work, content)
        figure = results / study.ref / "figures" / "second_by_name.svg"
        (work / "figure.svg").write_text(figure.read_text())

    return make(results, "papers/own", "exact", spec, {"study": study}, fill_item, verdict=content["verdict"])
