"""The stages: each reads a spec and its parents, calls the library, and writes one artifact."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefopt.store.builds import Build


@dataclass(frozen=True)
class RunOptions:
    """How a job runs on this machine; changes no result."""

    micro_batch: int = 32
    checkpoint_steps: int = 100
    gradient_checkpointing: bool = False
    compile: bool = False
    sharding: str = "none"
    device: str = "auto"
    processes: int = 1


@dataclass(frozen=True)
class Stage:
    """One verb of the command line and the function behind it, imported only when it runs."""

    verb: str
    folder: str
    module: str
    help: str
    options: tuple[str, ...] = ()  # which of RunOptions the stage heeds; the command line takes no others
    several: bool = False  # one job may make several artifacts, which then read what they share once

    def load(self) -> Callable[[Build, RunOptions], None]:
        """The stage's function, named as its verb."""
        module = importlib.import_module(f"prefopt.stages.{self.module}")
        return getattr(module, self.verb.replace("-", "_"))


_MODEL = ("micro_batch", "device")
_ROWS = (*_MODEL, "processes")  # of stages whose rows several processes can share
_TRAINING = (*_MODEL, "checkpoint_steps", "gradient_checkpointing", "compile")
_TOGETHER = (*_TRAINING, "sharding")  # of stages that can run as several processes

STAGES = {
    stage.verb: stage
    for stage in (
        Stage("prepare-pairs", "pairs", "data", "read preference pairs into the canonical table; refuse with a reason"),
        Stage("prepare-model", "base", "data", "start a model from scratch, or pin a local or hub one"),
        Stage("tokenize", "tokens", "data", "turn the pairs into token ids"),
        Stage("prepare-prompts", "prompts", "prompts", "read and tokenise prompts to answer, and a baseline's answers"),
        Stage("train-sft", "sft", "signals", "fine-tune on the chosen responses: the reference policy", _TOGETHER),
        Stage(
            "score-reference",
            "reference",
            "signals",
            "log-probability and entropy under the reference, in one pass",
            _ROWS,
        ),
        Stage("sample-reference", "samples", "signals", "draw responses from the reference for forward KL", _ROWS),
        Stage("estimate-dispersion", "dispersion", "signals", "prompt dispersion from the reference's token entropy"),
        Stage("train-reward", "reward", "reward", "train one reward model of an ensemble", _TOGETHER),
        Stage("score-rewards", "rewards", "reward", "score every pair with reward models", _ROWS, several=True),
        Stage("relabel-pairs", "relabelled", "relabel", "label pairs by a reward model, for D_rho"),
        Stage("collect-ensemble", "ensemble", "reward", "put the members' scores side by side, K columns"),
        Stage("calibrate-rewards", "win_rates", "calibration", "win rates of both responses among samples", _ROWS),
        Stage("train-classifier", "classifier", "sentiment", "fit a sentiment classifier on chosen and rejected texts"),
        Stage("train-policy", "policy", "policy", "fine-tune a policy with a preference loss", _TOGETHER),
        Stage("pair-samples", "sampled_pairs", "rounds", "label a model's own responses by reward, as pairs", _ROWS),
        Stage("extrapolate-weights", "extrapolated", "rounds", "move weights on, away from earlier ones", ("device",)),
        Stage("assign-types", "responsibilities", "annotator_types", "which type each annotator is of, for EM-DPO"),
        Stage("mix-policies", "mixtures", "annotator_types", "weigh the policies of annotator types", _MODEL),
        Stage("run-trial", "trials", "trial", "train a policy and answer prompts with it, in one job", _TRAINING),
        Stage("generate", "generations", "evaluate", "answer the test prompts with a model", ("device", "processes")),
        Stage("judge", "judgements", "evaluate", "compare two sets of answers in both orders", _ROWS),
        Stage("win-rate", "metrics", "evaluate", "win rate and reward advantage with intervals"),
        Stage(
            "run-vote-trial",
            "vote_trials",
            "annotators",
            "train a policy and score held-out pairs that annotators voted on",
            _TRAINING,
        ),
        Stage("compare-vote-trials", "vote_weights", "annotators", "policies of all arms against held-out votes"),
        Stage(
            "compare-disagreement", "disagreement", "annotators", "estimates of dispersion against annotators' votes"
        ),
        Stage("run-study", "studies", "tabular", "compute one exact study: numbers, tables and figures"),
        Stage("paper-item", "papers", "paper", "put one table or figure together, with its verdict"),
    )
}
