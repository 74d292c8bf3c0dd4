"""TRL's DPOTrainer on the pairs of ``gpu_shapes``, in an environment that has TRL; started by ``gpu_step``."""

from __future__ import annotations

import tempfile

import trl
from benchmarks.conditions import Found, serve
from benchmarks.gpu_shapes import SHAPES, Clock, equal_pairs, new_llama
from benchmarks.trl_dpo import InOrder, Ticks, rows_of, tokenizer_of


def measure(  # noqa: PLR0917 - the conditions of a measurement
    shape: str,
    device: str,
    length: int,
    steps: int,
    warm_up: int,
    batch: int,
    micro: int,
    lora: int,
    checkpointing: bool,
    compiled: bool,
) -> Found:
    """Rates and memory of a bf16 run with reference scores that TRL computes before it."""
    vocabulary = SHAPES[shape]["vocabulary"]
    pairs = equal_pairs(steps * batch, length, vocabulary)
    shorter = {name: rows if name == "prompt_ids" else [row[:-1] for row in rows] for name, rows in pairs.items()}
    policy = new_llama(shape, device, length)
    clock = Clock(device, warm_up)
    adapter = {}
    if lora:
        from peft import LoraConfig

        adapter = {"peft_config": LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM")}
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=policy,
            args=trl.DPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=batch // micro,
                learning_rate=1e-6,
                bf16=True,
                precompute_ref_log_probs=True,
                gradient_checkpointing=checkpointing,
                torch_compile=compiled,
                max_length=length,
                use_cpu=device == "cpu",
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
    plain = policy.base_model.model if lora else policy
    return {**clock.found(plain, pairs, batch, adapted=lora > 0), "trl": trl.__version__}


if __name__ == "__main__":
    serve(measure)
