"""What training must not see: evaluation prompts, the oracle, test rows in calibration and selection."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from marks import LONG
from prefopt.annotators.held_out import Margins, measured, selected_beta
from prefopt.artifacts import Node
from prefopt.cli import main
from prefopt.digests import canonical_json
from prefopt.errors import BadInput, FailedCheck
from prefopt.files import read_json, write_json
from prefopt.grids.collect import collect_runs
from prefopt.pairs import build_pairs, normal_prompt
from prefopt.plan import Plan, load_plan
from prefopt.planning.config import item_files
from prefopt.specs import DataSpec, DispersionSpec, ScratchModel, TrainSpec
from prefopt.store.builds import building
from prefopt.tables import read_table, write_table
from small_project import ROOT
from test_grids import BASE, answers, grid, point, selected, trial
from test_trial import DPO, SAMPLING, TRAIN

CONFIG = ROOT / "config"
DATA = ROOT.parent / "shared" / "data"


# --- every item of the configuration --------------------------------------------------------------------------------


def items() -> list[str]:
    files = item_files(CONFIG, ["*/*"])
    return [path.relative_to(CONFIG / "experiments").with_suffix("").as_posix() for path in files]


@cache
def prompts_of(content: str, paths: tuple[str, ...]) -> dict[str, frozenset[int]]:
    """Normal forms of the prompts of every split of a planned pairs artifact."""
    spec = json.loads(content)
    if paths:
        digests = [file["sha256"] for file in spec["source"].pop("files")]
        spec["source"] |= {"paths": list(paths), "sha256": digests}
    pairs, _ = build_pairs(DataSpec.model_validate(spec), Path())
    every = pairs.drop_duplicates("prompt_id")
    return {str(split): frozenset(map(normal_prompt, rows["prompt"])) for split, rows in every.groupby("split")}


def prompts(plan: Plan, ref: str) -> dict[str, frozenset[int]]:
    """The same of any source of prompts in a plan.

    Worlds that differ in rho alone have the same prompts, as a test of the world says, so one stands for all unless
    PREFOPT_LONG_TESTS is set. Relabelling changes no prompt.
    """
    node = plan.nodes[ref]
    while node.stage == "relabelled":
        node = plan.nodes[node.parents["pairs"]]
    spec = dict(node.spec)
    if not LONG and spec["source"]["kind"] == "world":
        spec["source"] = {**spec["source"], "rho": None}
    return prompts_of(canonical_json(spec), tuple(node.execution.get("paths", ())))


def learned_from(plan: Plan, roots: list[Node]) -> set[str]:
    """Pairs whose train split is behind these nodes: those of every table of tokens, of every tokenizer."""
    reached = plan.reachable(roots)
    return {node.parents["pairs"] for node in reached if node.stage in ("tokens", "base") and "pairs" in node.parents}


def evaluated(plan: Plan) -> Iterator[tuple[list[Node], str, str]]:
    """(what the policy is made from, pairs, split) of all answers and held-out votes of a plan."""
    for node in plan.nodes.values():
        parents = {role: plan.nodes[ref] for role, ref in node.parents.items()}
        behind = [parents[role] for role in ("model", "tokens", "rewards", "dispersion") if role in parents]
        if node.stage == "trials":
            for name, one in node.spec["evaluate"]["sets"].items():
                yield behind, node.parents[f"set.{name}.pairs"], one["split"]
        elif node.stage == "generations":
            yield [parents["model"]], node.parents["pairs"], "test"
        elif node.stage == "vote_trials":
            yield behind, parents["tokens"].parents["pairs"], "test"


@pytest.mark.parametrize("name", items())
def test_no_evaluation_prompt_is_in_training(name):
    """By text, up to case and spacing, for every split that an item answers or scores, quick and in full."""
    plans = []
    for full in (False, True):
        try:
            plans.append(load_plan(CONFIG / "config.yaml", {"items": name, "full": full, "data_root": str(DATA)}))
        except BadInput as error:
            pytest.skip(f"cannot be planned here: {error}")
    checked = 0
    for plan in plans:
        for behind, pairs, split in evaluated(plan):
            seen = prompts(plan, pairs)[split]
            for source in learned_from(plan, behind):
                assert not seen & prompts(plan, source)["train"], (name, pairs, source)
                checked += 1
            assert split in ("test", "validation")
    assert checked or not any(node.stage in ("trials", "generations") for node in plans[-1].nodes.values())


# --- overlap in the source itself -----------------------------------------------------------------------------------


def files_of(folder: Path, prompts: list[str]) -> DataSpec:
    rows = [{"prompt": text, "chosen": f"yes {n}", "rejected": f"no {n}"} for n, text in enumerate(prompts)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "files", "reader": "trl", "paths": [str(folder / "pairs.jsonl")]}
    return DataSpec.model_validate({"source": source, "splits": {"train": 0.5, "judge": 0.2, "test": 0.3}})


def test_prompts_that_differ_in_case_and_spacing_stand_in_one_split(tmp_path):
    """Two of three spellings of each question, one with a fullwidth letter; each alone falls anywhere."""
    forms = ("What is {}?", "what  is {}?\n", "\uff37HAT is {}?")
    plain = [forms[n % 3].format(f"thing {n}") for n in range(200)]
    spec = files_of(tmp_path, [*plain, *(forms[(n + 1) % 3].format(f"thing {n}") for n in range(200))])
    pairs, refused = build_pairs(spec, Path())
    splits = pairs["split"].groupby(pairs["prompt"].map(normal_prompt)).nunique()
    assert len(splits) == 200
    assert set(splits) == {1}
    assert len(pairs) + len(refused) == 400
    assert set(refused["reason"]) == {"prompt in another split"}
    # What is kept is in the split that its own text gives it: no other row moves one.
    alone, nothing = build_pairs(files_of(tmp_path, plain), Path())
    assert nothing.empty
    split = dict(zip(alone["prompt_id"], alone["split"], strict=True))
    both = pairs[pairs["prompt_id"].isin(split.keys())]
    assert len(both) > 100
    assert both["split"].tolist() == both["prompt_id"].map(split).tolist()


def test_training_keeps_a_prompt_that_evaluation_has_too(tmp_path):
    spec = files_of(tmp_path, [form.format(n) for n in range(60) for form in ("a {} b", "A {} B")])
    _, refused = build_pairs(spec, Path())
    order = ["train", "judge", "test"]
    for detail in refused["detail"]:
        lost, kept = detail.removeprefix("split ").split(", and up to case and spacing in split ")
        assert order.index(kept) < order.index(lost)
    assert len(refused) > 5


def prompt_set(project, texts: list[str]) -> Node:
    """A set of prompts, as prepare-prompts leaves it."""
    turns = [[{"role": "user", "content": text}] for text in texts]
    ids = read_table(project.folder(project.tokens) / "tokens.parquet")["prompt_ids"].iloc[0]
    table = pd.DataFrame({"prompt_id": range(len(texts)), "prompt": turns, "prompt_ids": [ids] * len(texts)})
    table = table.assign(split="test", index=range(len(texts)), dataset="")

    def fill(work: Path) -> None:
        write_table(work / "prompts.parquet", table)
        shutil.copytree(project.folder(project.tokens) / "tokenizer", work / "tokenizer")

    return written(project, "prompts", texts, fill)


def written(world, stage: str, content: object, fill: Callable[[Path], None]) -> Node:
    """An artifact of a stage with files of the test's own."""
    node = Node(stage, 1, "own", {"content": content}, {})
    with building(node, world.results) as build:
        fill(build.work)
    return node


def test_a_prompt_set_with_training_prompts_is_refused_before_anything_is_answered(own_world):
    pairs = read_table(own_world.folder(own_world.pairs) / "pairs.parquet")
    known = pairs.loc[pairs["split"] == "train", "prompt"].iloc[3][0]["content"]
    spec = {"prompts": 2, "sampling": SAMPLING}
    for spelling in (known, f"  {known.upper()} "):
        asked = prompt_set(own_world, ["something of its own", spelling])
        with pytest.raises(FailedCheck, match=r"1 of 2 prompts to answer are in the train split of .*take them"):
            own_world.make("generate", spec, {"pairs": asked, "tokens": asked, "model": own_world.model})
    other = pairs.loc[pairs["split"] == "test", "prompt"].iloc[0][0]["content"]
    asked = prompt_set(own_world, ["something of its own", other])
    made = own_world.make("generate", spec, {"pairs": asked, "tokens": asked, "model": own_world.model})
    assert len(read_json(own_world.folder(made) / "outputs.json")) == 2


def test_a_trial_is_not_evaluated_on_what_another_split_of_the_same_pairs_taught_it(own_world):
    """Evaluation sets of the same world, but with other splits than the policy's."""
    data = read_json(own_world.folder(own_world.pairs) / "manifest.json")["spec"] | {"split_seed": 1}
    pairs = own_world.make("prepare-pairs", data, {})
    spec = read_json(own_world.folder(own_world.tokens) / "manifest.json")["spec"]
    tokens = own_world.make("tokenize", spec, {"pairs": pairs, "base": own_world.base})
    sets = {"other": {"split": "test", "prompts": 20, "kl": False}}
    parents = {"model": own_world.model, "set.other.tokens": tokens, "set.other.pairs": pairs}
    settings = {"sets": sets, "sampling": SAMPLING, "draws": 1, "at": [1.0], "judge": "oracle"}
    content = {"loss": None, "regulariser": None, "train": None, "seed": 0, "evaluate": settings}
    with pytest.raises(
        FailedCheck, match=r"of 20 evaluation prompts are in the train split of .*same splits and split_"
    ):
        own_world.make("run-trial", content, parents)


# --- the oracle -----------------------------------------------------------------------------------------------------


def test_the_oracle_is_asked_by_labelling_and_evaluation_alone(own_world):
    """In a run of all stages: pairs are labelled by it and answers judged; what learns never calls it."""
    world = own_world
    seeds = {"init": 0, "order": 0, "subset": 0}
    reward = {"train": TrainSpec(steps=2, batch_size=8, learning_rate=1e-3).model_dump(), "seeds": seeds}
    reward |= {"split": "train", "longer_wins": None, "subset": 1.0}
    model = world.make("train-reward", reward, {"tokens": world.tokens, "model": world.model})
    scores = world.make("score-rewards", {}, {"tokens": world.tokens, "reward": model})
    ensemble = world.make("collect-ensemble", {}, {"tokens": world.tokens, "member0": scores})
    signals = {"tokens": world.tokens, "reference": world.reference}
    dispersion = world.make("estimate-dispersion", DispersionSpec().model_dump(), signals)
    parents = signals | {"model": world.model, "dispersion": dispersion, "rewards": ensemble}
    spec = {"loss": DPO, "regulariser": None, "train": TRAIN, "seed": 0}
    policy = world.make("train-policy", spec, parents)
    sources = {"pairs": world.pairs, "tokens": world.tokens}
    sampled = {"prompts": 5, "sampling": SAMPLING}
    answers = [world.make("generate", sampled, sources | {"model": node}) for node in (policy, world.model)]
    sides = {"pairs": world.pairs, "generations": answers[0], "baseline": answers[1]}
    judged = world.make("judge", {"judge": "oracle"}, sides)
    world.make("win-rate", {}, {"judgements": judged})
    asking = {verb for verb, count in world.calls.items() if count}
    assert asking == {"prepare-pairs", "judge"}
    assert len(world.calls) == 13


def test_the_oracle_is_imported_by_labelling_and_evaluation_alone():
    """By the imports themselves, in functions too; ``rewards: oracle: true`` is a declared bound, not a learner."""
    truth = {"oracle_reward", "oracle_best", "bounds", "reward_parts"}
    found = set()
    package = ROOT / "workflow" / "prefopt"
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.is_relative_to(package / "world") or "prefopt.world" not in text:
            continue
        for function in ast.walk(ast.parse(text)):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prefopt.world"):
                    found |= {(path.stem, function.name) for name in node.names if name.name in truth}
    assert found == {
        ("judges", "_oracle"),  # evaluation
        ("paper", "_add_bounds"),  # what the evaluation's rewards are worth
        ("reward", "_true_rewards"),  # the ensemble 'oracle: true'
        ("rounds", "_oracle_rewards"),  # labels of fresh pairs
    }


# --- calibration and selection --------------------------------------------------------------------------------------


def changed(world, split: str, factor: float) -> Node:
    """Reference scores with other entropies in one split."""
    path = world.folder(world.reference) / "scores.parquet"
    table = read_table(path)
    mine = table["split"] == split
    for side in ("chosen", "rejected"):
        table[f"{side}_entropy"] = table[f"{side}_entropy"].where(~mine, table[f"{side}_entropy"] * factor)
    about = read_json(world.folder(world.reference) / "reference.json")

    def fill(work: Path) -> None:
        write_table(work / "scores.parquet", table)
        write_json(work / "reference.json", about)

    return written(world, "reference", [split, factor], fill)


def test_phi_star_is_calibrated_on_training_rows_alone(own_world):
    def phi_star(reference: Node) -> float:
        parents = {"tokens": own_world.tokens, "reference": reference}
        made = own_world.make("estimate-dispersion", DispersionSpec().model_dump(), parents)
        return read_json(own_world.folder(made) / "calibration.json")["phi_star"]

    before = phi_star(own_world.reference)
    assert phi_star(changed(own_world, "test", 0.5)) == before
    assert phi_star(changed(own_world, "train", 0.5)) != before


def test_a_tokenizer_is_trained_on_training_rows_alone(own_world):
    table = read_table(own_world.folder(own_world.pairs) / "pairs.parquet")
    model = ScratchModel(kind="scratch", layers=1, hidden=16, heads=2, intermediate=32, max_positions=96).model_dump()

    def vocabulary(split: str) -> bytes:
        changed = table.assign(chosen=table["chosen"].where(table["split"] != split, table["chosen"] + " zyx zyx"))
        pairs = written(own_world, "pairs", split, lambda work: write_table(work / "pairs.parquet", changed))
        base = own_world.make("prepare-model", model, {"pairs": pairs})
        return (own_world.folder(base) / "weights" / "tokenizer.json").read_bytes()

    own = (own_world.folder(own_world.base) / "weights" / "tokenizer.json").read_bytes()
    assert vocabulary("test") == own
    assert vocabulary("train") != own


def test_a_grids_best_setting_comes_from_validation_answers_alone():
    points = [point("dpo", beta=beta) for beta in (0.1, 0.2, 0.3)]
    spec = grid(points, sets=["test", "validation"], select={"set": "validation", "metric": "reward"}, seeds=[0])

    def chosen(validation: list[float], test: list[float]) -> list[int]:
        each = zip(validation, test, strict=True)
        runs = {
            (i, 0): trial(answers(BASE + mine, where=("validation", 1.0, 10)), answers(BASE + other))
            for i, (mine, other) in enumerate(each)
        }
        return selected(collect_runs(spec, runs, {}))

    assert chosen([0, 2, 1], [0, 0, 0]) == chosen([0, 2, 1], [9, 0, 5]) == [1]
    assert chosen([0, 1, 2], [9, 0, 5]) == [2]


def test_settings_are_not_selected_on_test_prompts(tmp_path):
    """As planned: the declaration is refused."""
    config = tmp_path / "config"
    for name in ("datasets.yaml", "models.yaml", "judges.yaml"):
        (config / name).parent.mkdir(exist_ok=True)
        (config / name).write_text((CONFIG / name).read_text())
    item = (CONFIG / "experiments" / "mallowspo" / "fig10.yaml").read_text()
    assert "split: validation" in item
    path = config / "experiments" / "mallowspo" / "fig10.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(item.replace("split: validation", "split: test"))
    (config / "config.yaml").write_text("items: [mallowspo/fig10]\n")
    with pytest.raises(BadInput, match="the set 'validation' is of test prompts"):
        load_plan(config / "config.yaml")
    assert main(["plan", "--config", str(config / "config.yaml")]) == 2


def margins(validation: float, test: float) -> Margins:
    """Sure of every pair's majority by so many nats, on validation and on test pairs."""
    share = np.array([0.9, 0.8, 0.7, 0.6] * 2)
    sure = np.array([validation] * 4 + [test] * 4)
    return Margins(np.log(share / (1 - share)) * sure, share, np.arange(8), np.repeat(["validation", "test"], 4))


def test_the_best_beta_and_scale_for_held_out_votes_come_from_validation_pairs_alone():
    """The logits of beta 1 are the votes' own on validation pairs: no other is better there, whatever the test says."""
    runs = {(beta, 0): margins(own, test) for beta, (own, test) in enumerate([(0.2, 1.0), (1.0, 5.0), (3.0, 1.0)])}
    assert selected_beta(runs, 3, [0]) == 1
    runs[1, 0] = margins(1.0, -5.0)
    assert selected_beta(runs, 3, [0]) == 1
    runs[2, 0], runs[1, 0] = margins(1.0, 9.0), margins(2.0, 1.0)
    assert selected_beta(runs, 3, [0]) == 2
    scales = [float(measured(margins(own, test))["scale"][0]) for own, test in ((0.5, 1.0), (0.5, -7.0), (0.25, 1.0))]
    assert scales == pytest.approx([2.0, 2.0, 4.0], rel=1e-3)
