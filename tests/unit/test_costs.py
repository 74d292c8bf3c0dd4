"""The cost model: FLOPs and bytes as arithmetic, and its estimates beside what the full run of every item cost."""

from __future__ import annotations

import json

import pytest
from benchmarks.cost_model import compared

from prefopt.cli import main
from prefopt.errors import BadInput
from prefopt.files import write_json
from prefopt.plan import STAGE_VERSIONS, Plan, load_plan
from prefopt.planning.costs import WORK, Work, work_of
from prefopt.planning.machines import (
    BANDWIDTH_USED,
    CPU_TRAIN,
    GPU_CONTEXT,
    GPUS,
    MFU_TRAIN,
    cpu_seconds,
    gpu_seconds,
    parsed_gpus,
    placed,
    placed_rows,
    stage_costs,
)
from prefopt.planning.sizes import Model, Sizes
from prefopt.planning.text import duration, plan_lines, size
from prefopt.specs import Config

TRAIN = {"steps": 10, "epochs": None, "batch_size": 4, "optimizer": "adamw", "precision": "fp32"}
SCRATCH = {"kind": "scratch", "layers": 2, "hidden": 64, "heads": 4, "intermediate": 192}
SCRATCH |= {"tokenizer": {"kind": "words", "vocab_size": 512}}
PARAMETERS = 512 * 64 + 2 * (4 * 64**2 + 3 * 64 * 192)
WORLD = {"source": {"kind": "world", "pairs": 1000, "rho": 0.2}, "splits": {"train": 0.8, "test": 0.2}, "limit": None}


@pytest.fixture
def plan() -> Plan:
    return Plan(Config(items=["*"]))


@pytest.fixture
def sizes(plan, tmp_path) -> Sizes:
    return Sizes(plan, tmp_path / "results")


def tokens(plan: Plan, **base):
    pairs = plan.add("pairs", "world", WORLD)
    start = plan.add("base", "start", base or SCRATCH)
    spec = {"max_prompt_tokens": 100, "max_length": 300}
    return start, plan.add("tokens", "world", spec, {"pairs": pairs, "base": start})


def policy(plan: Plan, train=None, regulariser=None, **base):
    start, table = tokens(plan, **base)
    spec = {"train": TRAIN | (train or {}), "regulariser": regulariser}
    return plan.add("policy", "dpo", spec, {"tokens": table, "model": start})


def test_every_stage_has_a_cost():
    assert set(WORK) == set(STAGE_VERSIONS)


def test_a_step_of_pairs_is_6n_flops_a_token_with_the_prompt_read_once(plan, sizes):
    work = work_of(sizes, policy(plan))
    assert work.model.parameters == PARAMETERS
    assert work.train == pytest.approx(10 * 4 * (12.4 + 2 * 19.0) * 6 * PARAMETERS)
    assert cpu_seconds(work) == pytest.approx(work.fixed + work.train / CPU_TRAIN)


def test_forward_kl_adds_a_prompt_and_a_sample(plan, sizes):
    with_kl = work_of(sizes, policy(plan, regulariser={"forward_kl": {"gamma": 0.1}}))
    assert with_kl.train / work_of(sizes, policy(plan)).train == pytest.approx((50.4 + 31.4) / 50.4)


def test_epochs_are_steps_over_the_train_split(plan, sizes):
    work = work_of(sizes, policy(plan, {"steps": None, "epochs": 2.0}))
    assert work.train == pytest.approx(2 * 800 / 4 * 4 * 50.4 * 6 * PARAMETERS)


def test_state_of_a_hub_model_is_16_bytes_a_parameter_and_2_for_bf16(plan, sizes):
    hub = {"kind": "hub", "repo": "someone/Model-8B-Instruct", "revision": "0" * 40}
    work = work_of(sizes, policy(plan, {"precision": "bf16"}, **hub))
    assert work.state == pytest.approx(18 * 8e9)
    assert "someone/Model-8B-Instruct has 8 billion parameters" in sizes.assumed
    adapted = work_of(sizes, policy(plan, {"precision": "bf16", "adapter": {"rank": 16}}, **hub))
    assert 6 * 8e9 < adapted.state < 7 * 8e9, "frozen weights, their bf16 copy, and a small adapter's optimiser"
    assert adapted.train == pytest.approx(work.train * 4 / 6), "no gradients of the frozen weights"


@pytest.mark.parametrize(("bias", "share"), [(None, 1.0), (0.2, 1.0), (0.4, 0.5), (0.8, 0.25), (0.0, 0.8), (1.0, 0.2)])
def test_subsamples_of_biased_members(plan, sizes, bias, share):
    """Of 100 pairs with 20 longer ones, b = .4 keeps 20 + 30 of them."""
    start, table = tokens(plan)
    spec = {"train": TRAIN | {"steps": None, "epochs": 1.0}, "longer_wins": bias, "subset": 1.0, "split": "train"}
    member = plan.add("reward", "member", spec, {"tokens": table, "model": start})
    assert sizes.kept_share(member) == pytest.approx(share)


def test_finished_artifacts_tell_their_sizes(plan, sizes, tmp_path):
    start, table = tokens(plan)
    told = {"pairs": {"train": 40, "test": 10}, "mean_prompt_tokens": 3.0, "mean_response_tokens": 5.0}
    write_json(tmp_path / "results" / table.ref / "manifest.json", {"summary": told})
    write_json(tmp_path / "results" / start.ref / "manifest.json", {"summary": {"parameters": 1000}})
    assert work_of(sizes, policy(plan)).train == 10 * 4 * 13.0 * 6 * 1000


def test_gpu_time_is_flops_over_the_assumed_rate_and_weights_over_bandwidth():
    gpu, model = GPUS["h100"], Model(8e9, 32, 4096)
    trained = gpu_seconds(Work(train=1e18, model=model, bf16=True), gpu)
    assert trained == pytest.approx(1e18 / (MFU_TRAIN * 989e12))
    huge = Model(70e9, 80, 8192)
    written = gpu_seconds(Work(written=1000.0, batch=10.0, model=huge, bf16=True), gpu)
    assert written == pytest.approx(100 * 70e9 * 2 / (BANDWIDTH_USED * 3.35e12))


def test_a_job_takes_one_gpu_if_it_can_and_is_sharded_otherwise():
    gpu, model = GPUS["h100"], Model(8e9, 32, 4096)
    assert placed(Work(model=model, state=70e9, activations=8e9), gpu, 8) == (1, 78e9 + GPU_CONTEXT, True)
    assert placed(Work(model=model, state=144e9, activations=8e9), gpu, 8) == (8, 26e9 + GPU_CONTEXT, True)
    assert not placed(Work(model=model, state=144e9, activations=80e9), gpu, 8)[2]
    assert placed(Work(), gpu, 8) == (0, 0.0, True), "no model, no GPU"


def test_processes_of_a_training_job_take_a_gpu_each():
    gpu, model = GPUS["h100"], Model(8e9, 32, 4096)
    assert placed(Work(model=model, state=70e9, activations=8e9), gpu, 8, 2) == (2, 78e9 + GPU_CONTEXT, True)


def test_row_work_takes_a_gpu_per_process_and_a_whole_model_on_each():
    gpu, model = GPUS["h100"], Model(8e9, 32, 4096)
    read = Work(model=model, state=32e9)
    assert placed_rows(read, gpu, 8, 4) == (4, 32e9 + GPU_CONTEXT, True)
    assert placed_rows(read, gpu, 2, 4)[0] == 2, "no more than there are"
    assert placed_rows(Work(model=model, state=280e9), gpu, 8, 8) == (8, 280e9 + GPU_CONTEXT, False)
    written = Work(model=model, state=32e9, written=100 * 16.0, answer=16.0, batch=48.0)
    assert placed_rows(written, gpu, 8, 8)[0] == 3, "100 answers in batches of 48"


def test_the_longest_job_of_a_stage_is_as_long_as_its_share_of_the_rows(root, tmp_path):
    """Eight processes: an eighth of the time for scores, the same for training; GPU-hours stay."""
    found = []
    for execution in ({}, {"row_processes": 8}):
        plan = planned(root, tmp_path, items=["mallowspo/paper/fig10_hh_b01"], execution=execution)
        found.append(stage_costs(plan, Sizes(plan, tmp_path), (), ("h100", 8)))
    one, eight = found
    assert eight["reference"].longest == pytest.approx(one["reference"].longest / 8)
    assert (one["reference"].gpus, eight["reference"].gpus) == (1, 8)
    assert eight["reference"].gpu_seconds == one["reference"].gpu_seconds
    assert eight["reference"].cpu_memory == 8 * one["reference"].cpu_memory
    assert eight["policy"].longest == one["policy"].longest


def test_row_work_that_fits_no_gpu_needs_larger_ones(plan, tmp_path):
    hub = {"kind": "hub", "repo": "someone/Model-30B", "revision": "0" * 40}
    start, table = tokens(plan, **hub)
    scores = plan.add("reference", "start", {"precision": "bf16"}, {"tokens": table, "model": start})
    plan.items["own/x"] = plan.add("papers/own", "x", {"item": {}}, {"reference": scores})
    text = "\n".join(plan_lines(plan, ("h100", 8)))
    assert "reference does not fit on 8 x h100: every one of its processes holds a whole model" in text


@pytest.mark.parametrize("text", ["h1000:8", "h100:none", "h100:0", ""])
def test_unknown_gpus_are_refused(text):
    with pytest.raises(BadInput, match="--gpu"):
        parsed_gpus(text)


def test_known_gpus():
    assert parsed_gpus("H100:8") == ("h100", 8)
    assert parsed_gpus("a100") == ("a100", 1)


def test_estimates_are_within_a_factor_of_two_of_what_every_item_cost(root):
    """CPU seconds of the full run, in docs/results/index.json, beside the estimate from declarations alone."""
    plan = load_plan(root / "config" / "config.yaml", {"full": True, "results": "nothing-is-there"})
    sizes = Sizes(plan, root / "nothing-is-there")
    ratios = {}
    for row in json.loads((root / "docs" / "results" / "index.json").read_text(encoding="utf-8")):
        if row["item"] in plan.items:  # others need data from outside
            estimate = sum(cpu_seconds(work_of(sizes, node)) for node in plan.reachable([plan.items[row["item"]]]))
            ratios[row["item"]] = estimate / max(row["cpu_seconds"], 0.1)
    assert len(ratios) > 15
    assert {name: ratio for name, ratio in ratios.items() if not 0.5 < ratio < 2} == {}


def test_the_benchmark_compares_stages_of_a_results_folder(plan, tmp_path):
    node = policy(plan)
    for one in plan.nodes.values():
        measured = {"cpu_seconds": 2.0, "peak_memory_mb": 500.0, "outputs": {"a": {"bytes": 7}, "b": {"bytes": 3}}}
        write_json(tmp_path / one.ref / "manifest.json", one.to_json() | measured)
    stages = compared(tmp_path)
    assert set(stages) == {"base", "pairs", "policy", "tokens"}
    assert stages["policy"]["cpu_s"] == pytest.approx(cpu_seconds(work_of(Sizes(plan, tmp_path / "no"), node)))
    assert (stages["policy"]["cpu_s_measured"], stages["policy"]["disk_measured"]) == (2.0, 10)


def planned(root, tmp_path, **given) -> Plan:
    return load_plan(root / "config" / "config.yaml", {"results": str(tmp_path), **given})


def test_plan_shows_what_is_there_and_costs_only_the_rest(root, tmp_path):
    plan = planned(root, tmp_path, items=["mallowspo/fig7"])
    (sft,) = (node for node in plan.nodes.values() if node.stage == "sft")
    before = plan_lines(plan)
    row = next(line.split() for line in before if line.startswith("sft "))
    assert row[1:3] == ["1", "0"]
    write_json(tmp_path / sft.ref / "manifest.json", {"summary": {}})
    after = plan_lines(plan)
    assert next(line.split() for line in after if line.startswith("sft ")) == ["sft", "0", "1"]
    assert after[-1] == "1 item, 17 artifacts, 16 to make"
    assert f"have  {sft.ref}" in plan_lines(plan, listed=True)


def test_plan_on_gpus_names_its_assumptions(root, tmp_path):
    lines = plan_lines(planned(root, tmp_path, items=["mallowspo/paper/fig10_hh_*"]), ("h100", 8))
    text = "\n".join(lines)
    assert "GPU-hours of h100" in text
    assert "assumed: 35% of h100's data-sheet FLOP rate" in text
    assert "EleutherAI/pythia-2.8b has 2.8 billion parameters" in text
    assert "US dollars for a judge's server" in text
    small = "\n".join(plan_lines(planned(root, tmp_path, items=["mallowspo/paper/fig10_hh_*"]), ("rtx4090", 1)))
    assert "policy does not fit on 1 x rtx4090" in small


def test_names_may_stand_alone(root, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(root)
    assert main(["plan", "mallowspo/fig2", "mallowspo/fig3", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 items, 4 artifacts, 4 to make"
    assert main(["plan", "mallowspo/fig77"]) == 2
    assert "did you mean 'mallowspo/fig7'" in capsys.readouterr().err


def test_without_a_verb_all_verbs_are_listed_once(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "\033" not in text, "not a terminal"
    verbs = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert len(verbs) == len(set(verbs))
    assert {"plan", "verify", "losses", "train-policy", "win-rate"} <= set(verbs)
    assert all(len(line.split()) > 2 for line in text.splitlines() if line.startswith("  ")), "each says what it does"


@pytest.mark.parametrize(("no_color", "bold"), [(None, True), ("1", False)])
def test_headings_are_bold_on_terminals_only_and_not_with_no_color(monkeypatch, capsys, no_color, bold):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    main([])
    assert ("\033[1m" in capsys.readouterr().out) is bold


def test_readable_units():
    assert [duration(s) for s in (3.21, 119.0, 120.0, 7200.0)] == ["3.2 s", "119.0 s", "2 min", "2 h"]
    assert [size(b) for b in (1500, 2.5e6, 617e9, 4e12)] == ["2 kB", "2.5 MB", "617 GB", "4,000 GB"]
