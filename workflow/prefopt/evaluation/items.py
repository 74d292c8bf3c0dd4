"""From the measurements of all arms and seeds to one paper item: summaries, paired differences and a verdict."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prefopt.errors import FailedCheck

Values = NDArray[np.float64]

REPRODUCED = "reproduced"
DIRECTION_ONLY = "direction only"
NOT_REPRODUCED = "not reproduced"
NOT_RUN = "not run at this scale"
NO_CLAIM = "no claim declared"
WEAKEST_FIRST = (NOT_REPRODUCED, NOT_RUN, DIRECTION_ONLY, REPRODUCED)

RESAMPLES = 4000
LEVEL = 0.95
_LC = "length_controlled_win_rate"
LENGTH_CONTROLLED = "length-controlled %"
_NEEDS = {"reward_advantage": "reward_model", _LC: "length_controlled"}  # metric -> column
DRAWS_METHOD = (
    "; win rates are averaged over {draws} answers per prompt, and with a single training seed the seeds of these "
    "draws take the place of the seeds"
)
METHOD = (
    f"{100 * LEVEL:g} % percentile bootstrap over seeds and prompts at once ({RESAMPLES} resamples, fixed seed): of S "
    "seeds S-1 and of P prompts P are drawn with replacement, the same ones for both arms of a difference; with a "
    "single seed the interval covers the prompts only"
)

# Value per prompt of each metric; win rates in percent, the baseline arm's own value beside it.
_METRICS: dict[str, tuple[Callable[[Any], Any], float | None]] = {
    "win_rate": (lambda table: 100.0 * table["outcome"], 50.0),
    _LC: (lambda table: table["length_controlled"], 50.0),
    "reward_advantage": (lambda table: table["reward_model"] - table["reward_baseline"], 0.0),
    "avg_tokens": (lambda table: table["tokens_model"], None),
    "avg_tokens_baseline": (lambda table: table["tokens_baseline"], None),
}


def two_way_interval(values: Values) -> tuple[float, float]:
    """Bootstrap interval of the mean of ``values`` [seeds, prompts], both axes resampled; limits (low, high).

    Of S seeds S-1 are drawn: drawing all S would make the variance too small by (S-1)/S, half of it for two seeds.
    """
    seed_share, prompt_share = _shares(*values.shape)
    means = np.einsum("bs,sp,bp->b", seed_share, values, prompt_share, optimize=True)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@lru_cache(maxsize=2)  # drawing costs more than averaging, and all arms of an item have one shape
def _shares(seeds: int, prompts: int) -> tuple[Values, Values]:
    """Weight of every seed and of every prompt in each resample: [R, seeds], [R, prompts]."""
    rng = np.random.default_rng(20240514)
    drawn = max(seeds - 1, 1)
    seed_share = rng.multinomial(drawn, np.full(seeds, 1 / seeds), size=RESAMPLES) / drawn
    return seed_share, rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES) / prompts


def estimate(values: Values) -> dict[str, Any]:
    """Mean over ``values`` [seeds, prompts] with its interval and the numbers behind it."""
    low, high = two_way_interval(values)
    seeds, prompts = values.shape
    return {"mean": float(values.mean()), "low": low, "high": high, "n_seeds": seeds, "n_prompts": prompts}


def collect_item(spec: Mapping[str, Any], results: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """The content of ``item.json`` for one paper item.

    ``spec`` is the item node's: item (head), arms (name -> loss), seeds, against, expect, and draws where there are
    several. ``results`` holds for each finished (arm, seed): ``policy`` and ``metrics_ref`` (stage/id), ``metrics``
    (metrics.json) and ``prompts`` (one row per prompt, and draw: prompt_id, outcome, reward_model, reward_baseline,
    length_controlled, tokens_model, tokens_baseline; ``draw`` where there are several). The arm that the
    others are judged against needs only ``policy``; its win rate is 50 and its reward advantage 0 by definition.

    Raises FailedCheck where a prompt stands twice or the runs share no prompt.
    """
    runs = _Runs(spec, results)
    rows = [{**row, **runs.judge(row)} for row in spec["expect"]]
    verdicts = {row["verdict"] for row in rows}
    return {
        **spec["item"],
        "against": spec["against"],
        "seeds": list(spec["seeds"]),
        "method": METHOD + (DRAWS_METHOD.format(draws=spec["draws"]) if spec.get("draws", 1) > 1 else ""),
        "arms": {name: runs.arm(name, loss) for name, loss in spec["arms"].items()},
        "expect": rows,
        "verdict": next((v for v in WEAKEST_FIRST if v in verdicts), NO_CLAIM),
    }


@dataclass(frozen=True)
class _Runs:
    """The finished runs of one item, seen through its spec."""

    spec: Mapping[str, Any]
    results: Mapping[tuple[str, int], Mapping[str, Any]]

    def arm(self, name: str, loss: Mapping[str, Any]) -> dict[str, Any]:
        """What item.json says of one arm: its runs by seed, and its metrics over all of them."""
        found = {seed: self.results[name, seed] for seed in self.spec["seeds"] if (name, seed) in self.results}
        seeds = {
            str(seed): {"policy": run.get("policy"), "metrics": run.get("metrics_ref"), "values": run.get("metrics")}
            for seed, run in found.items()
        }
        baseline = name == self.spec["against"]
        if baseline:
            summary = self._baseline_summary(len(seeds))
        else:
            measured = self._seeds(name)
            metrics = [m for m in _METRICS if self._has(name, measured, m)] if measured else []
            summary = {m: estimate(self._values({name: measured}, m)[name]) for m in metrics}
        return {"loss": dict(loss), "baseline": baseline, "seeds": seeds, "summary": summary}

    def judge(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Difference, verdict and its reason for one declared claim."""
        missing = [n for n in (row["arm"], row["than"]) if self._is_measured(n) and not self._seeds(n)]
        if missing:
            return {"difference": None, "verdict": NOT_RUN, "reason": f"not run: {', '.join(missing)}"}
        difference = self._difference(row)
        if difference is None:
            return {"difference": None, "verdict": NOT_RUN, "reason": "the two arms share no seed"}
        verdict, reason = self._verdict(row, difference)
        return {"difference": difference, "verdict": verdict, "reason": reason}

    def _is_measured(self, side: str | float) -> bool:
        return isinstance(side, str) and side != self.spec["against"]

    def _has(self, arm: str, seeds: list[int], metric: str) -> bool:
        """Whether a metric was measured: judges that see two answers give no rewards, length control is asked for."""
        return all(_NEEDS.get(metric, "outcome") in self.results[arm, seed]["prompts"] for seed in seeds)

    def _seeds(self, arm: str) -> list[int]:
        return [s for s in self.spec["seeds"] if "prompts" in self.results.get((arm, s), {})]

    def _baseline_summary(self, n_seeds: int) -> dict[str, Any]:
        """The baseline against itself: rates by definition, its lengths from the runs judged against it."""
        others = {arm: seeds for arm in self.spec["arms"] if (seeds := self._seeds(arm))}
        defined = {"win_rate", "reward_advantage"} | {
            m for m in _METRICS if others and all(self._has(*o, m) for o in others.items())
        }
        means = {m: level for m, (_, level) in _METRICS.items() if level is not None and m in defined}
        if others:
            lengths = self._values(others, "avg_tokens_baseline")
            means["avg_tokens"] = float(np.concatenate(list(lengths.values())).mean())
        return {metric: {"mean": mean, "low": None, "high": None, "n_seeds": n_seeds} for metric, mean in means.items()}

    def _values(self, seeds_of: Mapping[str, list[int]], metric: str) -> dict[str, Values]:
        """Per arm the metric as [seeds, prompts], on the prompts that every run has, in one order for all.

        Of several draws per seed the mean, which holds the draws' own noise; with one seed the draws are the rows.
        """
        series = {}
        for arm, seed in ((a, s) for a, seeds in seeds_of.items() for s in seeds):
            for draw, drawn in self._draws(arm, seed):
                table = drawn.dropna(subset=["outcome"]).set_index("prompt_id")
                if not table.index.is_unique:
                    twice = table.index[table.index.duplicated()][0]
                    raise FailedCheck(f"arm '{arm}', seed {seed}: prompt_id {twice} stands in more than one row")
                series[arm, seed, draw] = _METRICS[metric][0](table).astype(float)
        frame = pd.concat(series, axis=1, join="inner").sort_index()
        if frame.empty:
            raise FailedCheck(f"no prompt was judged in all of {', '.join(f'{a} seed {s}' for a, s, _ in series)}")
        return {arm: self._by_seed(frame[arm], seeds) for arm, seeds in seeds_of.items()}

    def _draws(self, arm: str, seed: int) -> list[tuple[int, pd.DataFrame]]:
        table = self.results[arm, seed]["prompts"]
        return list(table.groupby("draw")) if "draw" in table else [(0, table)]

    @staticmethod
    def _by_seed(columns: pd.DataFrame, seeds: list[int]) -> Values:
        """Columns (seed, draw) as rows of seeds, or of draws where there is one seed."""
        if len(seeds) == 1:
            return columns[seeds[0]].to_numpy().T
        return np.array([columns[seed].to_numpy().mean(axis=1) for seed in seeds])

    def _difference(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """``arm`` minus ``than`` in the row's metric, prompt by prompt; None where the two share no seed."""
        level = _METRICS[row["metric"]][1]
        measured = [row[side] for side in ("arm", "than") if self._is_measured(row[side])]
        constant: dict[str, Any] = {s: level if row[s] == self.spec["against"] else row[s] for s in ("arm", "than")}
        if not measured:
            value = float(constant["arm"] - constant["than"])
            return {"mean": value, "low": value, "high": value, "n_seeds": 0, "n_prompts": 0}
        shared = sorted(set.intersection(*(set(self._seeds(arm)) for arm in measured)))
        if not shared:
            return None
        values = self._values(dict.fromkeys(measured, shared), row["metric"])
        sides = [values.get(row[side], constant[side]) for side in ("arm", "than")]
        return estimate(sides[0] - sides[1])

    def _verdict(self, row: Mapping[str, Any], difference: Mapping[str, Any]) -> tuple[str, str]:
        interval = f"the interval {_limits(difference)}"
        if difference["low"] <= 0:
            below = difference["high"] < 0
            why = "lies below 0: the opposite direction" if below else "reaches 0: no direction shown"
            return NOT_REPRODUCED, f"{interval} {why}"
        direction, scale = f"{interval} lies above 0", self.spec["item"]["scale"]
        if scale != "paper":
            return DIRECTION_ONLY, f"{direction}; numbers are not compared at the scale '{scale}'"
        reported = parse_reported(row["reported"])
        if reported is None or (reported[0] == "value" and not self._is_measured(row["arm"])):
            return DIRECTION_ONLY, f"{direction}; there is no reported number to compare a measured one with"
        kind, number = reported
        ours = difference
        if kind == "value":
            ours = estimate(self._values({row["arm"]: self._seeds(row["arm"])}, row["metric"])[row["arm"]])
        inside = ours["low"] <= number <= ours["high"]
        where = f"the reported {kind} {number:g} lies {'in' if inside else 'outside'} {_limits(ours)}"
        return (REPRODUCED if inside else DIRECTION_ONLY), f"{direction}; {where}"


def _limits(interval: Mapping[str, Any]) -> str:
    return f"[{interval['low']:.2f}, {interval['high']:.2f}]"


def parse_reported(text: str) -> tuple[str, float] | None:
    """What a declared ``reported`` says as a number.

    ``"52.4"`` is the arm's own value, ``"+2.8"`` or ``"52.4 vs 49.6"`` a difference; percent signs are allowed,
    anything else is prose and gives None.
    """
    number = r"([+-]?\d+(?:\.\d+)?)\s*%?"
    if found := re.fullmatch(rf"\s*{number}\s*(?:vs\.?|against)\s*{number}\s*", text):
        return "difference", float(found[1]) - float(found[2])
    if found := re.fullmatch(rf"\s*{number}\s*", text):
        return ("difference" if found[1][0] in "+-" else "value"), float(found[1])
    return None


def with_interval(summary: Mapping[str, Any] | None, digits: int = 1, sign: bool = False) -> str:
    """``mean [low, high]``; the mean alone where the value holds by definition; a dash where nothing was measured."""
    if not summary or summary["mean"] is None:
        return "–"
    number = f"{'+' if sign else ''}.{digits}f"
    if summary["low"] is None:
        return f"{summary['mean']:{number}}"
    return f"{summary['mean']:{number}} [{summary['low']:{number}}, {summary['high']:{number}}]"


def table(item: Mapping[str, Any]) -> pd.DataFrame:
    """One row per arm in declared order: arm, loss, seeds, win rates, advantage and tokens as text with intervals."""
    controlled = any(_LC in arm["summary"] for arm in item["arms"].values())
    rows = [
        {
            "arm": f"{name} (baseline)" if arm["baseline"] else name,
            "loss": _loss_text(arm["loss"]),
            "seeds": len(arm["seeds"]),
            "win rate %": with_interval(arm["summary"].get("win_rate")),
            **({LENGTH_CONTROLLED: with_interval(arm["summary"].get(_LC))} if controlled else {}),
            "reward advantage": with_interval(arm["summary"].get("reward_advantage"), 2, sign=True),
            "tokens": with_interval(arm["summary"].get("avg_tokens")),
        }
        for name, arm in item["arms"].items()
    ]
    return pd.DataFrame(rows)


def _loss_text(loss: Mapping[str, Any]) -> str:
    params = ", ".join(f"{key} {value}" for key, value in loss.items() if key != "name")
    return f"{loss['name']} ({params})" if params else str(loss["name"])


def markdown(item: Mapping[str, Any]) -> str:
    """The arm table and the claims as a Markdown text, for reading in a terminal or a repository."""
    claims = [
        {
            "claim": row["claim"],
            "reported": row["reported"] or "–",
            "difference": with_interval(row["difference"], 2, sign=True),
            "verdict": row["verdict"],
        }
        for row in item["expect"]
    ]
    parts = [f"# {item['title']}", f"Scale {item['scale']}: **{item['verdict']}**", pipe_table(table(item))]
    if claims:
        parts.append(pipe_table(pd.DataFrame(claims)))
    return "\n\n".join([*parts, item["method"]]) + "\n"


def pipe_table(frame: pd.DataFrame) -> str:
    """A data frame of texts and numbers as a Markdown table."""
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in frame.itertuples(index=False)]
    lines = [list(frame.columns), ["---"] * frame.shape[1], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
