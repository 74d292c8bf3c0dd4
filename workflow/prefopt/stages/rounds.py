"""What rounds of training need beside the other stages: extrapolated weights, and pairs of a model's own responses."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.errors import BadInput
from prefopt.stages import RunOptions
from prefopt.stages.common import device_of, kept_rows
from prefopt.stages.tables import draw_keys
from prefopt.stages.weights import TOKENIZER, policy_of, save_trained, tokenizer_for, weights_of
from prefopt.store.builds import Build
from prefopt.tables import read_table, write_table

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def extrapolate_weights(build: Build, options: RunOptions) -> None:
    """Write the weights of ``model`` moved away from those of ``before`` by a share ``momentum`` of the difference."""
    from prefopt.models import load_causal_lm
    from prefopt.outer.weights import extrapolate

    model, tokenizer = policy_of(build, options)
    before = weights_of(build.parent("before"))
    extrapolate(
        model,
        load_causal_lm(before.folder, device=build.device, **before.loading()),
        build.node.spec["momentum"],
    )
    save_trained(build, model, tokenizer, "model")


def pair_samples(build: Build, options: RunOptions) -> None:
    """Write pairs.parquet: of every prompt's samples one chosen and one rejected, by reward; refused.parquet: others.

    Splits other than train are those of the parent ``pairs``, and with ``keep`` in the spec so are its train rows. Each
    new pair is a prompt's, of which ``prompts`` are drawn; refused are those whose two responses are one text, or have
    one reward. A sample that was cut off at its length limit stands as if it had ended there. advantages.parquet: of
    every new pair's responses the mean reward minus that of all of the prompt's samples.
    """
    import pandas as pd

    from prefopt.pairs import PAIR_COLUMNS, REFUSED_COLUMNS, summarise

    spec = build.node.spec
    known = read_table(build.parent("pairs") / "pairs.parquet", PAIR_COLUMNS)
    samples = _samples(build, known)
    drawn = list(samples.groupby("prompt_id", sort=True).indices.items())
    if spec["prompts"] is not None and spec["prompts"] < len(drawn):
        kept = np.random.default_rng([spec["seed"], 5]).choice(len(drawn), spec["prompts"], replace=False)
        drawn = [drawn[at] for at in sorted(kept)]
    samples, drawn = _only(samples, drawn)
    rewards = _rewards(build, options, samples, drawn)
    accepted, refused = _pairs(build, known, samples, rewards, drawn)
    if not accepted:
        raise BadInput(f"{build.node.parents['samples']}: no prompt got two different responses of unequal reward")
    new = pd.DataFrame(accepted).drop_duplicates("pair_id")
    write_table(build.work / "advantages.parquet", new[["pair_id", "chosen_advantage", "rejected_advantage"]])
    new = new[list(PAIR_COLUMNS)]
    old = known if spec.get("keep") else known[known["split"] != "train"]
    table = pd.concat([old[~old["pair_id"].isin(new["pair_id"])], new], ignore_index=True)
    left_out = pd.DataFrame(refused, columns=REFUSED_COLUMNS)
    write_table(build.work / "pairs.parquet", table)
    write_table(build.work / "refused.parquet", left_out)
    build.summary |= summarise(table, left_out) | {"sampled": len(new)}
    log.info("%d pairs of %d prompts' own samples, %d prompts left out", len(new), len(drawn), len(refused))


def _samples(build: Build, known: pd.DataFrame) -> pd.DataFrame:
    """Samples with the texts of prompts and responses."""
    from prefopt.engine.answers import instruction_text
    from prefopt.inputs.rendering import response_texts
    from prefopt.models import load_tokenizer

    table = read_table(build.parent("samples") / "samples.parquet", ("prompt_id", "prompt_ids", "response_ids"))
    prompts = known.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
    texts = {prompt_id: instruction_text(prompts.loc[prompt_id]) for prompt_id in table["prompt_id"].unique()}
    tokenizer = load_tokenizer(build.parent("tokens") / TOKENIZER)
    for column in ("prompt_ids", "response_ids"):
        table[column] = [ids.tolist() for ids in table[column]]
    return table.assign(
        asked=table["prompt_id"].map(texts), text=response_texts(tokenizer, table["response_ids"].tolist())
    )


def _only(samples: pd.DataFrame, drawn: list[tuple[int, Any]]) -> tuple[pd.DataFrame, list[tuple[int, Any]]]:
    """The samples of the drawn prompts, and where they now stand."""
    rows = np.concatenate([places for _, places in drawn])
    ends = np.cumsum([len(places) for _, places in drawn])
    found = [(prompt, np.arange(end - len(places), end)) for (prompt, places), end in zip(drawn, ends, strict=True)]
    return samples.iloc[rows].reset_index(drop=True), found


def _rewards(build: Build, options: RunOptions, samples: pd.DataFrame, drawn: list[tuple[int, Any]]) -> np.ndarray:
    """Rewards of samples by every member [S, M], by the oracle [S, 1], or their mean preference over the prompt's
    other samples [S, 1].
    """
    if build.node.spec["oracle"]:
        return _oracle_rewards(build, samples)[:, None]
    from prefopt.engine.bulk import reward_responses
    from prefopt.engine.reward_models import load_reward_model

    columns = samples["prompt_ids"].tolist(), samples["response_ids"].tolist()
    outputs, found = build.node.spec.get("outputs", 1), []
    for role, folder in build.parents_like("reward").items():
        weights = weights_of(folder)
        tokenizer_for(build, weights.folder, weights.trusted)
        settings = {"members": outputs, "device": device_of(build, options), **weights.loading()}
        model = load_reward_model(weights.folder, **settings)
        kept = kept_rows(build, role, draw_keys(samples["prompt_id"]))
        found.append(reward_responses(model, *columns, batch_size=options.micro_batch, kept=kept))
    if outputs == 1:
        return np.stack(found, axis=1)
    from prefopt.training.reward_objectives import preference_over_others

    (vectors,) = found
    return np.concatenate([preference_over_others(vectors[places]) for _, places in drawn])[:, None]


def _oracle_rewards(build: Build, samples: pd.DataFrame) -> np.ndarray:
    from prefopt.world import asked, oracle_reward

    foreign = [text for text in samples["asked"].unique() if asked(text) is None]
    if foreign:
        raise BadInput(
            f"{build.node.parents['pairs']}: the prompt {foreign[0][:60]!r} is none of the demo world's, which alone "
            "has an oracle; label by trained reward models"
        )
    return np.array([oracle_reward(p, text) for p, text in zip(samples["asked"], samples["text"], strict=True)])


def _pairs(
    build: Build, known: pd.DataFrame, samples: pd.DataFrame, rewards: np.ndarray, drawn: list[tuple[int, Any]]
) -> tuple[list[dict[str, Any]], list[tuple[str, int, str, str]]]:
    """Rows of the pair table, and of the refusals: source, source_row, reason, detail."""
    from prefopt.outer.choice import chosen_and_rejected
    from prefopt.pairs import digest63
    from prefopt.readers.raw import Refused, checked_pair

    origin = known.drop_duplicates("prompt_id").set_index("prompt_id")
    worth = rewards.mean(axis=1)
    source = build.node.parents["samples"].rsplit("/", 1)[-1]
    accepted, refused = [], []
    for number, (prompt_id, places) in enumerate(drawn):
        draw = np.random.default_rng([build.node.spec["seed"], prompt_id])
        found = chosen_and_rejected(rewards[places], build.node.spec["choose"], draw)
        row = origin.loc[prompt_id]
        prompt = [dict(message) for message in row["prompt"]]
        try:
            if found is None:
                raise Refused("tie", "equal rewards")
            best, worst = places[list(found)]
            pair = checked_pair(prompt, samples["text"][best], samples["text"][worst], {})
        except Refused as refusal:
            refused.append((source, number, refusal.reason, refusal.detail))
            continue
        accepted.append(
            {
                "pair_id": digest63([prompt, pair.chosen, pair.rejected]),
                "prompt_id": prompt_id,
                "prompt": prompt,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "split": "train",
                "source": source,
                "source_row": number,
                "meta": row["meta"],
                "chosen_advantage": worth[best] - worth[places].mean(),
                "rejected_advantage": worth[worst] - worth[places].mean(),
            }
        )
    return accepted, refused
