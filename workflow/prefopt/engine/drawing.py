"""Next tokens from logits: the most likely ones, or draws with the random numbers of ``torch.multinomial``."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from prefopt.specs import SamplingSpec

_PROBED = 4096


class Drawer:
    """Draws tokens for a batch of B prompts, also when only some of its rows are still being written.

    Every draw takes the B * V random numbers that ``torch.multinomial`` would take for the whole batch, so a row's
    tokens do not depend on when the others end. Temperature and top-p are those of transformers' logits warpers.
    """

    def __init__(self, sampling: SamplingSpec, batch: int) -> None:
        self._temperature, self._top_p, self._batch = sampling.temperature, sampling.top_p, batch
        self._uniform: Tensor | None = None

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Tokens [R] from logits [R, V] of the batch's rows [R]: argmax of p / q with q ~ Exp(1), a draw from p."""
        if self._temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.float()
        if self._temperature != 1:
            logits = logits / self._temperature
        if self._top_p < 1:
            logits = nucleus(logits, self._top_p)
        return logits.softmax(dim=-1).div_(self._noise(logits, rows)).argmax(dim=-1)

    def _noise(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Exp(1) numbers [R, V] of these rows; the rest of the batch's are drawn and dropped."""
        shape = (self._batch, logits.shape[1])
        every = len(rows) == self._batch
        if logits.device.type != "cpu" or not _inverts_uniforms():
            drawn = torch.empty(shape, device=logits.device).exponential_()
            return drawn if every else drawn[rows]
        if self._uniform is None:
            self._uniform = torch.empty(shape, dtype=torch.float64)
        drawn = self._uniform.uniform_()
        drawn = drawn.neg() if every else drawn[rows].neg_()
        return drawn.log1p_().neg_().float()


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
