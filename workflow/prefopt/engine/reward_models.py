"""Reward models: linear heads on a causal model's body, new ones from seeds or trained ones from folders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.engine.adapters import merge_adapters
from prefopt.engine.model_folders import NOT_WHOLE, from_folder, model_folder, require_all
from prefopt.engine.precision import Precision, set_precision
from prefopt.errors import BadInput

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def new_reward_model(
    causal_folder: Path | str,
    seed: int,
    *,
    device: str = "cpu",
    precision: Precision = "fp32",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A scalar reward model: the causal model's body under a new head with N(0, 1/(hidden + 1)) weights from ``seed``.

    Head initialisation as in Stiennon et al. 2020 (arXiv 2009.01325), appendix B.1. Raises BadInput as
    ``load_causal_lm`` does, and where the architecture has no linear score head.
    """
    return new_shared_reward_model(
        causal_folder, [seed], device=device, precision=precision, trust_remote_code=trust_remote_code
    )


def new_shared_reward_model(
    causal_folder: Path | str,
    seeds: Sequence[int],
    *,
    frozen: bool = False,
    device: str = "cpu",
    precision: Precision = "fp32",
    adapters: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """One body under K heads, head k drawn from seeds[k] as ``new_reward_model`` draws its only one.

    ``frozen``: only the heads take gradients. ``adapters`` of the causal model are merged. These are no independent
    members. Raises BadInput as ``new_reward_model`` does.
    """
    folder = model_folder(causal_folder)
    model, in_body, _ = _with_heads(folder, len(seeds), trust_remote_code)
    require_all(folder, in_body, NOT_WHOLE)
    _draw_heads(score_head(model, len(seeds))[1], seeds)
    merge_adapters(model, adapters, device)
    model.base_model.requires_grad_(not frozen)
    return set_precision(model.to(device), precision)


def load_reward_model(
    folder: Path | str,
    *,
    members: int = 1,
    device: str,
    precision: Precision = "fp32",
    adapters: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The reward model of a folder, with ``members`` heads; or of a causal model, whose last adapter has the heads.

    Raises BadInput as ``load_causal_lm`` does, and where there are not so many trained heads.
    """
    folder = model_folder(folder)
    model, in_body, in_heads = _with_heads(folder, members, trust_remote_code)
    headed = merge_adapters(model, adapters, device)
    require_all(
        folder, in_body if headed else sorted([*in_body, *in_heads]), "this is no reward model, train one from it"
    )
    return set_precision(model.to(device), precision)


def _with_heads(folder: Path, heads: int, trust_remote_code: bool) -> tuple[PreTrainedModel, list[str], list[str]]:
    """A folder's body under so many heads, and the weights that the folder lacks: in the body, in the heads."""
    import torch
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):  # the library draws the heads that the folder does not have
        model, missing = from_folder(AutoModelForSequenceClassification, folder, trust_remote_code, num_labels=heads)
    name, _ = score_head(model, heads)
    in_heads = [key for key in missing if key.startswith(f"{name}.")]
    return model, [key for key in missing if key not in in_heads], in_heads


def _draw_heads(head: nn.Linear, seeds: Sequence[int]) -> None:
    import torch

    with torch.no_grad():
        for row, seed in zip(head.weight, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            row.normal_(0.0, 1.0 / math.sqrt(head.in_features + 1), generator=generator)
        if head.bias is not None:
            head.bias.zero_()


def score_head(model: PreTrainedModel, outputs: int = 1) -> tuple[str, nn.Linear]:
    """Name and module of a sequence classifier's linear head with that many outputs; BadInput where it has none."""
    from torch import nn

    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear) and head.out_features == outputs:
            return name, head
    count = "one output" if outputs == 1 else f"{outputs} outputs"
    raise BadInput(f"{type(model).__name__} has no linear score head with {count}; use another base model")
