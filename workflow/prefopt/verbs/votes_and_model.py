"""Votes of several annotators beside a model's estimates of dispersion, for the verb ``disagreement``."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput
from prefopt.lazy import LazyModule

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from prefopt.annotators.votes import VotedPair, Votes
else:
    np = LazyModule("numpy")

_MICRO_BATCH = 16


def against_model(votes: Votes, given: argparse.Namespace) -> dict[str, Any]:
    """Estimates of dispersion by the model (and reward models) beside the annotators."""
    from prefopt.annotators.agreement import counts_of
    from prefopt.annotators.estimates import compare_with_people, reward_estimates
    from prefopt.dispersion import normalised_entropy
    from prefopt.engine.bulk import score_responses
    from prefopt.models import load_causal_lm, load_tokenizer, pick_device

    device = pick_device(given.device)
    tokenizer = load_tokenizer(given.model)
    model = load_causal_lm(given.model, device=device)
    tokens, pairs, left_out = _tokenised(votes, tokenizer, model.config.get_text_config(), given.max_length)
    prompts, sides = tokens["prompt_ids"].tolist(), [tokens["chosen_ids"].tolist(), tokens["rejected_ids"].tolist()]
    scores = [score_responses(model, prompts, ids, batch_size=_MICRO_BATCH) for ids in sides]
    lengths = [score["tokens"] for score in scores]
    entropies = [score["entropy"] for score in scores]
    vocab = model.config.get_text_config().vocab_size
    estimates = {"token_entropy": normalised_entropy(entropies[0], entropies[1], lengths[0], lengths[1], vocab)}
    ids = tokens["prompt_id"].to_numpy()
    if given.samples:
        estimates["sequence_entropy"] = _sampled(model, tokenizer, tokens, given)
    if given.rewards:
        estimates |= reward_estimates(_reward_margins(given, device, prompts, sides))
    how = {"resamples": given.resamples, "seed": given.seed}
    found = compare_with_people(estimates, counts_of(pairs), lengths[0], lengths[1], ids, **how)
    return {key: found[key] for key in ("pairs", "prompts", "estimates")} | {"left_out": left_out}


def _tokenised(
    votes: Votes, tokenizer: Any, config: Any, limit: int | None
) -> tuple[Any, list[VotedPair], dict[str, int]]:
    """Token ids of the pairs that have two votes and texts, the pairs in the same order, and who is left out why.

    Raises BadInput where no pair is left.
    """
    from prefopt.specs import TokensSpec
    from prefopt.tokens import tokenize_pairs

    kept, left_out = _usable(votes.pairs)
    if not kept:
        raise BadInput(f"no pair with texts and two votes ({dict(left_out)}); a model has nothing to be compared on")
    positions = getattr(config, "max_position_embeddings", None)
    longest = limit or min(positions or 2048, 2048)
    spec = TokensSpec(max_prompt_tokens=max(1, longest // 2), max_length=longest, overlong="truncate_left")
    tokens, refused = tokenize_pairs(_pair_table(kept), tokenizer, spec, positions)
    left_out.update(refused["reason"].value_counts().to_dict())
    if tokens.empty:
        raise BadInput(f"all pairs are left out ({dict(left_out)}); raise --max-length")
    return tokens.reset_index(drop=True), [kept[number] for number in tokens["pair_id"]], dict(left_out)


def _usable(pairs: Sequence[VotedPair]) -> tuple[list[VotedPair], Counter[str]]:
    """The pairs with two votes whose texts can be compared, and how many others there are by reason."""
    from prefopt.readers.raw import Refused, checked_pair

    kept: list[VotedPair] = []
    left_out: Counter[str] = Counter()
    for pair in pairs:
        try:
            checked_pair([{"role": "user", "content": pair.prompt}], pair.response_a, pair.response_b, {})
        except Refused as refusal:
            left_out[refusal.reason] += 1
            continue
        if len(pair.ballots) < 2:
            left_out["fewer than two votes"] += 1
        else:
            kept.append(pair)
    return kept, left_out


def _pair_table(pairs: Sequence[VotedPair]) -> pd.DataFrame:
    """The pairs as the canonical pair table, response a in the place of chosen."""
    import pandas as pd

    from prefopt.pairs import digest63

    return pd.DataFrame(
        {
            "pair_id": range(len(pairs)),
            "prompt_id": [digest63(pair.prompt) for pair in pairs],
            "prompt": [[{"role": "user", "content": pair.prompt}] for pair in pairs],
            "chosen": [pair.response_a for pair in pairs],
            "rejected": [pair.response_b for pair in pairs],
            "split": "test",
            "source": "votes",
            "source_row": [pair.place for pair in pairs],
        }
    )


def _sampled(model: Any, tokenizer: Any, tokens: Any, given: argparse.Namespace) -> np.ndarray:
    from prefopt.dispersion import sequence_entropy
    from prefopt.engine.bulk import score_responses
    from prefopt.generation import generate
    from prefopt.specs import SamplingSpec

    rows = tokens.drop_duplicates("prompt_id")
    rows = rows.loc[rows.index.repeat(given.samples)]
    prompts = rows["prompt_ids"].tolist()
    sampling = SamplingSpec(max_new_tokens=given.new_tokens, batch_size=_MICRO_BATCH, seed=given.seed)
    drawn = generate(model, tokenizer, prompts, sampling)
    scores = score_responses(model, prompts, drawn.response_ids, batch_size=_MICRO_BATCH)
    vocab = model.config.get_text_config().vocab_size
    entropy = sequence_entropy(rows["prompt_id"].to_numpy(), scores["logp"], scores["tokens"], vocab)
    return tokens["prompt_id"].map(entropy).to_numpy()


def _reward_margins(given: argparse.Namespace, device: str, prompts: list, sides: list[list]) -> np.ndarray:
    """Margins of all reward models [N, K]."""
    from prefopt.engine.bulk import reward_responses
    from prefopt.engine.reward_models import load_reward_model
    from prefopt.inputs.tokenizer_training import check_same_vocabulary
    from prefopt.models import load_tokenizer

    if len(given.rewards) < 2:
        raise BadInput("--rewards names one reward model; votes and variances need two or more")
    columns = []
    for folder in given.rewards:
        check_same_vocabulary(load_tokenizer(folder), load_tokenizer(given.model))
        model = load_reward_model(folder, device=device)
        a, b = (reward_responses(model, prompts, ids, batch_size=_MICRO_BATCH) for ids in sides)
        columns.append(a - b)
    return np.column_stack(columns)
