"""Prompts and responses as token ids, rendered one way everywhere."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from prefopt.digests import canonical_json
from prefopt.errors import BadInput
from prefopt.readers.raw import RAW_ROLE, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Style = Literal["auto", "chat", "plain", "raw"]

_PLAIN_LABELS = {"system": "System", "user": "Human", "assistant": "Assistant"}
_PLAIN_ANSWER = "\n\nAssistant:"
_MARK = "sentinelanswer"


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Style) -> list[int]:
    """Ids of the prompt up to where the response starts, with at most one BOS.

    ``chat``: the tokenizer's chat template with its generation prompt; ``plain``: BOS + "Human: ... Assistant:" turns;
    one message of role text: BOS + that text; ``auto``: chat where there is a chat template, plain elsewhere.
    Raises BadInput where the template is missing or refuses the messages.
    """
    style = style_of(tokenizer, messages, template)
    return started(tokenizer, encode(tokenizer, [prompt_text(tokenizer, messages, style)])[0], style)


def response_ids(tokenizer: PreTrainedTokenizerBase, text: str, template: Style) -> list[int]:
    """Ids of a response, no BOS in front, and last what ends an assistant turn.

    Templates as in ``render_prompt``; ``raw`` keeps white space as it is, for what continues a raw prefix.
    Raises BadInput for a text without a token.
    """
    style = style_of(tokenizer, (), template)
    ids = encode(tokenizer, [response_body(text, style)])[0]
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
        ids = encode(tokenizer, [after])[0]
        special = set(special_tokens(tokenizer).values())
        stop = next((place for place, token in enumerate(ids) if token in special), None)
        if stop is not None:
            return ids[: stop + 1]
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no end-of-sequence token, so that no response can end; set its eos_token")
    return [tokenizer.eos_token_id]


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], style: Style) -> str:
    """The text of a prompt in a style; BadInput where the chat template refuses it, or a raw prefix has company."""
    if style == "chat":
        return _render(tokenizer, messages, generation_prompt=True)
    if style == "raw":
        if len(messages) != 1:
            raise BadInput(f"a raw prefix stands alone, this prompt has {len(messages)} messages")
        return messages[0]["content"]
    turns = (f"\n\n{_PLAIN_LABELS[message['role']]}: {message['content']}" for message in messages)
    return "".join(turns) + _PLAIN_ANSWER


def response_body(text: str, style: Style) -> str:
    """A response's text as it follows the prompt, without its end."""
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


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts, nothing added at either end."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def started(tokenizer: PreTrainedTokenizerBase, ids: list[int], style: Style) -> list[int]:
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


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every special token of a tokenizer and its id."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
