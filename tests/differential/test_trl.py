"""The engine beside TRL's DPOTrainer: the same pairs, order, reference and optimiser must give the same run."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast

from prefopt import scoring
from prefopt.models import new_causal_lm
from prefopt.scoring import response_scores
from prefopt.specs import ScratchModel, TrainSpec
from prefopt.trainer import train
from prefopt.training.objectives import rows_of_stream
from prefopt.training.policy_objective import PolicyObjective

pytestmark = pytest.mark.oracle

STEPS, BATCH, SIZE, BETA, RATE, SEED = 50, 8, 60, 0.3, 1e-3, 7


@cache
def in_order() -> type:
    """TRL's trainer, taking rows in the order given, and keeping every step's loss unrounded."""
    trl = pytest.importorskip("trl")  # here, since every process that collects this file would wait for its import

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def _compute_loss(self, model, inputs, return_outputs):
            found = super()._compute_loss(model, inputs, return_outputs)
            self.curve.append((found[0] if return_outputs else found).item())
            return found

    return InOrder


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[BOS]", "[EOS]", *(f"w{n}" for n in range(50))])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]")


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)

    def words(low, high):
        return " ".join(f"w{draw.randrange(50)}" for _ in range(draw.randint(low, high)))

    return [
        {"prompt": f"[BOS] {words(1, 10)} ", "chosen": f"{words(1, 14)} ", "rejected": f"{words(1, 14)} "}
        for _ in range(SIZE)
    ]


@pytest.fixture(scope="module")
def ids(tokenizer, texts):
    end = tokenizer.eos_token
    return {
        "prompt_ids": [tokenizer(row["prompt"]).input_ids for row in texts],
        "chosen_ids": [tokenizer(row["chosen"] + end).input_ids for row in texts],
        "rejected_ids": [tokenizer(row["rejected"] + end).input_ids for row in texts],
    }


def new_model(tokenizer, seed):
    spec = ScratchModel(kind="scratch", layers=2, hidden=32, heads=4, intermediate=64, max_positions=64, seed=seed)
    return new_causal_lm(spec, tokenizer)


def dpo_trainer(tokenizer, texts, *, folder, policy, reference, optimizer):
    order = [row for step in range(STEPS) for row in rows_of_stream(SIZE, SEED, step * BATCH, BATCH)]
    trainer_of = in_order()
    settings = pytest.importorskip("trl").DPOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim={"adamw": "adamw_torch", "rmsprop": "rmsprop"}[optimizer],
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=BETA,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    rows = pytest.importorskip("datasets").Dataset.from_list([texts[row] for row in order])
    trainer = trainer_of(
        model=policy, ref_model=reference, args=settings, train_dataset=rows, processing_class=tokenizer
    )
    trainer.curve = []
    return trainer, order


@pytest.mark.parametrize(("optimizer", "lean"), [("adamw", False), ("rmsprop", True)])
def test_loss_and_weights_of_50_steps_are_those_of_trl(  # noqa: PLR0917 - fixtures
    monkeypatch, tmp_path, tokenizer, texts, ids, optimizer, lean
):
    """lean: head and log-softmax fused in chunks, layers checkpointed. Bounds: some 10 times what float32 makes."""
    if lean:
        monkeypatch.setattr(scoring, "_SMALL_LOGITS", 0)
    policy, reference = new_model(tokenizer, 0), new_model(tokenizer, 1)  # two models: no loss starts at log 2
    theirs, order = dpo_trainer(
        tokenizer,
        texts,
        folder=tmp_path / "trl",
        policy=new_model(tokenizer, 0),
        reference=reference,
        optimizer=optimizer,
    )
    for column, rows in ids.items():
        assert theirs.train_dataset[column] == [rows[row] for row in order]  # same tokens, same order
    theirs.train()

    with torch.no_grad():
        signals = {
            f"ref_{side}_logp": response_scores(reference, ids["prompt_ids"], ids[f"{side}_ids"]).logp.tolist()
            for side in ("chosen", "rejected")
        }
    objective = PolicyObjective(**ids, pair_ids=range(SIZE), loss="dpo", loss_params={"beta": BETA}, signals=signals)
    spec = TrainSpec(steps=STEPS, batch_size=BATCH, learning_rate=RATE, optimizer=optimizer)
    ours = train(
        policy,
        objective,
        spec,
        seed=SEED,
        state_dir=tmp_path / "state",
        micro_batch=3,
        checkpoint_steps=100,
        device="cpu",
        progress=False,
        gradient_checkpointing=lean,
    )
    curve = [step["loss"] for step in ours.metrics]
    assert len(theirs.curve) == STEPS
    assert curve == pytest.approx(theirs.curve, abs=2e-5)
    assert max(curve) - min(curve) > 0.2  # the runs do go somewhere
    for (name, mine), other in zip(policy.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-4, msg=name)


def test_sequence_log_probabilities_are_those_of_trl(tmp_path, tokenizer, texts, ids):
    model = new_model(tokenizer, 3)
    theirs, order = dpo_trainer(
        tokenizer, texts, folder=tmp_path, policy=new_model(tokenizer, 0), reference=model, optimizer="adamw"
    )
    rows = order[:BATCH]
    inputs = theirs.data_collator([theirs.train_dataset[at] for at in range(BATCH)])
    for side, expected in zip(
        ("chosen", "rejected"), theirs.compute_ref_log_probs(theirs.ref_model, inputs), strict=True
    ):
        responses = [ids[f"{side}_ids"][row] for row in rows]
        scores = response_scores(model, [ids["prompt_ids"][row] for row in rows], responses)
        torch.testing.assert_close(scores.logp, expected, rtol=1e-6, atol=1e-4)
