"""Tiny models and random token rows that the engine's tests share."""

from __future__ import annotations

import random

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from prefopt.models import new_causal_lm
from prefopt.specs import ScratchModel

WORDS = 40
PAD, BOS, EOS = 0, 1, 2


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[BOS]", "[EOS]", *(f"w{n}" for n in range(WORDS - 3))])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]")


def scratch(seed: int = 0) -> ScratchModel:
    return ScratchModel(kind="scratch", layers=2, hidden=32, heads=4, intermediate=64, max_positions=64, seed=seed)


def causal_lm(seed: int = 0):
    return new_causal_lm(scratch(seed), tokenizer())


def token_rows(count: int, low: int, high: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, WORDS) for _ in range(draw.randint(low, high))] for _ in range(count)]


def responses(count: int, seed: int, high: int = 12) -> list[list[int]]:
    return [[*row, EOS] for row in token_rows(count, 0, high, seed)]


def pairs(count: int, seed: int) -> dict[str, list[list[int]]]:
    return {
        "prompt_ids": [[BOS, *row] for row in token_rows(count, 1, 9, seed)],
        "chosen_ids": responses(count, seed + 1),
        "rejected_ids": responses(count, seed + 2),
    }


def exact(model):
    """The model in float64, also inside a Llama's norms, which round to float32."""
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, LlamaRMSNorm):
                own = nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon)
                own.weight = norm.weight
                setattr(module, name, own)
    return model.double().eval()
