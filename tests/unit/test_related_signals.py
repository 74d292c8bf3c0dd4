"""What the related methods need beside the pairs: token sets, calibrated rewards, rewrites and heads."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch

import tiny
from prefopt.calibration import expected_win_rates, pair_win_rates
from prefopt.errors import BadInput, TryAgain
from prefopt.inputs.rewriting import rewrite_chosen
from prefopt.pairs import digest63
from prefopt.scoring import response_scores
from prefopt.specs import TrainSpec
from prefopt.trainer import train
from prefopt.training.heads import head_margin, heads_on, prompt_value
from prefopt.training.objectives import Moment
from prefopt.training.policy_objective import PolicyObjective
from prefopt.training.token_sets import diff_masks, shared_subset
from prefopt.training.training_run import Visits

# --- token sets -------------------------------------------------------------------------------------------------------


def common_length(first, second):
    """Length of a longest common subsequence, by the textbook recurrence."""
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, j in itertools.product(range(len(first)), range(len(second))):
        same = first[i] == second[j]
        table[i + 1, j + 1] = table[i, j] + 1 if same else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_diff_masks_leave_a_longest_common_subsequence():
    draw = random.Random(0)
    for _ in range(300):
        first, second = ([draw.randrange(5) for _ in range(draw.randint(0, 12))] for _ in range(2))
        masks = diff_masks(first, second)
        kept = [
            [x for x, m in zip(side, mask, strict=True) if m == 0]
            for side, mask in zip((first, second), masks, strict=True)
        ]
        assert kept[0] == kept[1]
        assert len(kept[0]) == common_length(first, second)


def test_diff_masks_by_hand():
    # "a b c d" against "a x c": b and d stand alone, x does; equal sequences differ in nothing.
    masks = diff_masks([1, 2, 3, 4], [1, 9, 3])
    assert [m.tolist() for m in masks] == [[0, 1, 0, 1], [0, 1, 0]]
    assert sum(m.sum() for m in diff_masks([5, 6, 5], [5, 6, 5])) == 0
    long = list(range(3000))
    masks = diff_masks(long, [x for x in long if x % 7])
    assert masks[0].sum() == len([x for x in long if x % 7 == 0])
    assert masks[1].sum() == 0


def test_shared_subsets_have_the_shorter_length_and_depend_on_seed_step_and_pair_alone():
    again = [shared_subset(7, 3, 1, 9, 4) for _ in range(2)]
    assert [m.tolist() for m in again[0]] == [m.tolist() for m in again[1]]
    assert [m.sum() for m in again[0]] == [4, 4]
    assert [len(m) for m in again[0]] == [9, 4]
    others = [shared_subset(*key, 9, 4)[0].tolist() for key in ((8, 3, 1), (7, 4, 1), (7, 3, 2))]
    assert again[0][0].tolist() not in others
    assert shared_subset(2**63 - 1, 0, 0, 5, 5)[0].tolist() == [1.0] * 5
    # Every place is drawn equally often: 4 of 9 over 3000 steps, within four standard deviations.
    counts = sum(shared_subset(7, step, 0, 9, 4)[0] for step in range(3000))
    sd = math.sqrt(3000 * 4 / 9 * 5 / 9)
    assert np.abs(counts - 3000 * 4 / 9).max() < 4 * sd


# --- calibrated rewards -----------------------------------------------------------------------------------------------


def test_expected_win_rate_vectors():
    first, second = [2, 0.5, -0.3, -1.2], [0.2, 0.9, 0.1, -0.4]
    member0 = [0.8957619307940078, 0.572644913283478, 0.37069932750408247, 0.1608938284184317]
    member1 = [0.5008159071788564, 0.7146657454461124, 0.46916855419843406, 0.3153497931765971]
    assert expected_win_rates(np.array([first]).T) == pytest.approx(member0, rel=1e-12)
    assert expected_win_rates(np.array([second]).T) == pytest.approx(member1, rel=1e-12)
    mean = [0.6982889189864321, 0.6436553293647952, 0.41993394085125824, 0.2381218107975144]
    both = expected_win_rates(np.array([first, second]).T)
    assert both == pytest.approx(mean, rel=1e-12)
    assert both[0] - both[3] == pytest.approx(0.4601671081889177, rel=1e-12)


def test_win_rates_sum_to_half_the_responses_and_ignore_a_models_shift():
    scores = np.random.default_rng(0).normal(size=(6, 5, 3))
    rates = expected_win_rates(scores)
    assert rates.sum(axis=-1) == pytest.approx(np.full(6, 2.5), rel=1e-12)
    assert expected_win_rates(scores + np.array([10, -3, 0.5])) == pytest.approx(rates, rel=1e-10)
    assert ((rates > 0) & (rates < 1)).all()
    with pytest.raises(ValueError, match="two responses"):
        expected_win_rates(scores[:, :1])


def test_a_pair_alone_has_twice_the_sigmoid_minus_one():
    chosen, rejected = pair_win_rates([[1.0, 0.5]], [[0.2, 0.9]], np.empty((1, 0, 2)))
    expected = np.mean([2 / (1 + math.exp(-d)) - 1 for d in (0.8, -0.4)])
    assert (chosen - rejected).item() == pytest.approx(expected, rel=1e-12)


# --- rewriting --------------------------------------------------------------------------------------------------------


def pair_table():
    prompt = [{"role": "user", "content": "what is it"}]
    rows = [
        {"prompt": prompt, "chosen": f"good {n}", "rejected": f"bad {n}", "split": split}
        for n, split in enumerate(["train", "test", "train"])
    ]
    for row in rows:
        row |= {"pair_id": digest63([prompt, row["chosen"], row["rejected"]]), "prompt_id": 5, "source": "s"}
    return pd.DataFrame(rows)


def test_only_the_chosen_responses_of_the_split_are_rewritten():
    before = pair_table()
    after = rewrite_chosen(
        before, lambda _p, chosen, rejected: rejected.replace("bad", "better") if "0" in chosen else None
    )
    assert after["chosen"].tolist() == ["better 0", "good 1", "good 2"]
    assert after.drop(columns=["chosen", "pair_id"]).equals(before.drop(columns=["chosen", "pair_id"]))
    assert after["pair_id"].tolist()[1:] == before["pair_id"].tolist()[1:]
    prompt = before["prompt"][0]
    assert after["pair_id"][0] == digest63([prompt, "better 0", "bad 0"])
    everything = rewrite_chosen(before, lambda _p, chosen, _r: chosen + " !", split=None)
    assert everything["chosen"].tolist() == ["good 0 !", "good 1 !", "good 2 !"]


@pytest.mark.parametrize("text", ["", "  ", "bad 0", 7])
def test_a_rewrite_that_is_no_answer_is_refused(text):
    with pytest.raises(BadInput, match="rewriter returned"):
        rewrite_chosen(pair_table(), lambda *_: text)


# --- heads ------------------------------------------------------------------------------------------------------------

PAIRS = tiny.pairs(24, seed=3)
SPEC = TrainSpec(steps=6, batch_size=8, learning_rate=3e-3)


def objective_of(loss, **signals):
    draw = np.random.default_rng(1)
    with torch.no_grad():
        reference = {
            f"ref_{side}_logp": response_scores(
                tiny.causal_lm(), PAIRS["prompt_ids"], PAIRS[f"{side}_ids"]
            ).logp.tolist()
            for side in ("chosen", "rejected")
        }
    rewards = {f"{side}_reward": draw.normal(size=(24, 3)) for side in ("chosen", "rejected")}
    signals = {**reference, **rewards, "auxiliary_reward": draw.normal(size=24), **signals}
    return PolicyObjective(**PAIRS, pair_ids=range(24), loss=loss, loss_params={"beta": 0.1}, signals=signals)


@pytest.mark.parametrize(("loss", "head"), [("drdo", "reward"), ("hpo", "value"), ("beta_dpo_filtered", "gap")])
def test_heads_train_with_the_model_are_checkpointed_and_leave_no_trace(tmp_path, loss, head):
    def run(folder, stop_at=None):
        model, objective = tiny.causal_lm(), objective_of(loss)
        names = set(dict(model.named_parameters()))

        def stop(_model, step):
            if step == stop_at:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGTERM)

        with heads_on(model, objective.pair_loss.needs):
            settings = {"seed": 5, "micro_batch": 4, "checkpoint_steps": 2, "device": "cpu", "progress": False}
            settings |= {"micro_batch": 8} if not objective.divisible else {}
            train(model, objective, SPEC, state_dir=tmp_path / folder, visits=Visits({3}, stop), **settings)
            part = model.objective_heads[head]
            weight = (part.state if head == "gap" else part.weight).detach().clone()
        assert set(dict(model.named_parameters())) == names
        return weight, [p.detach().clone() for p in model.parameters()]

    whole = run("whole")
    assert whole[0].abs().max() > 0
    with pytest.raises(TryAgain):
        run("cut", stop_at=3)
    resumed = run("cut")
    assert torch.equal(whole[0], resumed[0])
    assert all(torch.equal(a, b) for a, b in zip(whole[1], resumed[1], strict=True))


def test_head_values_are_those_of_the_states_at_the_last_tokens():
    model = tiny.causal_lm()
    prompts, responses = (
        [[1, 5, 6], [1, 7]],
        [[8, 9], [10, 2]],
    )
    with heads_on(model, frozenset({"reward_head", "auxiliary"})):
        for name in ("reward", "value"):
            torch.nn.init.normal_(model.objective_heads[name].weight)
        both = [*responses, [11, 12, 2], [13]]
        margin, value = head_margin(model, prompts, both), prompt_value(model, prompts)
        weights = {name: model.objective_heads[name].weight[0] for name in ("reward", "value")}

        def state(ids):
            return model.base_model(torch.tensor([ids]), use_cache=False)[0][0, -1]

        rewards = [weights["reward"] @ state(prompts[n % 2] + ids) for n, ids in enumerate(both)]
        expected = torch.stack([rewards[0] - rewards[2], rewards[1] - rewards[3]])
        torch.testing.assert_close(margin, expected, rtol=1e-4, atol=1e-5)
        values = torch.stack([weights["value"] @ state(prompt) for prompt in prompts])
        torch.testing.assert_close(value, values, rtol=1e-4, atol=1e-5)
        # The value's gradient stops at the head, the margin's goes on into the body.
        body = next(model.base_model.parameters())
        assert torch.autograd.grad(value.sum(), body, allow_unused=True)[0] is None
        assert torch.autograd.grad(margin.sum(), body)[0].abs().sum() > 0


def test_a_loss_without_needs_of_heads_gets_none():
    model = tiny.causal_lm()
    with heads_on(model, frozenset({"reference"})):
        assert not hasattr(model, "objective_heads")


def test_subsets_are_drawn_anew_at_every_step_and_the_same_in_any_micro_batch():
    tokens = {
        f"ref_{side}_token_logp": [[-1.0] * len(row) for row in PAIRS[f"{side}_ids"]] for side in ("chosen", "rejected")
    }
    objective, model = objective_of("sampo", **tokens), tiny.causal_lm()
    rows = list(range(24))
    first, second = (objective.batch(model, rows, step) for step in (0, 1))
    assert not torch.equal(first.chosen_subset, second.chosen_subset)
    shorter = torch.minimum(first.chosen_tokens, first.rejected_tokens)
    for side in ("chosen", "rejected"):
        subset, mask = getattr(first, f"{side}_subset"), getattr(first, f"{side}_mask")
        assert torch.equal(subset.sum(1), shorter)
        assert (subset <= mask).all()
    part = objective.batch(model, [5, 17], 0)
    width = part.chosen_subset.shape[1]
    assert torch.equal(part.chosen_subset, first.chosen_subset[[5, 17], :width])
    whole, _ = objective.loss(model, rows, Moment(2, 4, 0))
    halves = [objective.loss(model, half, Moment(2, 4, 0))[0] for half in (rows[:9], rows[9:])]
    torch.testing.assert_close(whole, sum(halves), rtol=1e-5, atol=1e-5)
