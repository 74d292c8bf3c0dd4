"""The benchmark of a DPO step on a GPU, as far as a CPU can try it."""

from __future__ import annotations

import pytest
from benchmarks import gpu_ours, gpu_step
from benchmarks.gpu_shapes import equal_pairs, floor_tflop, new_llama


def test_pairs_have_one_length_of_which_half_is_prompt():
    pairs = equal_pairs(3, 2048, 128_256)
    assert {name: {len(row) for row in rows} for name, rows in pairs.items()} == {
        "prompt_ids": {1024},
        "chosen_ids": {1024},
        "rejected_ids": {1024},
    }


def test_the_work_of_a_pair_is_six_n_tokens_and_four_n_with_adapters():
    """A layer has queries and output 64 x 64, keys and values 64 x 32, three times 64 x 192, and two norms of 64."""
    model, pairs = new_llama("tiny", "cpu", 64), equal_pairs(5, 64, 512)
    layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192 + 2 * 64)
    a_pair = layers * (32 + 32 + 32) + 512 * 64 * (32 + 32)
    assert floor_tflop(model, pairs, slice(2, None), adapted=False) == pytest.approx(6 * 3 * a_pair / 1e12)
    assert floor_tflop(model, pairs, slice(0, 1), adapted=True) == pytest.approx(4 * a_pair / 1e12)


@pytest.mark.parametrize("lora", [0, 4])
def test_our_side_runs_and_starts_at_the_references_margins(lora):
    found = gpu_ours.measure(
        shape="tiny", device="cpu", length=32, steps=3, warm_up=2, batch=4, micro=2, lora=lora, checkpointing=False,
        compiled=False,
    )  # fmt: skip
    assert found["step0_margin_gap"] == 0
    assert found["tokens_per_s"] == pytest.approx(found["pairs_per_s"] * 2 * 32, rel=1e-3)
    assert found["peak_gb"] is None


def test_ratios_are_those_of_rounds_and_utilisation_is_of_the_gpus_rate():
    def run(pairs, tflop, **more):
        return {"pairs_per_s": pairs, "tokens_per_s": pairs * 10, "tflop_per_s": tflop, "peak_gb": 2.0, **more}

    ours = [run(3.0, 400.0, step0_margin_gap=0.0), run(4.0, 500.0, step0_margin_gap=0.25)]
    mine, theirs = gpu_step.rows_of({"ours": ours, "TRL": [run(2.0, 200.0), run(1.0, 100.0)]}, 1000.0)
    assert (mine["times_trl"], theirs["times_trl"]) == ([1.5, 4.0], [1.0, 1.0])
    assert (mine["utilisation"], theirs["utilisation"]) == ([0.4, 0.5], [0.2, 0.1])
    assert (mine["step0_margin_gap"], theirs["step0_margin_gap"]) == (0.25, None)
    assert "| ours | 3.50 [3.00, 4.00] |" in gpu_step.shown([mine, theirs])
    assert "utilisation" not in gpu_step.rows_of({"ours": ours}, None)[0]
