"""What stands beside a language model while it trains, for losses that need it: linear heads, running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefopt.lazy import LazyModule
from prefopt.scoring import Ids, response_states

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel
else:
    torch = LazyModule("torch")
    nn = LazyModule("torch.nn")

HEADS = {"reward_head": "reward", "auxiliary": "value"}
"""A loss's need -> the head that meets it."""

_PLACE = "objective_heads"
_GAP = "gap"
_GAP_DECAY = 0.9  # of beta-DPO's running statistics, as in the authors' code


@contextmanager
def heads_on(model: PreTrainedModel, needs: frozenset[str]) -> Iterator[None]:
    """Put the heads that a loss needs onto ``model`` as a submodule, starting from zero, and take them off afterwards.

    While they are there they are parameters of the model like any other: optimiser, clipping and checkpoints see them.
    The running statistics of ``gap_state`` are a buffer, which checkpoints see.
    """
    names = [head for need, head in HEADS.items() if need in needs]
    if not names and "gap_state" not in needs:
        yield
        return
    size = model.config.get_text_config().hidden_size
    heads = nn.ModuleDict({name: nn.Linear(size, 1, device=model.device) for name in names})
    for parameter in heads.parameters():
        nn.init.zeros_(parameter)
    if "gap_state" in needs:
        heads[_GAP] = nn.Module()
        heads[_GAP].register_buffer("state", torch.zeros(3, device=model.device))
    model.add_module(_PLACE, heads)
    try:
        yield
    finally:
        delattr(model, _PLACE)


def head_margin(model: PreTrainedModel, prompt_ids: Ids, response_ids: Ids) -> Tensor:
    """Reward head at the last token of chosen - of rejected responses [B]; these stand first, those second.

    Raises AttributeError without ``heads_on``.
    """
    states = response_states(model, prompt_ids, response_ids)
    chosen, rejected = getattr(model, _PLACE)["reward"](states).squeeze(-1).chunk(2)
    return chosen - rejected


def prompt_value(model: PreTrainedModel, prompt_ids: Ids) -> Tensor:
    """Value head at the last token of prompts of two tokens or more [B]; no gradient reaches the body."""
    with torch.no_grad():
        states = response_states(model, [ids[:-1] for ids in prompt_ids], [ids[-1:] for ids in prompt_ids])
    return getattr(model, _PLACE)["value"](states).squeeze(-1)


def follow_gap(model: PreTrainedModel, margin: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of margins over the batches before this one; at the first, its own.

    This batch's ``margin`` [B] then enters with 1 - .9. Raises AttributeError without ``heads_on``.
    """
    state = getattr(model, _PLACE)[_GAP].state
    seen = margin.detach().to(state.dtype)
    now = torch.stack([seen.mean(), seen.std(correction=0)])
    before = state[:2].clone() if state[2] > 0 else now
    state.copy_(torch.cat([_GAP_DECAY * before + (1 - _GAP_DECAY) * now, state[2:] + 1]))
    return before[0].to(margin.dtype), before[1].to(margin.dtype)
