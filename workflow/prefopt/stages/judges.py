"""The judges of a spec: those that score every answer alone, and language models that see two answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.errors import BadInput
from prefopt.judging import BothOrders, Judge, ScalarJudge, judge_both_orders
from prefopt.stages.common import device_of, kept_rows
from prefopt.stages.weights import weights_of
from prefopt.store.builds import Build
from prefopt.tables import read_table

if TYPE_CHECKING:
    from prefopt.judges.pairwise import Asker, PairwiseJudge, Prices
    from prefopt.judges.templates import JudgeTemplate
    from prefopt.stages import RunOptions

CACHE = ".judge_cache"
_NOT_ASKED = ("max_unparsable", "labelled_pairs")  # the same questions, however many answers may be unusable

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


@dataclass(frozen=True)
class UsedJudge:
    """A judge and how its answers are dealt with.

    ``soft``: preferences are probabilities; ``score``: for judges that score answers alone; ``report``: of what it said
    about the answers, for the manifest: what that took, and how far it can be trusted.
    """

    judge: Judge
    name: str
    soft: bool
    max_unparsable: float = 0.0
    score: Scorer | None = None
    report: Callable[[BothOrders], dict[str, Any]] = lambda _: {}


@contextmanager
def judge_of(build: Build, options: RunOptions) -> Iterator[UsedJudge]:
    """The judge of a judgements spec: ``oracle``, ``reward_model``, or a pairwise judge's identity."""
    declared = build.node.spec["judge"]
    if isinstance(declared, str):
        scorer = _once(scorer_of(build, options, declared))
        soft = declared != "oracle"
        yield UsedJudge(ScalarJudge(scorer, soft), declared, soft, score=scorer)
        return
    from prefopt.judges.cache import AnswerCache
    from prefopt.judges.pairwise import PairwiseJudge

    local = declared["kind"] == "lm"
    asker, prices = _local(build, options, declared) if local else _server(build, declared)
    identity = {key: value for key, value in declared.items() if key not in _NOT_ASKED}
    name = declared["model_name"] if not local else build.node.parents["judge"].rsplit("/", 1)[-1]
    cache = AnswerCache(build.results / CACHE, identity | ({"model": name.rsplit("-", 1)[-1]} if local else {}))
    try:
        judge, apart = (PairwiseJudge(asker, declared["labels"], cache, prices) for _ in range(2))
        labelled = declared.get("labelled_pairs", 0)

        def report(orders: BothOrders) -> dict[str, Any]:
            labels = _labels_kept(build, apart, labelled, declared["max_unparsable"]) if labelled else {}
            return _took(judge) | _rounded(orders.order_effects()) | labels

        yield UsedJudge(judge, name, True, declared["max_unparsable"], report=report)
    finally:
        cache.close()


def _once(score: Scorer) -> Scorer:
    """The scorer asked once about every list of answers, which both orders and the rewards need."""
    found: list[tuple[Records, Records, np.ndarray]] = []

    def known(prompts: Records, answers: Records) -> np.ndarray:
        for asked, answered, scores in found:
            if asked is prompts and answered is answers:
                return scores
        found.append((prompts, answers, score(prompts, answers)))
        return found[-1][2]

    return known


def _labels_kept(build: Build, judge: PairwiseJudge, count: int, max_unparsable: float) -> dict[str, Any]:
    """How often the judge prefers the chosen answer of the first held-out pairs (draws are half); what that took."""
    from prefopt.engine.answers import instruction_text

    pairs = read_table(build.parent("pairs") / "pairs.parquet", split="test")
    if not {"chosen", "rejected"} <= set(pairs.columns) or pairs.empty:
        raise BadInput(f"{build.node.parents['pairs']}: no held-out pairs with labels; declare 'labelled_pairs: 0'")
    pairs = pairs.head(count)
    prompts = [{"text": instruction_text(prompt)} for prompt in pairs["prompt"]]
    chosen, rejected = ([{"text": text} for text in pairs[side]] for side in ("chosen", "rejected"))
    orders = judge_both_orders(judge, prompts, chosen, rejected, max_unparsable=max_unparsable)
    verdicts = np.sign(orders.baseline_first + orders.model_first - 3.0)
    usable = verdicts[~np.isnan(verdicts)]
    agreement = float((1 + usable).mean() / 2) if usable.size else None
    found = {"pairs": len(pairs), "agreement": agreement, **orders.order_effects()}
    return {"labelled_pairs": _rounded(found) | _took(judge)}


def _rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: value if value is None else round(value, 6) for name, value in values.items()}


def _took(judge: PairwiseJudge) -> dict[str, Any]:
    tally, cost = judge.tally, judge.tally.cost(judge.prices)
    counts = {"answers": dict(tally.readings), "asked": tally.asked, "kept_before": tally.kept}
    tokens = {"tokens_in": tally.tokens_in, "tokens_out": tally.tokens_out}
    return counts | tokens | ({"cost": round(cost, 6)} if cost is not None else {})


def _template(declared: Mapping[str, Any]) -> JudgeTemplate:
    from prefopt.judges.templates import TEMPLATES

    template = TEMPLATES.get(declared["template"]["name"])
    if template is None or template.digest != declared["template"]["sha256"]:
        raise BadInput(
            f"judge template '{declared['template']['name']}': its words are not the planned ones; plan again"
        )
    return template


def _local(build: Build, options: RunOptions, declared: Mapping[str, Any]) -> tuple[Asker, None]:
    from prefopt.judges.causal import CausalJudge
    from prefopt.models import load_causal_lm, load_tokenizer

    weights = weights_of(build.parent("judge"))
    device = device_of(build, options)
    model = load_causal_lm(weights.folder, device=device, precision=declared["precision"], **weights.loading())
    tokenizer = load_tokenizer(weights.folder, trust_remote_code=weights.trusted)
    return CausalJudge(model, tokenizer, _template(declared), declared["labels"], options.micro_batch), None


def _server(build: Build, declared: Mapping[str, Any]) -> tuple[Asker, Prices | None]:
    from prefopt.judges.client import ChatClient
    from prefopt.judges.pairwise import Prices
    from prefopt.judges.server import ServerJudge

    settings = build.node.execution["judge"]
    key_name = settings["api_key_env"]
    if key_name is not None and not os.environ.get(key_name):
        raise BadInput(f"the judge's key: the environment variable {key_name} is not set; export it and run again")
    client = ChatClient(
        settings["base_url"],
        api_key=os.environ[key_name] if key_name is not None else None,
        key_name=key_name,
        concurrency=settings["concurrency"],
        timeout_seconds=settings["timeout_seconds"],
        retries=settings["retries"],
    )
    asked = {name: declared[name] for name in ("model_name", "labels", "top_logprobs", "answer_tokens")}
    prices = Prices(**settings["prices"]) if settings["prices"] is not None else None
    return ServerJudge(client, template=_template(declared), **asked), prices


def _oracle(build: Build, options: RunOptions) -> Scorer:
    from prefopt.world import oracle_reward

    def score(prompts: Records, answers: Records) -> np.ndarray:
        return np.array([oracle_reward(p["text"], a["text"]) for p, a in zip(prompts, answers, strict=True)])

    return score


def _reward_models(build: Build, options: RunOptions) -> Scorer:
    from prefopt.engine.bulk import reward_responses
    from prefopt.engine.reward_models import load_reward_model

    models = {}
    for role, folder in build.parents_like("judge").items():
        weights = weights_of(folder)
        models[role] = load_reward_model(weights.folder, device=device_of(build, options), **weights.loading())
    asked = count()

    def score(prompts: Records, answers: Records) -> np.ndarray:
        asked_ids, answer_ids = [p["ids"] for p in prompts], [a["ids"] for a in answers]
        number, rewards = next(asked), []
        for role, model in models.items():
            kept = kept_rows(build, f"{role}-{number}", range(len(answers)))
            rewards.append(reward_responses(model, asked_ids, answer_ids, batch_size=options.micro_batch, kept=kept))
        return np.mean(rewards, axis=0)

    return score


def _classifier(build: Build, options: RunOptions) -> Scorer:
    from prefopt.evaluation.sentiment import load_classifier

    classifier = load_classifier(build.parent("classifier"))
    return lambda prompts, answers: classifier.positive([answer["text"] for answer in answers])
