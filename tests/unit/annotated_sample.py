"""A generated sample of annotators with known dispersion, as files of votes and of rankings."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np

from prefopt.mallows import sample_mallows_phi

PHI = {"closed": 0.15, "open": 0.9}
PEOPLE = 5
_WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "pu") for b in ("ra", "se", "ti", "vo")]


def sample(prompts: int = 24, responses: int = 3, seed: int = 0) -> list[dict]:
    """Per prompt: kind, phi, texts (best first in the centre) and every annotator's ranking of them.

    Open prompts have answers of random words, closed ones of one repeated word, so that a model which has seen both is
    surer of the latter.
    """
    rng = np.random.default_rng(seed)
    found = []
    for number in range(prompts):
        kind = "open" if number % 2 else "closed"
        words = [
            " ".join(rng.choice(_WORDS, 8)) if kind == "open" else " ".join([_WORDS[k]] * 8) for k in range(responses)
        ]
        rankings = sample_mallows_phi(rng, responses, PHI[kind], PEOPLE)
        asked = f"{kind} {_WORDS[number % len(_WORDS)]} {number}"
        found.append({"prompt": asked, "phi": PHI[kind], "texts": words, "rankings": rankings.tolist()})
    return found


def vote_rows(prompts: list[dict]) -> list[dict]:
    """One row per vote; the second annotator sees the two responses the other way round."""
    rows = []
    for one in prompts:
        for i, j in combinations(range(len(one["texts"])), 2):
            for person, ranking in enumerate(one["rankings"]):
                shown = (j, i) if person == 1 else (i, j)
                row = {"prompt": one["prompt"], "annotator": f"p{person}"}
                row |= {f"response_{s}": one["texts"][k] for s, k in zip("ab", shown, strict=True)}
                row |= {f"system_{s}": f"s{k}" for s, k in zip("ab", shown, strict=True)}
                rows.append(row | {"vote": "a" if ranking.index(shown[0]) < ranking.index(shown[1]) else "b"})
    return rows


def ranking_rows(prompts: list[dict]) -> list[dict]:
    """One row per annotator and prompt."""
    return [
        {
            "prompt": one["prompt"],
            "responses": {f"s{k}": text for k, text in enumerate(one["texts"])},
            "annotator": f"p{person}",
            "ranking": [f"s{k}" for k in ranking],
        }
        for one in prompts
        for person, ranking in enumerate(one["rankings"])
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
