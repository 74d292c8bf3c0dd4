"""A project that makes at least one artifact of every stage, as small as the stages allow."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from prefopt.plan import Plan, load_plan
from small_project import TRAIN, hh_rows, item

DETAILS = ("quiet", "golden", "windy", "hidden")
PEOPLE = ("ann", "bob", "eve")
SMALL = {"kind": "scratch", "layers": 1, "hidden": 16, "heads": 2, "intermediate": 32, "max_positions": 96}
WORDS = SMALL | {"tokenizer": {"kind": "words", "vocab_size": 256}}
TOKENS = {"max_prompt_tokens": 40, "max_length": 90}
WORLD = {
    "source": {"kind": "world", "prompts": 160, "pairs": 160},
    "splits": {"train": 0.5, "judge": 0.3, "test": 0.2},
}
POLARITY = {"source": {"kind": "world", "labels": "polarity", "closed_fraction": 0.0, "prompts": 80, "pairs": 80}}
VOTES = {
    "source": {"kind": "votes", "reader": "votes", "paths": ["votes.jsonl"], "hold_out": 1},
    "splits": {"train": 0.5, "validation": 0.2, "test": 0.3},
}
SAMPLING = {"max_new_tokens": 6, "batch_size": 64}


def head(name: str, **more: str) -> dict:
    return {"paper": "own", "name": name, "title": f"The item {name}", "scale": "local"} | more


def dialogues() -> dict:
    """Pairs, base, tokens, sft, reference, dispersion, reward, policy, prompts, generations, judgements, metrics."""
    evaluate = item()["evaluate"] | {"prompts": None, "prompt_set": {"kind": "file", "path": "asked.json"}}
    arms = {"mallows_theta": item()["arms"]["mallows_theta"]}
    return item(arms=arms, rewards={}, samples=None, policy=TRAIN | {"steps": 12}, evaluate=evaluate)


def grid() -> dict:
    """Relabelled, rewards, ensemble, samples, win_rates, classifier, trials."""
    oracle = {"members": 1, "split": "judge", "train": TRAIN}
    return {
        "item": head("grid", scale="demo"),
        "layout": "bars",
        "model": WORDS,
        "tokens": TOKENS,
        "reference": {"data": WORLD, "sft": {"train": TRAIN}},
        "conditions": {"one": {"data": WORLD, "relabel": {"oracle": oracle}}},
        "rewards": {"two": {"members": 2, "train": TRAIN}},
        "samples": SAMPLING,
        "policy": TRAIN,
        "arms": {"capo": {"loss": {"name": "capo", "beta": 0.1}, "rewards": "two", "win_rate_samples": 2}},
        "evaluate": {
            "sets": {"test": {"data": WORLD, "prompts": 8}},
            "sampling": SAMPLING,
            "judge": {"classifier": POLARITY},
        },
    }


def rounds() -> dict:
    """Sampled_pairs, extrapolated, responsibilities, mixtures."""
    accelerated = {"kind": "accelerated", "count": 1, "responses": {"labels": "truth", "prompts": 16}}
    arms = {
        "accelerated": {"loss": {"name": "dpo", "beta": 0.1}, "rounds": accelerated},
        "em": {"loss": {"name": "em_dpo", "beta": 0.5}, "rounds": {"kind": "em", "count": 1}},
    }
    raters = {"length_preferences": [12.0, -12.0], "annotators": 6, "votes": 3, "noise": 0.2}
    return grid() | {
        "item": head("rounds", scale="demo"),
        "conditions": {"one": {"data": WORLD | {"source": WORLD["source"] | {"raters": raters}}}},
        "rewards": {"truth": {"oracle": True}},
        "arms": arms,
        "evaluate": grid()["evaluate"] | {"judge": "oracle"},
    }


def humans() -> dict:
    """Disagreement."""
    return {
        "item": head("humans"),
        "annotated": {"places": {"data": VOTES}},
        "model": WORDS,
        "tokens": TOKENS,
        "resamples": 50,
    }


def weight() -> dict:
    """Vote_trials, vote_weights."""
    return {
        "item": head("weight"),
        "data": VOTES,
        "model": WORDS,
        "tokens": TOKENS,
        "policy": TRAIN,
        "betas": [1.0],
        "arms": {"dpo": {"loss": {"name": "dpo"}}, "votes": {"loss": {"name": "dpo_votes"}}},
    }


def exact() -> dict:
    """Studies."""
    return {"item": head("laws", scale="exact"), "study": {"name": "mallows_phi_links", "phi": 0.5, "width": 0.1}}


def vote_rows(prompts: int = 40) -> list[dict]:
    """Three people's votes on two answers; every fourth prompt divides them."""
    return [
        {
            "prompt": f"What is place {number} like?",
            "annotator": person,
            "response_a": f"It is {DETAILS[number % 4]} and {DETAILS[(number + 1) % 4]}.",
            "response_b": f"Rather {DETAILS[(number + 2) % 4]}.",
            "vote": "b" if number % 4 == 0 and person == "eve" else "a",
        }
        for number in range(prompts)
        for person in PEOPLE
    ]


def asked(count: int = 8) -> list[dict[str, str]]:
    return [{"instruction": f"Tell me about the river in town {n}.", "output": f"River {n}."} for n in range(count)]


def declare(folder: Path, *names: str, results: str = "results") -> Path:
    """Write data and declarations, all or those named; the configuration's file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hh_rows(80)))
    (folder / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in vote_rows()))
    (folder / "asked.json").write_text(json.dumps(asked()))
    experiments = folder / "config" / "experiments" / "own"
    experiments.mkdir(parents=True, exist_ok=True)
    for content in (dialogues(), grid(), rounds(), humans(), weight(), exact()):
        name = content["item"]["name"]
        if not names or name in names:
            (experiments / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    config = folder / "config" / "config.yaml"
    execution = {"checkpoint_steps": 3}
    config.write_text(yaml.safe_dump({"items": ["own/*"], "results": results, "execution": execution}))
    return config


def planned(folder: Path, monkeypatch) -> Plan:
    """The plan of a declared project, made as its commands make it: in its folder."""
    monkeypatch.chdir(folder)
    return load_plan(Path("config/config.yaml"))
