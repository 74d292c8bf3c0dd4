"""Two processes against one: the same curves and weights, checkpoints that either goes on from, one that tells why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import parallel_runs
import tiny
from parallel_runs import CUT_AT, RUNS, SPEC, policy, state_of
from prefopt.errors import BadInput
from prefopt.models import save_model
from prefopt.processes import parallel

BAND = 2e-5  # float32: sums of 7 rows in another order, over 8 steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs by two processes, after one process has left the checkpoints of a run that was cut off."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(KeyboardInterrupt):
        policy(folder, "one", on_metrics=parallel_runs.cut)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, parallel_runs.__file__, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same runs by this process."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: state_of(run(folder, name)) for name, run in RUNS.items()}


def _signs_of_nothing(ours, theirs):
    """Before a policy's first step log-ratios are 0 but for rounding, and its accuracy counts their signs."""
    return {"accuracy": ours["accuracy"]} if abs(theirs.get("margin", 1.0)) <= BAND else {}


def assert_same(found, expected):
    assert len(found["curve"]) == len(expected["curve"]) == SPEC.steps
    for ours, theirs in zip(found["curve"], expected["curve"], strict=True):
        assert ours == pytest.approx(theirs | _signs_of_nothing(ours, theirs), rel=BAND, abs=BAND)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=BAND, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_have_the_curve_and_end_in_the_weights_of_one(folder, alone, name, sharding):
    found = torch.load(folder / f"{name}-{sharding}.pt")
    start = tiny.causal_lm().state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert_same(found, alone[name])
    if name != "adapter":  # 8 steps move weights by far more than the band
        assert (found["weights"]["model.layers.0.mlp.up_proj.weight"] - start).abs().max() > 100 * BAND


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_go_on_from_the_checkpoint_of_one(folder, alone, sharding):
    assert_same(torch.load(folder / f"resumed-{sharding}.pt"), alone["policy"])


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_sigterm_on_one_process_saves_once_and_one_process_goes_on(folder, alone, sharding):
    first, last = (json.loads((folder / f"ends-{rank}.json").read_text())[f"terminated-{sharding}"] for rank in (0, 1))
    assert first[0] == "TryAgain"
    assert f"terminated after step {CUT_AT} of {SPEC.steps}" in first[1]
    assert last == ["exit", 0]
    state = folder / f"terminated-{sharding}"
    assert sorted(path.name for path in state.iterdir()) == ["step-000000003.pt", f"step-00000000{CUT_AT}.pt"]
    seen = []
    assert_same(state_of(policy(folder, state.name, on_metrics=seen.append)), alone["policy"])
    assert [metrics["step"] for metrics in seen] == list(range(CUT_AT + 1, SPEC.steps + 1))


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_what_all_processes_find_wrong_is_told_by_the_first(folder, sharding):
    first, last = (json.loads((folder / f"ends-{rank}.json").read_text()) for rank in (0, 1))
    assert first[f"nan-{sharding}"][0] == "FailedCheck"
    assert "step 1 of 8: loss is nan, on pairs 1" in first[f"nan-{sharding}"][1]
    assert last[f"nan-{sharding}"] == ["exit", 0]
    for ends in (first, last):
        kind, text = ends[f"indivisible-{sharding}"]
        assert kind == "BadInput"
        assert "looks at the whole batch, which 2 processes would split" in text


def test_what_sharded_training_leaves_is_an_ordinary_model(folder, tmp_path):
    found = torch.load(folder / "policy-full.pt")["weights"]
    assert {type(value) for value in found.values()} == {torch.Tensor}
    model = tiny.causal_lm()
    model.load_state_dict(found, strict=False)
    save_model(model, tiny.tokenizer(), tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in read.named_parameters():
        assert torch.equal(value, found[name]), name


def test_shares_are_all_rows_once_and_of_like_length(monkeypatch):
    lengths = [5, 9, 7, 1, 9, 3]
    assert parallel.shares([4, 0, 2], lengths) == [[4, 0, 2]]
    monkeypatch.setattr(parallel, "world", lambda: 3)
    # by falling length: 1, 4, 2, 0, 5, 3, dealt to three
    assert parallel.shares(range(6), lengths) == [[1, 0], [4, 5], [2, 3]]
    assert parallel.shares([3], lengths) == [[3], [], []]


def test_a_stage_that_runs_as_one_process_is_refused_as_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert parallel.label() == " (process 1)"
    with (
        pytest.raises(BadInput, match="judge was started as 2 processes, and runs as one"),
        parallel.started("judge", several=False, device="cpu"),
    ):
        pass


def test_sharding_is_refused_where_there_is_one_process(tmp_path):
    with pytest.raises(BadInput, match="sharding full divides a model among processes"):
        policy(Path(tmp_path), "run", sharding="full")
