"""Linear heads beside the language model's own, for losses that need a reward or a value of the policy."""

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


@contextmanager
def heads_on(model: PreTrainedModel, needs: frozenset[str]) -> Iterator[None]:
    """Put the heads that a loss needs onto ``model`` as a submodule, starting from zero, and take them off afterwards.

    While they are there they are parameters of the model like any other: optimiser, clipping and checkpoints see them.
    """
    names = [head for need, head in HEADS.items() if need in needs]
    if not names:
        yield
        return
    size = model.config.get_text_config().hidden_size
    heads = nn.ModuleDict({name: nn.Linear(size, 1, device=model.device) for name in names})
    for parameter in heads.parameters():
        nn.init.zeros_(parameter)
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
