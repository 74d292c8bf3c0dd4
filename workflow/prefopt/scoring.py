"""Log-probabilities, entropies and rewards of given responses: the one module that sees logits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from prefopt.engine.packed_attention import attention_for, packs
from prefopt.engine.packing import Ids, Rows, pack, pad
from prefopt.engine.precision import low_type
from prefopt.engine.reward_models import score_head
from prefopt.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
    from transformers import PreTrainedModel
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")

_SMALL_LOGITS = 1 << 21  # positions x vocabulary that are kept for the backward pass and not computed again
_CHUNK_TOKENS = 1024
_CPU_MULTIPLE = 32  # sizes of bf16 products on a CPU

_log = logging.getLogger(__name__)
_linear: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class ResponseScores:
    """What a model says of N responses.

    logp [N] nats, summed over response tokens; tokens [N] counts; entropy [N] nats per token; token_logp and mask
    [N, T], responses left-aligned.
    """

    logp: Tensor
    tokens: Tensor
    entropy: Tensor | None = None
    token_logp: Tensor | None = None
    mask: Tensor | None = None


def response_scores(
    model: PreTrainedModel,
    prompt_ids: Ids,
    response_ids: Ids,
    *,
    entropy: bool = False,
    token_level: bool = False,
    chunk_tokens: int | None = None,
) -> ResponseScores:
    """Sum over response tokens of log pi(token | what stands before it) [N], with gradient where gradients are on.

    Row i has prompt i modulo their number, so chosen + rejected responses need their prompts once. The body runs once,
    on packed rows, or on padded ones where the model cannot pack. Head and log-softmax run in fp32 on the response
    positions alone, chunk_tokens at a time, and again in the backward pass; where chunk_tokens is not given and the
    logits of these positions are few, they are kept. [N, L, V] logits never exist, except for models whose logits are
    not head(body). entropy is the mean over response tokens of -sum_v p log p. Raises ValueError for an empty prompt
    or response, and where the number of responses is no multiple of that of prompts.
    """
    rows = _layout(model, prompt_ids, response_ids)
    logp, nats = _token_values(model, rows, entropy, chunk_tokens)
    token_logp = _by_row(logp, rows.mask)
    return ResponseScores(
        logp=token_logp.sum(dim=1),
        tokens=rows.tokens,
        entropy=_by_row(nats, rows.mask).sum(dim=1) / rows.tokens if nats is not None else None,
        token_logp=token_logp if token_level else None,
        mask=rows.mask if token_level else None,
    )


def reward_scores(model: PreTrainedModel, prompt_ids: Ids, response_ids: Ids) -> Tensor:
    """Score head at the last token of each response [N], or [N, K] for K heads; padding has no say.

    Rows, prompts and errors are as in ``response_scores``.
    """
    head = score_head(model, model.config.num_labels)[1]
    rows = _layout(model, prompt_ids, response_ids)
    return _project(head, _states(model, rows, rows.last)).squeeze(-1)


def response_states(model: PreTrainedModel, prompt_ids: Ids, response_ids: Ids) -> Tensor:
    """The body's last hidden state at the last token of each response [N, H], in fp32 at least; rows as above."""
    rows = _layout(model, prompt_ids, response_ids)
    return _at_least_fp32(_states(model, rows, rows.last))


def length_batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Row numbers in batches of ``size``, longest rows first, so that little of a batch is padding."""
    rows = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def projects_linearly(model: PreTrainedModel) -> bool:
    """Whether logits = head(body) and nothing else, seen once per model by a run on a few tokens.

    The head's output is replaced by a ramp from -1024 to 1024: soft caps and scales after the head, which are invisible
    on the small logits of a new model, change such a ramp.
    """
    if model not in _linear:
        _linear[model] = _probe(model)
        if not _linear[model]:
            _log.warning("%s: logits are more than head(body); full logits are computed", type(model).__name__)
    return _linear[model]


def _probe(model: PreTrainedModel) -> bool:
    head, body = model.get_output_embeddings(), model.base_model
    if head is None or body is model:
        return False
    seen, shown = [], []

    def ramp(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        seen.append(args[0])
        shown.append(torch.linspace(-1024, 1024, out.numel(), device=out.device, dtype=out.dtype).view_as(out))
        return shown[-1]

    ids = torch.arange(4, device=model.device).remainder(model.config.get_text_config().vocab_size)[None]
    handle = head.register_forward_hook(ramp)
    with torch.no_grad():
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        hidden = body(input_ids=ids, use_cache=False)[0]
    return (
        len(seen) == 1
        and torch.equal(logits.to(shown[0].dtype), shown[0])
        and seen[0].shape == hidden.shape
        and torch.allclose(seen[0].to(hidden.dtype), hidden, rtol=1e-4, atol=1e-5)
    )


def _layout(model: PreTrainedModel, prompt_ids: Ids, response_ids: Ids) -> Rows:
    if not packs(model):
        return pad(prompt_ids, response_ids, model.device)
    # a CPU compiles bf16 products for every size; its fp32 ones it does not
    multiple = _CPU_MULTIPLE if low_type(model) and model.device.type == "cpu" else 1
    return pack(prompt_ids, response_ids, model.device, multiple=multiple)


def _states(model: PreTrainedModel, rows: Rows, places: Tensor) -> Tensor:
    """Last hidden states [P, H] at these of all tokens, counted end to end."""
    from prefopt.engine.lean_body import lean_states, runs_lean

    if runs_lean(model, rows):
        return lean_states(model, rows, places)
    with attention_for(model, rows):
        return _at(places, model.base_model(**rows.inputs, use_cache=False)[0].flatten(0, 1))


def _at(places: Tensor, values: Tensor) -> Tensor:
    """values[places], [P, H]; an embedding's backward pass is the fast and repeatable one."""
    return F.embedding(places, values)


def _project(head: nn.Linear, hidden: Tensor) -> Tensor:
    """head(hidden) in the head's own precision, at least fp32, whatever autocast surrounds the call."""
    from prefopt.engine.products import is_linear, least_of, linear

    hidden = hidden.to(head.weight.dtype)
    least = least_of(hidden) if is_linear(head) else None
    with torch.autocast(hidden.device.type, enabled=False):
        found = head(hidden) if least is None else linear(hidden, head.weight, head.bias, least=least)
    return _at_least_fp32(found)


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _token_values(model: PreTrainedModel, rows: Rows, entropy: bool, chunk: int | None) -> tuple[Tensor, Tensor | None]:
    """Log-probability [R] and, if wanted, entropy of the predicting distribution [R] for every response token."""
    if not projects_linearly(model):
        with attention_for(model, rows):
            logits = model(**rows.inputs, use_cache=False).logits.flatten(0, 1)
        return _log_softmax_values(_at_least_fp32(_at(rows.before, logits)), rows.target, entropy)

    hidden = _states(model, rows, rows.before)
    head = model.get_output_embeddings()

    def values(part: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return _log_softmax_values(_project(head, part), target, entropy)

    from prefopt.engine.products import is_linear, rows_to_add

    if chunk is None and len(hidden) * head.out_features <= _SMALL_LOGITS:
        more = rows_to_add(len(hidden)) if hidden.device.type == "cpu" else 0
        logp, nats = values(F.pad(hidden, (0, 0, 0, more)), F.pad(rows.target, (0, more)))
        return logp[: len(hidden)], None if nats is None else nats[: len(hidden)]
    if is_linear(head):
        from prefopt.engine.fused_head import token_logp

        hidden, low = hidden.to(head.weight.dtype), low_type(model)
        with torch.autocast(hidden.device.type, enabled=False):
            return token_logp(hidden, head.weight, head.bias, rows.target, entropy=entropy, low=low, chunk_tokens=chunk)
    chunk = chunk or _CHUNK_TOKENS
    from torch.utils.checkpoint import checkpoint

    parts = []
    for part, target in zip(hidden.split(chunk), rows.target.split(chunk), strict=True):
        if torch.is_grad_enabled():
            done = checkpoint(values, part, target, use_reentrant=False, preserve_rng_state=False)
        else:
            done = values(part, target)
        parts.append(done)
    logp = torch.cat([part[0] for part in parts])
    return logp, torch.cat([part[1] for part in parts]) if entropy else None


def _log_softmax_values(logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    logp = logits.log_softmax(dim=-1)
    chosen = -F.nll_loss(logp, target, reduction="none")  # its backward pass is faster than that of gather
    if not entropy:
        return chosen, None
    finite = logp.clamp(min=torch.finfo(logp.dtype).min)  # 0 log 0 = 0 for tokens a model rules out with -inf
    return chosen, -(logp.exp() * finite).sum(dim=-1)


def _by_row(values: Tensor, mask: Tensor) -> Tensor:
    """Token values [R] in row order -> [N, T], zero beyond a response."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
