"""A small project of its own: pairs, configuration and results in a temporary folder, the rules of this checkout."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

import forked_commands
from warm_server import beside_server

ROOT = Path(__file__).resolve().parents[1]
TRAIN = {"steps": 4, "batch_size": 8, "learning_rate": 1e-3}
THINGS = ["river", "forest", "market", "harbour", "garden", "kitchen", "library", "station", "mountain", "village"]
DETAILS = ["quiet", "narrow", "golden", "crowded", "ancient", "windy", "empty", "bright", "hidden", "famous"]


def dialogue(rng: random.Random, answer: str, thing: str, turn: str) -> str:
    return f"\n\nHuman: Tell me about the {thing}.\n\nAssistant: Which one?\n\nHuman: {turn}\n\nAssistant: {answer}"


def hh_rows(count: int) -> list[dict[str, str]]:
    """Dialogue pairs in HH-RLHF's form; the longer, more detailed answer is chosen."""
    rng = random.Random(7)
    rows = []
    for number in range(count):
        thing, turn = rng.choice(THINGS), f"The one near town number {number}."
        words = rng.sample(DETAILS, 5)
        rows.append(
            {
                "chosen": dialogue(rng, f"The {thing} is {words[0]}, {words[1]} and {words[2]}.", thing, turn),
                "rejected": dialogue(rng, f"It is {words[3]}.", thing, turn),
            }
        )
    return rows


def item(**changes) -> dict:
    """A declaration with the four methods and a held-out reward judge."""
    content = {
        "item": {"paper": "own", "name": "tiny", "title": "Tiny dialogues", "scale": "local"},
        "data": {
            "source": {"kind": "files", "reader": "hh", "paths": ["pairs.jsonl"]},
            "splits": {"train": 0.6, "judge": 0.2, "test": 0.2},
        },
        "model": {
            "kind": "scratch",
            "layers": 1,
            "hidden": 32,
            "heads": 2,
            "intermediate": 64,
            "max_positions": 160,
            "tokenizer": {"kind": "bpe", "vocab_size": 400},
        },
        "tokens": {"max_prompt_tokens": 110, "max_length": 160},
        "sft": {"train": {**TRAIN, "steps": 10}},
        "rewards": {"single": {"members": 1, "train": TRAIN}, "three": {"members": 3, "subset": 0.8, "train": TRAIN}},
        "samples": {"max_new_tokens": 8, "batch_size": 32},
        "policy": TRAIN,
        "arms": {
            "dpo": {"loss": {"name": "dpo", "beta": 0.1}},
            "mallows_theta": {"loss": {"name": "mallows_theta", "beta": 0.1}},
            "distill": {"loss": {"name": "distill", "beta": 0.1}, "rewards": "single"},
            "e_dpo": {"loss": {"name": "e_dpo", "beta": 0.1}, "rewards": "three"},
        },
        "seeds": [0],
        "evaluate": {
            "prompts": 12,
            "sampling": {"max_new_tokens": 8, "batch_size": 12},
            "judge": {"members": 1, "seeds": [100], "split": "judge", "train": TRAIN},
            "against": "reference",
        },
    }
    content.update(changes)
    return content


def snakemake_words(*words: object, executor: str = "local") -> list[str]:
    """What follows ``python -m``: this checkout's rules by the profile for one machine, or another."""
    profile = ROOT / "workflow" / "profiles" / executor
    return ["snakemake", "-s", str(ROOT / "Snakefile"), "--workflow-profile", str(profile), *map(str, words)]


@dataclass(frozen=True)
class Project:
    """A folder with configuration, data and results, and the commands a user would type in it."""

    folder: Path

    def declare(self, content: dict) -> None:
        path = self.folder / "config" / "experiments" / content["item"]["paper"] / f"{content['item']['name']}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MLFLOW_TRACKING_URI": ""}

    def prefopt(self, *words: object, cold: bool = False, check: bool = False) -> subprocess.CompletedProcess[str]:
        return self._run(["prefopt", *map(str, words)], cold, check)

    def snakemake(self, *words: object, cold: bool = False, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Beside the server of all tests, or with jobs that import for themselves."""
        return self._run(snakemake_words(*words), cold, check)

    def launch(self, *words: object, check: bool = False) -> subprocess.CompletedProcess[str]:
        """As ``make reproduce`` runs it: with a server of its own."""
        return self.prefopt("launch", "--", sys.executable, "-m", *snakemake_words(*words), cold=True, check=check)

    def _run(self, words: list[str], cold: bool, check: bool) -> subprocess.CompletedProcess[str]:
        """``python -m WORDS``; cold: nothing of it and of its jobs has been imported before."""
        if cold:
            python = {"cwd": self.folder, "env": self.environment(), "capture_output": True, "text": True}
            run = subprocess.run([sys.executable, "-m", *words], **python, check=False)
        else:
            run = forked_commands.run(words, self.folder, self.environment() | beside_server())
        if check and run.returncode:
            raise AssertionError(f"{' '.join(words)}\nexit {run.returncode}\n{run.stdout}\n{run.stderr}")
        return run

    def planned_jobs(self) -> dict[str, int]:
        """Rule -> number of jobs that a dry run would start."""
        text = self.snakemake("-n", check=True).stdout
        table = re.findall(r"^(\w+) +(\d+)$", text, re.MULTILINE)
        return {rule: int(count) for rule, count in table if rule not in ("all", "total")}

    def spec(self, stage: str, name: str = "") -> Path:
        found = sorted((self.folder / "results" / "specs" / stage).glob(f"{name}*.json"))
        assert found, f"no spec {stage}/{name}*"
        return found[0]

    def artifact(self, stage: str, name: str = "") -> Path:
        return self.folder / "results" / stage / self.spec(stage, name).stem

    def copy(self, folder: Path) -> Project:
        """As after a clone and a pull: the same files with new times, none of Snakemake's own records."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(".snakemake"), copy_function=shutil.copyfile)
        return Project(folder)


def new_project(folder: Path, rows: int = 80) -> Project:
    folder.mkdir(parents=True, exist_ok=True)
    project = Project(folder)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hh_rows(rows)))
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump({"items": ["*/*"]}))
    project.declare(item())
    return project
