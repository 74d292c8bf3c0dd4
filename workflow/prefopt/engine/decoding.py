"""Responses token by token: prompts are read once, and rows that have ended leave the forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.engine.kv_cache import Cache, Group, attention, attention_set
from prefopt.engine.lean import LeanLlama, is_plain_llama

Ids = Sequence[Sequence[int]]

_GROUP_TOKENS, _GROUP_FILL = 1024, 0.8  # one pass over prompts: at least so many, further ones as long as this share
_ENDED = 0.125  # share of rows that have ended at which the others close ranks

_log = logging.getLogger(__name__)
_decodes: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def decode(
    model: PreTrainedModel,
    prompt_ids: Ids,
    *,
    choose: Callable[[Tensor, Tensor], Tensor],
    ends: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """What ``choose`` writes after each prompt; what follows a row's first end token is meaningless.

    ``choose`` gives tokens [R] for logits [R, V] and the rows of the batch [R] that they belong to. Equal prompts are
    read once. Prompts are read in groups of like length.
    """
    device = model.device
    rows = torch.arange(len(prompt_ids), device=device)
    position = torch.tensor([len(prompt) for prompt in prompt_ids], device=device)
    written = torch.full((len(prompt_ids), max_new_tokens), ends[0], device=device)
    with torch.no_grad(), attention_set(model):
        cache, logits = _read(model, prompt_ids, max_new_tokens)
        step_logits = _stepper(model, cache)
        ending = torch.zeros(logits.shape[1], dtype=torch.bool, device=device)
        ending[[end for end in ends if end < len(ending)]] = True
        going = torch.ones(len(rows), dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            tokens = choose(logits, rows)
            written[rows, step] = tokens
            going &= ~ending[tokens]
            left = int(going.sum())
            if left == 0 or step + 1 == max_new_tokens:
                break
            if left <= (1 - _ENDED) * len(rows):
                order = cache.keep(going)
                rows, tokens, position, going = rows[order], tokens[order], position[order], going[order]
            logits = step_logits(tokens, position)
            cache.filled += 1
            position = position + 1
    return written[:, : step + 1].tolist()


def _read(model: PreTrainedModel, prompt_ids: Ids, max_new_tokens: int) -> tuple[Cache, Tensor]:
    """The cache filled with the prompts, and the logits [B, V] of the tokens after them."""
    longest = max(len(prompt) for prompt in prompt_ids)
    lengths = torch.tensor([len(prompt) for prompt in prompt_ids], device=model.device)
    slot = torch.arange(longest, device=model.device)
    bias = None
    if min(len(prompt) for prompt in prompt_ids) < longest:
        outside = slot < longest - lengths[:, None, None]
        bias = torch.zeros(outside.shape, device=model.device).masked_fill_(outside, float("-inf"))
    cache = Cache(len(prompt_ids), longest, longest + max_new_tokens, bias)
    logits = None
    for group in _groups(prompt_ids, model.device):
        cache.group = group
        width = len(group.prompts[0])
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in group.prompts])
        before = torch.tensor([width - len(prompt) for prompt in group.prompts])
        position = (torch.arange(width) - before[:, None]).clamp_(min=0)
        found = _logits(model, ids.to(model.device), position.to(model.device), cache)
        if logits is None:
            logits = found.new_empty(len(prompt_ids), found.shape[1])
        logits[group.rows] = found[group.prompt]
    cache.group, cache.filled = None, longest
    return cache, logits


def _groups(prompt_ids: Ids, device: torch.device) -> Iterator[Group]:
    """The different prompts, longest first, cut where they become much shorter than the first of their group."""
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompt_ids):
        rows_of.setdefault(tuple(prompt), []).append(row)
    prompts = sorted(rows_of, key=len, reverse=True)
    starts = [0]
    for at, prompt in enumerate(prompts):
        longest = len(prompts[starts[-1]])
        if (at - starts[-1]) * longest >= _GROUP_TOKENS and len(prompt) < _GROUP_FILL * longest:
            starts.append(at)
    for start, stop in zip(starts, [*starts[1:], len(prompts)], strict=True):
        some = prompts[start:stop]
        rows = [row for prompt in some for row in rows_of[prompt]]
        place = [at for at, prompt in enumerate(some) for _ in rows_of[prompt]]
        yield Group(some, torch.tensor(rows, device=device), torch.tensor(place, device=device), _seen(some, device))


def _seen(prompts: Ids, device: torch.device) -> Tensor | None:
    """Left-padded prompts: tokens see what is before them, and padding, which nothing reads, sees itself."""
    width = len(prompts[0])
    if len(prompts[-1]) == width:
        return None
    before = torch.tensor([width - len(prompt) for prompt in prompts], device=device)[:, None, None, None]
    slot = torch.arange(width, device=device)
    causal = slot <= slot[:, None]
    return (causal & (slot >= before)) | torch.eye(width, dtype=torch.bool, device=device)


def _stepper(model: PreTrainedModel, cache: Cache) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits [R, V] after the tokens [R] at positions [R], which the cache keeps."""
    if not is_plain_llama(model):
        return lambda tokens, position: _logits(model, tokens[:, None], position[:, None], cache)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(module, query, key, value, None, decoding=cache, scaling=module.scaling)[0]

    return LeanLlama(model, cache.size, attend)


def _logits(model: PreTrainedModel, ids: Tensor, position: Tensor, cache: Cache) -> Tensor:
    """Logits [R, V] after the last token of every row of ids [R, L]."""
    out = model(input_ids=ids, position_ids=position, use_cache=False, logits_to_keep=1, decoding=cache)
    return out.logits[:, -1]


def decodes(model: PreTrainedModel) -> bool:
    """Whether the model gives its own logits with a cache of ours, seen once per model by a run on a few tokens."""
    if model not in _decodes:
        reason = _why_not(model)
        _decodes[model] = reason is None
        if reason is not None:
            _log.warning("%s: responses are sampled with transformers' generate (%s)", type(model).__name__, reason)
    return _decodes[model]


@contextmanager
def plain(model: PreTrainedModel) -> Iterator[None]:
    """The model as if it could not be decoded here, to compare the two ways."""
    before = decodes(model)
    _decodes[model] = False
    try:
        yield
    finally:
        _decodes[model] = before


def _why_not(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"it has layers of {min(kinds)}"
    try:
        gap = _gap(model, config.vocab_size)
    except Exception as error:  # whatever an unknown architecture makes of what it does not know
        return f"{type(error).__name__}: {error}".splitlines()[0]
    half = "forward" in vars(model.base_model) or model.dtype in (torch.bfloat16, torch.float16)
    return None if gap <= (5e-2 if half else 1e-4) else f"logits differ by {gap:.1g} of the largest"


def _gap(model: PreTrainedModel, vocabulary: int) -> float:
    """Largest difference of our logits and the model's own over given responses, as a share of the largest logit."""
    rows = [([1, 2, 3], [3, 1, 2]), ([2], [2, 2, 3]), ([1, 2, 3], [1, 3, 3]), ([3, 1], [2, 1, 1])]
    rows = [([token % vocabulary for token in p], [token % vocabulary for token in r]) for p, r in rows]
    mine: list[Tensor] = []

    def given(logits: Tensor, numbers: Tensor) -> Tensor:
        mine.append(logits.float())
        return torch.tensor([rows[row][1][len(mine) - 1] for row in numbers.tolist()], device=logits.device)

    decode(model, [prompt for prompt, _ in rows], choose=given, ends=[vocabulary], max_new_tokens=3)
    gap, scale = 0.0, 0.0
    with torch.no_grad():
        for row, (prompt, response) in enumerate(rows):
            ids = torch.tensor([prompt + response[:-1]], device=model.device)
            theirs = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
            gap = max(gap, float((torch.stack(mine)[:, row] - theirs).abs().max()))
            scale = max(scale, float(theirs.abs().max()))
    return gap / scale
