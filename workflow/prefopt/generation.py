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
# prompts and seeds -> per seed a response to each prompt, which may go on after its first end token
DrawBatch = Callable[[Ids, Sequence[int]], list[list[list[int]]]]

_TOGETHER_BYTES = 1 << 27  # of keys and values up to which draws with several seeds share their passes


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
    seeds = [sampling.seed]
    return generate_draws(model, tokenizer, prompt_ids, sampling, seeds, state=state, progress=progress)[0]


def generate_draws(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Ids,
    sampling: SamplingSpec,
    seeds: Sequence[int],
    *,
    state: Path | None = None,
    progress: bool = True,
) -> list[Generations]:
    """For every seed what ``generate`` gives with it in the place of ``sampling.seed``.

    Draws of a small model share their passes: a batch's prompts are read once for all of them.
    """
    _check_prompts(model, prompt_ids, sampling)
    ends = end_token_ids(model, tokenizer)
    starts = range(0, len(prompt_ids), sampling.batch_size)
    batches = [_Batch(prompt_ids, sampling, seeds, ends, number=number, state=state) for number in range(len(starts))]
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
    drawn = [[row for rows in parts for row in rows] for parts in zip(*(b.merged() for b in batches), strict=True)]
    drawn = drawn or [[] for _ in seeds]
    return [Generations(rows, [row[-1] in ends for row in rows]) for rows in drawn]


class _Batch:
    """Prompts whose responses are drawn from one seed per draw, and where these are kept."""

    def __init__(
        self,
        prompt_ids: Ids,
        sampling: SamplingSpec,
        seeds: Sequence[int],
        ends: list[int],
        *,
        number: int,
        state: Path | None,
    ) -> None:
        start = number * sampling.batch_size
        self._prompts = [[*prompt] for prompt in prompt_ids[start : start + sampling.batch_size]]
        self._seeds, self._ends = [_batch_seed(seed, number) for seed in seeds], ends
        self._path = state / f"batch-{number:06d}.json" if state is not None else None
        self._asked = {"prompts": self._prompts, "sampling": sampling.model_dump(), "seeds": self._seeds, "ends": ends}
        self._responses: list[list[list[int]]] | None = None
        self.cost = sum(map(len, self._prompts)) + len(self._prompts) * sampling.max_new_tokens

    def kept(self) -> list[list[list[int]]] | None:
        """The responses in a file that was made for exactly this."""
        if self._path is None or not self._path.is_file():
            return None
        kept = read_json(self._path)
        return kept["responses"] if kept["of"] == self._digest() else None

    def respond(self, draw: DrawBatch) -> None:
        """Draw and keep the responses, if they are not there; each is cut after its first end token."""
        self._responses = self.kept()
        if self._responses is None:
            drawn = draw(self._prompts, self._seeds)
            self._responses = [[_cut(row, self._ends) for row in rows] for rows in drawn]
            if self._path is not None:
                write_json(self._path, {"of": self._digest(), "responses": self._responses})

    def merged(self) -> list[list[list[int]]]:
        """The responses of every draw, one per prompt, whichever process drew them; FailedCheck where they are not."""
        found = self.kept() if self._responses is None else self._responses
        if found is None or [len(rows) for rows in found] != [len(self._prompts) for _ in self._seeds]:
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

    def draw(prompts: Ids, seeds: Sequence[int]) -> list[list[list[int]]]:
        if not decodes(model):
            return [_transformers_batch(model, prompts, ends, seed) for seed in seeds]
        found: list[list[list[int]]] = []
        for some in _together(model, prompts, seeds, sampling.max_new_tokens):
            choose = Drawer(sampling, len(prompts), some, model.device)
            every = [*prompts] * len(some)
            rows = decode(model, every, choose=choose, ends=ends, max_new_tokens=sampling.max_new_tokens)
            found += [rows[start : start + len(prompts)] for start in range(0, len(rows), len(prompts))]
        return found

    gpus = range(torch.cuda.device_count()) if model.device.type == "cuda" else []
    with _decoding(model, _generation_config(sampling, ends)), torch.random.fork_rng(devices=gpus), torch.no_grad():
        yield draw


def _together(model: PreTrainedModel, prompts: Ids, seeds: Sequence[int], new: int) -> list[Sequence[int]]:
    """The seeds whose draws share their passes: as many as have few keys and values, at least one at a time."""
    config = model.config.get_text_config()
    slots = len(prompts) * (max(map(len, prompts)) + new)
    size = slots * 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    count = max(1, _TOGETHER_BYTES // size)
    return [seeds[start : start + count] for start in range(0, len(seeds), count)]


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


def _transformers_batch(model: PreTrainedModel, prompt_ids: Ids, ends: list[int], seed: int) -> list[list[int]]:
    """Tokens after one batch of left-padded prompts."""
    import torch

    torch.manual_seed(seed)

    rows = [torch.tensor(prompt) for prompt in prompt_ids]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ends[0], padding_side="left")
    lengths = torch.tensor([len(prompt) for prompt in prompt_ids])
    attention = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()
    out = model.generate(input_ids=ids.to(model.device), attention_mask=attention.to(model.device))
    return out[:, ids.shape[1] :].tolist()


def _cut(ids: list[int], ends: list[int]) -> list[int]:
    stop = next((at for at, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: stop + 1]
