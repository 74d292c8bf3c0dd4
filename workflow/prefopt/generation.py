"""Sampling responses from a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefopt import team
from prefopt.digests import digest
from prefopt.errors import BadInput, FailedCheck
from prefopt.files import read_json, write_json
from prefopt.inputs.rendering import end_ids
from prefopt.processes.shares import shares
from prefopt.progress import Progress

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.specs import SamplingSpec

Ids = Sequence[Sequence[int]]
DrawBatch = Callable[[Ids, int], list[list[int]]]  # prompts and a seed -> tokens, which may go on after the first end


class Generations(NamedTuple):
    """Token ids of N responses, end token included where there is one, and whether each came to an end."""

    response_ids: list[list[int]]
    ended: list[bool]


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the tokenizer's, the generation config's, and the chat template's end of turn.

    Raises BadInput where there is none.
    """
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    turn = end_ids(tokenizer, "chat")[-1] if tokenizer.chat_template else None
    ends = sorted({int(end) for end in [tokenizer.eos_token_id, turn, *configured] if end is not None})
    if not ends:
        raise BadInput("neither tokenizer nor model has an end-of-sequence token, so responses could never end")
    return ends


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Ids,
    sampling: SamplingSpec,
    *,
    state: Path | None = None,
    progress: bool = True,
) -> Generations:
    """One response per prompt, in the prompts' order; temperature 0 takes the most likely token.

    Batch b of sampling.batch_size prompts draws from the seed (sampling.seed, b), so that what is sampled depends on
    the prompts and the sampling spec only. The model's own decoding defaults are not used, and the global random
    state is left as it was. Finished batches are kept in the folder ``state`` and not drawn again; a folder belongs to
    one model. As one of several processes it draws its share of the batches, the same text whatever their number; that
    takes ``state``. Raises BadInput for an empty prompt, where a prompt and max_new_tokens exceed the positions that
    the model was made for, and for an engine that is not installed.
    """
    _check_prompts(model, prompt_ids, sampling)
    ends = end_token_ids(model, tokenizer)
    starts = range(0, len(prompt_ids), sampling.batch_size)
    batches = [_Batch(prompt_ids, sampling, ends, number, state) for number in range(len(starts))]
    left = [batch for batch in batches if batch.kept() is None] if team.size() > 1 else batches
    team.barrier()  # all have looked before anyone draws
    mine = shares([batch.cost for batch in left], team.size())[team.rank()]
    with (
        _engine(model, tokenizer, sampling, ends) as draw,
        Progress(len(mine), "generate", shown=progress) as bar,
    ):
        for number in mine:
            team.check()
            left[number].respond(draw)
            bar.advance()
    team.barrier()
    responses = [response for batch in batches for response in batch.merged()]
    return Generations(responses, [response[-1] in ends for response in responses])


class _Batch:
    """Prompts whose responses are drawn from one seed, and where these are kept."""

    def __init__(
        self, prompt_ids: Ids, sampling: SamplingSpec, ends: list[int], number: int, state: Path | None
    ) -> None:
        start = number * sampling.batch_size
        self._prompts = [[*prompt] for prompt in prompt_ids[start : start + sampling.batch_size]]
        self._seed, self._ends = _batch_seed(sampling.seed, number), ends
        self._path = state / f"batch-{number:06d}.json" if state is not None else None
        self._asked = {"prompts": self._prompts, "sampling": sampling.model_dump(), "seed": self._seed, "ends": ends}
        self._responses: list[list[int]] | None = None
        self.cost = sum(map(len, self._prompts)) + len(self._prompts) * sampling.max_new_tokens

    def kept(self) -> list[list[int]] | None:
        """The responses in a file that was made for exactly this."""
        if self._path is None or not self._path.is_file():
            return None
        kept = read_json(self._path)
        return kept["responses"] if kept["of"] == self._digest() else None

    def respond(self, draw: DrawBatch) -> None:
        """Draw and keep the responses, if they are not there; each is cut after its first end token."""
        self._responses = self.kept()
        if self._responses is None:
            self._responses = [_cut(row, self._ends) for row in draw(self._prompts, self._seed)]
            if self._path is not None:
                write_json(self._path, {"of": self._digest(), "responses": self._responses})

    def merged(self) -> list[list[int]]:
        """The responses, one per prompt, whichever process drew them; FailedCheck where they are not."""
        found = self.kept() if self._responses is None else self._responses
        if found is None or len(found) != len(self._prompts):
            raise FailedCheck(f"{self._path}: not one response for each of {len(self._prompts)} prompts; run again")
        return found

    def _digest(self) -> str:
        return digest(self._asked)


def _check_prompts(model: PreTrainedModel, prompt_ids: Ids, sampling: SamplingSpec) -> None:
    if any(len(prompt) == 0 for prompt in prompt_ids):
        raise BadInput(f"prompt {[len(p) for p in prompt_ids].index(0)} has no tokens; a prompt needs at least one")
    largest = max((max(prompt) for prompt in prompt_ids), default=0)
    if largest >= (embedded := model.get_input_embeddings().weight.shape[0]):
        raise BadInput(
            f"a prompt has the token id {largest}, and the model has embeddings for {embedded} tokens; use the "
            "tokenizer that the model was trained with"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(prompt) for prompt in prompt_ids), default=0)
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise BadInput(
            f"a prompt of {longest} tokens and max_new_tokens {sampling.max_new_tokens} exceed the model's {limit} "
            "positions; lower sampling.max_new_tokens or tokens.max_prompt_tokens"
        )


def _batch_seed(seed: int, number: int) -> int:
    import numpy as np

    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _engine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSpec, ends: list[int]
) -> Iterator[DrawBatch]:
    """What draws a batch: vLLM, the loop of ``decoding`` where it knows the model, else transformers' ``generate``."""
    if sampling.engine == "vllm":
        from prefopt.engine.vllm_engine import vllm_drawing

        with vllm_drawing(model, tokenizer, sampling, ends) as drawn:
            yield drawn
        return
    import torch

    from prefopt.engine.decoding import decode, decodes
    from prefopt.engine.drawing import Drawer

    def draw(prompts: Ids, seed: int) -> list[list[int]]:
        known = decodes(model)
        torch.manual_seed(seed)
        if not known:
            return _transformers_batch(model, prompts, ends)
        choose = Drawer(sampling, len(prompts))
        return decode(model, prompts, choose=choose, ends=ends, max_new_tokens=sampling.max_new_tokens)

    gpus = range(torch.cuda.device_count()) if model.device.type == "cuda" else []
    with _decoding(model, _generation_config(sampling, ends)), torch.random.fork_rng(devices=gpus), torch.no_grad():
        yield draw


def _generation_config(sampling: SamplingSpec, ends: list[int]) -> GenerationConfig:
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(max_new_tokens=sampling.max_new_tokens, eos_token_id=ends, pad_token_id=ends[0], **chosen)


@contextmanager
def _decoding(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """The model with ``config`` as its only generation config: the library fills gaps from the model's own one."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _transformers_batch(model: PreTrainedModel, prompt_ids: Ids, ends: list[int]) -> list[list[int]]:
    """Tokens after one batch of left-padded prompts."""
    import torch

    rows = [torch.tensor(prompt) for prompt in prompt_ids]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ends[0], padding_side="left")
    lengths = torch.tensor([len(prompt) for prompt in prompt_ids])
    attention = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()
    out = model.generate(input_ids=ids.to(model.device), attention_mask=attention.to(model.device))
    return out[:, ids.shape[1] :].tolist()


def _cut(ids: list[int], ends: list[int]) -> list[int]:
    stop = next((at for at, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: stop + 1]
