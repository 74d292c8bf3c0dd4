"""From texts to token ids: tokenizers trained here, prompts and responses rendered one way everywhere."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from prefopt.digests import canonical_json
from prefopt.errors import BadInput
from prefopt.pairs import REFUSED_COLUMNS
from prefopt.readers.raw import RAW_ROLE, Message

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from prefopt.specs import TokensSpec

Style = Literal["auto", "chat", "plain", "raw"]
Problem = tuple[str, str]  # reason, detail

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_SIDES = ("chosen", "rejected")
_PARTS = ("prompt", *_SIDES)
TOKEN_COLUMNS = ("pair_id", "prompt_id", "split", *(f"{p}_ids" for p in _PARTS), *(f"{p}_tokens" for p in _PARTS))
_PLAIN_LABELS = {"system": "System", "user": "Human", "assistant": "Assistant"}
_PLAIN_ANSWER = "\n\nAssistant:"
_MARK = "sentinelanswer"


# --- tokenizers -----------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], kind: Literal["words", "bpe"], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for small models, at most ``vocab_size`` tokens, equal for equal texts.

    ``words``: one token per white-space separated word, the most frequent first, others are <unk>; ``bpe``: byte-level
    byte pairs, which represent any text. Raises BadInput where bytes and special tokens do not fit in vocab_size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL_TOKENS)
    if kind == "words":
        backend = Tokenizer(models.WordLevel(unk_token=UNK))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if vocab_size < len(alphabet) + len(special):
            raise BadInput(
                f"vocab_size {vocab_size} is too small for bpe: {len(alphabet)} bytes and {len(special)} special "
                f"tokens need {len(alphabet) + len(special)}; raise it, or use kind: words"
            )
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def check_same_vocabulary(policy: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase) -> None:
    """Raises BadInput unless both tokenizers give every token the same id."""
    ours, theirs = policy.get_vocab(), reference.get_vocab()
    if ours == theirs:
        return
    names = [{number: token for token, number in vocabulary.items()} for vocabulary in (ours, theirs)]
    first = min(number for number in {*names[0], *names[1]} if names[0].get(number) != names[1].get(number))
    raise BadInput(
        f"policy and reference tokenizers differ: {len(ours)} and {len(theirs)} tokens, first at id {first} "
        f"({names[0].get(first)!r} and {names[1].get(first)!r}); use a reference with the policy's tokenizer"
    )


# --- rendering ------------------------------------------------------------------------------------------------------


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Style) -> list[int]:
    """Ids of the prompt up to where the response starts, with at most one BOS.

    ``chat``: the tokenizer's chat template with its generation prompt; ``plain``: BOS + "Human: ... Assistant:" turns;
    one message of role text: BOS + that text; ``auto``: chat where there is a chat template, plain elsewhere.
    Raises BadInput where the template is missing or refuses the messages.
    """
    style = style_of(tokenizer, messages, template)
    return _started(tokenizer, _encode(tokenizer, [_prompt_text(tokenizer, messages, style)])[0], style)


def response_ids(tokenizer: PreTrainedTokenizerBase, text: str, template: Style) -> list[int]:
    """Ids of a response, no BOS in front, and last what ends an assistant turn.

    Templates as in ``render_prompt``; ``raw`` keeps white space as it is, for what continues a raw prefix.
    Raises BadInput for a text without a token.
    """
    style = style_of(tokenizer, (), template)
    ids = _encode(tokenizer, [_response_body(text, style)])[0]
    if not ids:
        raise BadInput(f"response {text[:40]!r} has no token; a response must say something")
    return ids + end_ids(tokenizer, style)


def response_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a response: up to its first end token, white space at both ends removed."""
    return response_texts(tokenizer, [ids])[0]


def response_texts(tokenizer: PreTrainedTokenizerBase, responses: Sequence[Sequence[int]]) -> list[str]:
    """``response_text`` of many responses: what ends them is looked up once, since that renders the chat template."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ends.add(end_ids(tokenizer, "chat")[-1])
    texts = []
    for ids in responses:
        stop = next((place for place, token in enumerate(ids) if int(token) in ends), len(ids))
        texts.append(tokenizer.decode([int(token) for token in ids[:stop]], skip_special_tokens=True).strip())
    return texts


def template_record(tokenizer: PreTrainedTokenizerBase, styles: Iterable[Style]) -> dict[str, Any]:
    """How prompts were rendered, for an artifact's summary: prompts by style, and the chat template's sha256."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) or template is None else canonical_json(template)
    digest = None if text is None else hashlib.sha256(text.encode()).hexdigest()
    return {"prompts_by_style": dict(sorted(Counter(styles).items())), "chat_template_sha256": digest}


def style_of(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Style) -> Style:
    """How a prompt is rendered: ``raw``, ``chat`` or ``plain``. Raises BadInput for chat without a chat template."""
    if any(message["role"] == RAW_ROLE for message in messages):
        return "raw"
    if template == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    if template == "chat" and not tokenizer.chat_template:
        raise BadInput("template: chat, but the tokenizer has no chat template; use template: plain, or add one to it")
    return template


def end_ids(tokenizer: PreTrainedTokenizerBase, style: Style) -> list[int]:
    """What follows a response: for chat all the template puts there up to its first special token, elsewhere EOS.

    Raises BadInput where neither the template nor the tokenizer has an end token.
    """
    if style == "chat":
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
        _, found, after = _render(tokenizer, turns, generation_prompt=False).rpartition(_MARK)
        if not found:
            raise BadInput("the chat template leaves out what the assistant says; repair it, or use template: plain")
        ids = _encode(tokenizer, [after])[0]
        special = set(_special_tokens(tokenizer).values())
        stop = next((place for place, token in enumerate(ids) if token in special), None)
        if stop is not None:
            return ids[: stop + 1]
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no end-of-sequence token, so that no response can end; set its eos_token")
    return [tokenizer.eos_token_id]


def _prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], style: Style) -> str:
    if style == "chat":
        return _render(tokenizer, messages, generation_prompt=True)
    if style == "raw":
        if len(messages) != 1:
            raise BadInput(f"a raw prefix stands alone, this prompt has {len(messages)} messages")
        return messages[0]["content"]
    turns = (f"\n\n{_PLAIN_LABELS[message['role']]}: {message['content']}" for message in messages)
    return "".join(turns) + _PLAIN_ANSWER


def _response_body(text: str, style: Style) -> str:
    if style == "raw":
        return text
    return (" " if style == "plain" else "") + text.strip()


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise BadInput(f"the chat template refuses turns {roles} ({error}); use template: plain") from None


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _started(tokenizer: PreTrainedTokenizerBase, ids: list[int], style: Style) -> list[int]:
    """Prompt ids with their BOS: a chat template writes its own, elsewhere it is put in front."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    if style != "chat":
        return [bos, *ids]
    # Where one token is both BOS and end of turn, only a doubled start is a mistake.
    doubled = ids[:2] == [bos, bos] if bos == tokenizer.eos_token_id else ids.count(bos) > 1
    if doubled:
        raise BadInput(f"the chat template writes {tokenizer.bos_token} more than once; repair the template")
    return ids


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


# --- the token table ------------------------------------------------------------------------------------------------


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
        _encode(tokenizer, [_response_body(*pair) for pair in zip(pairs[side], styles, strict=True)]) for side in _SIDES
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
            texts[number] = _prompt_text(tokenizer, prompt, styles[number])
        except BadInput as error:
            problems[number] = ("chat template refuses the prompt", str(error))
    ids = dict(zip(texts, _encode(tokenizer, list(texts.values())), strict=True))
    problems |= {number: ("empty prompt", "no token left") for number, body in ids.items() if not body}
    ids = {number: _started(tokenizer, body, styles[number]) for number, body in ids.items()}
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
    return re.compile("|".join(re.escape(token) for token in sorted(_special_tokens(tokenizer))))


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
