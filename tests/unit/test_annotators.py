"""Readers of multi-annotator files: which votes go together, what is refused, and the public data sets' own counts."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from annotated_sample import PEOPLE, ranking_rows, sample, vote_rows, write_rows
from prefopt.annotators.agreement import agreement_summary, counts_of, item_disagreement
from prefopt.annotators.readers import VOTE_READERS, read_votes
from prefopt.annotators.source import votes_of_table
from prefopt.annotators.votes import Ballot, VotedPair, rankings_in_pairs, sampled_per_prompt
from prefopt.dispersion import human_votes, vote_entropy
from prefopt.errors import BadInput
from prefopt.inputs.sources import data_identity
from prefopt.pairs import HELD_OUT_COLUMNS, PAIR_COLUMNS, VOTE_COLUMNS, build_pairs
from prefopt.specs import DataSpec

ROW = {"prompt": "q", "response_a": "x", "response_b": "y", "annotator": "ann", "vote": "a"}


def read(tmp_path, rows, name="votes.jsonl"):
    return read_votes([write_rows(tmp_path / name, rows)])


def refusal(tmp_path, rows) -> str:
    with pytest.raises(BadInput) as error:
        read(tmp_path, rows)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_votes_on_the_same_two_responses_go_together_whichever_was_shown_first(tmp_path):
    swapped = {"prompt": "q", "response_a": "y", "response_b": "x", "annotator": "bob", "vote": "a"}
    (pair,) = read(tmp_path, [ROW, swapped, ROW | {"annotator": "cy", "vote": "tie"}]).pairs
    assert pair.ballots == (Ballot("ann", "a"), Ballot("bob", "b"), Ballot("cy", "tie"))
    assert pair.counts() == (1, 1, 1)


LISTED = [{"annotator": "ann", "vote": "a"}, {"annotator": "bob", "vote": "tie"}]


@pytest.mark.parametrize("votes", [{"ann": "a", "bob": "tie"}, LISTED])
def test_a_row_may_hold_all_votes_of_a_pair(tmp_path, votes):
    row = {key: ROW[key] for key in ("prompt", "response_a", "response_b")} | {"votes": votes}
    assert read(tmp_path, [row]).pairs[0].ballots == (Ballot("ann", "a"), Ballot("bob", "tie"))


def test_csv_says_the_same_as_jsonl(tmp_path):
    rows = vote_rows(sample(4))
    path = tmp_path / "votes.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    both = read_votes([path]), read(tmp_path, rows)
    said = [[(pair.prompt, pair.response_a, pair.ballots) for pair in one.pairs] for one in both]
    assert said[0] == said[1]


def test_rankings_and_the_votes_they_imply_are_the_same_pairs(tmp_path):
    prompts = sample(6)
    ranked = read(tmp_path, ranking_rows(prompts), "rankings.jsonl")
    voted = read(tmp_path, vote_rows(prompts))
    by_text = {(p.prompt, p.response_a, p.response_b): p.counts() for p in voted.pairs}
    assert {(p.prompt, p.response_a, p.response_b): p.counts() for p in ranked.pairs} == by_text
    again = rankings_in_pairs(voted.pairs)
    assert [{who: tuple(np.argsort(r)) for who, r in one.ranks.items()} for one in again] == [
        {who: tuple(np.argsort(r)) for who, r in one.ranks.items()} for one in ranked.rankings
    ]


def test_a_circle_of_votes_is_no_ranking():
    def pair(a, b, vote):
        return VotedPair("q", a, b, (Ballot("ann", vote),))

    assert rankings_in_pairs([pair("x", "y", "a"), pair("y", "z", "a"), pair("x", "z", "a")])
    assert not rankings_in_pairs([pair("x", "y", "a"), pair("y", "z", "a"), pair("x", "z", "b")])


def test_tied_responses_share_a_rank(tmp_path):
    row = {"prompt": "q", "responses": {"x": "1", "y": "2", "z": "3"}, "annotator": "ann", "ranking": [["z", "x"], "y"]}
    votes = read(tmp_path, [row])
    assert votes.rankings[0].ranks == {"ann": (1.0, 3.0, 1.0)}
    assert [pair.ballots[0].vote for pair in votes.pairs] == ["a", "tie", "b"]  # x-y, x-z, y-z


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([ROW | {"vote": "A"}], "line 1: 'vote' is 'A'; known: a, b, tie"),
        ([ROW, ROW | {"vote": "b"}], "line 2: 'annotator' is 'ann', who voted on these two responses before (line 1)"),
        ([ROW | {"annotator": ""}], "line 1: 'annotator' is '', expected a name"),
        ([ROW | {"prompt": 3}], "line 1: 'prompt' is 3, expected a text"),
        ([ROW | {"votes": {"ann": 7}}], "line 1: the vote of 'ann' is 7"),
        ([ROW | {"votes": "a;b"}], "line 1: 'votes' is 'a;b', expected JSON"),
        ([{"prompt": "q", "text": "x"}], "fits no reader (its keys: prompt, text); your own votes need"),
        ([[1, 2]], "line 1: list where an object with keys is expected"),
        ([ROW | {"votes": {}}], "no votes in it"),
        ([], "it has no rows"),
    ],
)
def test_what_cannot_be_read_is_told_with_file_row_and_value(tmp_path, rows, told):
    message = refusal(tmp_path, rows)
    assert told in message
    assert message.startswith(str(tmp_path / "votes.jsonl"))


@pytest.mark.parametrize(
    ("ranking", "told"),
    [
        (["x"], "lacks 'y'"),
        (["x", "x", "y"], "'x' stands twice"),
        (["x", "w"], "'w'"),
        ("x,y", "expected a list of names"),
    ],
)
def test_a_ranking_holds_every_response_once(tmp_path, ranking, told):
    row = {"prompt": "q", "responses": {"x": "1", "y": "2"}, "annotator": "ann", "ranking": ranking}
    assert told in refusal(tmp_path, [row])


# --- the canonical table --------------------------------------------------------------------------------------------


def source_of(path, **settings) -> DataSpec:
    source = {"kind": "votes", "paths": [str(path)]} | settings
    return DataSpec.model_validate({"source": source, "splits": {"train": 0.5, "test": 0.5}})


def test_the_pair_table_keeps_every_vote_beside_chosen_and_rejected(tmp_path):
    path = write_rows(tmp_path / "votes.jsonl", vote_rows(sample(24)))
    pairs, refused = build_pairs(source_of(path), tmp_path)
    assert list(pairs) == [*PAIR_COLUMNS, *VOTE_COLUMNS]
    assert refused.empty
    assert (pairs["votes_chosen"] > pairs["votes_rejected"]).all()  # five people, no ties
    assert (pairs[["votes_chosen", "votes_rejected", "votes_tie"]].sum(axis=1) == PEOPLE).all()
    first = json.loads(pairs["votes"].iloc[0])
    assert {vote["annotator"] for vote in first} == {f"p{k}" for k in range(PEOPLE)}
    counted = [tuple(row) for row in pairs[list(VOTE_COLUMNS[1:])].to_numpy().tolist()]
    assert [pair.counts() for pair in votes_of_table(pairs)] == counted


def test_level_votes_are_a_coin_of_the_texts_or_refused(tmp_path):
    rows = [
        ROW | {"prompt": f"q{n}", "response_a": f"x{n}", "response_b": f"y{n}", "vote": vote, "annotator": vote}
        for n in range(60)
        for vote in ("a", "b", "tie")
    ]
    path = write_rows(tmp_path / "votes.jsonl", rows)
    pairs, _ = build_pairs(source_of(path), tmp_path)
    heads = pairs["chosen"].str.startswith("x").mean()
    assert 0.25 < heads < 0.75
    turned = [row | {"response_a": row["response_b"], "response_b": row["response_a"]} for row in rows]
    same, _ = build_pairs(source_of(write_rows(tmp_path / "turned.jsonl", turned)), tmp_path)
    assert same["chosen"].tolist() == pairs["chosen"].tolist()
    with pytest.raises(BadInput, match="no usable pair \\(tie: 60\\)"):
        build_pairs(source_of(path, ties="refuse"), tmp_path)


def test_a_sample_of_pairs_depends_on_their_texts_alone():
    pairs = [VotedPair("q", f"x{n}", f"y{n}", (Ballot("ann", "a"),)) for n in range(50)]
    kept = sampled_per_prompt(pairs, 10)
    assert len(kept) == 10
    assert kept != pairs[:10]
    turned = sampled_per_prompt([pair.flipped() for pair in reversed(pairs)], 10)
    assert {pair.digest() for pair in turned} == {pair.digest() for pair in kept}


def test_held_out_votes_are_seen_by_no_label(tmp_path):
    path = write_rows(tmp_path / "votes.jsonl", vote_rows(sample(24)))
    whole, _ = build_pairs(source_of(path), tmp_path)
    pairs, _ = build_pairs(source_of(path, hold_out=2), tmp_path)
    assert list(pairs) == [*PAIR_COLUMNS, *VOTE_COLUMNS, *HELD_OUT_COLUMNS]
    apart = pairs[list(HELD_OUT_COLUMNS)].to_numpy()
    kept = pairs[list(VOTE_COLUMNS[1:])].to_numpy()
    assert (apart.sum(axis=1) == 2).all()
    assert (kept.sum(axis=1) == PEOPLE - 2).all()
    assert (kept[:, 0] > kept[:, 1]).all()  # chosen by the three alone
    assert (apart[:, 0] < apart[:, 1]).any()  # whom the two may contradict

    def texts(table):
        return [(row.prompt_id, *sorted([row.chosen, row.rejected])) for row in table.itertuples()]

    every = dict(zip(texts(whole), whole[list(VOTE_COLUMNS[1:])].to_numpy().tolist(), strict=True))
    assert all(sorted(every[of]) == sorted(votes) for of, votes in zip(texts(pairs), kept + apart, strict=True))
    drawn = {vote["annotator"] for text in pairs["votes"] for vote in json.loads(text)}
    assert drawn == {f"p{k}" for k in range(PEOPLE)}  # not the same two people everywhere
    assert data_identity(source_of(path), tmp_path)[0]["source"].keys() == {
        "kind",
        "reader",
        "per_prompt",
        "ties",
        "files",
    }


def test_settings_of_the_source_are_part_of_its_identity(tmp_path):
    path = write_rows(tmp_path / "votes.jsonl", [ROW])
    plain, execution, _ = data_identity(source_of(path), tmp_path)
    fewer, _, _ = data_identity(source_of(path, per_prompt=3), tmp_path)
    assert plain["source"] != fewer["source"]
    assert "paths" not in plain["source"]
    assert execution == {"paths": [str(path)]}


# --- human dispersion -----------------------------------------------------------------------------------------------


def test_human_votes_are_the_ensembles_formula_with_people():
    margins = np.array([[1.0, 1, 1, 1, 1], [1, 1, 1, -1, -1], [1, 1, -1, -1, 0]])
    counts = np.array([[5, 0, 0], [3, 2, 0], [2, 2, 1]])
    assert human_votes(*counts.T) == pytest.approx(vote_entropy(margins))
    assert human_votes([5], [0], [0]) == pytest.approx(human_votes([0], [5], [0]))
    assert human_votes([5], [0], [0]) < human_votes([4], [1], [0]) < human_votes([0], [0], [5])
    with pytest.raises(BadInput, match="row 1"):
        human_votes([1, 0], [1, 0], [0, 0])


# --- public data ----------------------------------------------------------------------------------------------------

# What the data sets' own descriptions count: items with several votes, agreement, share unanimous.
PUBLIC = {
    "ukp_convarg1": (["ukp_convarg1/pairs_5annotators.jsonl.gz", "ukp_convarg1/arguments.jsonl.gz"], 13650, 0.54, 0.21),
    "pandalm": (["pandalm/testset_v1_3annotators.jsonl.gz"], 999, 0.92, 879 / 999),
    "tulu_human_eval": (["tulu_human_eval/instances_annotations.jsonl.gz"], 121, 0.57, None),
    "mt_bench_human": (["mt_bench_human/human.jsonl.gz"], 960, 0.66, 1 - 386 / 960),
    "squality_human_eval": (["squality_human_eval/rankings_3reviewers.jsonl.gz"], 300, None, None),
    "hanna": (["hanna/human_ratings_long.csv.gz"], 96 * 55, None, None),
    "llmbar": (["llmbar/items.jsonl.gz", "llmbar/llm_judge_votes.csv.gz"], 734, None, None),
}


def test_every_public_reader_is_recognised_by_its_keys(shared_data):
    for name, (files, several, agreement, unanimous) in PUBLIC.items():
        votes = read_votes([shared_data / file for file in files])
        counts = counts_of(votes.pairs)
        found = agreement_summary(counts, resamples=10)
        assert found["items_with_several_votes"] == several, name
        if agreement is not None:
            assert found["pairwise"]["agreement"] == pytest.approx(agreement, abs=0.005), name
        if unanimous is not None:
            assert found["unanimous"]["share"] == pytest.approx(unanimous, abs=0.0051), name
    assert {*PUBLIC, "votes", "rankings", "qlora"} == {*VOTE_READERS}


def test_reviewers_distances_are_those_of_the_rankings(shared_data):
    votes = read_votes([shared_data / PUBLIC["squality_human_eval"][0][0]])
    people = item_disagreement(counts_of(votes.pairs))
    # Kendall distances 0, 1, 2, 3 between two reviewers of a question: 192, 102, 4, 2; each is a pair ordered otherwise
    disagreeing = round(float(((1 - people["agreement"]) * 3).sum()))
    assert disagreeing == 102 + 2 * 4 + 3 * 2
    unanimous = people["split"].to_numpy().reshape(100, 3).max(axis=1) == 0
    assert unanimous.sum() == 46
