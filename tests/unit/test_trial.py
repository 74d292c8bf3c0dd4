"""Trials: one training run and its answers in one artifact, against the same work done stage by stage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import tiny
from prefopt.artifacts import Node
from prefopt.engine.answers import steps_of_fractions
from prefopt.engine.bulk import reward_responses
from prefopt.engine.reward_models import load_reward_model, new_reward_model
from prefopt.errors import BadInput, FailedCheck
from prefopt.evaluation.sentiment import fit_classifier, load_classifier
from prefopt.files import read_json, read_lines
from prefopt.models import load_causal_lm, load_tokenizer, save_model
from prefopt.specs import DataSpec, ScratchModel, TokensSpec, TrainSpec
from prefopt.stages import STAGES, RunOptions, trial
from prefopt.stages.weights import WEIGHTS, weights_of
from prefopt.store.builds import building
from prefopt.tables import read_table, write_table
from prefopt.trainer import train
from prefopt.training.objectives import SftObjective, rows_of_stream
from prefopt.training.training_run import Run, Visits
from prefopt.world import oracle_reward

STEPS, BATCH, PROMPTS = 8, 8, 12
TRAIN = TrainSpec(steps=STEPS, batch_size=BATCH, learning_rate=3e-3, warmup_steps=2).model_dump()
SAMPLING = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 1.0, "batch_size": 5, "seed": 40}
SETS = {"test": {"split": "test", "prompts": PROMPTS, "kl": True}}
OPTIONS = RunOptions(micro_batch=4, checkpoint_steps=3, device="cpu")
DPO = {"name": "dpo", "params": {"beta": 0.2}}


class Project:
    """A results folder with a small world, a reference model and its scores, made by the stages themselves."""

    def __init__(self, results: Path) -> None:
        self.results = results
        world = {"kind": "world", "prompts": 150, "pairs": 150, "seed": 3}
        splits = {"train": 0.6, "test": 0.4}
        data = DataSpec.model_validate({"source": world, "splits": splits}).model_dump()
        model = ScratchModel(kind="scratch", layers=1, hidden=16, heads=2, intermediate=32, max_positions=96)
        self.pairs = self.make("prepare-pairs", data, {})
        self.base = self.make("prepare-model", model.model_dump(), {"pairs": self.pairs})
        tokens = TokensSpec(max_prompt_tokens=40, max_length=90).model_dump()
        self.tokens = self.make("tokenize", tokens, {"pairs": self.pairs, "base": self.base})
        sft = TrainSpec(steps=40, batch_size=16, learning_rate=1e-2).model_dump()
        self.model = self.make(
            "train-sft", {"train": sft, "seed": 0}, {"tokens": self.tokens, "base": self.base}, RunOptions()
        )
        signals = {"tokens": self.tokens, "model": self.model}
        self.reference = self.make("score-reference", {"precision": "fp32"}, signals)

    def make(self, verb: str, spec: dict, parents: dict, options: RunOptions = OPTIONS) -> Node:
        stage = STAGES[verb]
        node = Node(stage.folder, 1, verb, spec, {role: parent.ref for role, parent in parents.items()})
        if not (self.results / node.ref).is_dir():
            with building(node, self.results) as build:
                stage.load()(build, options)
        return node

    def write(self, stage: str, name: str, fill) -> Node:
        """An artifact whose files ``fill(folder)`` writes."""
        node = Node(stage, 1, name, {}, {})
        with building(node, self.results) as build:
            fill(build.work)
        return node

    def folder(self, node: Node) -> Path:
        return self.results / node.ref

    def trial_node(self, loss: dict | None = DPO, seed: int = 1, train: dict | None = TRAIN, **evaluate) -> Node:
        parents = evaluate.pop("parents", {}) | {"model": self.model}
        spec = {"sets": SETS, "sampling": SAMPLING, "draws": 1, "at": [1.0], "judge": "oracle"} | evaluate
        if loss is not None:
            parents |= {"tokens": self.tokens, "reference": self.reference}
        for name in spec["sets"]:
            parents |= {f"set.{name}.tokens": self.tokens, f"set.{name}.pairs": self.pairs}
        content = {"loss": loss, "regulariser": None, "train": train if loss else None, "seed": seed, "evaluate": spec}
        return Node("trials", 1, "trial", content, {role: parent.ref for role, parent in parents.items()})

    def trial(self, *args, options: RunOptions = OPTIONS, **settings) -> Path:
        node = self.trial_node(*args, **settings)
        if not self.folder(node).is_dir():
            with building(node, self.results) as build:
                trial.run_trial(build, options)
        return self.folder(node)

    def chain(self, seed: int, train: dict = TRAIN, draw: int = 0) -> tuple[Node, pd.DataFrame]:
        """The policy of train-policy, and its answers from generate with the sampling seed of that draw."""
        parents = {"tokens": self.tokens, "model": self.model, "reference": self.reference}
        spec = {"loss": DPO, "regulariser": None, "train": train, "seed": seed}
        policy = self.make("train-policy", spec, parents)
        sampling = SAMPLING | {"seed": SAMPLING["seed"] + 100_000 * seed + draw}
        parents = {"pairs": self.pairs, "tokens": self.tokens, "model": policy}
        answers = self.folder(self.make("generate", {"prompts": PROMPTS, "sampling": sampling}, parents))
        table = read_table(answers / "responses.parquet")
        table["text"] = [record["output"] for record in read_json(answers / "outputs.json")]
        table["prompt"] = [record["instruction"] for record in read_json(answers / "outputs.json")]
        return policy, table


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("results"))


def answers_of(folder: Path) -> pd.DataFrame:
    return read_table(folder / "answers.parquet")


def logp_by_hand(model, prompt: list[int], response: list[int]) -> float:
    with torch.no_grad():
        logp = model(torch.tensor([[*prompt, *response]])).logits[0].double().log_softmax(-1)
    return sum(float(logp[len(prompt) - 1 + at, token]) for at, token in enumerate(response))


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trial_is_train_policy_and_generate_in_one_and_scores_as_the_judge_does(project, precision):
    run = TRAIN | {"precision": precision}
    folder = project.trial(seed=1, train=run, at=[0.0, 1.0])
    start, table = (rows.reset_index(drop=True) for _, rows in answers_of(folder).groupby("step"))
    policy, chain = project.chain(seed=1, train=run)
    assert len(start) == len(table) == PROMPTS
    assert start["log_ratio"].tolist() == [0.0] * PROMPTS  # answers are drawn and scored in fp32, as from saved weights
    for column in ("prompt_id", "text", "tokens", "ended"):
        assert table[column].tolist() == chain[column].tolist(), column
    assert (folder / "metrics.jsonl").read_bytes() == (project.folder(policy) / "metrics.jsonl").read_bytes()
    rewards = [oracle_reward(*row) for row in zip(chain["prompt"], chain["text"], strict=True)]
    assert table["score"].tolist() == rewards
    assert set(table["set"]) == {"test"}
    assert set(zip(table["step"], table["fraction"], table["draw"], strict=True)) == {(STEPS, 1.0, 0)}


def test_the_log_ratio_is_that_of_the_whole_answer_under_policy_and_reference(project):
    policy, chain = project.chain(seed=1)
    models = [load_causal_lm(weights_of(project.folder(node))[0], device="cpu") for node in (policy, project.model)]
    rows = zip(chain["prompt_ids"], chain["response_ids"], strict=True)
    expected = [
        logp_by_hand(models[0], [*prompt], [*answer]) - logp_by_hand(models[1], [*prompt], [*answer])
        for prompt, answer in rows
    ]
    found = answers_of(project.trial(seed=1))["log_ratio"]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.abs().max() > 0.01  # the policy did move


def test_sets_draws_and_fractions_have_a_row_for_every_prompt(project):
    sets = {"train": {"split": "train", "prompts": 5, "kl": False}, **SETS}
    table = answers_of(project.trial(seed=1, sets=sets, draws=2, at=[0.0, 0.25, 1.0]))
    expected = {
        (name, step, draw): size
        for name, size in {"train": 5, "test": PROMPTS}.items()
        for step in (0, 2, STEPS)  # round(0.25 * 8) = 2
        for draw in (0, 1)
    }
    assert Counter(zip(table["set"], table["step"], table["draw"], strict=True)) == expected
    assert table.groupby("step")["fraction"].unique().map(list).to_dict() == {0: [0.0], 2: [0.25], STEPS: [1.0]}
    assert (table["log_ratio"].isna() == (table["set"] == "train")).all()
    assert (table["text"].str.len() > 0)[table["draw"] == 1].sum() == 0
    start = table[(table["step"] == 0) & (table["set"] == "test")]
    assert start["log_ratio"].tolist() == [0.0] * len(start)  # the policy starts as the reference
    for draw in (0, 1):  # each draw has the sampling seed of its own, and what else is measured changes no answer
        last = table[(table["step"] == STEPS) & (table["set"] == "test") & (table["draw"] == draw)]
        assert last["tokens"].tolist() == project.chain(seed=1, draw=draw)[1]["tokens"].tolist()
    plain = answers_of(project.trial(seed=1))
    last = table[(table["step"] == STEPS) & (table["set"] == "test") & (table["draw"] == 0)]
    pd.testing.assert_frame_equal(last.reset_index(drop=True), plain)


def test_the_order_in_which_sets_are_declared_changes_nothing(project):
    sets = {"train": {"split": "train", "prompts": 5, "kl": False}, **SETS}
    nodes = [project.trial_node(sets=dict(order)) for order in (sets.items(), reversed(sets.items()))]
    assert nodes[0].id == nodes[1].id
    found = []
    for node in nodes:
        with building(node, project.results) as build:
            trial.run_trial(build, OPTIONS)
        found.append((project.folder(node) / "answers.parquet").read_bytes())
    assert found[0] == found[1]


def test_the_reference_is_answered_once_and_nothing_is_trained(project):
    folder = project.trial(loss=None, seed=2, sets={**SETS, "other": {"split": "train", "prompts": 3, "kl": False}})
    table = answers_of(folder)
    assert (folder / "metrics.jsonl").read_text() == ""
    assert set(zip(table["step"], table["fraction"], strict=True)) == {(0, 0.0)}
    own, other = (table[table["set"] == name] for name in ("test", "other"))
    assert own["log_ratio"].tolist() == [0.0] * PROMPTS
    assert other["log_ratio"].isna().all()
    start = answers_of(project.trial(seed=2, at=[0.0, 1.0]))
    assert own["text"].tolist() == start[start["step"] == 0]["text"].tolist()  # where every policy starts
    summary = read_json(folder / "manifest.json")["summary"]
    assert summary["steps"] == 0
    assert summary["sets"]["test"]["score"] == pytest.approx(own["score"].mean(), abs=1e-6)
    assert "log_ratio" not in summary["sets"]["other"]


def test_reward_model_judges_give_their_mean_reward(project):
    sft = project.folder(project.model) / WEIGHTS
    members = {}
    for k in (0, 1):
        members[f"judge{k}"] = project.write(
            "reward",
            f"r{k}",
            lambda work, k=k: save_model(new_reward_model(sft, k), load_tokenizer(sft), work / WEIGHTS),
        )
    scores = answers_of(project.trial(seed=1, judge="reward_model", parents=members))["score"]
    chain = project.chain(seed=1)[1]
    ids = [[row.tolist() for row in chain[name]] for name in ("prompt_ids", "response_ids")]
    models = [load_reward_model(project.folder(node) / WEIGHTS, device="cpu") for node in members.values()]
    rewards = [reward_responses(model, *ids, batch_size=4) for model in models]
    assert scores.tolist() == pytest.approx(((rewards[0] + rewards[1]) / 2).tolist(), abs=1e-6)


def test_a_classifier_judges_the_answer_alone(project):
    chain = project.chain(seed=1)[1]
    words = sorted({word for text in chain["text"] for word in text.split()})
    node = project.write("classifier", "c", fit_classifier(words[::2], words[1::2]).save)
    scores = answers_of(project.trial(seed=1, judge="classifier", parents={"classifier": node}))["score"]
    expected = load_classifier(project.folder(node)).positive(chain["text"].tolist())
    assert scores.tolist() == expected.tolist()
    assert scores.nunique() > 1


# --- the curve --------------------------------------------------------------------------------------------------------


def ensemble(project: Project, members: int) -> tuple[Node, pd.DataFrame]:
    pair_ids = read_table(project.folder(project.tokens) / "tokens.parquet")["pair_id"]
    draw = np.random.default_rng(0).normal(size=(2, len(pair_ids), members))
    draw[:, :, -1] *= 1e4  # margins that nothing comes near: the last member is never matched
    table = pd.DataFrame({"pair_id": pair_ids, "chosen_reward": list(draw[0]), "rejected_reward": list(draw[1])})
    node = project.write("ensemble", "e", lambda work: write_table(work / "scores.parquet", table.sample(frac=1)))
    return node, table


def test_the_curve_tells_log_ratios_and_which_member_the_pairs_matched(project):
    node, rewards = ensemble(project, 3)
    loss = {"name": "distill_ensemble", "params": {"beta": 0.1}}
    curve = read_lines(project.trial(loss, parents={"rewards": node}) / "metrics.jsonl")
    shares = np.array([[row[f"member_{k}"] for k in range(3)] for row in curve])
    assert shares.sum(axis=1) == pytest.approx(np.ones(STEPS))
    assert shares[:, 2].tolist() == [0.0] * STEPS  # never matched, and still in the curve
    assert "member_3" not in curve[0]
    for row in curve:
        assert row["margin"] == pytest.approx(row["chosen_log_ratio"] - row["rejected_log_ratio"], abs=1e-4)
    # the policy starts as the reference: margins are 0, and a pair matches the member of smallest |reward margin|
    assert curve[0]["chosen_log_ratio"] == pytest.approx(0.0, abs=1e-4)
    tokens = read_table(project.folder(project.tokens) / "tokens.parquet")
    ids = tokens[tokens["split"] == "train"]["pair_id"].tolist()
    first = rewards.set_index("pair_id").loc[[ids[row] for row in rows_of_stream(len(ids), 1, 0, BATCH)]]
    margins = np.abs(np.stack(first["chosen_reward"].to_list()) - np.stack(first["rejected_reward"].to_list()))
    assert shares[0] == pytest.approx(np.bincount(margins.argmin(axis=1), minlength=3) / BATCH)


def test_losses_that_match_no_member_have_no_shares(project):
    row = read_lines(project.trial(seed=1) / "metrics.jsonl")[0]
    assert not [name for name in row if name.startswith("member")]


# --- kills ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill."""


def test_a_killed_trial_keeps_its_answers_and_ends_as_an_undisturbed_one(project, monkeypatch):
    settings = {"seed": 7, "at": [0.0, 0.5, 1.0]}  # steps 0, 4, 8; checkpoints after 3 and 6
    undisturbed = project.trial(**settings)
    expected = {name: (undisturbed / name).read_bytes() for name in ("answers.parquet", "metrics.jsonl")}
    node = project.trial_node(**settings)
    undisturbed.rename(undisturbed.with_name("undisturbed"))
    drawn, kills = [], {("draw", 4), ("advance", 5)}
    whole, advance = trial._Evaluation._answers, Run.advance

    def counted(self, model, step):
        table = whole(self, model, step)
        drawn.append(step)
        if ("draw", step) in kills:
            kills.remove(("draw", step))
            raise Killed  # before anything of this step was kept
        return table

    def stopped(self):
        if ("advance", self.step) in kills:
            kills.remove(("advance", self.step))
            raise Killed
        return advance(self)

    monkeypatch.setattr(trial._Evaluation, "_answers", counted)
    monkeypatch.setattr(Run, "advance", stopped)
    for _ in range(2):
        with pytest.raises(Killed), building(node, project.results) as build:
            trial.run_trial(build, OPTIONS)
        assert not project.folder(node).exists()
    folder = project.trial(**settings)
    assert drawn == [0, 4, 4, STEPS]  # 4 again since nothing of it had been kept; 0, and then 4, never again
    assert {name: (folder / name).read_bytes() for name in expected} == expected
    assert not (project.results / ".scratch" / node.ref).exists()


def test_answers_lost_from_the_scratch_folder_are_not_passed_over(project, monkeypatch):
    node = project.trial_node(seed=8, at=[0.0, 1.0])
    advance = Run.advance

    def stopped(self):
        if self.step == 4:
            raise Killed
        return advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", stopped)
        with pytest.raises(Killed), building(node, project.results) as build:
            trial.run_trial(build, OPTIONS)
    (project.results / ".scratch" / node.ref / "answers" / "step-000000000.parquet").unlink()
    with pytest.raises(FailedCheck, match=r"remove .* to start anew"), building(node, project.results) as build:
        trial.run_trial(build, OPTIONS)


# --- visits -----------------------------------------------------------------------------------------------------------


def test_visits_come_at_their_steps_and_leave_training_as_it_was(tmp_path):
    pairs = tiny.pairs(20, seed=1)
    objective = SftObjective(pairs["prompt_ids"], pairs["chosen_ids"])
    seen = []

    def visit(model, step):
        assert not torch.is_grad_enabled()
        torch.manual_seed(99)
        seen.append((step, float(model.get_input_embeddings().weight.sum())))

    def run(name, visits):
        model = tiny.causal_lm()
        states = []
        result = train(
            model,
            objective,
            TrainSpec(steps=5, batch_size=4, learning_rate=1e-2),
            seed=1,
            state_dir=tmp_path / name,
            micro_batch=4,
            checkpoint_steps=100,
            device="cpu",
            on_metrics=lambda _: states.append(torch.get_rng_state()),
            visits=visits,
            progress=False,
        )
        return model, result.metrics, states

    visited, plain = run("visited", Visits({0, 2, 5}, visit)), run("plain", None)
    assert [step for step, _ in seen] == [0, 2, 5]
    assert len({weight for _, weight in seen}) == 3  # the model as it is then
    assert visited[1] == plain[1]
    assert all(torch.equal(a, b) for a, b in zip(visited[2], plain[2], strict=True))
    for own, other in zip(visited[0].parameters(), plain[0].parameters(), strict=True):
        assert torch.equal(own, other)


def test_fractions_become_the_nearest_steps_and_two_on_one_step_are_refused():
    assert steps_of_fractions([0.0, 0.13, 0.5, 1.0], 122) == {0: 0.0, 16: 0.13, 61: 0.5, 122: 1.0}  # 15.86 -> 16
    with pytest.raises(BadInput, match=r"0.5 and 0.55 are both step 2 of 4"):
        steps_of_fractions([0.5, 0.55, 1.0], 4)
