"""Answers that a policy draws to prompts, and what they cost it in log-probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from prefopt.engine.adapters import adapters_off
from prefopt.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.specs import SamplingSpec

Ids = Sequence[Sequence[int]]

_SEEDS_PER_RUN = 100_000


@dataclass(frozen=True)
class Mixture:
    """Policies that take turns: for every prompt one of them is drawn, with these shares, and answers it."""

    models: tuple[PreTrainedModel, ...]
    shares: tuple[float, ...]  # above 0, sum 1

    def drawn(self, count: int, seed: int) -> np.ndarray:
        """Numbers of the policies that answer ``count`` prompts."""
        import numpy as np

        return np.random.default_rng([seed, 13]).choice(len(self.models), size=count, p=self.shares)


class Answer(TypedDict):
    """One response: token ids with their end token, its text, and whether it came to an end."""

    ids: list[int]
    text: str
    ended: bool


def instruction_text(prompt: Sequence[Mapping[str, str]]) -> str:
    """A prompt as one string: the bare text of a single message, else one labelled paragraph per turn."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def seed_of_draw(sampling: SamplingSpec, seed: int, draw: int) -> int:
    """The seed of one draw of the run with that seed: sampling's + 100 000 * run seed + draw."""
    return sampling.seed + _SEEDS_PER_RUN * seed + draw


def steps_of_fractions(fractions: Sequence[float], steps: int) -> dict[int, float]:
    """round(fraction * steps) -> fraction; BadInput where two fractions fall on one step."""
    found: dict[int, float] = {}
    for fraction in fractions:
        step = round(fraction * steps)
        if step in found:
            raise BadInput(
                f"evaluate.at: {found[step]:g} and {fraction:g} are both step {step} of {steps}; "
                "give fewer fractions, or train for more steps"
            )
        found[step] = fraction
    return found


def draw_answers(
    model: PreTrainedModel | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Ids,
    sampling: SamplingSpec,
    *,
    state: Path | None = None,
) -> list[Answer]:
    """One answer per prompt, in the prompts' order; ``state`` and BadInput as in ``generation.generate``."""
    return draws_of_answers(model, tokenizer, prompt_ids, sampling, [sampling.seed], state=state)[0]


def draws_of_answers(
    model: PreTrainedModel | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Ids,
    sampling: SamplingSpec,
    seeds: Sequence[int],
    *,
    state: Path | None = None,
) -> list[list[Answer]]:
    """For every seed the answers that ``draw_answers`` gives with it in the place of ``sampling.seed``."""
    from prefopt.generation import generate_draws
    from prefopt.inputs.rendering import response_texts

    if isinstance(model, Mixture):
        return [_mixed_answers(model, tokenizer, prompt_ids, sampling, seed, state) for seed in seeds]
    found = []
    for drawn in generate_draws(model, tokenizer, prompt_ids, sampling, seeds, state=state):
        texts = response_texts(tokenizer, drawn.response_ids)
        rows = zip(drawn.response_ids, texts, drawn.ended, strict=True)
        found.append([Answer(ids=ids, text=text, ended=ended) for ids, text, ended in rows])
    return found


def _mixed_answers(  # noqa: PLR0917 - what a draw depends on
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Ids,
    sampling: SamplingSpec,
    seed: int,
    state: Path | None,
) -> list[Answer]:
    found: dict[int, Answer] = {}
    sampling = sampling.model_copy(update={"seed": seed})
    turns = mixture.drawn(len(prompt_ids), seed)
    for number, model in enumerate(mixture.models):
        rows = [row for row, turn in enumerate(turns) if turn == number]
        own = None if state is None else state / f"policy{number}"
        answers = draw_answers(model, tokenizer, [prompt_ids[row] for row in rows], sampling, state=own) if rows else []
        found |= dict(zip(rows, answers, strict=True))
    return [found[row] for row in range(len(prompt_ids))]


def _logp(model: PreTrainedModel | Mixture, prompt_ids: Ids, draws: Sequence[Ids], batch_size: int) -> np.ndarray:
    """log-probability of every response [N, draws]; of a mixture log sum_k share_k pi_k."""
    import numpy as np
    from scipy.special import logsumexp

    from prefopt.engine.bulk import score_draws

    if isinstance(model, Mixture):
        logp = [_logp(one, prompt_ids, draws, batch_size) for one in model.models]
        return logsumexp(logp, axis=0, b=np.reshape(model.shares, (-1, 1, 1)))
    return score_draws(model, prompt_ids, draws, batch_size=batch_size)


def log_ratio(
    policy: PreTrainedModel | Mixture,
    reference: PreTrainedModel,
    prompt_ids: Ids,
    draws: Sequence[Ids],
    *,
    batch_size: int,
) -> np.ndarray:
    """log policy(response) - log reference(response) [N, draws], nats, summed over tokens.

    ``draws`` holds responses to all prompts, several times over. The mean over the policy's own answers is an unbiased
    estimate of the sequence KL(policy || reference). Where both are one model, the reference is this model without its
    adapters.
    """
    logp = _logp(policy, prompt_ids, draws, batch_size)
    with adapters_off(reference) if reference is policy else nullcontext():
        return logp - _logp(reference, prompt_ids, draws, batch_size)
