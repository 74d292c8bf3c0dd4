"""Grid items on disk: from trial artifacts to item.json, tables and figures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from finished_results import make
from grid_items import HEAD, answers, arm, claim, grid, noise, point
from prefopt.artifacts import MANIFEST
from prefopt.evaluation.items import DIRECTION_ONLY
from prefopt.files import read_json, read_rows, write_lines
from prefopt.stages import RunOptions
from prefopt.stages.paper import paper_item
from prefopt.store.builds import building
from prefopt.store.verification import verify_artifact
from prefopt.tables import write_table

BASE = noise(0)


def trial_artifact(results, level, seed):
    """A trial artifact whose rewards are ``level`` above the reference's."""

    def fill(work):
        score = BASE + level + 0.05 * noise(seed + 1)
        write_table(work / "answers.parquet", answers(score, log_ratio=level))
        curve = [{"step": t + 1, "loss": 0.7 - 0.01 * t, "accuracy": 0.5, "margin": level} for t in range(20)]
        write_lines(work / "metrics.jsonl", curve if level else [])

    return make(results, "trials", f"run-s{seed}", {"level": level, "seed": seed}, {}, fill, steps=20)


def finished_grid(results, expect=(), seeds=(0, 1, 2)):
    """The item node, planned and not built, of a DPO arm and a better one against it."""
    points = [point("dpo", beta=0.1), point("mallows", beta=0.1)]
    parents = {f"reference.{s}": trial_artifact(results, 0.0, s) for s in seeds}
    parents |= {f"run.{i}.{s}": trial_artifact(results, 1.0 + i, s) for i in range(2) for s in seeds}
    arms = {"dpo": arm(label="DPO"), "mallows": arm("dpo", label="Mallows | θ", control=True)}
    spec = grid(points, expect, arms=arms, seeds=list(seeds))
    return make(results, "papers/p", "n", spec, parents, lambda work: write_lines(work / "x", []))


def built(results, node):
    with building(node, results) as build:
        paper_item(build, RunOptions())
    return results / node.ref


def test_a_grid_item_is_written_whole(tmp_path):
    node = finished_grid(tmp_path, [claim("mallows", "dpo", claim="mallows | above")])
    folder = built(tmp_path, node)
    item = read_json(folder / "item.json")
    assert item["expect"][0]["difference"]["mean"] == pytest.approx(1)
    assert (item["verdict"], item["points"][1]["sets"]["test"]["win_rate"]["mean"]) == (DIRECTION_ONLY, 100)
    assert item["points"][0]["sets"]["test"]["advantage"]["mean"] == pytest.approx(1)
    assert item["points"][0]["runs"]["2"].startswith("trials/run-s2-")
    summary = read_json(folder / MANIFEST)["summary"]
    assert (summary["verdict"], summary["claims"]) == (DIRECTION_ONLY, [DIRECTION_ONLY])
    figures = {path.stem: path.read_text() for path in (folder / "figures").glob("*.svg")}
    assert set(figures) == set(summary["figures"])
    assert (folder / "figure.svg").read_text() == figures[summary["figures"][0]]
    assert verify_artifact(tmp_path, node) == []


def test_tables_of_a_grid_item(tmp_path):
    folder = built(tmp_path, finished_grid(tmp_path, [claim("mallows", "dpo", claim="mallows | above")]))
    header, dpo, mallows = read_rows(folder / "table.csv")
    row = dict(zip(header, mallows, strict=True))
    assert (row["arm"], row["settings"], row["seeds"]) == ("Mallows | θ (control)", "beta 0.1", "3")
    assert row["win rate %"].startswith("100.0 [")
    assert (row["advantage"].split()[0], dict(zip(header, dpo, strict=True))["advantage"].split()[0]) == (
        "+2.00",
        "+1.00",
    )
    text = (folder / "table.md").read_text()
    assert text.startswith("# T\n\nScale demo, quick grid: **direction only**")
    assert "| c | Mallows \\| θ (control) | beta 0.1 | test | 3 |" in text
    assert "| mallows \\| above | – | +1.000 [" in text
    assert "Satterthwaite" in text


def test_a_histogram_item_reads_training_weights_and_kinds(tmp_path):
    weight = np.array([0.5, 0.6, 1.4, 1.5, 9.0])
    kinds = ["open", "open", "closed", "closed", "closed"]
    ids = np.arange(5) + 100

    def dispersion(work):
        frame = pd.DataFrame({"pair_id": ids, "split": ["train"] * 4 + ["test"], "dispersion_weight": weight})
        write_table(work / "dispersion.parquet", frame.iloc[::-1])

    def pairs(work):
        prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(5)]
        meta = [f'{{"kind": "{kind}"}}' for kind in kinds]
        write_table(
            work / "pairs.parquet", pd.DataFrame({"pair_id": ids, "prompt_id": ids, "prompt": prompts, "meta": meta})
        )

    parents = {
        "dispersion.home": make(tmp_path, "dispersion", "token-entropy", {}, {}, dispersion, phi_star=0.29),
        "pairs.home": make(tmp_path, "pairs", "world", {}, {}, pairs),
    }
    declared = {"tier": "full", "layout": "histogram", "conditions": {"home": {"value": None, "label": "Home"}}}
    row = {"kind": "weights", "claim": "c", "quantity": "auroc_closed", "condition": "home", "than": 0.5}
    spec = {"item": HEAD, "grid": declared, "expect": [row | {"source": "figure 7", "sign": "above"}]}
    node = make(tmp_path, "papers/p", "n", spec, parents, lambda work: write_lines(work / "x", []))
    folder = built(tmp_path, node)
    item = read_json(folder / "item.json")
    found = item["weights"]["home"]
    assert (found["phi_star"], found["mean"], found["auroc_closed"]) == (0.29, pytest.approx(1.0), 1.0)
    assert found["lowest"][0] == {"prompt": "question 0", "weight": 0.5, "kind": "open"}
    assert item["expect"][0]["difference"]["mean"] == 0.5
    assert (item["points"], item["arms"]) == ([], {})
    assert "| Home | 4 | 0.290 | 1.000 |" in (folder / "table.md").read_text()
