"""What both sides of ``gpu_step`` share: shapes of models, pairs of one length, and steps timed on the device's clock.

Needs torch and transformers, not prefopt.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.conditions import Found, new_pairs

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv": 8, "vocabulary": 128_256, "tied": True},
    "8b": {"hidden": 4096, "inner": 14_336, "layers": 32, "heads": 32, "kv": 8, "vocabulary": 128_256, "tied": False},
    "tiny": {"hidden": 64, "inner": 192, "layers": 2, "heads": 4, "kv": 2, "vocabulary": 512, "tied": True},
}
"""Those of Llama 3.2 1B and Llama 3.1 8B, and one to try the command with."""


@dataclass(frozen=True)
class Conditions:
    """Of one measurement; batch and micro are pairs, per step and at a time."""

    shape: str
    device: str
    length: int
    steps: int
    warm_up: int
    batch: int
    micro: int
    lora: int  # rank, 0: all weights are trained
    checkpointing: bool
    compiled: bool


def new_llama(shape: str, device: str, positions: int) -> Any:
    """A Llama of this shape with random weights in fp32, made on the device; the same every time on one device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv"],
        vocab_size=size["vocabulary"],
        tie_word_embeddings=size["tied"],
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config)


def equal_pairs(count: int, length: int, vocabulary: int) -> dict[str, list[list[int]]]:
    """Random pairs whose sequences have ``length`` tokens, half of them prompt."""
    half = length // 2
    return new_pairs(count, vocabulary=vocabulary, prompt=half, response=length - half, spread=0, longest=length)


def floor_tflop(model: Any, pairs: dict[str, list[list[int]]], part: slice, *, adapted: bool) -> float:
    """6 N tokens, 4 N where weights take no gradient: layers for every token, each prompt once; the head for responses.

    Attention over the length is left out. The same work for both sides, whatever they compute twice.
    """
    prompt, chosen, rejected = (sum(map(len, rows[part])) for rows in pairs.values())
    layers = sum(p.numel() for name, p in model.model.layers.named_parameters() if "lora" not in name)
    head = model.lm_head.weight.numel()
    return (4 if adapted else 6) * (layers * (prompt + chosen + rejected) + head * (chosen + rejected)) / 1e12


class Clock:
    """Wall seconds of the steps after the first ``warm_up`` ones, with all work of the device done."""

    def __init__(self, device: str, warm_up: int) -> None:
        self.device, self.warm_up, self.steps, self.started, self.ended = device, warm_up, 0, 0.0, 0.0

    def tick(self) -> None:
        """After every step."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        self.steps += 1
        self.ended = time.perf_counter()
        if self.steps == self.warm_up:
            self.started = self.ended

    def found(self, model: Any, pairs: dict[str, list[list[int]]], batch: int, *, adapted: bool) -> Found:
        """Rates of the timed steps, and the most memory that tensors took on the GPU."""
        import torch

        timed = slice(self.warm_up * batch, self.steps * batch)
        seconds = self.ended - self.started
        tokens = sum(2 * len(p) + len(c) + len(r) for p, c, r in list(zip(*pairs.values(), strict=True))[timed])
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        return {
            "seconds": round(seconds, 4),
            "pairs_per_s": round((self.steps - self.warm_up) * batch / seconds, 4),
            "tokens_per_s": round(tokens / seconds, 1),
            "tflop_per_s": round(floor_tflop(model, pairs, timed, adapted=adapted) / seconds, 4),
            "peak_gb": None if peak is None else round(peak / 1e9, 2),
        }
