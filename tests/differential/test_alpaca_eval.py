"""The real alpaca_eval package beside us, in an environment of its own: it reads our files, and we read its.

To enable: make an environment from envs/alpaca-eval.txt and name its interpreter in ALPACA_EVAL_PYTHON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from judge_server import JudgeServer, completion, serving
from prefopt.winrate import length_controlled_win_rate

PYTHON = os.environ.get("ALPACA_EVAL_PYTHON")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not PYTHON, reason="ALPACA_EVAL_PYTHON names no interpreter with alpaca_eval (see the file)"),
]

JUDGE = "weighted_alpaca_eval_gpt4_turbo"
METRICS = """
import json, sys
import pandas as pd
from alpaca_eval import metrics
print("RESULT " + json.dumps([metrics.get_winrate(pd.read_json(path)) for path in sys.argv[1:]], default=float))
"""
LENGTH_CONTROLLED = """
import json, sys
import pandas as pd
from alpaca_eval.metrics import glm_winrate
asked = json.load(open(sys.argv[1]))
info = dict(glm_winrate.GLM_INFO["length_controlled_v1"])
found = {}
for name, part in asked.items():
    info["kwargs"] = {"n_splits": 5} if part["C"] is None else {"n_splits": 0, "C": part["C"]}
    found[name] = glm_winrate.get_length_controlled_winrate(
        pd.DataFrame(part["rows"]), save_weights_dir=None, glm_info=info, is_warn_extreme_changes=False
    )
print("RESULT " + json.dumps(found, default=float))
"""


def run_theirs(words: list[str], folder: Path, **environment: str) -> str:
    run = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def script(code: str, folder: Path, *words: object, **environment: str):
    said = run_theirs([PYTHON, "-c", code, *map(str, words)], folder, **environment)
    return json.loads(next(line for line in said.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


def longer_wins(request: dict) -> dict:
    """What their prompt template quotes, judged: log-odds of 'M' are a tenth of the difference in characters."""
    first, second = re.findall(r'"output": """(.*?)"""\n', request["messages"][-1]["content"], re.DOTALL)
    odds = (len(second) - len(first)) / 10
    reply = completion("M" if odds > 0 else "m", {"m": -1.0, "M": odds - 1.0, "other": -9.0})
    reply["usage"]["total_tokens"] = sum(reply["usage"].values())  # they count what an answer cost
    return {"id": "x", "created": 0, "model": request["model"], **reply}


@pytest.fixture(scope="module")
def sides(finished) -> dict[str, Path]:
    """Answers of a policy and of the reference, as the generate stage wrote them."""
    return {name: finished.artifact("generations", name) / "outputs.json" for name in ("dpo", "sft")}


@pytest.fixture(scope="module")
def judged(sides, tmp_path_factory) -> Path:
    """The folder in which their command line judged our answers against ours, by a server on loopback."""
    folder = tmp_path_factory.mktemp("theirs")
    with serving(JudgeServer(reply=longer_wins)) as server:
        clients = {"default": [{"api_key": "none", "base_url": server.base_url}]}
        (folder / "clients.yaml").write_text(json.dumps(clients))
        options = {
            "model_outputs": sides["dpo"],
            "reference_outputs": sides["sft"],
            "annotators_config": JUDGE,
            "fn_metric": "get_winrate",
            "sort_by": "win_rate",
            "precomputed_leaderboard": None,
            "is_cache_leaderboard": False,
            "output_path": folder / "out",
            "caching_path": folder / "cache.json",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = str(Path(PYTHON).with_name("alpaca_eval"))
        run_theirs([command, *words], folder, OPENAI_CLIENT_CONFIG_PATH=str(folder / "clients.yaml"))
        assert sum(server.answered.values()) > 0
    return folder / "out"


def found(folder: Path, name: str) -> Path:
    (path,) = folder.rglob(name)
    return path


def test_their_command_line_takes_our_outputs(judged, sides):
    ours = json.loads(sides["dpo"].read_text())
    theirs = json.loads(found(judged, "annotations.json").read_text())
    assert {row["instruction"]: row["output"] for row in ours} == {r["instruction"]: r["output_2"] for r in theirs}
    assert {row["generator_2"] for row in theirs} == {ours[0]["generator"]}
    assert all(row["preference"] is not None for row in theirs)


def test_their_annotations_give_the_same_by_our_command(judged, finished):
    path = found(judged, "annotations.json")
    ours = json.loads(finished.prefopt("win-rate", "--annotations", path, "--json", check=True).stdout)
    board = pd.read_csv(found(judged, "leaderboard.csv"), index_col=0).loc[ours["model"]]
    for name in ("win_rate", "standard_error", "discrete_win_rate", "n_wins", "n_wins_base", "n_draws", "n_total"):
        assert ours[name] == pytest.approx(board[name], abs=1e-8), name
    assert ours["avg_length"] == board["avg_length"]
    assert 0 < board["win_rate"] < 100


def test_our_annotations_give_the_same_by_their_metrics(finished, tmp_path):
    arms = ("dpo", "mallows", "distill", "e-dpo")
    paths = [finished.artifact("judgements", arm) / "annotations.json" for arm in arms]
    for arm, theirs in zip(arms, script(METRICS, tmp_path, *paths), strict=True):
        ours = json.loads((finished.artifact("metrics", arm) / "metrics.json").read_text())
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-8), arm


def texts_of(rows: pd.DataFrame) -> list[dict]:
    """Annotations whose texts have the given lengths; their fit looks at nothing else of a text."""
    return [
        {
            "output_1": "x" * int(row["len_baseline"]),
            "output_2": "x" * int(row["len_model"]),
            "preference": None if np.isnan(row["preference"]) else row["preference"],
            "generator_1": "baseline",
            "generator_2": "model",
            "annotator": JUDGE,
            "index": int(row["index"]),
        }
        for row in rows.to_dict("records")
    ]


def offline_hub(folder: Path, gamed: Path) -> str:
    """A hub cache in which their code finds the local gamed rows, since it downloads them for every fit."""
    repo = folder / "hub" / "datasets--tatsu-lab--alpaca_eval"
    commit = "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    pd.read_csv(gamed).iloc[:, :6].to_csv(repo / "snapshots" / commit / "df_gamed.csv", index=False)
    return str(folder)


def test_length_controlled_win_rates_agree(shared_data, tmp_path):
    """At one penalty ours is the optimum that liblinear stops short of; with own folds each side chooses its own."""
    data = shared_data / "alpaca_eval"
    if not data.is_dir():
        pytest.skip("needs shared/data/alpaca_eval")
    every = pd.read_csv(data / "annotations.csv.gz")
    difficulty = pd.read_csv(data / "instruction_difficulty.csv").set_index("index")["instruction_difficulty"]
    gamed = pd.read_csv(data / "df_gamed_surrogate.csv")
    ours, asked = {}, {}
    for model in ("claude-2.1", "Qwen-14B-Chat", "gemma-2b-it"):
        rows = every[every["model"] == model].sort_values("index")
        ours[model] = length_controlled_win_rate(rows, difficulty=difficulty.to_numpy(), gamed=gamed)
        asked |= {f"{model} fixed": {"C": ours[model]["C"], "rows": texts_of(rows)}}
        asked |= {f"{model} own": {"C": None, "rows": texts_of(rows)}}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    home = offline_hub(tmp_path / "home", data / "df_gamed_surrogate.csv")
    theirs = script(LENGTH_CONTROLLED, tmp_path, tmp_path / "asked.json", HF_HOME=home)
    for model, mine in ours.items():
        for kind, apart in (("fixed", 0.03), ("own", 0.2)):
            other = theirs[f"{model} {kind}"]
            gap = mine["length_controlled_win_rate"] - other["length_controlled_winrate"]
            print(f"{model} {kind}: {gap:+.5f} points, standard error {other['lc_standard_error']:.4f}")
            assert abs(gap) < apart, (model, kind)
            assert mine["win_rate"] == pytest.approx(other["win_rate"], abs=1e-8)
        assert mine["lc_standard_error"] == pytest.approx(theirs[f"{model} fixed"]["lc_standard_error"], abs=1e-3)
