"""A trial: one short training run and its answers to the evaluation prompts, in one job, without keeping weights."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.engine.adapters import is_adapted
from prefopt.engine.answers import draws_of_answers, log_ratio, seed_of_draw, steps_of_fractions
from prefopt.errors import FailedCheck
from prefopt.files import write_lines
from prefopt.specs import SamplingSpec, TrainSpec
from prefopt.stages import RunOptions
from prefopt.stages.common import run_training
from prefopt.stages.judges import scorer_of
from prefopt.stages.leakage import check_unseen
from prefopt.stages.policy import policy_objective, policy_to_train
from prefopt.stages.tables import prompt_rows, prompt_texts
from prefopt.stages.weights import answerer_of, policy_of
from prefopt.store.builds import Build
from prefopt.tables import read_table, write_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.engine.answers import Mixture
    from prefopt.engine.precision import Precision

_ROUND = "round"  # and its number: the role of what answers after a round


@dataclass(frozen=True)
class _Set:
    """The prompts of one evaluation set; ``kl``: their answers are scored with policy and reference."""

    name: str
    prompt_ids: list[int]
    prompts: list[dict[str, Any]]  # records with ids and text
    kl: bool


def _sets(build: Build) -> list[_Set]:
    """The spec's evaluation sets by name, since two specs that differ in their order alone are the same trial."""
    sets = []
    for name, declared in sorted(build.node.spec["evaluate"]["sets"].items()):
        rows = prompt_rows(build.parent(f"set.{name}.tokens"), declared["split"], declared["prompts"])
        if declared["split"] != "train":
            check_unseen(build, [role for role in ("model", "tokens") if build.has_parent(role)], rows["prompt_id"])
        texts = prompt_texts(build.parent(f"set.{name}.pairs"), rows["prompt_id"], declared["split"])
        prompts = [{"ids": ids, "text": text} for ids, text in zip(rows["prompt_ids"], texts, strict=True)]
        sets.append(_Set(name, rows["prompt_id"].tolist(), prompts, declared["kl"]))
    return sets


@dataclass
class _Evaluation:
    """Answers of a policy to all sets at given steps, kept in a scratch folder, one file per step, until the end."""

    build: Build
    options: RunOptions
    tokenizer: PreTrainedTokenizerBase
    fractions: dict[int, float]
    reference: PreTrainedModel | None = None  # None: the policy is the reference, or no set asks for the KL
    precision: Precision = "fp32"  # of the policy between the visits
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.spec = self.build.node.spec
        self.score = scorer_of(self.build, self.options, self.spec["evaluate"]["judge"])
        self.sampling = SamplingSpec.model_validate(dict(self.spec["evaluate"]["sampling"]))
        self.sets = _sets(self.build)
        self.folder = self.build.scratch / "answers"
        self.folder.mkdir(parents=True, exist_ok=True)

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.parquet"

    def visit(self, model: PreTrainedModel, step: int) -> None:
        """Answer all sets with the weights as they are, in fp32 as saved weights would be."""
        from prefopt.engine.precision import set_precision

        set_precision(model, "fp32")
        try:
            self.keep(model, step)
        finally:
            set_precision(model, self.precision)

    def keep(self, model: PreTrainedModel | Mixture, step: int) -> None:
        """Answer all sets with a model that is in fp32, unless that was done."""
        if self._file(step).is_file():
            return
        started = time.monotonic()
        table = self._answers(model, step)
        part = self._file(step).with_suffix(".part")
        write_table(part, table)
        part.replace(self._file(step))
        self.seconds += time.monotonic() - started

    def _answers(self, model: PreTrainedModel | Mixture, step: int) -> pd.DataFrame:
        import pandas as pd

        place = {"fraction": self.fractions[step], "step": step}
        return pd.concat([table for one in self.sets for table in self._drawn(model, one, place)])

    def _drawn(self, model: PreTrainedModel | Mixture, one: _Set, place: dict[str, Any]) -> list[pd.DataFrame]:
        """A table for every draw."""
        import pandas as pd

        prompt_ids = [prompt["ids"] for prompt in one.prompts]
        seeds = [seed_of_draw(self.sampling, self.spec["seed"], draw) for draw in range(self.spec["evaluate"]["draws"])]
        draws = draws_of_answers(model, self.tokenizer, prompt_ids, self.sampling, seeds)
        ratios = self._log_ratios(model, one, prompt_ids, [[answer["ids"] for answer in answers] for answers in draws])
        return [
            pd.DataFrame(
                {
                    "set": one.name,
                    **place,
                    "draw": draw,
                    "prompt_id": one.prompt_ids,
                    "score": self.score(one.prompts, answers).astype(np.float64),
                    "log_ratio": ratio,
                    "tokens": [len(answer["ids"]) for answer in answers],
                    "ended": [answer["ended"] for answer in answers],
                    "text": [answer["text"] if draw == 0 else "" for answer in answers],
                }
            )
            for draw, (answers, ratio) in enumerate(zip(draws, ratios, strict=True))
        ]

    def _log_ratios(
        self, model: PreTrainedModel | Mixture, one: _Set, prompt_ids: list[list[int]], draws: list[list[list[int]]]
    ) -> Sequence[np.ndarray | float]:
        """For every draw those of its answers, or one number for all."""
        if not one.kl:
            return [float("nan")] * len(draws)
        if self.reference is None:
            return [0.0] * len(draws)
        return list(log_ratio(model, self.reference, prompt_ids, draws, batch_size=self.options.micro_batch).T)

    def table(self) -> pd.DataFrame:
        """The answers at all steps; FailedCheck where those of a step are not there."""
        import pandas as pd

        missing = [step for step in self.fractions if not self._file(step).is_file()]
        if missing:
            raise FailedCheck(
                f"{self._file(missing[0])}: not there, though the run went on from a later step; "
                f"remove {self.build.scratch} to start anew"
            )
        return pd.concat([read_table(self._file(step)) for step in sorted(self.fractions)])


def _means(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Per set the mean score, log-ratio (where it is known), length and share of ended answers at the last step."""
    last = table[table["step"] == table["step"].max()]
    columns = ["score", "log_ratio", "tokens", "ended"]
    return {
        str(name): {column: round(float(rows[column].mean()), 6) for column in columns if rows[column].notna().all()}
        for name, rows in last.groupby("set")
    }


def _trained(build: Build, options: RunOptions) -> _Evaluation:
    from prefopt.training.heads import heads_on
    from prefopt.training.optimizers import total_steps
    from prefopt.training.training_run import Visits

    spec = build.node.spec
    train = TrainSpec.model_validate(spec["train"])
    model, tokenizer = policy_to_train(build, options)
    objective = policy_objective(build, options, model)
    fractions = steps_of_fractions(spec["evaluate"]["at"], total_steps(train, objective.size))
    scored = any(declared["kl"] for declared in spec["evaluate"]["sets"].values())
    reference = None
    if scored:  # with adapters, the reference is the policy without them
        reference = model if is_adapted(model) else policy_of(build, options)[0]
    evaluation = _Evaluation(build, options, tokenizer, fractions, reference=reference, precision=train.precision)
    visits = Visits(frozenset(fractions), evaluation.visit)
    with heads_on(model, objective.pair_loss.needs):
        run_training(build, options, model, objective, spec["seed"], visits=visits)
    return evaluation


def _finished_evaluated(build: Build, options: RunOptions) -> _Evaluation:
    """Answers of the reference itself, or of the models after an arm's rounds, a step being a round."""
    model, tokenizer = policy_of(build, options)
    rounds = {int(role.removeprefix(_ROUND)): role for role in build.parents_like(_ROUND)}
    at = build.node.spec["evaluate"]["at"] if rounds else [0.0]
    visited = list(rounds) if at[0] > 0 else [0, *rounds]
    fractions = dict(zip(visited, at, strict=True))
    evaluation = _Evaluation(build, options, tokenizer, fractions, reference=model if rounds else None)
    for number in visited:
        evaluation.keep(answerer_of(build, options, role=rounds[number])[0] if number else model, number)
    write_lines(build.work / "metrics.jsonl", [])
    build.summary |= {"steps": 0, "train_seconds": 0.0}
    return evaluation


def run_trial(build: Build, options: RunOptions) -> None:
    """Write answers.parquet and metrics.jsonl of a policy trained with one loss, of rounds, or of the reference itself.

    answers.parquet has a row per set, step, draw and prompt: the judge's score, log policy - log reference of the
    sampled answer (nats), its length in tokens. A run that was cut off keeps the answers that it has drawn.
    """
    evaluation = _finished_evaluated(build, options) if build.node.spec["loss"] is None else _trained(build, options)
    table = evaluation.table()
    write_table(build.work / "answers.parquet", table)
    build.summary |= {"answers": len(table), "answer_seconds": round(evaluation.seconds, 3), "sets": _means(table)}
