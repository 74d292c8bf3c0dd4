"""Next tokens from logits: the most likely ones, or draws with the random numbers of ``torch.multinomial``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from prefopt.specs import SamplingSpec

_PROBED = 4096


class Drawer:
    """Draws tokens for batches of B prompts, one below the other, also when only some rows are still being written.

    Every batch has a seed and takes the B * V random numbers that ``torch.multinomial`` would take for the whole of it,
    so a row's tokens depend neither on when the others end nor on the batches beside its own. Temperature and top-p
    are those of transformers' logits warpers.
    """

    def __init__(self, sampling: SamplingSpec, batch: int, seeds: Sequence[int], device: torch.device) -> None:
        self._temperature, self._top_p, self._batch = sampling.temperature, sampling.top_p, batch
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._room: Tensor | None = None

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Tokens [R] from logits [R, V] of these of all rows [R]: argmax of p / q with q ~ Exp(1), a draw from p."""
        if self._temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.float()
        if self._temperature != 1:
            logits = logits / self._temperature
        if self._top_p < 1:
            logits = nucleus(logits, self._top_p)
        return logits.softmax(dim=-1).div_(self._noise(logits, rows)).argmax(dim=-1)

    def _noise(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Exp(1) numbers [R, V] of these rows; the rest of the batches' are drawn and dropped."""
        uniform = logits.device.type == "cpu" and _inverts_uniforms()
        if self._room is None:
            shape = (len(self._generators) * self._batch, logits.shape[1])
            self._room = torch.empty(shape, dtype=torch.float64 if uniform else torch.float32, device=logits.device)
        for part, generator in zip(self._room.split(self._batch), self._generators, strict=True):
            part.uniform_(generator=generator) if uniform else part.exponential_(generator=generator)
        drawn = self._room if len(rows) == len(self._room) else self._room[rows]
        return drawn.neg().log1p_().neg_().float() if uniform else drawn


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits [R, V] with -inf outside the smallest set of most likely tokens that has probability top_p or more.

    As transformers' TopPLogitsWarper, but that tokens exactly as likely as the least likely kept one are kept too.
    """
    if logits.device.type == "cpu":
        rising = torch.from_numpy(np.sort(logits.numpy(), axis=-1))  # many times faster than torch's sort
    else:
        rising = logits.sort(dim=-1).values
    dropped = (rising.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p).sum(dim=-1, keepdim=True)
    least = rising.gather(1, dropped.clamp_(max=logits.shape[1] - 1))
    return logits.masked_fill(logits < least, float("-inf"))


@lru_cache(maxsize=1)
def _inverts_uniforms() -> bool:
    """Whether Exp(1) numbers are -log(1 - u) of the generator's double uniforms here: seen on some numbers.

    It is so where torch fills them one by one, and computing them at once takes a third of the time. Builds that draw
    them with MKL have other numbers.
    """
    with torch.random.fork_rng(devices=[]):
        found = []
        for uniform in (False, True):
            torch.manual_seed(0)
            if uniform:
                drawn = torch.empty(_PROBED, dtype=torch.float64).uniform_().neg_().log1p_().neg_().float()
            else:
                drawn = torch.empty(_PROBED).exponential_()
            found.append((drawn, torch.get_rng_state()))
    (plain, after), (inverted, then) = found
    return torch.equal(after, then) and bool(((plain - inverted).abs() <= 1e-6 * plain).all())
