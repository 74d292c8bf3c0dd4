"""The token table: pairs and prompts as token ids, and why some cannot be used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefopt.errors import BadInput
from prefopt.inputs.rendering import (
    Style,
    encode,
    end_ids,
    prompt_text,
    response_body,
    special_tokens,
    started,
    style_of,
)
from prefopt.pairs import REFUSED_COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from prefopt.specs import TokensSpec

Problem = tuple[str, str]  # reason, detail

_SIDES = ("chosen", "rejected")
_PARTS = ("prompt", *_SIDES)
TOKEN_COLUMNS = ("pair_id", "prompt_id", "split", *(f"{p}_ids" for p in _PARTS), *(f"{p}_tokens" for p in _PARTS))


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt that many pairs may share: its style, its ids, and why it cannot be used, if so."""

    style: Style
    ids: list[int]
    problem: Problem | None


def tokenize_pairs(
    pairs: pd.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    spec: TokensSpec,
    model_max_positions: int | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Pairs as (tokens, refused): TOKEN_COLUMNS with int32 ids, and source, source_row, reason, detail.

    prompt_tokens + response tokens <= max_length with the end token inside; nothing but a prompt's start is ever cut,
    and that only with overlong: truncate_left. Raises BadInput where max_length exceeds the model's positions, and with
    overlong: error for the first prompt over max_prompt_tokens.
    """
    import numpy as np
    import pandas as pd

    if model_max_positions is not None and spec.max_length > model_max_positions:
        raise BadInput(
            f"tokens: max_length {spec.max_length} is more than the model's {model_max_positions} positions; lower "
            "max_length, or use a model with more"
        )
    prompts = _prompts_by_id(pairs, tokenizer, spec)
    styles = [prompts[number].style for number in pairs["prompt_id"]]
    ends = {style: end_ids(tokenizer, style) for style in set(styles)}
    bodies = [
        encode(tokenizer, [response_body(*pair) for pair in zip(pairs[side], styles, strict=True)]) for side in _SIDES
    ]
    control = _control_pattern(tokenizer)
    accepted, refused = [], []
    for row, chosen, rejected in zip(pairs.to_dict("records"), *bodies, strict=True):
        prompt = prompts[row["prompt_id"]]
        ids = {"chosen": chosen, "rejected": rejected}
        end = ends[prompt.style]
        room = spec.max_length - len(prompt.ids) - len(end)
        problem = prompt.problem or _control_token(control, [row[side] for side in _SIDES]) or _misfit(ids, room)
        if problem is not None:
            place = {"source": row["source"], "source_row": row["source_row"]}
            refused.append({**place, "reason": problem[0], "detail": problem[1]})
            continue
        record = {"prompt": prompt.ids, **{side: body + end for side, body in ids.items()}}
        accepted.append(
            {key: row[key] for key in ("pair_id", "prompt_id", "split")}
            | {f"{name}_ids": np.array(tokens, dtype=np.int32) for name, tokens in record.items()}
            | {f"{name}_tokens": len(tokens) for name, tokens in record.items()}
        )
    return pd.DataFrame(accepted, columns=TOKEN_COLUMNS), pd.DataFrame(refused, columns=REFUSED_COLUMNS)


def tokenize_prompts(
    prompts: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, spec: TokensSpec
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Prompts alone as (tokens, refused): prompt_id, prompt_ids and prompt_tokens in the prompts' order.

    ``prompts`` has prompt_id (each once), prompt, source, source_row; limits and refusals are those of
    ``tokenize_pairs``. Where it has ``output``, an answer to be tokenised, a control token there is refused too.
    """
    import numpy as np
    import pandas as pd

    found = _prompts_by_id(prompts, tokenizer, spec)
    control = _control_pattern(tokenizer)
    accepted, refused = [], []
    for row in prompts.to_dict("records"):
        prompt = found[row["prompt_id"]]
        outputs = [said for said in [row.get("output")] if isinstance(said, str)]  # none is NaN in a table
        problem = prompt.problem or _control_token(control, outputs)
        if problem is not None:
            place = {"source": row["source"], "source_row": row["source_row"]}
            refused.append({**place, "reason": problem[0], "detail": problem[1]})
            continue
        ids = {"prompt_ids": np.array(prompt.ids, dtype=np.int32), "prompt_tokens": len(prompt.ids)}
        accepted.append({"prompt_id": row["prompt_id"], **ids})
    columns = ["prompt_id", "prompt_ids", "prompt_tokens"]
    return pd.DataFrame(accepted, columns=columns), pd.DataFrame(refused, columns=REFUSED_COLUMNS)


def check_embedded(tokenizer: PreTrainedTokenizerBase, table: pd.DataFrame, vocabulary: int) -> None:
    """Raise BadInput where a text of a token table has an id for which the model has no embedding."""
    import numpy as np

    for name in table.columns[table.columns.str.endswith("_ids")]:
        largest = int(np.concatenate(table[name].tolist()).max())
        if largest >= vocabulary:
            raise BadInput(
                f"{name}: the token {tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, and the model "
                f"has embeddings for {vocabulary} tokens; use the tokenizer that the model was trained with"
            )


def _prompts_by_id(pairs: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, spec: TokensSpec) -> dict[int, _Prompt]:
    messages = {number: list(prompt) for number, prompt in zip(pairs["prompt_id"], pairs["prompt"], strict=True)}
    styles = {number: style_of(tokenizer, prompt, spec.template) for number, prompt in messages.items()}
    control = _control_pattern(tokenizer)
    problems: dict[int, Problem] = {}
    texts: dict[int, str] = {}
    for number, prompt in messages.items():
        if problem := _control_token(control, [message["content"] for message in prompt]):
            problems[number] = problem
            continue
        try:
            texts[number] = prompt_text(tokenizer, prompt, styles[number])
        except BadInput as error:
            problems[number] = ("chat template refuses the prompt", str(error))
    ids = dict(zip(texts, encode(tokenizer, list(texts.values())), strict=True))
    problems |= {number: ("empty prompt", "no token left") for number, body in ids.items() if not body}
    ids = {number: started(tokenizer, body, styles[number]) for number, body in ids.items()}
    overlong = {number: len(tokens) for number, tokens in ids.items() if len(tokens) > spec.max_prompt_tokens}
    if overlong and spec.overlong == "error":
        _stop_at_overlong(pairs, overlong, spec.max_prompt_tokens)
    for number, count in overlong.items():
        if spec.overlong == "refuse":
            problems[number] = ("prompt too long", f"{count} tokens, max_prompt_tokens {spec.max_prompt_tokens}")
        ids[number] = _keep_end(tokenizer, ids[number], spec.max_prompt_tokens)
    return {number: _Prompt(styles[number], ids.get(number, []), problems.get(number)) for number in messages}


def _stop_at_overlong(pairs: pd.DataFrame, overlong: Mapping[int, int], limit: int) -> None:
    over = pairs[pairs["prompt_id"].isin(list(overlong))]
    first = over.iloc[0]
    raise BadInput(
        f"{first['source']}: row {first['source_row'] + 1}: prompt of {overlong[first['prompt_id']]} tokens, "
        f"max_prompt_tokens is {limit} ({len(over)} of {len(pairs)} pairs are over it, the longest has "
        f"{max(overlong.values())}); raise max_prompt_tokens, or set overlong: refuse or overlong: truncate_left"
    )


def _keep_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], limit: int) -> list[int]:
    # A model that was trained with BOS in front needs it there on cut prompts too.
    start = ids[:1] if ids[0] == tokenizer.bos_token_id and limit > 1 else []
    return start + ids[len(ids) - limit + len(start) :]


def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(special_tokens(tokenizer))))


def _control_token(pattern: re.Pattern[str], texts: Sequence[str]) -> Problem | None:
    """A text that spells a special token would be read as that token, for example as the end of the response."""
    found = next((match[0] for match in map(pattern.search, texts) if match), None) if pattern.pattern else None
    return None if found is None else ("control token in text", found)


def _misfit(ids: Mapping[str, Sequence[int]], room: int) -> Problem | None:
    for side, body in ids.items():
        if not body:
            return f"empty {side}", "no token left"
        if len(body) > room:
            return "response too long", f"{side}: {len(body)} tokens without its end, room for {max(room, 0)}"
    return ("identical tokens", "") if ids["chosen"] == ids["rejected"] else None
