"""What an answer is worth: the oracle, held-out reward models, or a classifier, each one number per answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.artifacts import Build
from prefopt.stages.common import device_of, weights_of

if TYPE_CHECKING:
    from prefopt.stages import RunOptions

Records = Sequence[Mapping[str, Any]]
Scorer = Callable[[Records, Records], np.ndarray]
"""(prompts, answers) -> score of every answer [N]; both sides are records with ``text`` and token ``ids``."""


def scorer_of(build: Build, options: RunOptions, judge: str) -> Scorer:
    """The judge of a spec.

    oracle: the demo world's true reward; reward_model: mean reward of the parents judge0, judge1, ..;
    classifier: probability that the answer is positive, by the parent ``classifier``.
    """
    makers = {"oracle": _oracle, "reward_model": _reward_models, "classifier": _classifier}
    return makers[judge](build, options)


def _oracle(build: Build, options: RunOptions) -> Scorer:
    from prefopt.world import oracle_reward

    def score(prompts: Records, answers: Records) -> np.ndarray:
        return np.array([oracle_reward(p["text"], a["text"]) for p, a in zip(prompts, answers, strict=True)])

    return score


def _reward_models(build: Build, options: RunOptions) -> Scorer:
    from prefopt.bulk import reward_responses
    from prefopt.models import load_reward_model

    models = []
    for folder in build.parents_like("judge").values():
        weights, trusted = weights_of(folder)
        models.append(load_reward_model(weights, device=device_of(build, options), trust_remote_code=trusted))

    def score(prompts: Records, answers: Records) -> np.ndarray:
        ids = [p["ids"] for p in prompts], [a["ids"] for a in answers]
        return np.mean([reward_responses(m, *ids, batch_size=options.micro_batch) for m in models], axis=0)

    return score


def _classifier(build: Build, options: RunOptions) -> Scorer:
    from prefopt.sentiment import load_classifier

    classifier = load_classifier(build.parent("classifier"))
    return lambda prompts, answers: classifier.positive([answer["text"] for answer in answers])
