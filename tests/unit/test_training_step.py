"""What a training step computes, counted: forward passes, tokens through the model, logits, reference passes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from prefopt import scoring
from prefopt.engine import fused_head
from prefopt.engine.packed_attention import packs, padded
from prefopt.engine.precision import set_precision
from prefopt.scoring import projects_linearly, response_scores
from prefopt.specs import TrainSpec
from prefopt.trainer import train
from prefopt.training.objectives import Moment, rows_of_stream
from prefopt.training.policy_objective import PolicyObjective
from prefopt.training.training_run import Run, micro_batches

SIZE, WORDS, WIDTH = 12, 3000, 32
PAIRS = {name: [[token % WORDS for token in row] for row in rows] for name, rows in tiny.pairs(SIZE, seed=6).items()}
SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=WORDS, max_position_embeddings=64, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).eval()
    assert packs(model)  # the probes of the model are over after this
    assert projects_linearly(model)
    return model


def dpo(reference):
    with torch.no_grad():
        chosen, rejected = response_scores(
            reference, PAIRS["prompt_ids"], PAIRS["chosen_ids"] + PAIRS["rejected_ids"]
        ).logp.chunk(2)
    signals = {"ref_chosen_logp": chosen.tolist(), "ref_rejected_logp": rejected.tolist()}
    return PolicyObjective(**PAIRS, pair_ids=range(SIZE), loss="dpo", loss_params={"beta": 0.3}, signals=signals)


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that is as wide as the vocabulary, weights and their gradients left out."""

    def __init__(self):
        super().__init__()
        self.largest, self.dtypes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and WORDS in value.shape and WIDTH not in value.shape:
                self.largest = max(self.largest, value.numel())
                self.dtypes.add(value.dtype)
        return out


def counted(model):
    """Lists that grow by one entry per forward pass of the body, and of any other module called a model."""
    shapes, whole = [], []
    model.get_input_embeddings().register_forward_hook(lambda _m, args, _out: shapes.append(tuple(args[0].shape)))
    model.register_forward_hook(lambda *_: whole.append("full logits"))
    return shapes, whole


def test_a_run_makes_one_pass_per_micro_batch_over_every_token_once_and_none_of_a_reference(tmp_path, monkeypatch):
    reference, model = llama(seed=1), llama()
    objective = dpo(reference)
    of_reference, _ = counted(reference)
    shapes, whole = counted(model)
    spec = TrainSpec(steps=5, batch_size=8, learning_rate=1e-3)
    train(
        model,
        objective,
        spec,
        seed=3,
        state_dir=tmp_path,
        micro_batch=4,
        checkpoint_steps=99,
        device="cpu",
        progress=False,
    )
    expected = []
    for step in range(5):
        for part in micro_batches(rows_of_stream(SIZE, 3, 8 * step, 8), objective.lengths, 4):
            expected.append((1, sum(len(PAIRS[name][row]) for name in SIDES for row in part)))
    assert shapes == expected
    assert not of_reference
    assert not whole


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_another_loss_beta_or_seed_on_the_same_signals_makes_no_pass_of_the_reference(loss):
    reference, model = llama(seed=1), llama()
    signals = dpo(reference).signals
    of_reference, _ = counted(reference)
    shapes, _ = counted(model)
    for beta in (0.1, 1.0):
        params = {"loss": loss, "loss_params": {"beta": beta}}
        objective = PolicyObjective(**PAIRS, pair_ids=range(SIZE), **params, signals=signals)
        objective.loss(model, [0, 1, 2], Moment(step=0, steps=1, rows_before=0))[0].backward()
    assert len(shapes) == 2
    assert not of_reference


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_exist_for_one_chunk_of_response_positions_at_a_time(monkeypatch, precision):
    """Padded, a model's own loss would make 2 * 9 rows x 22 positions x 3000 logits, in several copies."""
    monkeypatch.setattr(scoring, "_SMALL_LOGITS", 0)
    monkeypatch.setattr(fused_head, "_KEPT_BYTES", 0)
    monkeypatch.setattr(fused_head, "_chunk_of", lambda _: 8)
    objective, model = dpo(llama(seed=1)), set_precision(llama(), precision)
    with Sizes() as seen:
        objective.loss(model, list(range(9)), Moment(step=0, steps=1, rows_before=0))[0].backward()
    assert seen.largest == 8 * WORDS
    assert seen.dtypes == {torch.float32} | ({torch.bfloat16} if precision == "bf16" else set())


def test_small_logits_are_those_of_response_positions_alone():
    objective, model = dpo(llama(seed=1)), llama()
    with Sizes() as seen:
        objective.loss(model, list(range(9)), Moment(step=0, steps=1, rows_before=0))[0].backward()
    positions = sum(len(PAIRS[name][row]) for name in SIDES[1:] for row in range(9))
    assert seen.largest == positions * WORDS


def test_bf16_attention_is_made_of_bf16_products():
    """Rotary positions leave queries and keys in fp32; scores in fp32 would cost twice as much."""
    model, seen = set_precision(llama(), "bf16"), []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
                seen.append(args[-1].dtype)
            assert "scaled_dot_product" not in str(func)
            return func(*args, **(kwargs or {}))

    with Products():
        response_scores(model, PAIRS["prompt_ids"], PAIRS["chosen_ids"]).logp.sum().backward()
    assert seen.count(torch.bfloat16) > 8
    assert seen.count(torch.float32) <= 4  # rotary angles


def test_bf16_bands_of_values_and_gradients():
    """8 bits: 2^-9 = 0.2 % per product, so a few hundredths of a nat per token of about 8, percents of gradients."""
    objective = dpo(llama(seed=1))
    found = {}
    for precision in ("fp32", "bf16"):
        model = set_precision(llama(), precision)
        loss, _ = objective.loss(model, list(range(SIZE)), Moment(step=0, steps=1, rows_before=0))
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        scores = response_scores(model, PAIRS["prompt_ids"], PAIRS["chosen_ids"], token_level=True)
        found[precision] = (scores.token_logp.detach(), loss.item() / SIZE, gradient)
    (logp, loss, gradient), (rough_logp, rough_loss, rough_gradient) = found["fp32"], found["bf16"]
    assert 0 < (logp - rough_logp).abs().max() < 0.02
    assert abs(loss - rough_loss) < 0.01
    assert 0 < (gradient - rough_gradient).norm() / gradient.norm() < 0.03


def test_padded_and_packed_bf16_agree_within_the_band():
    model = set_precision(llama(), "bf16")
    packed = response_scores(model, PAIRS["prompt_ids"], PAIRS["chosen_ids"]).logp
    with padded(model):
        other = response_scores(model, PAIRS["prompt_ids"], PAIRS["chosen_ids"]).logp
    tokens = torch.tensor([len(row) for row in PAIRS["chosen_ids"]])
    assert ((packed - other).abs() / tokens).max() < 0.02


@pytest.mark.parametrize(("width", "tokens"), [(8, 65536), (64, 8192), (256, 2048), (512, 2048)])
def test_narrow_models_take_larger_pieces_of_at_most_2_to_the_19_numbers(tmp_path, width, tokens):
    """tokens x width = 2^19, but never fewer than 2048 tokens."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    spec = TrainSpec(steps=1, batch_size=2, learning_rate=1e-3)
    settings = {"seed": 0, "state_dir": tmp_path, "micro_batch": 32, "device": "cpu"}
    assert Run(model, dpo(llama(seed=1)), spec, **settings).tokens == tokens
