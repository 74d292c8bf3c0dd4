"""A local causal language model as judge: next-token log-probabilities of two labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefopt import team
from prefopt.errors import BadInput
from prefopt.inputs.rendering import end_ids, render_prompt, response_ids, style_of
from prefopt.judges.answers import RawAnswer
from prefopt.judges.pairwise import Keep
from prefopt.judges.templates import CONTROL, JudgeTemplate, Question
from prefopt.processes.shares import shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class CausalJudge:
    """Asks a model in its own chat format (plain turns where it has none), ``batch_size`` questions at a time."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: JudgeTemplate
    labels: Sequence[str]
    batch_size: int

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """Keep log P(label | prompt) of both labels; a prompt longer than the model's positions has no answer.

        One of several processes asks its share of the questions.
        """
        import torch

        from prefopt.scoring import length_batches, response_scores

        answers = label_ids(self.tokenizer, self.labels)
        prompts = self.prompt_ids(questions)
        room = getattr(self.model.config, "max_position_embeddings", None)
        fitting = [row for row, ids in enumerate(prompts) if room is None or len(ids) < room]
        for row in sorted(set(range(len(prompts))) - set(fitting)):
            keep(row, RawAnswer(f"not asked: {len(prompts[row])} tokens, the model has {room} positions"))
        lengths = [len(prompts[row]) for row in fitting]
        batches = list(length_batches(lengths, self.batch_size))
        for number in shares([sum(lengths[place] for place in batch) for batch in batches], team.size())[team.rank()]:
            team.check()
            rows = [fitting[place] for place in batches[number]]
            asked = [prompts[row] for row in rows]
            replies = [[answer] for answer in answers for _ in rows]
            with torch.no_grad():
                logps = response_scores(self.model, asked, replies).logp.view(2, len(rows)).T.tolist()
            for row, (first, second) in zip(rows, logps, strict=True):
                found = dict(zip(self.labels, (first, second), strict=True))
                keep(row, RawAnswer(max(found, key=found.__getitem__), found, len(prompts[row]), 1))

    def prompt_ids(self, questions: Sequence[Question]) -> list[list[int]]:
        """Token ids of the questions up to where the label stands; no text in them spells a control token."""
        control = control_pattern(self.tokenizer)
        turns = (self.template.messages(question, self.labels, control) for question in questions)
        return [render_prompt(self.tokenizer, messages, "auto") for messages in turns]


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What chat formats use for turns, and every token that this tokenizer takes out of a text before all others."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    own = sorted((re.escape(token) for token in added if token.strip()), key=len, reverse=True)
    return re.compile("|".join([*own, CONTROL.pattern]))


def label_ids(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[int]:
    """The one token of every label where an answer starts; BadInput where a label has more, or none of its own."""
    style = style_of(tokenizer, (), "auto")
    found: list[int] = []
    for label in labels:
        ids = response_ids(tokenizer, label, style)[: -len(end_ids(tokenizer, style))]
        if len(ids) != 1:
            raise BadInput(f"label '{label}' is {len(ids)} tokens for the judge's tokenizer; declare other 'labels'")
        if ids[0] in {tokenizer.unk_token_id, *found}:
            raise BadInput(f"label '{label}' has no token of its own for the judge's tokenizer; declare other 'labels'")
        found += ids
    return found
