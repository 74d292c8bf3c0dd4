"""A reward ensemble: K members of ours against K runs of TRL's RewardTrainer, CPU seconds; and what cheaper heads lose.

    python -m benchmarks.reward_ensemble --against trl --trl-python PATH
    python -m benchmarks.reward_ensemble --diversity

Same pairs, model and batch on both sides, processes in turn, one epoch for every member. A member of ours has its own
initialisation, data order and subset seed, and goes the way of our stage ``train-reward``; heads on a shared body are
no independent members and stand in rows of their own. Only training is timed. ``--diversity`` trains ensembles of all
kinds on the demo world and compares the members' margins on its test split.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.conditions import new_model, shape_of
from benchmarks.pairs_and_models import (
    Pairs,
    Side,
    alternate,
    arguments_for,
    environment,
    markdown,
    median_range,
    reward_llama,
    serve,
    timed,
    typical_pairs,
    word_tokenizer,
    write_evidence,
)

BATCH = 8  # pairs, the default of RewardTrainer
MEMBERS = 5
LEARNING_RATE = 1e-4
OURS = {
    "ours fp32": {"precision": "fp32", "kind": "independent"},
    "ours bf16": {"precision": "bf16", "kind": "independent"},
    "shared backbone, bf16": {"precision": "bf16", "kind": "shared_backbone"},
    "shared backbone, frozen, bf16": {"precision": "bf16", "kind": "shared_backbone", "frozen": True},
}
TRL = {
    "TRL default": {},
    "TRL best (bf16, no checkpointing)": {"gradient_checkpointing": False},
}


def ours(told: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """The members of an ensemble one after another, as the stage makes them, or the heads in one run."""
    from prefopt.engine.reward_models import new_shared_reward_model
    from prefopt.models import save_model
    from prefopt.specs import TrainSpec
    from prefopt.trainer import train
    from prefopt.training.objectives import RewardObjective, SharedRewardObjective

    pairs = typical_pairs(told["pairs"], BATCH)
    folder = tempfile.TemporaryDirectory()
    base = Path(folder.name) / "base"
    save_model(new_model(), word_tokenizer(), base)
    spec = TrainSpec(epochs=1, batch_size=BATCH, learning_rate=LEARNING_RATE, precision=told["precision"])
    shared = told["kind"] == "shared_backbone"
    objective = (SharedRewardObjective if shared else RewardObjective)(**pairs)
    seeds = list(range(told["members"]))

    def one(initial: list[int], order: int) -> dict[str, float]:
        model = new_shared_reward_model(base, initial, frozen=told.get("frozen", False))
        with tempfile.TemporaryDirectory(dir=folder.name) as state:
            settings = {"state_dir": Path(state), "micro_batch": BATCH, "checkpoint_steps": 1000, "device": "cpu"}
            spent, _ = timed(lambda: train(model, objective, spec, seed=order, progress=False, **settings))
        return spent

    one(seeds if shared else seeds[:1], 0)
    runs = [(seeds, 0)] if shared else [([seed], seed) for seed in seeds]
    return lambda: _total([one(*run) for run in runs])


def trl(told: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """RewardTrainer once per member, on token ids."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    pairs = typical_pairs(told["pairs"], BATCH)
    rows = Dataset.from_list(
        [
            {f"{side}_ids": prompt + answer for side, answer in (("chosen", chosen), ("rejected", rejected))}
            for prompt, chosen, rejected in zip(*(pairs[f"{part}_ids"] for part in _PARTS), strict=True)
        ]
    )
    folder = tempfile.TemporaryDirectory()

    def one(seed: int) -> dict[str, float]:
        settings = RewardConfig(
            output_dir=folder.name,
            use_cpu=True,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            seed=seed,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **told["settings"],
        )
        model = reward_llama(seed).train()
        trainer = RewardTrainer(model, args=settings, train_dataset=rows, processing_class=word_tokenizer())
        return timed(trainer.train)[0]

    one(0)
    return lambda: _total([one(seed) for seed in range(told["members"])])


_PARTS = ("prompt", "chosen", "rejected")


def _total(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "cpu_s": round(sum(run["cpu_s"] for run in runs), 4),
        "wall_s": round(sum(run["wall_s"] for run in runs), 4),
        "peak_mb": max(run["peak_mb"] for run in runs),
    }


def new_round(told: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """What a worker does in each round."""
    return (ours if told["who"] == "ours" else trl)(told)


def compare(arguments: Any) -> dict[str, Any]:
    """CPU seconds of all members, and shares of TRL's."""
    common = {"pairs": arguments.pairs, "members": arguments.members}
    sides = [Side(name, common | {"who": "ours"} | told) for name, told in OURS.items()]
    if arguments.against == "trl":
        sides += [
            Side(name, common | {"who": "trl", "settings": told}, arguments.trl_python) for name, told in TRL.items()
        ]
    found = alternate(
        "benchmarks.reward_ensemble",
        sides,
        rounds=arguments.rounds,
        warm_up=0,
        threads=arguments.threads,
        keep_pages=arguments.keep_pages,
    )
    rows = []
    for name, answers in found.items():
        spent = [answer["cpu_s"] for answer in answers]
        row = {"side": name, "cpu_s": median_range(spent)}
        for baseline in (side for side in TRL if side in found):
            theirs = [answer["cpu_s"] for answer in found[baseline]]
            row[f"share of {baseline}"] = median_range([a / b for a, b in zip(spent, theirs, strict=True)])
        rows.append(row | {"peak_mb": max(answer["peak_mb"] for answer in answers)})
    print(f"\n{arguments.members} members, {arguments.pairs} pairs each, CPU seconds\n\n{markdown(rows)}")
    pairs: Pairs = typical_pairs(arguments.pairs, BATCH)
    return {"members": arguments.members, "batch_pairs": BATCH, "pairs": shape_of(pairs, BATCH), "rows": rows}


def diversity(arguments: Any) -> dict[str, Any]:
    """Ensembles of all kinds through the stages of a project of its own, on the demo world."""
    import yaml

    from prefopt.cli import main as prefopt
    from prefopt.files import read_json
    from prefopt.plan import load_plan
    from prefopt.stages import STAGES

    train = {"epochs": 3, "batch_size": 32, "learning_rate": 1e-3}
    shared = {"kind": "shared_backbone", "members": arguments.members, "train": train}
    ensembles = {
        "independent": {"members": arguments.members, "train": train},
        "shared_backbone": shared,
        "shared_backbone, frozen": shared | {"frozen": True, "train": train | {"learning_rate": 1e-2}},
    }
    item = {
        "item": {"paper": "own", "name": "diversity", "title": "Diversity of reward ensembles"},
        "data": {"source": {"kind": "world"}, "splits": {"train": 0.6, "judge": 0.1, "test": 0.3}},
        "model": {"kind": "scratch"},
        "tokens": {},
        "sft": {"train": {"epochs": 4, "batch_size": 32, "learning_rate": 2e-3}},
        "rewards": {f"e{number}": one for number, one in enumerate(ensembles.values())},
        "policy": {"steps": 1},
        "arms": {
            f"a{number}": {"loss": {"name": "distill_ensemble", "beta": 0.1}, "rewards": f"e{number}"}
            for number in range(len(ensembles))
        },
        "seeds": [0],
        "evaluate": {"judge": "oracle"},
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        results, file = Path(folder) / "results", Path(folder) / "config/experiments/own/diversity.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(yaml.safe_dump(item))
        config = Path(folder) / "config/config.yaml"
        config.write_text(yaml.safe_dump({"items": ["*/*"], "results": str(results)}))
        plan = load_plan(config)
        plan.write_specs(results)
        verbs = {stage.folder: stage.verb for stage in STAGES.values()}
        wanted = [node for node in plan.nodes.values() if node.stage == "ensemble"]
        for node in plan.reachable(wanted):
            if prefopt([verbs[node.stage], "--spec", str(results / "specs" / f"{node.ref}.json")]):
                raise SystemExit(f"{node.ref} was not made")
        for ensemble in wanted:
            spent = sum(
                read_json(results / node.ref / "manifest.json")["cpu_seconds"]
                for node in plan.reachable([ensemble])
                if node.stage in ("reward", "rewards")
            )
            held_out = read_json(results / ensemble.ref / "diagnostics.json")
            kind = held_out["kind"] + (", frozen" if held_out.get("frozen") else "")
            held_out = held_out["held_out"]
            rows.append(
                {
                    "kind": kind,
                    "members": held_out["members"],
                    "test pairs": held_out["pairs"],
                    "mean accuracy": round(statistics.mean(held_out["accuracy"]), 3),
                    "correlation of margins": round(held_out["mean_correlation"], 3),
                    "disagreement": round(held_out["disagreement"], 3),
                    "vote entropy": round(held_out["vote_entropy"], 3),
                    "cpu_s of training and scoring": round(spent, 1),
                }
            )
    print(f"\n{markdown(rows)}")
    return {"item": item, "rows": rows}


def main() -> None:
    """Measure what is asked for, print the table and write the evidence."""
    parser = arguments_for(
        __doc__,
        "cpu-reward-ensemble.json",
        pairs={"type": int, "default": 32},
        members={"type": int, "default": MEMBERS},
        diversity={"action": "store_true", "help": "compare what members know instead of what they cost"},
    )
    arguments = parser.parse_args()
    if arguments.worker:
        serve(new_round, arguments.worker)
        return
    part = "diversity" if arguments.diversity else "cost"
    found = (diversity if arguments.diversity else compare)(arguments)
    kept = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {"benchmark": "reward_ensemble"}
    theirs = arguments.trl_python if arguments.against == "trl" and not arguments.diversity else None
    command = "--diversity" if arguments.diversity else "--against trl --trl-python PATH"
    about = {
        "command": f"python -m benchmarks.reward_ensemble {command}",
        "environment": environment(theirs, arguments.threads),
    }
    write_evidence(arguments.json, kept | {part: about | found})


if __name__ == "__main__":
    main()
