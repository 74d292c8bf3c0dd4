"""TRL's DPOTrainer on the pairs of ``gpu_shapes``, in an environment that has TRL; started by ``gpu_step``."""

from __future__ import annotations

import tempfile
from typing import Any

import trl
from benchmarks.conditions import Found, serve
from benchmarks.gpu_shapes import SHAPES, Clock, Conditions, equal_pairs, new_llama
from benchmarks.trl_dpo import InOrder, Ticks, rows_of, tokenizer_of


def measure(**given: Any) -> Found:
    """Rates and memory of a bf16 run with reference scores that TRL computes before it."""
    on = Conditions(**given)
    vocabulary = SHAPES[on.shape]["vocabulary"]
    pairs = equal_pairs(on.steps * on.batch, on.length, vocabulary)
    shorter = {name: rows if name == "prompt_ids" else [row[:-1] for row in rows] for name, rows in pairs.items()}
    policy = new_llama(on.shape, on.device, on.length)
    clock = Clock(on.device, on.warm_up)
    adapter = {}
    if on.lora:
        from peft import LoraConfig

        adapter = {"peft_config": LoraConfig(r=on.lora, target_modules="all-linear", task_type="CAUSAL_LM")}
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=policy,
            args=trl.DPOConfig(
                output_dir=folder,
                max_steps=on.steps,
                per_device_train_batch_size=on.micro,
                gradient_accumulation_steps=on.batch // on.micro,
                learning_rate=1e-6,
                bf16=True,
                precompute_ref_log_probs=True,
                gradient_checkpointing=on.checkpointing,
                torch_compile=on.compiled,
                max_length=on.length,
                use_cpu=on.device == "cpu",
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=rows_of(shorter),  # TRL appends the end token itself
            processing_class=tokenizer_of(vocabulary),
            callbacks=[Ticks(clock)],
            **adapter,
        )
        trainer.train()
    return {**clock.found(policy, pairs, on.batch, adapted=on.lora > 0), "trl": trl.__version__}


if __name__ == "__main__":
    serve(measure)
