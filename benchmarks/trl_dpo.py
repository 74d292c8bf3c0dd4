"""TRL's DPOTrainer on the pairs of ``conditions``, in an environment that has TRL; started by ``dpo_step``."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl
from benchmarks.conditions import Found, Timer, new_model, new_pairs, serve
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import SequentialSampler


class InOrder(trl.DPOTrainer):
    """Takes the rows as they stand."""

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)


class Ticks(transformers.TrainerCallback):
    """Tells a timer of every step's end."""

    def __init__(self, timer: Any) -> None:
        self.timer = timer

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """As the trainer calls it."""
        self.timer.tick()


def tokenizer_of(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """Words w3, w4 ... are tokens 3, 4 ...; the end token is no word, TRL puts it after each response."""
    words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, **{f"w{token}": token for token in range(3, vocabulary)}}
    inner = Tokenizer(WordLevel(words, unk_token="[PAD]"))
    inner.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]"
    )


def rows_of(pairs: dict[str, list[list[int]]]) -> datasets.Dataset:
    """Pairs as texts of such words."""
    text = {
        name.removesuffix("_ids"): ["".join(f"w{token} " for token in row) for row in rows]
        for name, rows in pairs.items()
    }
    return datasets.Dataset.from_dict(text)


def measure(
    *,
    pairs: dict[str, Any],
    model: dict[str, Any],
    steps: int,
    warm_up: int,
    batch: int,
    settings: dict[str, Any],
    compact: bool = False,
) -> Found:
    """Pairs per CPU second and peak memory of a run; ``settings`` are DPOConfig's, all others stand at its defaults.

    compact: the head on response positions alone. TRL does that on GPUs and has no setting for it.
    """
    torch.set_num_threads(1)
    if compact:
        trl.trainer.utils._use_triton = lambda _device: True
    vocabulary = model.get("vocabulary", 8192)
    rows = new_pairs(steps * batch, vocabulary=vocabulary, **pairs)
    policy = new_model(**model)
    for side in ("chosen_ids", "rejected_ids"):  # TRL appends the end token itself
        rows[side] = [row[:-1] for row in rows[side]]
    with tempfile.TemporaryDirectory() as folder:
        given = trl.DPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        timer = Timer(warm_up)
        reference = None if given.precompute_ref_log_probs else copy.deepcopy(policy)
        trainer = InOrder(
            model=policy,
            ref_model=reference,
            args=given,
            train_dataset=rows_of(rows),
            processing_class=tokenizer_of(vocabulary),
            callbacks=[Ticks(timer)],
        )
        expected = sum(len(part) + len(end) for part, end in zip(rows["prompt_ids"], rows["chosen_ids"], strict=True))
        tokens = sum(map(len, trainer.train_dataset["prompt_ids"])) + sum(map(len, trainer.train_dataset["chosen_ids"]))
        if tokens != expected + len(rows["prompt_ids"]):
            raise SystemExit(f"TRL sees {tokens} tokens of prompts and chosen responses, not {expected}")
        trainer.train()
    return {**timer.found(batch), "trl": trl.__version__}


if __name__ == "__main__":
    serve(measure)
