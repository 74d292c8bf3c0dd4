"""Tiny language models that can be asked for a judgement: random, torn, and one that always says the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.inputs.rendering import render_prompt
from prefopt.inputs.tokenizer_training import train_tokenizer
from prefopt.judges.templates import TEMPLATES, Question
from prefopt.models import new_causal_lm, save_model
from prefopt.specs import ScratchModel


def judge_tokenizer(kind: str = "bpe") -> PreTrainedTokenizerFast:
    """Trained on the judge's own prompts, so that these are few tokens."""
    words = [f"{t.system} {t.user}" for t in TEMPLATES.values()]
    return train_tokenizer([*words, "m M hello well then a b c"] * 3, kind, 700)


def tiny_judge(tokenizer: PreTrainedTokenizerFast, positions: int = 4096) -> LlamaForCausalLM:
    spec = ScratchModel(kind="scratch", layers=2, hidden=32, heads=4, intermediate=64, max_positions=positions)
    model = new_causal_lm(spec, tokenizer)
    with torch.no_grad():  # new weights are so small that all answers were nearly even
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def always(tokenizer: PreTrainedTokenizerFast, label: str) -> LlamaForCausalLM:
    """A model whose next token after an assistant's turn begins is ``label``: layers add nothing, embeddings decide."""
    model = tiny_judge(tokenizer)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = model.get_input_embeddings().weight
        embeddings.zero_()
        embeddings[tokenizer.convert_tokens_to_ids("<|assistant|>"), 0] = 1.0
        embeddings[tokenizer.convert_tokens_to_ids(label), 0] = 2.0
    return model


def torn(tokenizer: PreTrainedTokenizerFast, labels: Sequence[str]) -> LlamaForCausalLM:
    """A model that answers with one of the labels, which one depends on the prompt.

    Both labels point where the last hidden state does, each with some noise of its own.
    """
    model = tiny_judge(tokenizer)
    turns = TEMPLATES["ranking"].messages(Question("prompt 0", "a 0", "b 0"), labels)
    ids = torch.tensor([render_prompt(tokenizer, turns, "chat")])
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        hidden = model.model(ids)[0][0, -1]
        embeddings = model.get_input_embeddings().weight
        for label in labels:
            own = 0.1 * torch.randn(len(hidden), generator=noise)
            embeddings[tokenizer.convert_tokens_to_ids(label)] = 2 * hidden / hidden.norm() + own
    return model


def folder_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    save_model(model, tokenizer, folder)
    return folder
